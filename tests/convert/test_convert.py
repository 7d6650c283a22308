"""Export and import, with the real peers on the other side: safetensors, torch.distributed.checkpoint, torch.save."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from autoglm_elastic.catalog import limits
from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.inventory import Inventory
from autoglm_elastic.catalog.verify import verify
from autoglm_elastic.cli.main import main
from autoglm_elastic.convert import open_source
from autoglm_elastic.errors import ElasticError
from autoglm_elastic.snapshot import CheckpointManager
from autoglm_elastic.storage import LocalBlobs

WAIT_S = 30.0
Capture = pytest.CaptureFixture[str]


def whole() -> dict[str, Any]:
    shared = torch.arange(30.0).view(6, 5)
    return {
        "model": {
            "wte.weight": shared,
            "lm_head.weight": shared,
            "half": torch.arange(7, dtype=torch.bfloat16),
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "mask": torch.tensor([True, False]),
            "long": torch.arange(9).view(3, 3),
            "transposed": torch.arange(12.0).view(3, 4).t(),
        },
        "optim": {"state": {0: {"exp_avg": torch.ones(6, 5, dtype=torch.float64)}}, "groups": [{"lr": 0.1}]},
        "step": 7,
        "name": "run",
        "nothing": None,
        "list": [torch.ones(2), torch.zeros(3)],
    }


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a tensor, and boxes that are cut along the first dimension."""
    monkeypatch.setattr(limits, "CHUNK_BYTES", 48)


@pytest.fixture
def saved(run_dir: Path) -> Path:
    with CheckpointManager(run_dir) as manager:
        result = manager.save(7, whole()).wait(WAIT_S)
        assert result.committed, result.reason
    return run_dir


def run(capsys: Capture, *argv: object) -> Any:
    code = main(["ckpt", *map(str, argv), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_safetensors_opens_what_is_exported(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    told = run(capsys, "export", saved, "HEAD", tmp_path / "hf", "--prefix", "model")
    assert told["files"] == ["model.safetensors"]
    assert told["tied"] == {"lm_head.weight": "wte.weight"}
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {name: tensor for name, tensor in whole()["model"].items() if name != "lm_head.weight"}
    assert loaded.keys() == expected.keys()
    assert all(same(loaded[name], tensor) for name, tensor in expected.items())


def test_shards_with_an_index_and_a_cast(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = ("--prefix", "model", "--dtype", "bf16", "--shard-bytes", "60")
    told = run(capsys, "export", saved, "7", tmp_path / "hf", *argv)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(told["files"]) - {"model.safetensors.index.json"}
    assert len(told["files"]) > 3
    loaded: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        part = load_file(tmp_path / "hf" / file)
        assert all(index["weight_map"][name] == file for name in part)
        loaded |= part
    for name, tensor in loaded.items():
        original = whole()["model"][name]
        assert same(tensor, original.bfloat16() if original.is_floating_point() else original)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded.values())


def test_stock_dcp_loads_what_is_exported(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    run(capsys, "export", saved, "HEAD", tmp_path / "dcp", "--to", "dcp")
    state = whole()
    for tensor in (*state["model"].values(), *state["list"], state["optim"]["state"][0]["exp_avg"]):
        tensor.zero_()
    state["step"], state["name"] = 0, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, tensor in whole()["model"].items():
        assert same(state["model"][name], tensor), name
    assert same(state["optim"]["state"][0]["exp_avg"], torch.ones(6, 5, dtype=torch.float64))
    assert [tensor.tolist() for tensor in state["list"]] == [[1, 1], [0, 0, 0]]
    assert (state["step"], state["name"], state["optim"]["groups"]) == (7, "run", [{"lr": 0.1}])


def load(run_dir: Path) -> dict[str, Any]:
    """The newest of the lineage, whole and verified."""
    blobs = LocalBlobs(run_dir)
    catalog = Catalog(blobs)
    inventory = Inventory(blobs, catalog)
    entry = inventory.find("HEAD")
    assert verify(blobs, catalog, entry) == []
    manifest = catalog.manifest(entry)
    target: dict[str, Any] = dict.fromkeys(manifest.tree)
    with CheckpointManager(run_dir) as manager:
        manager.load(target)
    return target


def test_a_safetensors_model_becomes_a_snapshot_to_start_from(tmp_path: Path, capsys: Capture) -> None:
    model = {name: tensor.contiguous().clone() for name, tensor in whole()["model"].items()}
    save_file(model, tmp_path / "m.safetensors")
    told = run(
        capsys, "import", tmp_path / "run", tmp_path / "m.safetensors", "--prefix", "model", "--step", "3"
    )
    assert (told["entry"], told["tensors"]) == ("000000000003-g1", 8)
    loaded = load(tmp_path / "run")
    assert all(same(loaded["model"][name], tensor) for name, tensor in model.items())
    run(capsys, "export", tmp_path / "run", "HEAD", tmp_path / "back", "--prefix", "model")
    assert all(
        same(tensor, model[name])
        for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items()
    )


def test_a_sharded_model_is_imported(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    run(capsys, "export", saved, "HEAD", tmp_path / "hf", "--prefix", "model", "--shard-bytes", "60")
    run(capsys, "import", tmp_path / "new", tmp_path / "hf", "--prefix", "model")
    loaded = load(tmp_path / "new")["model"]
    assert same(loaded["transposed"], whole()["model"]["transposed"])
    assert loaded.keys() == whole()["model"].keys() - {"lm_head.weight"}


def test_a_stock_dcp_directory_is_imported(tmp_path: Path, capsys: Capture) -> None:
    state = whole()
    del state["nothing"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    run(capsys, "import", tmp_path / "run", tmp_path / "dcp", "--step", "7")
    loaded = load(tmp_path / "run")
    for name, tensor in state["model"].items():
        assert same(loaded["model"][name], tensor), name
    assert (loaded["step"], loaded["name"], loaded["optim"]["groups"]) == (7, "run", [{"lr": 0.1}])
    assert same(loaded["optim"]["state"]["0"]["exp_avg"], state["optim"]["state"][0]["exp_avg"])
    assert same(loaded["list"][1], torch.zeros(3))


def test_there_and_back_through_dcp_is_the_same_snapshot(
    saved: Path, tmp_path: Path, capsys: Capture
) -> None:
    run(capsys, "export", saved, "HEAD", tmp_path / "dcp", "--to", "dcp")
    told = run(capsys, "import", saved, tmp_path / "dcp", "--step", "8", "--tag", "again")
    assert told["generation"] == 1
    difference = run(capsys, "diff", saved, "7", "again", "--values")
    # Tied tensors are two in a DCP directory, and it writes every key as text.
    assert {change["name"] for change in difference["tensors"]} == {"model.lm_head.weight"}
    assert {value["path"] for value in difference["values"]} <= {"nothing"}
    rows = run(capsys, "ls", saved)
    assert [(row["step"], row["head"], row["in_lineage"]) for row in rows] == [
        (7, False, False),
        (8, True, True),
    ]


def test_a_torch_save_file_is_imported(tmp_path: Path, capsys: Capture) -> None:
    torch.save(whole(), tmp_path / "all.pt")
    run(capsys, "import", tmp_path / "run", tmp_path / "all.pt")
    loaded = load(tmp_path / "run")
    assert all(same(loaded["model"][name], tensor) for name, tensor in whole()["model"].items())
    assert loaded["optim"]["state"][0]["exp_avg"].sum() == 30
    assert loaded["model"]["lm_head.weight"] is loaded["model"]["wte.weight"], "still tied"


class Evil:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.flag,))


def test_nothing_in_a_foreign_file_is_executed(tmp_path: Path) -> None:
    flag = tmp_path / "executed"
    torch.save({"a": Evil(flag)}, tmp_path / "evil.pt")
    folder = tmp_path / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.ones(2), "n": 1}, checkpoint_id=folder, no_dist=True)
    metadata = (folder / ".metadata").read_bytes()
    hostile = [
        pickle.dumps(Evil(flag)),
        pickle.dumps({"state_dict_metadata": Evil(flag)}),
        b"cposix\nsystem\n(S'touch " + str(flag).encode() + b"'\ntR.",
        b"ctorch\nload\n.",
        metadata[:-20],
        metadata.replace(b"__0_0.distcp", b"../../secret"),
        b"",
        b"N.",
    ]
    with pytest.raises(ElasticError, match="not opened"):
        open_source(tmp_path / "evil.pt")
    for data in hostile:
        (folder / ".metadata").write_bytes(data)
        with pytest.raises(ElasticError):
            open_source(folder)
    assert not flag.exists()


def test_every_cut_of_the_metadata_is_one_clear_error(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.ones(2), "n": 1}, checkpoint_id=tmp_path, no_dist=True)
    good = (tmp_path / ".metadata").read_bytes()
    for at in range(0, len(good), 7):
        (tmp_path / ".metadata").write_bytes(good[:at])
        with pytest.raises(ElasticError):
            open_source(tmp_path)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["export", "RUN", "HEAD", "RUN"], "exists; do: give a name that is free"),
        (
            ["export", "RUN", "HEAD", "NEW", "--prefix", "modle"],
            "nothing at 'modle' of the state; valid: list, model",
        ),
        (["export", "RUN", "HEAD", "NEW", "--dtype", "int8"], "dtype 'int8'"),
        (["export", "RUN", "HEAD", "NEW", "--to", "dcp", "--dtype", "bf16"], "for dcp"),
        (["export", "RUN", "HEAD", "NEW", "--to", "onnx"], "onnx"),
        (["import", "NEW", "NEW/nothing"], "does not exist"),
        (["import", "NEW", "RUN"], "holds nothing that can be imported"),
        (["import", "NEW", "RUN/HEAD"], "is not opened"),
        (["import", "NEW", "RUN/HEAD", "--prefix", "x"], "--prefix for safetensors only"),
        (["import", "NEW", "RUN/HEAD", "--tag", "1"], "tag '1'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    saved: Path, tmp_path: Path, capsys: Capture, argv: list[str], says: str
) -> None:
    new = tmp_path / "new"
    given = [text.replace("RUN", str(saved)).replace("NEW", str(new)) for text in argv]
    assert main(["ckpt", *given]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not list(new.glob("*"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".new")]


def test_a_damaged_chunk_stops_the_export(saved: Path, tmp_path: Path, capsys: Capture) -> None:
    (pack,) = saved.rglob("*.safetensors")
    data = bytearray(pack.read_bytes())
    data[4100] ^= 1
    pack.write_bytes(data)
    for to in ("hf", "dcp"):
        assert main(["ckpt", "export", str(saved), "HEAD", str(tmp_path / to), "--to", to]) == 1
        assert "its digest differs" in capsys.readouterr().err
        assert not (tmp_path / to).exists()


def test_values_tell_how_far_two_snapshots_lie_apart(run_dir: Path, capsys: Capture) -> None:
    with CheckpointManager(run_dir) as manager:
        one = torch.arange(40.0)
        other = one.clone()
        other[3], other[39] = 3.5, 38.0
        nan = torch.tensor([float("nan"), 1.0])
        for step, tensor in ((1, one), (2, other)):
            state = {"a": tensor, "b": torch.full((2,), step), "nan": nan * step}
            assert manager.save(step, state).wait(WAIT_S).committed
    changes = {
        change["name"]: change for change in run(capsys, "diff", run_dir, "1", "2", "--values")["tensors"]
    }
    assert (changes["a"]["elements_changed"], changes["a"]["max_abs"]) == (2, 1.0)
    assert (changes["b"]["elements_changed"], changes["b"]["max_abs"]) == (2, 1.0)
    assert (changes["nan"]["elements_changed"], changes["nan"]["max_abs"]) == (1, 1.0)


def test_a_prefix_may_be_what_keys_begin_with(run_dir: Path, tmp_path: Path) -> None:
    """As the state_dict of a model in a wrapper has them."""
    shared = torch.arange(4.0)
    state = {
        "model": {"module.a": shared, "module.b.c": torch.ones(2), "module.tied": shared, "other": shared + 1}
    }
    with CheckpointManager(run_dir) as manager:
        assert manager.save(1, state).wait(WAIT_S).committed
    target = tmp_path / "out"
    assert main(["ckpt", "export", str(run_dir), "HEAD", str(target), "--prefix", "model.module"]) == 0
    assert load_file(target / "model.safetensors").keys() == {"a", "b.c"}
    assert main(["ckpt", "export", str(run_dir), "HEAD", str(tmp_path / "no"), "--prefix", "model.mod"]) == 2
