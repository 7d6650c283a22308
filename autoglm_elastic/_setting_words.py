"""Words about settings, for whoever gave a wrong one: what would have been valid, and which name comes nearest.

Must never: read anything, or know a setting by its name."""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Iterable
from typing import Any, Final, Literal, get_args, get_origin

from msgspec import Meta

_UNITS: Final = ("s", "hours", "steps", "bytes")
_LIKE: Final = 0.6
"""Below this ratio a name resembles another by accident."""
_LIKE_BEHIND: Final = 0.5

_LIST: Final = "autoglm config --schema lists all"
_shortened: Final = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80


def quoted(value: Any) -> str:
    """A value as it was given, not longer than a line of text has room for."""
    return _shortened.repr(value)


def valid(name: str, annotated: Any) -> str:
    """What a setting takes, from its declared type, its range and the unit at the end of its name."""
    declared, *extras = get_args(annotated)
    meta = next((extra for extra in extras if isinstance(extra, Meta)), Meta())
    if get_origin(declared) is Literal:
        return " or ".join(get_args(declared))
    if declared is bool:
        return "true or false"
    if declared in (int, float):
        return _number(name, declared, meta)
    if declared is str:
        return "text" + (f" of at most {meta.max_length} characters" if meta.max_length is not None else "")
    return "names, such as [numpy, json]"


def nearest(name: str, known: Iterable[str]) -> str:
    """What to do about a name that is none of `known`."""
    names = {each.casefold(): each for each in known}
    given = name.casefold()
    found = _elsewhere(given, names) or _resembling(given, names)
    if not found:
        return f"{_LIST} that this version knows"
    return f"did you mean {names[found]}? {_LIST}"


def _elsewhere(name: str, names: Iterable[str]) -> str:
    """The one name with this field in another group, or in the group that was left out."""
    leaf = name.removeprefix("autoglm_").rpartition(".")[2]
    same = [each for each in names if each.endswith((f".{leaf}", f"_{leaf}"))]
    return same[0] if len(same) == 1 else ""


def _resembling(name: str, names: Iterable[str]) -> str:
    """The name that comes nearest, if it is near behind the whole words that both begin with, too: a group makes no
    setting."""
    for close in difflib.get_close_matches(name, list(names), n=3, cutoff=_LIKE):
        shared = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, close, strict=False))
        )
        shared = 1 + max(name.rfind(".", 0, shared), name.rfind("_", 0, shared))
        rest, other = name[shared:], close[shared:]
        if not rest or not other or difflib.SequenceMatcher(None, rest, other).ratio() >= _LIKE_BEHIND:
            return close
    return ""


def _number(name: str, declared: type, meta: Meta) -> str:
    words = name.rpartition(".")[2].split("_")
    unit = next((word for word in reversed(words) if word in _UNITS), "")
    what = "a whole number" if declared is int else "a number"
    if unit:
        what += f" of {'seconds' if unit == 's' else unit}"
    low = "" if meta.ge is None else f"from {meta.ge:.15g}"
    if meta.gt is not None:
        low = f"above {meta.gt:.15g}"
    high = "" if meta.le is None else f"up to {meta.le:.15g}"
    return f"{what} {low} {high}".rstrip() + (", without a unit" if unit else "")
