"""How a load is cut for several ranks: the same for all of them, whatever the memory of their tensors looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoglm_elastic.catalog.dtypes import BY_NAME
from autoglm_elastic.catalog.format import Box, Chunk
from autoglm_elastic.snapshot import messages
from autoglm_elastic.snapshot.boxes import split
from autoglm_elastic.snapshot.dtypes import torch_dtype
from autoglm_elastic.snapshot.messages import Packer, messages_of
from autoglm_elastic.snapshot.scatter import Job, Target
from autoglm_elastic.snapshot.share import _shares


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MESSAGE_BYTES", 256)
    monkeypatch.setattr(messages, "_ALONE_BYTES", 64)


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
kinds = sorted(set(BY_NAME) - {"complex32"})
"""Not that of which torch warns whenever it sees it."""
tensors = st.lists(st.tuples(shapes, st.sampled_from(kinds)), max_size=12)


def of_bytes(data: torch.Tensor, shape: Sequence[int], name: str) -> torch.Tensor:
    return data.view(torch_dtype(name)).view(torch.Size(shape))


def nbytes_of(shape: Sequence[int], name: str) -> int:
    return torch.Size(shape).numel() * torch_dtype(name).itemsize


def laid_out(shape: tuple[int, ...], name: str, backwards: bool) -> torch.Tensor:
    """Zeros, with the dimensions in memory in their order or in the other."""
    data = torch.zeros(nbytes_of(shape, name), dtype=torch.uint8)
    if backwards:
        return of_bytes(data, shape[::-1], name).permute(tuple(reversed(range(len(shape)))))
    return of_bytes(data, shape, name)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def jobs_of(found: Sequence[tuple[torch.Tensor, str]]) -> Iterator[Job]:
    """Each tensor in chunks of at most 500 bytes."""
    for number, (tensor, dtype) in enumerate(found):
        whole: Box = ((0,) * tensor.dim(), tuple(tensor.shape))
        target = Target(f"t{number}", whole, tensor)
        for box in split(whole, tensor.element_size(), 500):
            nbytes = torch.Size(box[1]).numel() * tensor.element_size()
            yield Job(target.name, dtype, Chunk(*box, 0, 0, nbytes, "", ""), ((target, box),))


@given(tensors, st.lists(st.booleans(), min_size=24, max_size=24))
def test_what_one_packs_another_unpacks_whatever_its_strides(
    wanted: list[tuple[tuple[int, ...], str]], backwards: list[bool]
) -> None:
    sent = [(laid_out(*kind, backwards[number]), kind[1]) for number, kind in enumerate(wanted)]
    got = [(laid_out(*kind, backwards[-1 - number]), kind[1]) for number, kind in enumerate(wanted)]
    generator = torch.Generator().manual_seed(len(wanted))
    for tensor, name in sent:
        noise = torch.randint(0, 2, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
        tensor.copy_(of_bytes(noise, tensor.shape, name))
    sender, receiver, onward = Packer(), Packer(), Packer()
    for out, into in zip(messages_of(jobs_of(sent)), messages_of(jobs_of(got)), strict=True):
        data, room = sender.filled(out), receiver.empty(into)
        assert 0 < data.nbytes == room.nbytes <= messages.MESSAGE_BYTES
        room[:] = data
        receiver.unpack(into)
        assert bytes(onward.filled(into)) == bytes(data), "it is passed on as it came"
    assert [raw(tensor) for tensor, _ in got] == [raw(tensor) for tensor, _ in sent]


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 9))
def test_shares_are_consecutive_and_even_but_for_one_chunk(sizes: list[int], count: int) -> None:
    jobs = [Job("t", "uint8", Chunk((0,), (size,), 0, 0, size, "", ""), ()) for size in sizes]
    shares = _shares(jobs, count)
    assert [job for share in shares for job in share] == jobs
    ends = accumulate(sum(job.chunk.nbytes for job in share) for share in shares)
    for place, end in enumerate(ends, 1):
        assert abs(end - sum(sizes) * place / count) <= max(sizes, default=0)
