"""Where a job stands, as its store shows it: for hosts that see neither the run directory nor an agent. No torch.

Two watches keep a picture current, so nobody polls: the membership's keys, and the notes that the nodes leave for us
(`_notes`). May touch: the store, for reading. Must never: write a key, hold a lease, or join.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from autoglm_elastic.agent._keys import Keys
from autoglm_elastic.agent._notes import Note
from autoglm_elastic.agent._security import Security, options_of
from autoglm_elastic.agent._view import View
from autoglm_elastic.coordination import StoreClient, StoreDenied, etcd
from autoglm_elastic.core.generation import Generation
from autoglm_elastic.core.lifecycle import TaskState
from autoglm_elastic.errors import PlatformError, UsageError
from autoglm_elastic.observe.status import CUT_OFF, Node, Rank, Status, ended
from autoglm_elastic.observe.view import Incident
from autoglm_elastic.ports import EventKind, Json, Store, StoreUnavailable, WatchEvent
from autoglm_elastic.settings import Settings

if TYPE_CHECKING:
    from autoglm_elastic.coordination.etcd.store import EtcdStore

INCIDENTS_MAX: Final = 8
REACH_S_MAX: Final = 5.0
"""Bound of a store call, the first connection included."""

_TCP: Final = "tcp://"


def is_address(text: str) -> bool:
    """Whether `text` is a store's address, as `--store` takes it or as plain HOST:PORT, and not a path."""
    if text.startswith((f"{etcd.SCHEME}://", _TCP)):
        return True
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and "/" not in host and not os.path.exists(text)


def reach(address: str, run_id: str, settings: Settings) -> StoreClient | EtcdStore:
    """The store of run `run_id` at `address`, for who only reads. `settings`: `tls` and `store.insecure`.

    Raises:
        UsageError: no address, the store of another run, one off loopback without TLS, or one that does not let
            us in.
        PlatformError: nobody answers there.
    """
    options = options_of(settings)
    security = Security.of(options)
    try:
        if address.startswith(f"{etcd.SCHEME}://"):
            etcd.require()
            target = etcd.parse(etcd.with_options(address, options))
            security.check_etcd(target)
            from autoglm_elastic.coordination.etcd.store import EtcdStore

            return EtcdStore(target, timeout_s=REACH_S_MAX, prefix=Keys(run_id).prefix, looks_on=True)
        host, _, port = address.removeprefix(_TCP).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(f"store {address}", valid=f"HOST:PORT, tcp://HOST:PORT, {etcd.VALID}")
        host = host.strip("[]")
        credentials = security.credentials(host)
        return StoreClient(host, int(port), timeout_s=REACH_S_MAX, realm=run_id, credentials=credentials)
    except StoreDenied as error:
        raise UsageError(error.got, do=error.do) from error
    except StoreUnavailable as error:
        raise PlatformError(
            f"no store at {address}: {error}",
            do="check that the job runs and that this machine can reach it; or give its run directory",
        ) from error


class Onlooker:
    """A `status.Source` on the store of run `run_id`; the store stays open.

    Raises (construction):
        UsageError: the store knows no such run.
        StoreUnavailable: it does not answer.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id = store, run_id
        self._keys = Keys(run_id)
        self._changed = threading.Condition()
        self._news = self._stale = False
        self._view = View(self._keys)
        self._sealed: dict[int, tuple[Generation, float]] = {}
        self._notes: dict[str, Note] = {}
        self._newest, self._snapshot_step = Note(), -1
        revision = self._read_everything()
        if self._view.generation is None and not self._view.members:
            raise UsageError(
                f"no run {run_id!r} in this store",
                do="give its --rdzv-id; a run that has ended leaves nothing here, its run directory tells",
            )
        self._watches = [
            store.watch(prefix, revision + 1, self._receive)
            for prefix in (self._keys.prefix, self._keys.notes)
        ]

    def wait(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._news, timeout_s)

    def close(self) -> None:
        for watch in self._watches:
            watch.cancel()

    def status(self) -> Status:
        """Raises StoreUnavailable."""
        with self._changed:
            stale, self._news, self._stale = self._stale, False, False
        if stale:
            self._read_everything()
        with self._changed:
            return self._status()

    def _read_everything(self) -> int:
        entries, revision = self._store.get_prefix(self._keys.prefix)
        notes, noted = self._store.get_prefix(self._keys.notes)
        with self._changed:
            self._view.load(entries)
            self._sealed.clear()
            self._notes.clear()
            for entry in entries:
                self._take_history(entry.key, entry.value)
            for entry in notes:
                self._take_note(entry.key, entry.value)
        return min(revision, noted)

    def _receive(self, event: WatchEvent) -> None:
        with self._changed:
            if event.lost:
                self._stale = True
            elif event.key.startswith(self._keys.notes):
                self._take_note(event.key, None if event.kind is EventKind.DELETE else event.value)
            else:
                self._view.apply(event, 0.0)
                if event.kind is EventKind.PUT:
                    self._take_history(event.key, event.value)
            self._news = True
            self._changed.notify_all()

    def _take_note(self, key: str, value: Json) -> None:
        node = self._keys.node_of_note(key)
        self._notes.pop(node, None)
        if value is not None:
            with contextlib.suppress(msgspec.ValidationError):
                self._notes[node] = msgspec.convert(value, Note)

    def _take_history(self, key: str, value: Json) -> None:
        match self._keys.parse(key):
            case ("generations", _):
                # What does not parse is no generation of ours.
                with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                    generation = Generation.from_json(value["generation"])
                    self._sealed[generation.number] = generation, float(value["wall_time"])

    def _status(self) -> Status:
        generation, notes = self._view.generation, self._notes
        placements = () if generation is None else generation.placements
        placed = {place.node: notes[place.node] for place in placements if place.node in notes}
        # The notes end with their nodes; what was known before is not unknown after that.
        newest = self._newest = max([*placed.values(), self._newest], key=_progress)
        snapshot_step = max([note.snapshot_step for note in notes.values()] + [self._snapshot_step])
        self._snapshot_step = snapshot_step
        incidents = list(_incidents(self._sealed, notes))
        state = self._state(placed)
        live = max((note.step for note in placed.values()), default=-1)
        held = {"live": live} if live >= 0 and not ended(state) else {}
        if snapshot_step >= 0:
            held["disk"] = snapshot_step
        walls = [note.wall_time for note in notes.values()] + [wall for _, wall in self._sealed.values()]
        return Status(
            run_id=self._run_id,
            state=state,
            alive=bool(self._view.members),
            generation=0 if generation is None else generation.number,
            step=newest.step,
            steps_per_s=newest.steps_per_s if state == TaskState.RUNNING.value else None,
            loss=newest.loss,
            world_size=0 if generation is None else generation.world_size,
            failures=len(incidents),
            recoveries=sum(each.generation is not None for each in incidents),
            snapshots=None,
            snapshot_step=snapshot_step,
            newest_by_tier=held,
            wall_time=max(walls, default=0.0),
            nodes=[
                Node(
                    node=place.node,
                    host=place.host,
                    ranks=list(range(place.base_rank, place.base_rank + place.nproc)),
                    step=placed[place.node].step if place.node in placed else -1,
                )
                for place in placements
            ],
            ranks=list(_ranks(generation, placed, self._view)),
            incidents=incidents[-INCIDENTS_MAX:],
            agents=[],
            messages=[] if self._view.closed is None else [self._view.closed.reason],
        )

    def _state(self, placed: Mapping[str, Note]) -> str:
        view, generation = self._view, self._view.generation
        if view.closed is not None:
            if view.closed.outcome == "failed":
                return TaskState.FAILED.value
            return TaskState.PAUSED.value if view.returning else TaskState.DONE.value
        if generation is None:
            return TaskState.INIT.value
        if not view.members:
            return CUT_OFF
        first = placed.get(generation.placements[0].node)
        # Workers that do not run `elastic.run` tell nobody how far they are.
        tells = first is not None and any(worker.elastic for worker in first.workers)
        if first is None or (tells and not _goes_on(generation, first)):
            return TaskState.INIT.value if generation.parent < 0 else TaskState.RECOVERING.value
        return TaskState.RUNNING.value


def _progress(note: Note) -> tuple[int, int]:
    return note.generation, note.step


def _goes_on(generation: Generation, first: Note) -> bool:
    """Whether the newest generation has committed a step, or grows from one that did and still runs."""
    known = {each.generation for each in first.recovered}
    return first.generation in known and generation.nodes_of(first.generation) is not None


def _ranks(generation: Generation | None, placed: Mapping[str, Note], view: View) -> Iterator[Rank]:
    for place in () if generation is None else generation.placements:
        workers = {each.local_rank: each for each in placed.get(place.node, Note()).workers}
        for local_rank in range(place.nproc):
            worker = workers.get(local_rank)
            state = "unknown" if worker is None else worker.state if worker.elastic else "running"
            yield Rank(
                rank=place.base_rank + local_rank,
                node=place.node,
                local_rank=local_rank,
                pid=0 if worker is None else worker.pid,
                state=state if place.node in view.members else "lost",
            )


def _incidents(
    sealed: Mapping[int, tuple[Generation, float]], notes: Mapping[str, Note]
) -> Iterator[Incident]:
    """Every unplanned generation with a parent ends one that broke; those that no step was committed in belong to the
    incident before them."""
    seen: dict[int, float] = {}
    for note in notes.values():
        for opened in note.opened:
            seen[opened.broke] = min(opened.wall_time, seen.get(opened.broke, opened.wall_time))
    recovered = {each.generation: each for note in notes.values() for each in note.recovered}
    current: Incident | None = None
    for number, (generation, sealed_at) in sorted(sealed.items()):
        if generation.parent < 0 or generation.planned:
            continue
        if current is None:
            current = Incident(
                broke=generation.parent,
                reason=generation.reason,
                opened=min(sealed_at, seen.get(generation.parent, sealed_at)),
            )
        resumed = recovered.get(number)
        if resumed is not None:
            current.generation, current.tier = number, resumed.tier
            current.from_step = resumed.from_step
            current.seconds = resumed.wall_time - current.opened
        if resumed is not None or _was_left_well(number, sealed):
            yield current
            current = None
    if current is not None:
        yield current


def _was_left_well(number: int, sealed: Mapping[int, tuple[Generation, float]]) -> bool:
    """Whether nobody is left who could tell of generation `number`, but its charge was forgiven: a step was committed
    before the next one broke."""
    generation, _ = sealed[number]
    later = [each for each, _ in sealed.values() if each.number > number and not each.planned]
    following = min(later, key=lambda each: each.number, default=None)
    return following is not None and following.committed_step > generation.committed_step
