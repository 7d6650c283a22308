"""`autoglm`: everything beside starting a job. Thin: parses, calls the room that knows, prints.

May touch: standard output and error, the exit code. Must never: decide anything; import torch before a
command that needs it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from autoglm_elastic.cli import ckpt, ckpt_convert, tls
from autoglm_elastic.errors import ElasticError, ExitCode, PlatformError, UsageError, in_one_line
from autoglm_elastic.ports import StoreUnavailable

if TYPE_CHECKING:
    from autoglm_elastic.observe.status import Source
    from autoglm_elastic.settings import Loaded

app = typer.Typer(
    name="autoglm",
    help="Look at, check and try fault-tolerant training. Jobs are started with autoglm-run.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Benchmarks against torch's own ways, on this machine.")
app.add_typer(bench, name="bench")
ckpt_convert.register(ckpt.app)
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(tls.app, name="tls")

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="GROUP.FIELD=VALUE", help="One setting; repeatable.")
]


_CommandLineError: Any = typer.BadParameter.__mro__[1]
"""click's UsageError, of the click that this typer brings or imports."""
_SIGNAL_BASE = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's). Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        result = app(arguments or ["--help"], prog_name="autoglm", standalone_mode=False)
    except ElasticError as error:
        print(f"autoglm: {in_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except _CommandLineError as error:
        print(f"autoglm: {_one_line(error)}; do: autoglm --help", file=sys.stderr)
        return ExitCode.USAGE
    except (typer.Abort, KeyboardInterrupt):
        print("autoglm: stopped by SIGINT", file=sys.stderr)
        return _SIGNAL_BASE + signal.SIGINT
    return result if isinstance(result, int) else ExitCode.DONE


@app.command()
def demo(
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of either run.")] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for all files; default: under runs/.")] = None,
    seed: Annotated[int, typer.Option(help="Of the parameters and the order of samples.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of the live view.")] = False,
) -> int:
    """Train a small GPT on 4 workers, kill a worker, kill an agent, and tell what it cost."""
    from autoglm_elastic.bench import demo as room

    return room.run(steps=steps or room.STEPS, out=out, seed=seed, plain=plain)


@bench.command()
def recovery(
    kills: Annotated[int, typer.Option(help="Workers killed in each mode.")] = 20,
    starts: Annotated[int, typer.Option(help="Jobs started under each launcher.")] = 5,
    mode: Annotated[list[str] | None, typer.Option(help="Only this mode; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Show that it works; proves nothing.")] = False,
) -> int:
    """Kill workers under torchrun and under autoglm-run, and compare what it costs."""
    from autoglm_elastic.bench import recovery as room

    return room.main(kills, mode or None, out or room.OUT, starts=starts, quick=quick)


@bench.command()
def restarts(
    n: Annotated[int, typer.Option("--n", help="Restarts in a row.")] = 100,
    mode: Annotated[str, typer.Option(help="Of `autoglm bench recovery`.")] = "unmodified",
) -> int:
    """Kill a worker of one job again and again, and stop at the first hang."""
    from autoglm_elastic.bench import restarts as room

    return room.main(n, mode)


@bench.command()
def checkpoint(
    folder: Annotated[Path | None, typer.Option("--dir", help="On the disk to be measured.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this part; repeatable.")] = None,
    mib: Annotated[int | None, typer.Option(help="Size of the state, in MiB.")] = None,
    repeat: Annotated[int | None, typer.Option(help="Measured rounds.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Show that it works; proves nothing.")] = False,
    allow_tmpfs: Annotated[bool, typer.Option("--allow-tmpfs", help="Measure memory as a disk.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all samples to FILE.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw a picture of each table into FOLDER.")] = None,
    earlier: Annotated[
        list[Path] | None, typer.Option("--with", help="Show the parts of an earlier --json FILE, too.")
    ] = None,
) -> int:
    """Save and load with ours, with torch's own ways and at the limits of this machine, and compare."""
    from autoglm_elastic.bench import checkpoint as room

    options = room.options(quick=quick, mib=mib, repeat=repeat)
    return room.main(
        folder or room.DIR,
        only,
        options,
        allow_tmpfs=allow_tmpfs,
        json=json_file,
        plots=plots,
        earlier=earlier,
    )


@app.command()
def report(
    run: RunDir,
    as_json: AsJson = False,
    png: Annotated[
        Path | None, typer.Option(help="Draw the loss curve with the incidents into FILE.")
    ] = None,
    timeline_png: Annotated[
        Path | None,
        typer.Option(
            "--timeline", help="Draw steps, down time and each incident's phases over the clock into FILE."
        ),
    ] = None,
    each: Annotated[bool, typer.Option("--all", help="Every incident, however many there are.")] = False,
) -> None:
    """What a run went through: incidents and their phases, goodput, snapshots."""
    from autoglm_elastic.agent.run_dir import check_format
    from autoglm_elastic.observe import events, metrics, plot, text, timeline
    from autoglm_elastic.observe import report as room

    check_format(run)
    told = room.build(run)
    steps = list(metrics.read(run / events.METRICS_NAME)) if png or timeline_png else []
    if png is not None:
        plot.loss_curve(png, told, steps)
    if timeline_png is not None:
        timeline.draw(timeline_png, told, steps)
    _json(told) if as_json else _lines(text.lines(told, each=each))


@app.command()
def status(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run directory, or the job's store as --store takes it: etcd://HOST:PORT,… or HOST:PORT.",
            show_default=False,
        ),
    ],
    rdzv_id: Annotated[
        str | None, typer.Option("--rdzv-id", help="With a store: the job, as its agents got it.")
    ] = None,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until the job ends: live on a terminal, else lines.")
    ] = False,
    file: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Where a run stands: from its run directory, or from its store on any host that reaches that.

    A store with TLS (docs/tls.md) needs the settings tls.ca, tls.cert and tls.key."""
    with _source(run, rdzv_id, file, overrides or ()) as source:
        if watch:
            from rich.console import Console

            from autoglm_elastic.observe.watch import watch as go_on

            go_on(source, Console(), as_json=as_json)
            return
        from autoglm_elastic.observe.status import lines

        told = source.status()
        _json(told) if as_json else _lines(lines(told))


@app.command()
def simulate(
    seeds: Annotated[int, typer.Option(help="How many simulated jobs.")] = 1000,
    seed: Annotated[int | None, typer.Option(help="Only this one: replays a failure.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of each job; default: by seed.")] = None,
    plant: Annotated[str | None, typer.Option(help="Plant this bug, to see that it is found.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Print every event.")] = False,
    growth: Annotated[
        bool,
        typer.Option("--growth", help="Instead: what a recovery and a snapshot cost by number of nodes."),
    ] = False,
    sizes: Annotated[str, typer.Option(help="With --growth: numbers of nodes.")] = "16,64,256,1024,4096",
    png: Annotated[Path | None, typer.Option(help="With --growth: draw it into FILE.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --growth: JSON instead of tables.")] = False,
) -> int:
    """Run the core against thousands of simulated faults and check the invariants."""
    if growth:
        from autoglm_elastic.bench import growth as room

        found = list(room.rows(room.sizes(sizes)))
        if png is not None:
            room.draw(png, found)
        _json(found) if as_json else _lines(room.lines(found))
        return ExitCode.DONE
    from autoglm_elastic.sim.campaign import Campaign

    count, first = (seeds, 0) if seed is None else (1, seed)
    campaign = Campaign(seeds=count, first_seed=first, nodes=nodes, plant=plant, trace=trace)
    _lines(campaign.lines())
    return ExitCode.DONE if campaign.failed is None else ExitCode.FAILED


@app.command()
def config(
    file: ConfigFile = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of such a file instead.")] = False,
) -> None:
    """Print every setting with its value and where it came from; the output is a file for --config."""
    from autoglm_elastic import settings

    if schema:
        print(settings.json_schema(), end="")
        return
    print(settings.to_yaml(settings.explain(_settings(file, overrides or ()))), end="")


def _settings(file: Path | None, overrides: Iterable[str]) -> Loaded:
    from autoglm_elastic import settings

    return settings.load(file, os.environ, [settings.override(text) for text in overrides])


@contextlib.contextmanager
def _source(run: str, rdzv_id: str | None, file: Path | None, overrides: Iterable[str]) -> Iterator[Source]:
    from autoglm_elastic.agent import onlooker
    from autoglm_elastic.agent.run_dir import check_format
    from autoglm_elastic.observe.status import RunDirectorySource

    if not onlooker.is_address(run):
        if rdzv_id is not None:
            raise UsageError("--rdzv-id with a run directory", do="leave it out, or give the job's store")
        check_format(run)
        yield RunDirectorySource(run)
        return
    if rdzv_id is None:
        raise UsageError(f"store {run} without --rdzv-id", do="give the one that the job's agents got")
    with contextlib.closing(onlooker.reach(run, rdzv_id, _settings(file, overrides).settings)) as store:
        try:
            with contextlib.closing(onlooker.Onlooker(store, rdzv_id)) as source:
                yield source
        except StoreUnavailable as error:
            raise PlatformError(
                f"the store at {run} does not answer any more: {error}", do="look into the run directory"
            ) from error


def _one_line(error: Any) -> str:
    return " ".join(error.format_message().split()).rstrip(".")


def _lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _json(told: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())


if __name__ == "__main__":
    sys.exit(main())
