"""What this agent knows of its run: the store's keys as values, kept current by a watch. No I/O.

Everything here was written by an agent of the same run, but is checked like any input: a value that does not
parse is reported once and treated as absent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.core import membership as core
from autoglm_elastic.core.membership import Failure, Generation, Member
from autoglm_elastic.ports import Entry, EventKind, Json, WatchEvent

log = logging.getLogger(__name__)

RunOutcome = Literal["done", "failed"]


@dataclass(frozen=True, slots=True)
class Leadership:
    """Who leads. `revision`: of the leader's key; whatever the leader writes compares it."""

    node: str
    incarnation: int
    revision: int


@dataclass(frozen=True, slots=True)
class Report:
    """A node's word that a worker of it died; `alive_s`: how long its generation had run."""

    failure: Failure
    alive_s: float


@dataclass(frozen=True, slots=True)
class Closed:
    """The run is over. `first_failure`: the one to be named, of a run that failed because of its workers."""

    outcome: RunOutcome
    reason: str
    first_failure: Failure | None

    def to_json(self) -> Json:
        failure = None if self.first_failure is None else self.first_failure.to_json()
        return {"outcome": self.outcome, "reason": self.reason, "first_failure": failure}

    @classmethod
    def from_json(cls, data: Json) -> Closed:
        failure = data["first_failure"]
        return cls(
            "done" if data["outcome"] == "done" else "failed",
            str(data["reason"]),
            None if failure is None else Failure.from_json(failure),
        )


def member_to_json(member: Member) -> Json:
    return asdict(member)


def member_from_json(data: Json) -> Member:
    return Member(
        str(data["node"]), str(data["host"]), int(data["nproc"]), str(data["role"]), int(data["incarnation"])
    )


class View:
    """The run's keys, parsed. `members` is in order of arrival."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.clear()

    def clear(self) -> None:
        self.members: dict[str, Member] = {}
        self.leader: Leadership | None = None
        self.generation: Generation | None = None
        self.generation_revision = 0
        self.broken: dict[tuple[int, str], Report] = {}
        self.finished: set[tuple[int, str]] = set()
        self.returning = False
        """Workers left on an agreed stop: a run that is done then wants to be started again."""
        self.entered: set[tuple[int, str]] = set()
        self.c10d: dict[int, tuple[str, int]] = {}
        self.history: set[int] = set()
        self.closed: Closed | None = None

    def load(self, entries: Iterable[Entry]) -> None:
        """Everything anew, as it is in the store."""
        self.clear()
        for entry in sorted(entries, key=lambda each: (each.create_revision, each.key)):
            self._set(entry.key, entry.value, entry.mod_revision, 0.0)

    def apply(self, event: WatchEvent, now: float) -> core.Event | None:
        """One change. Returns what it means to the leader, if anything. `now`: monotonic seconds."""
        if event.kind is EventKind.PUT:
            return self._set(event.key, event.value, event.revision, now)
        try:
            return self._unset(self._keys.parse(event.key), now)
        except ValueError:
            # A key that was ignored when it was written.
            return None

    def has_finished(self, node: str) -> bool:
        return any(finished == node for _, finished in self.finished)

    def _set(self, key: str, value: Json, revision: int, now: float) -> core.Event | None:
        try:
            return self._put(self._keys.parse(key), value, revision, now)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.warning("ignored %s: its value does not parse (%s: %s)", key, type(error).__name__, error)
            return None

    def _put(self, path: tuple[str, ...], value: Json, revision: int, now: float) -> core.Event | None:
        match path:
            case ("members", node):
                member = member_from_json(value)
                self.members.pop(node, None)
                self.members[node] = member
                return core.MemberUp(member, now)
            case ("leader",):
                self.leader = Leadership(str(value["node"]), int(value["incarnation"]), revision)
            case ("generation",):
                self.generation, self.generation_revision = Generation.from_json(value), revision
            case ("broken", number, node):
                report = Report(Failure.from_json(value["failure"]), float(value["alive_s"]))
                self.broken[int(number), node] = report
                return core.Broken(node, int(number), report.failure, now, report.alive_s)
            case ("finished", number, node):
                returns = value["returns"] is True
                self.finished.add((int(number), node))
                self.returning = self.returning or returns
                return core.Finished(node, int(number), now)
            case ("entered", number, node):
                self.entered.add((int(number), node))
                return core.Entered(node, int(number), now)
            case ("c10d", number):
                self.c10d[int(number)] = (str(value["host"]), int(value["port"]))
            case ("generations", number):
                self.history.add(int(number))
            case ("closed",):
                self.closed = Closed.from_json(value)
        return None

    def _unset(self, path: tuple[str, ...], now: float) -> core.Event | None:
        match path:
            case ("members", node) if node in self.members:
                member = self.members.pop(node)
                return core.MemberDown(node, now, incarnation=member.incarnation)
            case ("leader",):
                self.leader = None
            case ("broken", number, node):
                self.broken.pop((int(number), node), None)
            case ("finished", number, node):
                self.finished.discard((int(number), node))
            case ("entered", number, node):
                self.entered.discard((int(number), node))
            case ("c10d", number):
                self.c10d.pop(int(number), None)
            case ("generations", number):
                self.history.discard(int(number))
        return None
