"""Names that people give to snapshots: `tags/<name>.json`, replaced as a whole when a tag moves.

Entries are immutable, tags are not: the newest put of a tag wins. A tagged snapshot is never collected. The tags that
were given when a snapshot was saved are part of its entry and cannot be taken away; a tag of this room wins over one of
those of the same name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.core.lineage import parse_entry_name
from autoglm_elastic.errors import CorruptSnapshot, UsageError
from autoglm_elastic.ports import StreamBlobs

TAG_DIR: Final = "tags"
HEAD_WORDS: Final = ("HEAD", "latest")
"""Both name the newest snapshot of the lineage."""
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")


class TagFile(fmt.Sealed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`wall_time`: when it was put there, seconds since the epoch."""

    name: str
    entry: str
    wall_time: float


def check_name(name: str) -> None:
    """Raises UsageError for what cannot be a tag."""
    if not _NAME.fullmatch(name) or name in HEAD_WORDS:
        raise UsageError(
            f"tag {name[:80]!r}",
            valid="a letter, then at most 63 letters, digits and ._-, and neither HEAD nor latest",
        )


class Tags:
    def __init__(self, blobs: StreamBlobs) -> None:
        self._blobs = blobs

    def all(self) -> dict[str, str]:
        """Tag → name of its snapshot, sorted by tag. Raises CorruptSnapshot: what is tagged must be known before
        anything is removed."""
        found: dict[str, str] = {}
        for path in self._blobs.list(TAG_DIR):
            name = path.removeprefix(f"{TAG_DIR}/").removesuffix(".json")
            if not _NAME.fullmatch(name) or path != _path(name):
                continue
            if len(found) >= limits.TAGS_MAX:
                raise CorruptSnapshot(f"{TAG_DIR} has too many tags", valid=f"at most {limits.TAGS_MAX}")
            try:
                data = self._blobs.read(path, bytes_max=limits.ENTRY_BYTES_MAX)
            except FileNotFoundError:
                continue  # taken away meanwhile
            found[name] = _parse(data, name, path)
        return found

    def put(self, name: str, entry: str, catalog: Catalog, wall: Callable[[], float]) -> str | None:
        """The tag names `entry` from now on. Returns what it named before, None for a new tag. Raises UsageError."""
        check_name(name)
        catalog.entry(entry)
        known = self.all()
        if name not in known and len(known) >= limits.TAGS_MAX:
            raise UsageError(f"a tag more than {limits.TAGS_MAX}", do="remove some: autoglm ckpt untag")
        document = fmt.sealed(TagFile(name=name, entry=entry, wall_time=wall()))
        self._blobs.replace(_path(name), fmt.encode(document))
        return known.get(name)

    def remove(self, name: str) -> str:
        """Returns what the tag named. Raises UsageError when there is none of that name."""
        check_name(name)
        known = self.all()
        if name not in known:
            raise UsageError(f"no tag {name!r}", valid=", ".join(known) or "there is no tag")
        self._blobs.delete(_path(name))
        return known[name]


def _path(name: str) -> str:
    return f"{TAG_DIR}/{name}.json"


def _parse(data: bytes, name: str, where: str) -> str:
    tag = fmt.decode(data, TagFile, where)
    if tag.digest != fmt.sealed(tag).digest or tag.name != name:
        raise CorruptSnapshot(f"{where}: its digest or its name differs")
    try:
        return parse_entry_name(tag.entry).name
    except ValueError as error:
        raise CorruptSnapshot(f"{where}: {error}") from error
