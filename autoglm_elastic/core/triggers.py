"""Whether a snapshot begins at a trigger: rank 0 answers by what it has in flight, and every other rank finds the same
answer, mostly without hearing it.

All ranks number their triggers alike. With each ruling rank 0 tells how many triggers it had answered until then: the
snapshot that was ruled on counted as in flight for those, and for none of the later ones. So a rank that knows the
rulings on all that was begun knows every answer. While a ruling is out it may be in doubt; then, and only then, it has
to wait for the answer itself, or for the ruling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Answering:
    """Rank 0. `answered`: triggers so far."""

    limit: int
    answered: int = 0
    in_flight: int = 0

    def trigger(self) -> tuple[Answering, bool]:
        """The next trigger's answer: whether a snapshot begins."""
        go = self.in_flight < self.limit
        return replace(self, answered=self.answered + 1, in_flight=self.in_flight + go), go

    def begin(self) -> Answering:
        """A snapshot that all ranks have agreed on in another way."""
        return replace(self, in_flight=self.in_flight + 1)

    def ruled(self) -> tuple[Answering, int]:
        """A snapshot is decided: what the ruling tells the others."""
        return replace(self, in_flight=self.in_flight - 1), self.answered


@dataclass(frozen=True, slots=True)
class Following:
    """Another rank.

    Attributes:
        number: of the last trigger, from 1.
        open: snapshots begun whose rulings are not known here.
        until: for rulings that are known, the last trigger for which their snapshot counted as in flight.
    """

    limit: int
    number: int = 0
    open: int = 0
    until: tuple[int, ...] = ()

    def trigger(self) -> tuple[Following, bool | None]:
        """The next trigger's answer, None when it is in doubt: then `Following.expect` says it as soon as it is known,
        unless it is heard. In any case `answer` follows before the next one."""
        following = replace(self, number=self.number + 1)
        return following, following.expect()

    def expect(self) -> bool | None:
        """The answer to the last trigger, as far as it follows from what is known."""
        counted = sum(last >= self.number for last in self.until)
        if counted >= self.limit:
            return False
        return True if counted + self.open < self.limit else None

    def answer(self, go: bool) -> Following:
        """To the last trigger; rulings that counted up to it are settled with it."""
        return replace(
            self, open=self.open + go, until=tuple(last for last in self.until if last > self.number)
        )

    def begin(self) -> Following:
        """A snapshot that all ranks have agreed on in another way."""
        return self.answer(True)

    def ruled(self, answered: int) -> Following:
        """A ruling came, with what rank 0 tells in it."""
        return replace(self, open=self.open - 1, until=(*self.until, answered))
