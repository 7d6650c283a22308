"""What the demo promises, checked against what the run directory tells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from autoglm_elastic.observe import metrics
from autoglm_elastic.observe.metrics import Metric
from autoglm_elastic.observe.report import Report
from autoglm_elastic.observe.text import count, duration

EVAL_LOSS_MAX: Final = 0.01
"""Largest difference of the held-out losses, in nats a byte, that counts as "as if nothing had happened". The
order of sums depends on the world, so the last bits may differ; other seeds end 0.04 apart (seeds 0, 1 and 2,
300 steps)."""


@dataclass(frozen=True, slots=True)
class Promise:
    """`kept`, and the sentence with the number that shows it."""

    kept: bool
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One training's end: the JSON that `examples/gpt.py` writes, and its metrics."""

    result: dict[str, Any]
    steps: Sequence[Metric]

    @classmethod
    def read(cls, run_dir: Path, result: Path) -> Outcome:
        return cls(json.loads(result.read_text()), list(metrics.read(run_dir / "metrics.jsonl")))

    @property
    def eval_loss(self) -> float:
        return float(self.result["eval_loss"])


def promises(
    report: Report,
    *,
    steps: int,
    workers: int,
    workers_gone_s: float | None,
    disturbed: Outcome,
    undisturbed: Outcome,
) -> list[Promise]:
    """Every promise of the demo, kept or not."""
    lost = [incident.steps_lost for incident in report.incidents]
    recovered = [incident for incident in report.incidents if incident.closed is not None]
    grown = [change for change in report.changes if change.kind == "growth"]
    snapshots = [note for note in report.snapshots if note.outcome == "committed"]
    return [
        Promise(
            report.status == "done" and report.step == steps,
            f"trained to the end: step {report.step} of {steps}, {report.status}",
        ),
        Promise(
            len(report.incidents) == len(recovered) == 2,
            f"recovered from {len(recovered)} of {count(len(report.incidents), 'incident')}:"
            " a worker killed, an agent killed",
        ),
        Promise(
            bool(lost) and all(number == 0 for number in lost),
            f"steps lost: {', '.join('unknown' if number is None else str(number) for number in lost)}",
        ),
        Promise(
            workers_gone_s is not None,
            f"the killed agent's workers ended with it, after {duration(workers_gone_s)}"
            if workers_gone_s is not None
            else "the killed agent left workers behind",
        ),
        Promise(
            bool(grown) and grown[-1].world_after == workers,
            f"the agent came back and the world grew to {grown[-1].world_after if grown else '?'} workers",
        ),
        Promise(bool(snapshots), f"{count(len(snapshots), 'snapshot')} committed"),
        _comparison(disturbed, undisturbed),
    ]


def _comparison(disturbed: Outcome, undisturbed: Outcome) -> Promise:
    ours, theirs = disturbed.result, undisturbed.result
    difference = abs(disturbed.eval_loss - undisturbed.eval_loss)
    text = f"held-out loss {disturbed.eval_loss:.6f}, undisturbed {undisturbed.eval_loss:.6f}"
    if ours["digest"] == theirs["digest"]:
        return Promise(True, f"{text}: the parameters are equal to the last bit")
    curve = curve_difference(disturbed, undisturbed)
    along = "" if curve is None else f", loss curves by at most {curve:.1e}"
    return Promise(
        difference <= EVAL_LOSS_MAX,
        f"{text}: apart by {difference:.1e}{along} (the same samples in the same order, but"
        " two workers add up in another order than four)",
    )


def curve_difference(disturbed: Outcome, undisturbed: Outcome) -> float | None:
    """Largest difference of the two loss curves, None when they cannot be compared.

    A step's loss is the mean over its global batch, whatever the world.
    """
    theirs = {m.step: m.loss for m in metrics.lineage(undisturbed.steps)}
    differences = [
        abs(metric.loss - other)
        for metric in metrics.lineage(disturbed.steps)
        if metric.loss is not None and (other := theirs.get(metric.step)) is not None
    ]
    return max(differences, default=None)
