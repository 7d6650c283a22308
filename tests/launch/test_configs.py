"""configs/: every file is accepted, says what it changes, and stands in the page; the schema of such files."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from autoglm_elastic import settings
from autoglm_elastic.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMA = REPOSITORY / "docs" / "settings.schema.json"
CONFIGS = sorted(path for path in (REPOSITORY / "configs").glob("*.yaml") if path.name != "default.yaml")
CHOICES = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)

FOR = {
    "laptop": "a laptop or a workstation",
    "node-8gpu": "one machine with 8 GPUs",
    "cluster-small": "2 to 16 nodes",
    "cluster-large": "hundreds of nodes",
    "preemptible": "machines that come and go",
}
UNITS = ("_s", "_hours", "_steps", "bytes", "bytes_max")
PLAIN_NUMBERS = {"snapshot.keep_last", "snapshot.keep_best", "restart.max_failures", "keeper.nice"}
"""Counts, and what the system calls a number."""


def table() -> str:
    """The rows of the page."""

    def row(name: str) -> str:
        values = settings.load(REPOSITORY / "configs" / f"{name}.yaml").settings
        member, shots = values.membership, values.snapshot
        archive = f", one every {shots.keep_every_hours:g} h" if shots.keep_every_hours else ""
        return (
            f"| [{name}.yaml]({name}.yaml) | {FOR[name]} | {member.join_window_s:g} s after the last node came "
            f"| {member.lease_s:g} s | every {shots.interval_s:g} s | {shots.keep_last}{archive} "
            f"| {values.restart.max_failures} |\n"
        )

    return "".join(map(row, FOR))


def test_the_files_are_those_of_the_page() -> None:
    assert {path.stem for path in CONFIGS} == set(FOR)
    assert table() in (REPOSITORY / "configs" / "README.md").read_text()


@CHOICES
def test_a_file_is_accepted_and_its_values_count(path: Path) -> None:
    loaded = settings.load(path)
    given = {
        f"{group}.{leaf}": value
        for group, section in yaml.safe_load(path.read_text()).items()
        for leaf, value in section.items()
    }
    assert set(loaded.provenance) == set(given)
    values = {item.name: item.value for item in settings.explain(loaded)}
    assert {name: values[name] for name in given} == given


@CHOICES
def test_what_a_file_asks_for_fits_together(path: Path) -> None:
    values = settings.load(path).settings
    assert values.membership.lease_s < values.recovery.unwind_limit_s < values.recovery.group_timeout_s
    assert values.membership.join_window_s < values.membership.join_timeout_s


def test_the_published_schema_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config", "--schema"]) == 0
    assert capsys.readouterr().out == SCHEMA.read_text(), (
        "run: autoglm config --schema >docs/settings.schema.json"
    )


@pytest.mark.parametrize(
    "path", [*CONFIGS, REPOSITORY / "configs" / "default.yaml"], ids=lambda path: path.stem
)
def test_the_schema_accepts_the_files(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize(
    "text", ["membership: {lese_s: 5}", "membrship: {}", "membership: {lease_s: 0}", "keeper: {nice: high}"]
)
def test_the_schema_refuses_what_the_code_refuses(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), json.loads(SCHEMA.read_text()))


def test_numbers_have_their_unit_in_the_name() -> None:
    numbers = [item for item in settings.fields() if type(item.default) in (int, float)]
    assert len(numbers) > 10
    assert [item.name for item in numbers if not item.name.endswith(UNITS)] == sorted(
        PLAIN_NUMBERS, key=[item.name for item in numbers].index
    )
