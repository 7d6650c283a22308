"""Settings: order of the sources, refusals that name the place, and the file in configs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_elastic import _yaml, settings
from autoglm_elastic.errors import ExitCode, UsageError, in_one_line
from autoglm_elastic.settings import Settings, load, override

CONFIGS = Path(__file__).parents[2] / "configs"


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, "membership: {lease_s: 3, join_window_s: 4, join_timeout_s: 5}\nsnapshot:\n")
    environ = {"AUTOGLM_MEMBERSHIP_JOIN_WINDOW_S": "40", "AUTOGLM_MEMBERSHIP_JOIN_TIMEOUT_S": "50"}
    loaded = load(file, environ, [override("membership.join_timeout_s=500")])

    assert loaded.settings.membership == settings.Membership(lease_s=3, join_window_s=40, join_timeout_s=500)
    sources = {item.name: item.source for item in settings.explain(loaded)}
    assert sources["membership.lease_s"] == f"file {file}"
    assert sources["membership.join_window_s"] == "environment AUTOGLM_MEMBERSHIP_JOIN_WINDOW_S"
    assert sources["membership.join_timeout_s"] == "flag --set membership.join_timeout_s"
    assert sources["zygote.enabled"] == "default"


def test_text_becomes_the_type_of_the_field() -> None:
    loaded = load(
        environ={
            "AUTOGLM_ZYGOTE_PRELOAD": "numpy, json",
            "AUTOGLM_ZYGOTE_ENABLED": "false",
            "AUTOGLM_RUN_DIR": "x",
        },
        overrides=[override("snapshot.interval_steps=10")],
    )
    assert loaded.settings.zygote == settings.Zygote(enabled=False, preload=("numpy", "json"))
    assert loaded.settings.snapshot.interval_steps == 10


def test_json_round_trip() -> None:
    loaded = load(overrides=[override("zygote.preload=a,b"), override("membership.lease_s=7")])
    assert Settings.from_json(loaded.settings.to_json()) == loaded.settings
    with pytest.raises(UsageError, match="lease"):
        Settings.from_json('{"membership": {"lease": 1}}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "membership: {lese_s: 5}",
            "membership.lese_s: no such setting .*config.yaml.*mean membership.lease_s",
        ),
        ("membrship: {}", "membrship: no such group .*config.yaml.*mean membership"),
        (
            "membership: {lease_s: -1}",
            r"membership.lease_s is -1 \(file .*config.yaml\); valid: a number of seconds from 0.2 up to 300,",
        ),
        ("membership: {lease_s: .inf}", "membership.lease_s is inf"),
        ("membership: {lease_s: .nan}", "membership.lease_s is nan"),
        ("membership: {lease_s: soon}", "membership.lease_s is 'soon'.*valid: a number of seconds"),
        ("snapshot: {interval_steps: 1.5}", "interval_steps is 1.5.*valid: a whole number of steps from 0"),
        ("snapshot: {verify_on_load: 7}", "verify_on_load is 7.*valid: true or false"),
        ("zygote: {preload: [1]}", r"preload is \[1\].*valid: names, such as"),
        ("membership: {lease_s: 5s}", "lease_s is '5s'.*a number of seconds .*, without a unit"),
        ("membership: {lease_s: 1:30}", "lease_s is '1:30'.*a number of seconds"),
        ("snapshot: {keep_last: 010}", "keep_last is '010'.*a whole number"),
        ("snapshot: {pack_bytes_max: 1GiB}", "'1GiB'.*a whole number of bytes from 65536"),
        ("snapshot: {keep_best_is: MIN}", "keep_best_is is 'MIN'.*valid: min or max"),
        ("snapshot: {lease_s: 3}", "snapshot.lease_s: no such setting.*mean membership.lease_s"),
        ("snapshot: {interval_stepz: 3}", "snapshot.interval_stepz: no such.*mean snapshot.interval_steps"),
        ("snapshot: {Interval_S: 3}", "snapshot.Interval_S: no such.*mean snapshot.interval_s"),
        (
            "snapshot: {compression: zstd}",
            "no such setting .*do: autoglm config --schema lists all that this",
        ),
        ("membership.lease_s: 5", "a setting and no group.*valid: membership: {lease_s: 5}"),
        ("membership: 3", "membership is 3"),
        ("[1, 2]", "list; valid: a mapping"),
        ("a: [", "not valid YAML: line 1"),
        ("membership:\n  lease_s: 1\n  lease_s: 2\n", "line 2: 'lease_s' is given twice"),
        ("? [a]\n: 1", "not valid YAML"),
        (b"\x80 not UTF-8", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        (b"#" * (_yaml.FILE_BYTES_MAX + 1), "larger than"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("AUTOGLM_MEMBERSHIP_LESE_S", "AUTOGLM_MEMBERSHIP_LEASE_S"),
        ("AUTOGLM_MEMBERSHP_LEASE_S", "AUTOGLM_MEMBERSHIP_LEASE_S"),
        ("AUTOGLM_LEASE_S", "AUTOGLM_MEMBERSHIP_LEASE_S"),
        ("autoglm_membership_lease_s", "AUTOGLM_MEMBERSHIP_LEASE_S"),
        ("AUTOGLM_SNAPSHOT_CODEC", "autoglm config --schema lists all"),
    ],
)
def test_a_misspelt_variable_is_refused(variable: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"{variable}: no such setting.*{hint}"):
        load(environ={variable: "1"})


def test_a_variable_for_a_whole_group_is_refused() -> None:
    with pytest.raises(UsageError, match=r"AUTOGLM_ZYGOTE: a group.*such as AUTOGLM_ZYGOTE_ENABLED"):
        load(environ={"AUTOGLM_ZYGOTE": "{}"})
    load(environ={"AUTOGLM_STORE": "etcd://h", "AUTOGLM_PORT": "1", "AUTOGLM_LEAVE_S": "3"})  # of launch/


def test_a_line_stays_a_line_whatever_it_quotes(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, '"a\\nb\\e[31m": 1'))
    assert in_one_line(caught.value).startswith(r"a b\x1b[31m: no such group")
    with pytest.raises(UsageError) as caught:
        load(overrides=[override("membership.lease_s=" + "x" * 9999)])
    assert len(str(caught.value)) < 300


def test_flags_without_a_value_or_a_name_are_refused() -> None:
    with pytest.raises(UsageError, match=r"group\.field=value"):
        override("membership.lease_s")
    with pytest.raises(UsageError, match=r"mean membership\.lease_s"):
        load(overrides=[override("lease_s=3")])


def test_a_printed_configuration_can_be_loaded(tmp_path: Path) -> None:
    loaded = load(overrides=[override("zygote.preload=a,b"), override("membership.lease_s=7")])
    printed = settings.to_yaml(settings.explain(loaded))
    assert load(write(tmp_path, printed)).settings == loaded.settings


def test_the_file_in_configs_is_the_defaults() -> None:
    """Regenerate it with settings.defaults_yaml()."""
    assert (CONFIGS / "default.yaml").read_text() == settings.defaults_yaml()
    assert load(CONFIGS / "default.yaml").settings == Settings()


def test_every_setting_says_what_it_means() -> None:
    for field in settings.fields():
        assert field.description.endswith("."), field.name
        assert f"`{field.name}`" in settings.reference()
