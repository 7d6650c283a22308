"""What is written is the state of the boundary, whatever training does next; and a layout that is kept is never
stale."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoglm_elastic.catalog import format as fmt
from autoglm_elastic.snapshot import CheckpointManager
from autoglm_elastic.snapshot import copy as copying
from autoglm_elastic.snapshot.layout import Layout

WAIT_S = 60.0


def loaded(manager: CheckpointManager, entry: Any) -> dict[str, Any]:
    state: dict[str, Any] = {}
    manager.load(state, entry=entry)
    return state


def bits(value: Any) -> Any:
    """For comparison, NaN included."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.detach().contiguous().view(-1).numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value


def frozen(value: Any) -> Any:
    """A deep copy of a state as plain values."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(frozen(item) for item in value)
    return value


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The copying thread stands still in its first piece until the training thread helps, or the event is
    set."""
    go, original = threading.Event(), copying._copy

    def copy(piece: list[Any]) -> None:
        if threading.current_thread().name == "autoglm-snapshot-copy":
            go.wait(WAIT_S)
            original(piece)
        else:
            original(piece)
            if piece[0][0].data_ptr() in late:
                go.set()

    late: set[int] = set()
    make = copying.Copy.__init__

    def note(self: Any, now: Any, later: Any, guarded: Any) -> None:
        go.clear()
        late.update(to.data_ptr() for to, _ in later)
        make(self, now, later, guarded)

    monkeypatch.setattr(copying, "PIECE_TENSORS", 2)
    monkeypatch.setattr(copying, "_copy", copy)
    monkeypatch.setattr(copying.Copy, "__init__", note)
    yield go
    go.set()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


def net_of(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.BatchNorm1d(3))


def closure_of(net: nn.Module, optim: torch.optim.Optimizer) -> Callable[[], float]:
    def closure() -> float:
        optim.zero_grad()
        loss = net(torch.randn(8, 5)).square().mean()
        loss.backward()
        return float(loss.detach())

    return closure


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_late_copies_are_of_the_boundary(run_dir: Path, held: threading.Event, name: str) -> None:
    """pytorch#144657: training goes on at once, and only the optimizer's step waits."""
    net = net_of()
    optim = OPTIMIZERS[name](net.parameters())
    closure = closure_of(net, optim)
    expected = {}
    with CheckpointManager(run_dir) as manager:
        for step in range(4):
            optim.step(closure)
            state = {"net": net.state_dict(), "optim": optim.state_dict(), "step": step}
            expected[step] = bits(frozen(state))
            handle = manager.save(step, state, optimizers=[optim])
            closure()
            assert not held.is_set(), "something is left to copy"
            optim.step(closure)
            assert held.is_set()
            assert handle.wait(WAIT_S).committed, handle.wait(0).reason
        for entry in manager.entries():
            assert bits(loaded(manager, entry)) == expected[entry.step]


def test_a_step_that_is_skipped_copies_nothing_early(run_dir: Path, held: threading.Event) -> None:
    net = net_of()
    optim = torch.optim.AdamW(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled_step(factor: float) -> None:
        optim.zero_grad()
        scaler.scale(net(torch.randn(8, 5)).square().mean() * factor).backward()
        scaler.step(optim)
        scaler.update()

    scaled_step(1)
    state = {"net": dict(net.named_parameters()), "optim": optim.state_dict(), "scaler": scaler.state_dict()}
    expected = bits(frozen(state))
    with CheckpointManager(run_dir) as manager:
        handle = manager.save(1, state, optimizers=[optim])
        scaled_step(float("inf"))
        assert not held.is_set(), "something is left to copy"
        assert bits(dict(net.named_parameters())) == expected["net"]
        scaled_step(1)
        assert held.is_set()
        assert handle.wait(WAIT_S).committed, handle.wait(0).reason
        assert bits(loaded(manager, manager.entries()[-1])) == expected
        assert bits(dict(net.named_parameters())) != expected["net"]


def test_two_in_flight_keep_their_own_bytes(run_dir: Path) -> None:
    reached, go = threading.Event(), threading.Event()

    def hold(point: str) -> None:
        if point == "votes_gathered":
            reached.set()
            go.wait(WAIT_S)

    net = net_of()
    optim = torch.optim.AdamW(net.parameters())
    closure = closure_of(net, optim)
    with CheckpointManager(run_dir, in_flight_max=2, failpoint=hold) as manager:
        expected, handles = {}, []
        for step in range(2):
            optim.step(closure)
            state = {"net": net, "optim": optim}
            expected[step] = bits(frozen({"net": net.state_dict(), "optim": optim.state_dict()}))
            handles.append(manager.save(step, state, optimizers=[optim]))
        optim.step(closure)
        assert reached.wait(WAIT_S)
        assert manager.busy
        assert "coalesced" in manager.save(2, {"net": net}).wait(0).reason
        go.set()
        assert [handle.wait(WAIT_S).committed for handle in handles] == [True, True]
        for entry in manager.entries():
            assert bits(loaded(manager, entry)) == expected[entry.step]


def test_what_else_changes_the_state_early_is_an_error_once(run_dir: Path, held: threading.Event) -> None:
    """Then everything is copied at once: a training that does so keeps its snapshots."""
    net = net_of()
    optim = torch.optim.SGD(net.parameters(), lr=0.1)
    state = {"net": net}
    with CheckpointManager(run_dir) as manager:
        handle = manager.save(1, state, optimizers=[optim])
        with torch.no_grad():
            net[0].weight.add_(1)
        held.set()
        result = handle.wait(WAIT_S)
        assert not result.committed
        assert "changed while they were copied" in result.reason
        kept = bits(frozen(net.state_dict()))
        handle = manager.save(2, state, optimizers=[optim])
        with torch.no_grad():
            net[0].weight.add_(1)
        assert handle.wait(WAIT_S).committed
        assert bits(loaded(manager, manager.entries()[-1])["net"]) == kept


def test_whoever_changes_the_state_by_hand_can_wait(run_dir: Path, held: threading.Event) -> None:
    net = net_of()
    optim = torch.optim.SGD(net.parameters(), lr=0.1)
    kept = bits(frozen(net.state_dict()))
    with CheckpointManager(run_dir) as manager:
        handle = manager.save(1, {"net": net}, optimizers=[optim])
        assert handle.wait_staged()
        with torch.no_grad():
            net[0].weight.add_(1)
        assert handle.wait(WAIT_S).committed
        assert bits(loaded(manager, manager.entries()[-1])["net"]) == kept


def test_a_manager_that_is_closed_copies_no_more(run_dir: Path, held: threading.Event) -> None:
    net = net_of()
    optim = torch.optim.SGD(net.parameters(), lr=0.1)
    manager = CheckpointManager(run_dir)
    handle = manager.save(1, {"net": net}, optimizers=[optim])
    manager.close(0.0)
    held.set()
    assert not handle.wait(WAIT_S).committed
    assert manager.close(WAIT_S)
    optim.step(closure_of(net, optim))


class Thing:
    def __init__(self, *values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}


ONE = torch.arange(12, dtype=torch.float32).view(3, 4)
STATES: list[dict[str, Any]] = [
    {"a": ONE, "b": ONE + 1, "n": 1},
    {"a": ONE, "b": ONE + 1, "n": 2},
    {"a": ONE, "b": ONE + 1, "n": True},
    {"a": ONE, "b": ONE + 1, "n": 1.0},
    {"a": ONE, "b": ONE + 1, "n": None},
    {"a": ONE, "b": ONE + 1, "n": [1]},
    {"a": ONE, "b": ONE + 1, "n": (1,)},
    {"a": ONE, "b": ONE + 1, "n": {"x": 1}},
    {"a": ONE, "b": ONE + 1, "n": {1: 1}},
    {"a": ONE, "b": ONE + 1, "n": {True: 1}},
    {"a": ONE, "b": ONE + 1, "n": {1.0: 1}},
    {"a": ONE, "b": ONE + 1, "n": -0.0},
    {"a": ONE, "b": ONE + 1, "n": 0.0},
    {"a": ONE, "b": ONE + 1, "n": bytearray(b"x")},
    {"b": ONE + 1, "a": ONE, "n": 1},
    {"a": ONE.double(), "b": ONE + 1, "n": 1},
    {"a": ONE.t(), "b": ONE + 1, "n": 1},
    {"a": ONE.view(4, 3), "b": ONE + 1, "n": 1},
    {"a": ONE[:2], "b": ONE + 1, "n": 1},
    {"a": ONE.int(), "b": ONE + 1, "n": 1},
    {"a": ONE, "b": ONE, "n": 1},
    {"a": ONE, "b": ONE.numpy(), "n": 1},
    {"a": ONE, "b": ONE.t(), "n": 1},
    {"a": nn.Parameter(ONE), "b": ONE + 1, "n": 1},
    {"a": ONE, "b": 5, "n": 1},
    {"a": Thing(ONE, 1), "b": Thing(2, ONE + 2)},
    {"a": Thing(ONE, 1), "b": Thing(ONE + 2)},
    {"a": Thing(ONE, 1), "b": Thing(ONE + 2, ONE)},
]


@pytest.mark.parametrize("world", [1, 3])
def test_a_kept_layout_is_never_stale(world: int) -> None:
    """Each state in the layout of each other, if that takes it, is as in a layout of its own."""
    followed = 0
    for one in STATES:
        for other in STATES:
            kept = Layout(one, 0, world)
            kept.first()
            taken = kept.take(other)
            if taken is None:
                assert one is not other
                continue
            followed += 1
            fresh = Layout(other, 0, world)
            wanted = fresh.first()
            assert fmt.encode(kept.structure(taken.values)) == fmt.encode(fresh.structure(wanted.values))
            assert (kept.parts, kept.digest) == (fresh.parts, fresh.digest)
            for part in kept.parts:
                assert bits(part.of(taken.local[part.source])) == bits(part.of(wanted.local[part.source]))
    assert followed > len(STATES)


def test_a_kept_layout_holds_no_memory_of_the_state(run_dir: Path) -> None:
    state = {"a": torch.ones(5), "n": 1}
    alive = weakref.ref(state["a"])
    with CheckpointManager(run_dir) as manager:
        assert manager.save(1, state).wait(WAIT_S).committed
        assert manager.save(2, state).wait(WAIT_S).committed
        del state
        gc.collect()
        assert alive() is None
