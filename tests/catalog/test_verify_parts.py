"""A snapshot checked by several processes, a part each: every byte once, and nothing is missed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoglm_elastic.snapshot import CheckpointManager

from .saved import save

TENSORS = 13


@pytest.fixture
def run(run_dir: Path) -> Path:
    save(run_dir, 1, whole={f"t{number}": torch.rand(200 + number) for number in range(TENSORS)})
    return run_dir


def problems(run: Path, parts: int) -> list[int]:
    """How many each part finds."""
    with CheckpointManager(run) as manager:
        (entry,) = manager.entries()
        return [len(manager.verify(entry, part=(part, parts))) for part in range(parts)]


@pytest.mark.parametrize("parts", [1, 2, 5, 40])
def test_every_byte_is_read_once(run: Path, parts: int) -> None:
    read: list[int] = []
    with CheckpointManager(run) as manager:
        (entry,) = manager.entries()
        for part in range(parts):
            assert manager.verify(entry, part=(part, parts), on_bytes=read.append) == []
    assert sum(read) == sum(4 * (200 + number) for number in range(TENSORS))
    assert len(read) == TENSORS


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_flipped_bit_is_found_by_one(run: Path, parts: int) -> None:
    (pack,) = (run / "packs").rglob("*.safetensors")
    pack.chmod(0o600)
    sound = pack.read_bytes()
    for at in range(len(sound) - 4 * 200 * TENSORS, len(sound), 401):
        pack.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        assert sum(problems(run, parts)) == 1, at


def test_damage_to_a_header_is_found_by_whoever_reads_it(run: Path) -> None:
    (pack,) = (run / "packs").rglob("*.safetensors")
    pack.chmod(0o600)
    sound = pack.read_bytes()
    pack.write_bytes(sound[:20] + bytes([sound[20] ^ 1]) + sound[21:])
    assert problems(run, 3)[0] > 0


def test_the_check_ends_when_nobody_wants_it_any_more(run: Path) -> None:
    def stop(_: int) -> None:
        raise KeyError("enough")

    with CheckpointManager(run) as manager, pytest.raises(KeyError, match="enough"):
        manager.verify(manager.entries()[0], on_bytes=stop)
