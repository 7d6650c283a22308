"""`autoglm ckpt export` and `import`: snapshots to and from the formats of others. Thin."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from autoglm_elastic.catalog.index import Catalog
from autoglm_elastic.catalog.inventory import Inventory
from autoglm_elastic.catalog.tags import check_name
from autoglm_elastic.cli import _ckpt_text as text
from autoglm_elastic.cli import _place as place
from autoglm_elastic.coordination.clock import SystemClock
from autoglm_elastic.errors import UsageError
from autoglm_elastic.observe.text import count, size

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


class Peer(StrEnum):
    HF = "hf"
    DCP = "dcp"


class Exported(msgspec.Struct, kw_only=True):
    entry: str
    target: str
    format: str
    tensors: int
    files: list[str]
    tied: dict[str, str]


class Imported(msgspec.Struct, kw_only=True):
    entry: str
    generation: int
    tensors: int
    nbytes: int


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    entry: Annotated[
        str, typer.Argument(metavar="ENTRY", help="HEAD, a step, a tag or a name.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.", show_default=False)],
    to: Annotated[
        Peer, typer.Option(help="hf: model.safetensors; dcp: torch.distributed.checkpoint.")
    ] = Peer.HF,
    prefix: Annotated[str, typer.Option(help="Only what is below this path, without it in the names.")] = "",
    dtype: Annotated[
        str | None, typer.Option(help="hf: cast floating-point tensors, as bf16 or float32.")
    ] = None,
    shard_bytes: Annotated[int | None, typer.Option(min=1, help="hf: bytes of a file at most.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text (docs/ckpt.md).")] = False,
) -> None:
    """Write a snapshot as others read it; every byte is verified on the way."""
    blobs = place.opened(run)
    catalog = Catalog(blobs)
    chosen = Inventory(blobs, catalog).find(entry)
    if to is Peer.DCP and (dtype is not None or shard_bytes is not None):
        raise UsageError("--dtype or --shard-bytes for dcp", valid="--to hf")
    from autoglm_elastic.convert import export_dcp, export_hf
    from autoglm_elastic.convert.to_hf import SHARD_BYTES

    manifest = catalog.manifest(chosen)
    with text.progress("exporting", chosen.nbytes, quiet=as_json) as advance:
        if to is Peer.DCP:
            items = export_dcp(blobs, manifest, target, prefix=prefix, on_bytes=advance)
            files, tied = sorted(path.name for path in target.iterdir()), {}
        else:
            done = export_hf(
                blobs,
                manifest,
                target,
                prefix=prefix,
                dtype=None if dtype is None else _SHORT.get(dtype, dtype),
                shard_bytes=shard_bytes or SHARD_BYTES,
                on_bytes=advance,
            )
            items, files, tied = done.tensors, list(done.files), done.tied
    if as_json:
        told = Exported(
            entry=chosen.name, target=str(target), format=to.value, tensors=items, files=files, tied=tied
        )
        print(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
        return
    what = "tensor" if to is Peer.HF else "item"
    print(f"{chosen.name}: {count(items, what)} in {target}: {', '.join(files)}")
    for name, written in tied.items():
        print(f"  {name} is {written}: written once")


def import_(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run directory, made if it is not there.", show_default=False)
    ],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A folder or file of safetensors, a folder of torch.distributed.checkpoint, a torch.save file.",
            show_default=False,
        ),
    ],
    step: Annotated[int, typer.Option(min=0, help="The step that the snapshot is of.")] = 0,
    prefix: Annotated[
        str, typer.Option(help="safetensors: where in the state the tensors go, as model.")
    ] = "",
    tag: Annotated[list[str] | None, typer.Option(help="A tag for it; repeatable.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Although something holds the directory's lock.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text (docs/ckpt.md).")] = False,
) -> None:
    """Commit a snapshot of what others wrote; the next start resumes from it."""
    for name in tag or ():
        check_name(name)
    blobs = place.made(run)
    from autoglm_elastic.convert import ingest, open_source

    found = open_source(source, prefix)
    with place.claimed(run, force=force):
        nbytes = sum(path.stat().st_size for path in ([source] if source.is_file() else source.iterdir()))
        with text.progress("importing", nbytes, quiet=as_json) as advance:
            name = ingest(
                blobs, found, step=step, tags=tuple(tag or ()), wall=SystemClock().wall, on_bytes=advance
            )
    entry = Catalog(blobs).entry(name)
    if as_json:
        told = Imported(entry=name, generation=entry.generation, tensors=entry.tensors, nbytes=entry.nbytes)
        print(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
        return
    print(f"{name}: {count(entry.tensors, 'tensor')}, {size(entry.nbytes)}; the next start resumes from it")


def register(app: typer.Typer) -> None:
    """Adds both commands."""
    app.command("export")(export)
    app.command("import")(import_)
