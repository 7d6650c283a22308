"""What is written: images of packs in a segment, and the job that makes files of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.packs import ALIGNMENT, DIGEST_CHARS, DIGESTS_AT_MIN
from autoglm_elastic.core.commit import Snapshot
from autoglm_elastic.errors import UsageError
from autoglm_elastic.keeper.messages import PACKS_MAX, SPANS_MAX

_SMALLEST_HEAD: Final = 16


class PackImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pack as it will be in its file, at `start` (a multiple of 4096) of a segment: `head_nbytes` of head, in
    which the digests (at `digests_at`) are still to be filled in, then the data.

    `spans`: (begin, nbytes) of each chunk, in the order of its digests, relative to the image. `nbytes`: of
    head and data."""

    start: int
    head_nbytes: int
    digests_at: int
    spans: tuple[tuple[int, int], ...]
    nbytes: int


Layout = tuple[PackImage, ...]
LAYOUTS: Final = msgspec.json.Decoder(Layout, strict=True)


@dataclass(frozen=True, slots=True)
class WriteJob:
    """One rank's part of one snapshot.

    Args:
        segment: number of the segment that holds the images.
        vote: `fmt.Prepared` without packs, encoded.
        details: `catalog.prepared.Details`, encoded.
    """

    snapshot: Snapshot
    segment: int
    packs: Layout
    vote: bytes
    details: bytes


def check_layout(packs: Layout, segment_nbytes: int) -> None:
    """Raises UsageError unless every image lies inside the segment and every span inside its image's data,
    in order and without a hole."""
    if len(packs) > PACKS_MAX or sum(len(pack.spans) for pack in packs) > SPANS_MAX:
        raise UsageError(f"{len(packs)} packs", valid=f"at most {PACKS_MAX}, of {SPANS_MAX} chunks")
    free_from = 0
    for number, pack in enumerate(packs):
        digests_end = pack.digests_at + DIGEST_CHARS * len(pack.spans)
        good = (
            pack.start >= free_from
            and pack.start % ALIGNMENT == 0
            and _SMALLEST_HEAD <= pack.head_nbytes <= min(pack.nbytes, limits.HEADER_BYTES_MAX + 8)
            and pack.digests_at >= DIGESTS_AT_MIN
            and digests_end <= pack.head_nbytes
            and pack.start + pack.nbytes <= segment_nbytes
        )
        at = pack.head_nbytes
        for begin, nbytes in pack.spans:
            good = good and begin == at and nbytes >= 0
            at = begin + nbytes
        if not good or at != pack.nbytes:
            raise UsageError(
                f"image {number} of {pack.nbytes} bytes at {pack.start}",
                valid=f"images in order inside a segment of {segment_nbytes} bytes, filled by their spans",
            )
        free_from = pack.start + pack.nbytes
