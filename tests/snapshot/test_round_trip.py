"""One rank: whatever a state may hold comes back as it was, into the very objects that asked for it."""

from __future__ import annotations

import collections
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.dtypes import BY_NAME
from autoglm_elastic.core.lineage import GenerationRecord
from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe import events
from autoglm_elastic.ports import Outcome
from autoglm_elastic.snapshot import CheckpointManager
from autoglm_elastic.snapshot.dtypes import torch_dtype

WAIT_S = 60.0


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bit pattern, except that a bool is 0 or 1."""
    nbytes = math.prod(shape) * BY_NAME[str(dtype).removeprefix("torch.")].nbytes
    raw = torch.arange(3, 3 + nbytes).to(torch.uint8)
    return (raw % 2 if dtype is torch.bool else raw).view(dtype).view(shape)


def blank(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    nbytes = math.prod(shape) * BY_NAME[str(dtype).removeprefix("torch.")].nbytes
    return torch.zeros(nbytes, dtype=torch.uint8).view(dtype).view(shape)


def saved(manager: CheckpointManager, step: int, state: dict[str, Any], **options: Any) -> str:
    result = manager.save(step, state, **options).wait(WAIT_S)
    assert result.committed, result.reason
    assert result.entry
    return result.entry


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", BY_NAME)
def test_every_dtype(run_dir: Path, name: str) -> None:
    dtype = torch_dtype(name)
    state = {
        "matrix": sample(dtype, 5, 3),
        "transposed": sample(dtype, 4, 6).t(),
        "strided": sample(dtype, 8, 4)[::2, 1:3],
        "scalar": sample(dtype, 1)[0],
        "empty": sample(dtype, 0, 3),
    }
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, state)
        target = {key: blank(dtype, *value.shape) for key, value in state.items()}
        target["matrix"] = blank(dtype, 3, 5).t()
        manager.load(target)
        assert {key: bits(value) for key, value in target.items()} == {
            key: bits(value) for key, value in state.items()
        }
        assert manager.verify(manager.entries()[-1]) == []


def test_lazy_conjugates_and_negatives_are_stored_as_they_read(run_dir: Path) -> None:
    whole = torch.tensor([1 + 2j, 3 - 4j])
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, {"conj": whole.conj(), "neg": whole.conj().imag})
        target = {"conj": torch.zeros(2, dtype=torch.complex64).conj(), "neg": torch.zeros(2)}
        manager.load(target)
    assert target["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert target["neg"].tolist() == [-2, 4]


def test_every_kind_of_value(run_dir: Path) -> None:
    random_state, numpy_state = random.getstate(), np.random.default_rng(5).bit_generator.state
    state: dict[str, Any] = {
        "none": None,
        "bool": True,
        "int": -5,
        "big": 1 << 200,
        "float": 0.1,
        "inf": [math.inf, -math.inf],
        "nan": math.nan,
        "text": 'snow ☃ "quoted" \\ \n',
        "bytes": b"\0\xff",
        "tuple": (1, (2, [3, ()])),
        "dict": {0: "zero", (1, "a"): None, "$": "dollar", b"k": 1.5, None: 2, -1: 3, 2.5: 4},
        "ordered": collections.OrderedDict(b=1, a=2),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "scalar": np.float32(0.5),
        "random": random_state,
        "numpy": numpy_state,
        "list": [torch.ones(2), {"deep": torch.zeros(())}],
        "dotted.name": torch.ones(1),
        "dotted": {"name": torch.zeros(1)},
    }
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, state)
        loaded: dict[str, Any] = {}
        manager.load(loaded)
    assert math.isnan(loaded.pop("nan"))
    for key in ("array", "list", "dotted.name", "dotted"):
        assert repr(loaded.pop(key)) == repr(state[key])
    expected = {key: value for key, value in state.items() if key in loaded}
    assert loaded == expected
    random.setstate(loaded["random"])


def test_loading_is_in_place(run_dir: Path) -> None:
    weight, array = torch.zeros(2), np.zeros(2)
    target: dict[str, Any] = {
        "w": weight,
        "a": array,
        "n": {"step": 0},
        "l": [weight.clone()],
        "t": (0, weight.clone()),
    }
    inner, listed = target["n"], target["l"]
    with CheckpointManager(run_dir) as manager:
        ones = torch.ones(2)
        state = {"w": ones, "a": np.ones(2), "n": {"step": 7}, "l": [ones + 1], "t": (3, ones + 2)}
        saved(manager, 1, state)
        report = manager.load(target)
    assert (report.step, report.missing, report.unexpected) == (1, (), ())
    assert target["w"] is weight
    assert weight.tolist() == [1, 1]
    assert target["a"] is array
    assert array.tolist() == [1, 1]
    assert target["n"] is inner
    assert inner["step"] == 7
    assert target["l"] is listed
    assert listed[0].tolist() == [2, 2]
    assert target["t"][0] == 3
    assert target["t"][1].tolist() == [3, 3]


def test_optimizer_of_a_fresh_process_takes_what_is_stored(run_dir: Path) -> None:
    def build(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
        net[0].weight.requires_grad_(False)  # frozen: the optimizer has no state for it
        return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)

    net, optim = build(1)
    net(torch.ones(3)).sum().backward()
    optim.step()
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, {"net": net, "optim": optim})
        net2, optim2 = build(2)
        manager.load({"net": net2, "optim": optim2})
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), net2.parameters(), strict=True))
    for one, two in ((net, optim), (net2, optim2)):
        two.zero_grad()
        one(torch.ones(3)).sum().backward()
        two.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), net2.parameters(), strict=True))


class Counter:
    def __init__(self, value: int) -> None:
        self.value = value

    def to_state(self) -> dict[str, int]:
        return {"value": self.value}

    def from_state(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def test_objects_with_to_state(run_dir: Path) -> None:
    target = Counter(0)
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, {"counter": Counter(5)})
        manager.load({"counter": target})
    assert target.value == 5


def test_an_object_that_does_not_fit_names_itself(run_dir: Path) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    with CheckpointManager(run_dir, on_event=lambda name, fields: seen.append((name, fields))) as manager:
        result = manager.save(1, {"a": {"b": [object()]}}).wait(WAIT_S)
        assert not result.committed
        assert "a.b.0 is a builtins.object" in result.reason
        assert "to_state()" in result.reason
        sparse = manager.save(2, {"s": torch.ones(2).to_sparse()}).wait(WAIT_S)
        assert not sparse.committed
        assert "tensor s" in sparse.reason
        saved(manager, 3, {"a": torch.ones(1)})
    assert [name for name, _ in seen] == [*("snapshot.failed", "snapshot.aborted") * 2, "snapshot.committed"]
    for name, fields in seen:
        events.make(name, fields)


def test_what_a_users_state_dict_raises_is_the_snapshots_failure(run_dir: Path) -> None:
    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise KeyError("mine")

    with CheckpointManager(run_dir) as manager:
        result = manager.save(1, {"b": Broken()}).wait(WAIT_S)
        assert not result.committed
        assert "KeyError" in result.reason
        assert manager.counts.failed == 1


def test_missing_and_unexpected_keys(run_dir: Path) -> None:
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, {"a": torch.ones(1), "b": {"c": torch.ones(1), "n": 1}})
        target = {"a": torch.zeros(1), "b": {"n": 0, "new": torch.zeros(1)}}
        with pytest.raises(UsageError, match=r"1 missing \(b\.new\), 1 unexpected|strict=False"):
            manager.load(target)
        assert target["a"].item() == 0, "nothing is changed by a refused load"
        report = manager.load(target, strict=False)
        assert (report.missing, report.unexpected) == (("b.new",), ("b.c",))
        assert target["a"].item() == 1
        assert target["b"]["n"] == 1


def test_another_shape_or_dtype_is_refused(run_dir: Path) -> None:
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, {"a": torch.ones(2)})
        for wrong in (torch.ones(3), torch.ones(2, dtype=torch.int32)):
            with pytest.raises(UsageError, match=r"float32 \[2\] as in the snapshot"):
                manager.load({"a": wrong}, strict=False)


def test_tied_tensors_are_stored_once(run_dir: Path) -> None:
    weight = torch.randn(64, 64)
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, {"a": weight, "b": weight, "view": weight[0]})
        assert manager.entries()[0].tensors == 2
        target = {"a": torch.zeros(64, 64), "b": torch.zeros(64, 64), "view": torch.zeros(64)}
        manager.load(target)
    assert torch.equal(target["a"], weight)
    assert torch.equal(target["b"], weight)


def test_the_step_boundary_is_saved_whatever_training_does_next(run_dir: Path) -> None:
    """pytorch#144657."""
    weight = torch.zeros(1 << 16)
    with CheckpointManager(run_dir) as manager:
        for step in range(3):
            weight.fill_(step)
            handle = manager.save(step, {"w": weight})
            weight.fill_(-1)
            assert handle.wait(WAIT_S).committed
        for entry in manager.entries():
            target = {"w": torch.zeros(1 << 16)}
            manager.load(target, entry=entry)
            assert target["w"].unique().tolist() == [entry.step]


def test_large_tensors_become_chunks_and_packs(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(limits, "PACK_BYTES", 5000)
    state = {"wide": torch.randn(1, 2000), "tall": torch.randn(700, 3), "deep": torch.randn(3, 50, 7)}
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, state)
        target = {name: torch.zeros(value.shape) for name, value in state.items()}
        target["tall"] = torch.zeros(3, 700).t()
        manager.load(target)
        assert manager.verify(manager.entries()[0]) == []
    assert all(torch.equal(target[name], state[name]) for name in state)
    packs = list(run_dir.glob("packs/*/*.safetensors"))
    assert len(packs) > 3
    for pack in packs:
        with safe_open(pack, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                name, _, place = key.partition("@")
                chunk = opened.get_tensor(key)
                whole = state[name]
                for dim, start in enumerate(int(number) for number in place.split(",")):
                    whole = whole.narrow(dim, start, chunk.shape[dim])
                assert torch.equal(chunk, whole)


def test_a_pack_has_an_aligned_header_and_stock_names(run_dir: Path) -> None:
    with CheckpointManager(run_dir) as manager:
        saved(
            manager,
            1,
            {"m": {"w": torch.ones(2, 2), "b": torch.ones((), dtype=torch.bfloat16)}, "f": torch.ones(3)},
        )
    (pack,) = run_dir.glob("packs/*/*.safetensors")
    assert int.from_bytes(pack.read_bytes()[:8], "little") % 8 == 0
    with safe_open(pack, "pt") as opened:
        assert sorted(opened.keys()) == ["f", "m.b", "m.w"]
        assert opened.get_tensor("m.b").item() == 1


def test_a_trigger_that_finds_one_in_flight_is_coalesced(run_dir: Path) -> None:
    import threading

    reached, go = threading.Event(), threading.Event()

    def hold(point: str) -> None:
        if point == "packs_written":
            reached.set()
            go.wait(WAIT_S)

    with CheckpointManager(run_dir, failpoint=hold) as manager:
        first = manager.save(1, {"a": torch.ones(1)})
        assert reached.wait(WAIT_S)
        assert manager.busy
        second = manager.save(2, {"a": torch.ones(1)}).wait(0)
        assert not second.committed
        assert "coalesced" in second.reason
        assert not first.done()
        assert not first.wait(0).committed
        assert not manager.close(timeout_s=0.01), "close is bounded"
        go.set()
        assert first.wait(WAIT_S).committed
        assert (manager.counts.committed, manager.counts.coalesced) == (1, 1)
    assert manager.save(3, {}).wait(0).reason == "the manager is closed"


def test_one_that_hangs_behind_its_decision_holds_up_the_next_trigger_for_a_moment_only(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks know that it is decided, so that the next one begins; here it cannot, and is voted down."""
    import threading

    decided, go = threading.Event(), threading.Event()

    def hold(point: str) -> None:
        if point == "announced":
            decided.set()
            go.wait(WAIT_S)

    monkeypatch.setattr("autoglm_elastic.snapshot.manager._TURN_S", 0.05)
    with CheckpointManager(run_dir, failpoint=hold) as manager:
        first = manager.save(1, {"a": torch.ones(1)})
        assert decided.wait(WAIT_S)
        second = manager.save(2, {"a": torch.ones(1)})
        third = manager.save(3, {"a": torch.ones(1)}).wait(0)
        assert "coalesced" in third.reason
        go.set()
        assert first.wait(WAIT_S).committed
        assert "did not end" in second.wait(WAIT_S).reason
        saved(manager, 4, {"a": torch.ones(1)})


def test_who_asked_for_it_is_called_back_with_the_result(run_dir: Path) -> None:
    import threading

    told, go, results = threading.Event(), threading.Event(), []

    def hold(point: str) -> None:
        if point == "packs_written":
            go.wait(WAIT_S)

    def fail(_: object) -> None:
        raise ValueError("the caller's own mistake")

    with CheckpointManager(run_dir, failpoint=hold) as manager:
        handle = manager.save(1, {"a": torch.ones(1)})
        handle.add_done_callback(fail)
        handle.add_done_callback(lambda result: (results.append(result), told.set()))
        go.set()
        assert told.wait(WAIT_S)
        handle.add_done_callback(fail)
        handle.add_done_callback(results.append)
        assert [result.entry for result in results] == [handle.wait(0).entry] * 2
        assert manager.save(2, {"a": torch.ones(1)}).wait(WAIT_S).committed


def test_the_same_step_twice_is_refused(run_dir: Path) -> None:
    with CheckpointManager(run_dir) as manager:
        saved(manager, 1, {"a": torch.ones(1)})
        again = manager.save(1, {"a": torch.zeros(1)}).wait(WAIT_S)
        assert not again.committed
        assert "already in the catalog" in again.reason


def test_catalog_fields(run_dir: Path) -> None:
    with CheckpointManager(run_dir, generation=2) as manager:
        saved(
            manager,
            4,
            {"a": torch.ones(1)},
            metrics={"loss": 0.5, "bad": math.nan},
            tags=["best"],
            kind="full",
        )
        saved(manager, 5, {"a": torch.ones(1)})
        first, second = manager.entries()
    assert (first.name, first.step, first.generation, first.parent) == ("000000000004-g2", 4, 2, None)
    assert (first.metrics, first.tags, second.parent) == ({"loss": 0.5}, ("best",), first.name)
    assert first.nbytes == sum(path.stat().st_size for path in run_dir.glob("packs/*/*")) or second.nbytes
    assert (run_dir / "HEAD").read_text() == f"{second.name}\n"
    assert (run_dir / "latest").resolve() == (run_dir / "catalog" / f"{second.name}.json").resolve()


def test_a_stale_generation_writes_late_and_harms_nothing(run_dir: Path) -> None:
    """The fence: generation 1 left generation 0 at step 2; what 0 commits afterwards is not in the
    lineage."""
    state = {"a": torch.ones(1)}
    with CheckpointManager(run_dir) as old, CheckpointManager(run_dir, generation=1) as new:
        assert old.put_generation(GenerationRecord(0, -1, -1, None, "fresh")) is Outcome.OK
        two = saved(old, 2, state)
        record = GenerationRecord(1, 0, 2, two, "disk")
        assert new.put_generation(record) is Outcome.OK
        assert new.put_generation(record) is Outcome.OK, "the same record again"
        assert new.put_generation(GenerationRecord(1, 0, 1, None, "live")) is Outcome.CONFLICT
        three = saved(new, 3, state)
        late = saved(old, 9, state)
        assert {entry.name for entry in new.entries()} == {two, three, late}
        newest = new.newest()
        assert newest is not None
        assert newest.name == three
        assert (run_dir / "HEAD").read_text().strip() == three
        assert [record.number for record in new.records()] == [0, 1]


def test_hints_are_only_hints(run_dir: Path) -> None:
    with CheckpointManager(run_dir) as manager:
        entry = saved(manager, 1, {"a": torch.ones(1)})
        (run_dir / "HEAD").write_text("nonsense")
        (run_dir / "latest").unlink()
        assert manager.load({"a": torch.zeros(1)}).entry == entry
        assert manager.repair_hints()
    assert (run_dir / "HEAD").read_text().strip() == entry
    assert (run_dir / "latest").is_symlink()


def test_an_empty_run_directory(run_dir: Path) -> None:
    with CheckpointManager(run_dir) as manager:
        found = (manager.entries(), manager.records(), manager.newest(), manager.newest_verified())
        assert found == (
            [],
            [],
            None,
            None,
        )
        with pytest.raises(UsageError, match="no snapshot"):
            manager.load({})
        with pytest.raises(UsageError, match="no snapshot '000000000001-g0'"):
            manager.load({}, entry="000000000001-g0")
        with pytest.raises(UsageError, match="valid: <step>-g<generation>"):
            manager.load({}, entry="../../etc/passwd")
    assert not run_dir.exists(), "reading writes nothing"


def test_a_read_only_run_directory_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with CheckpointManager(tmp_path / "file" / "run") as manager:
        result = manager.save(1, {"a": torch.ones(1)}).wait(WAIT_S)
    assert not result.committed
    assert "file/run" in result.reason
