"""The demo from beginning to end: start, kill a worker, kill an agent, bring it back, compare, tell."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from autoglm_elastic.bench.demo import compare
from autoglm_elastic.bench.demo.acts import Act, Acts
from autoglm_elastic.bench.demo.agents import Agents, free_port
from autoglm_elastic.errors import ExitCode, PlatformError, UsageError
from autoglm_elastic.observe import live, plot, report, text

STEPS: Final = 300
STEPS_MIN: Final = 120
"""Fewer would be over before the second agent is back."""
NPROC: Final = 2
SILENCE_S_MAX: Final = 60.0
"""No step and no message for so long: something is wrong, and the demo says so instead of waiting on."""
RESTARTS: Final = 3
EXAMPLE: Final = "autoglm_elastic.examples.gpt"
RUNS: Final = Path("runs")


def run(*, steps: int = STEPS, out: Path | None = None, seed: int = 0, plain: bool = False) -> int:
    """Run the demo. Returns 0 when everything that it promises was seen, else 1.

    Args:
        steps: optimizer steps of either run.
        out: a folder that does not exist or is empty; by default a new one under `runs/`.
        seed: of the parameters and of the order of samples.
        plain: lines instead of the live view, also on a terminal.

    Raises UsageError for a folder in use or too few steps, PlatformError when the job fails.
    """
    if steps < STEPS_MIN:
        raise UsageError(f"--steps {steps}", valid=f"at least {STEPS_MIN}")
    return Story(_folder(out), steps, seed, Console(), plain=plain).play()


class Story:
    """One demo in the folder `out`: `run/` is the job, `undisturbed/` what it is compared with."""

    def __init__(self, out: Path, steps: int, seed: int, console: Console, *, plain: bool) -> None:
        self.out, self.steps, self.seed = out, steps, seed
        self.run_dir, self.undisturbed_dir = out / "run", out / "undisturbed"
        self._console, self._plain = console, plain

    def play(self) -> int:
        """All of it; the exit code."""
        started = time.monotonic()
        self._say(f"A small GPT on 2 agents with {NPROC} workers each, {self.steps} steps, in {self.out}.")
        acts = self._disturbed()
        self._say("The same training again, undisturbed, for comparison.")
        self._undisturbed()
        return self._tell(acts, started)

    def _disturbed(self) -> Acts:
        endpoint = f"localhost:{free_port()}"
        with Agents() as agents:

            def start(node: str) -> None:
                meeting = ["--nnodes=1:2", f"--nproc-per-node={NPROC}", "--rdzv-backend=autoglm"]
                meeting += [f"--rdzv-endpoint={endpoint}", "--rdzv-id=demo", f"--rdzv-conf=node={node}"]
                meeting.append(f"--max-restarts={RESTARTS}")
                agents.start(node, [*meeting, *self._training(self.run_dir)], self.out / f"{node}.log")

            follower = live.Follower(self.run_dir)
            acts = Acts(agents, follower.view, self.run_dir, self.steps, start)
            start("node-a")
            start("node-b")
            self._follow(agents, follower, "autoglm demo", acts.in_order())
        return acts

    def _undisturbed(self) -> None:
        meeting = ["--standalone", f"--nproc-per-node={2 * NPROC}"]
        with Agents() as agents:
            training = self._training(self.undisturbed_dir)
            agents.start("undisturbed", [*meeting, *training], self.out / "undisturbed.log")
            self._follow(agents, live.Follower(self.undisturbed_dir), "undisturbed, for comparison", ())

    def _training(self, run_dir: Path) -> list[str]:
        snapshots = f"--set=snapshot.interval_steps={max(1, self.steps // 6)}"
        script = ["-m", EXAMPLE, f"--steps={self.steps}", f"--seed={self.seed}", f"--out={_result(run_dir)}"]
        return [f"--run-dir={run_dir}", snapshots, *script]

    def _follow(self, agents: Agents, follower: live.Follower, title: str, acts: Sequence[Act]) -> None:
        """Show the job until its agents have ended; do each act, in order, once its time has come."""
        view, left = follower.view, list(acts)
        newest, heard = (view.step, 0), time.monotonic()
        with live.display(self._console, title=title, steps=self.steps, plain=self._plain) as shown:
            while True:
                over = not agents.running()  # looked at first: what they wrote last is still read
                new = follower.refresh()
                shown.show(view, new)
                agents.check()
                if over:
                    return
                if left and left[0]():
                    left.pop(0)
                if new or view.step != newest[0]:
                    newest, heard = (view.step, len(new)), time.monotonic()
                elif time.monotonic() - heard > SILENCE_S_MAX:
                    raise PlatformError(
                        f"nothing has happened for {SILENCE_S_MAX:.0f} s at step {view.step}",
                        do=f"see the logs in {self.out}",
                    )
                agents.wait(live.REFRESH_S)

    def _tell(self, acts: Acts, started: float) -> int:
        told = report.build(self.run_dir)
        disturbed = compare.Outcome.read(self.run_dir, _result(self.run_dir))
        undisturbed = compare.Outcome.read(self.undisturbed_dir, _result(self.undisturbed_dir))
        picture = plot.loss_curve(
            self.run_dir / "loss.png",
            told,
            disturbed.steps,
            undisturbed=undisturbed.steps,
            title=f"A small GPT, {self.steps} steps: a worker killed, an agent killed, the agent back",
        )
        self._say("")
        for line in text.lines(told):
            self._say(line)
        self._say("")
        promises = compare.promises(
            told,
            steps=self.steps,
            workers=2 * NPROC,
            workers_gone_s=acts.workers_gone_s,
            disturbed=disturbed,
            undisturbed=undisturbed,
        )
        for promise in promises:
            self._console.print(
                "  ✓" if promise.kept else "  ✗", style="green" if promise.kept else "red", end=" "
            )
            self._say(promise.text)
        self._say("")
        self._say(f"picture   {picture}")
        self._say(f"run       {self.run_dir} (autoglm report {self.run_dir})")
        self._say(f"took      {text.duration(time.monotonic() - started)}")
        return ExitCode.DONE if all(promise.kept for promise in promises) else ExitCode.FAILED

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _result(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.json")


def _folder(out: Path | None) -> Path:
    """The output folder, created. Raises UsageError when it holds something already."""
    if out is None:
        names = itertools.chain(["demo"], (f"demo-{number}" for number in itertools.count(2)))
        out = next(RUNS / name for name in names if not (RUNS / name).exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is in use", valid="a folder that does not exist or is empty")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error
    return out
