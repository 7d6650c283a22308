"""What both GPT examples train: bytes of the Python standard library's sources, and a small transformer.

Nothing here knows of processes, launchers or elasticity.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name that everybody knows)
from torch.utils.data import Dataset

CORPUS_BYTES_MAX = 4 * 1024 * 1024
HELD_OUT = 0.05
VOCABULARY = 256


@functools.cache
def corpus() -> bytes:
    """The first `CORPUS_BYTES_MAX` bytes of the standard library's modules, in the order of their names.

    Real text that every machine with Python has; the same on every worker of a machine.
    """
    parts: list[bytes] = []
    nbytes = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_bytes())
        nbytes += len(parts[-1])
        if nbytes >= CORPUS_BYTES_MAX:
            break
    return b"".join(parts)[:CORPUS_BYTES_MAX]


class ByteWindows(Dataset[Tensor]):
    """Windows of `length + 1` bytes that do not overlap, as int64 tensors: inputs are `[:-1]`, targets
    `[1:]`."""

    def __init__(self, text: bytes, length: int) -> None:
        count = (len(text) - 1) // length
        if count < 1:
            raise ValueError(f"text of {len(text)} bytes is shorter than one window of {length + 1}")
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._length = length
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        start = index * self._length
        return self._bytes[start : start + self._length + 1].long()


def split(length: int) -> tuple[ByteWindows, ByteWindows]:
    """(training windows, held-out windows): the end of the corpus is held out."""
    text = corpus()
    border = int(len(text) * (1 - HELD_OUT))
    return ByteWindows(text[:border], length), ByteWindows(text[border:], length)


class Block(nn.Module):
    """Pre-norm attention and MLP. (batch, time, width) → the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(width, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        result: Tensor = x + self.mlp(self.norm_2(x))
        return result


class GPT(nn.Module):
    """A byte-level GPT. Windows of bytes (batch, time + 1) → mean cross-entropy in nats a byte, a scalar."""

    def __init__(self, layers: int, width: int, length: int) -> None:
        super().__init__()
        if width % 32:
            raise ValueError(f"width {width}; valid: a multiple of 32, the size of a head")
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, windows: Tensor) -> Tensor:
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.bytes(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def arguments(description: str) -> argparse.Namespace:
    """The flags of both examples; `epochs` follows: as many as `steps` need."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default %(default)s)")
    parser.add_argument("--global-batch-size", type=int, default=16, help="windows a step, over all workers")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--seq-len", type=int, default=64, help="bytes in a window")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="write held-out loss and a digest of the parameters here, as JSON"
    )
    args = parser.parse_args()
    windows = len(split(args.seq_len)[0])
    args.epochs = math.ceil(args.steps * args.global_batch_size / windows) + 1
    return args


@torch.no_grad()
def evaluate(model: nn.Module, held_out: ByteWindows, windows: int = 64) -> float:
    """Mean loss over the first `windows` held-out windows."""
    model.eval()
    batch = torch.stack([held_out[index] for index in range(min(windows, len(held_out)))])
    loss = float(model(batch.to(next(model.parameters()).device)))
    model.train()
    return loss


def digest(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters: equal only for models that are equal to the last
    bit."""
    sha256 = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha256.hexdigest()


def write_result(path: Path | None, *, step: int, loss: float, model: nn.Module) -> None:
    """Print the held-out loss and, with a path, write the result as JSON, whole or not at all."""
    print(f"step {step}: held-out loss {loss:.4f} nats a byte", flush=True)  # noqa: T201
    if path is None:
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = {"step": step, "eval_loss": loss, "digest": digest(model), "parameters": parameters}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)
