"""The simulator: thousands of seeds are clean, equal seeds tell the same story, and every planted bug is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_elastic.errors import UsageError
from autoglm_elastic.sim import Fault, SimConfig, run, search
from autoglm_elastic.sim.campaign import Campaign
from autoglm_elastic.sim.plants import PLANTS, planted

SCENARIOS = Path(__file__).parent / "scenarios"

CALM = SimConfig(steady=True, nodes=2, nodes_max=2, workers=1, steps=8, snapshot_every=2)

STORIES = {
    "the coordinator dies between the entry and the hints": SimConfig(
        steady=True, nodes=2, nodes_max=2, workers=1, steps=4, snapshot_every=2,
        faults=(Fault("kill-worker", "rank0", when="disk: entry"),),
    ),
    "a paused coordinator of an old generation wakes up": SimConfig(
        steady=True, nodes=2, nodes_max=2, workers=1, steps=4, snapshot_every=2,
        faults=(Fault("pause-node", "rank0", when="disk: manifest", duration_s=8.0),),
    ),
    "the fence holds against an entry that comes late": SimConfig(
        steady=True, nodes=2, nodes_max=2, workers=1, steps=6, snapshot_every=2, sharded=True,
        faults=(
            Fault("pause-node", "rank0", when="disk: manifest of 000000000001-g0", duration_s=5.0),
            Fault("kill-worker", "b.0", when="disk: entry 000000000001-g0"),
        ),
    ),
    "a node is lost and returns": SimConfig(
        steady=True, nodes=2, nodes_max=2, workers=1, steps=8, snapshot_every=4,
        faults=(Fault("kill-node", "b", at_s=3.5, duration_s=5.0),),
    ),
    "a node that went down is reported by another first": SimConfig(
        steady=True, nodes=3, nodes_max=3, workers=1, steps=6, snapshot_every=9,
        faults=(
            Fault("kill-node", "b", at_s=2.5, duration_s=30.0),
            Fault("kill-worker", "c.0", when="fault: node b is down"),
        ),
    ),
    "the budget is exhausted": SimConfig(
        steady=True, nodes=1, nodes_max=1, workers=2, steps=4, snapshot_every=9, max_restarts=1,
        faults=(
            Fault("kill-worker", "a.0", when="seals generation", nth=1),
            Fault("kill-worker", "a.1", when="seals generation", nth=2),
            Fault("kill-worker", "a.0", when="plans: ", nth=1),
            Fault("kill-worker", "a.1", when="plans: ", nth=2),
            Fault("kill-worker", "a.0", when="plans: ", nth=3),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_stories_are_told_as_written_down(story: str) -> None:
    """After a change that is meant: write the new transcript down, and read it."""
    result = run(1, STORIES[story])
    assert result.ok, result.violation
    told = "\n".join((f"# {story}", *result.trace)) + "\n"
    written = SCENARIOS / (story.replace(" ", "_") + ".txt")
    assert told == written.read_text(), told


def test_an_undisturbed_job_ends_and_saves() -> None:
    result = run(0, CALM)
    assert (result.end, result.violation) == ("done", None)
    assert result.counts["snapshot commit"] >= 2


def test_equal_seeds_tell_the_same_story() -> None:
    assert run(17).trace_hash == run(17).trace_hash
    assert run(17).trace_hash != run(18).trace_hash


def test_thousands_of_seeds_break_no_invariant() -> None:
    failed = search(range(4000))
    assert failed is None, f"autoglm simulate --seed {failed.seed} --trace: {failed.violation}"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    failed = search(range(3000), core=planted(name))
    assert failed is not None, f"{name} ({PLANTS[name].what}) stayed hidden"
    assert failed.violation is not None
    assert failed.violation.name in PLANTS[name].breaks, failed.violation
    again = run(failed.seed, failed.config, planted(name))
    assert again.trace_hash == failed.trace_hash, "a seed that fails must fail again"


def test_a_campaign_tells_how_to_see_a_failure_again() -> None:
    campaign = Campaign(seeds=50, plant="commit-before-votes")
    lines = list(campaign.lines())
    assert campaign.failed is not None
    assert (
        lines[-1]
        == f"again: autoglm simulate --seed {campaign.failed.seed} --plant commit-before-votes --trace"
    )


def test_a_clean_campaign_says_what_it_went_through() -> None:
    campaign = Campaign(seeds=20)
    assert list(campaign.lines())[-1].startswith("20 seeds, ")
    assert campaign.failed is None


def test_an_unknown_plant_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="mixed-steps"):
        Campaign(seeds=1, plant="no-such-bug")
