"""The one tree of settings: defaults < YAML file < environment < flags.

For whoever needs a number that a person may want to change. May read a configuration file and nothing else;
must never start, create or change anything. Every field is here once: its type, range, default and meaning;
checks, environment names, `--print-config` and the reference in the docs are derived from it.

A YAML file has a mapping per group; the environment has `AUTOGLM_<GROUP>_<FIELD>`; a flag is
`--set group.field=value`.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from autoglm_elastic import _setting_words as _words
from autoglm_elastic import _yaml
from autoglm_elastic.core.retention import Retention
from autoglm_elastic.errors import UsageError

ENVIRONMENT_PREFIX: Final = "AUTOGLM_"


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A group of settings."""


class Membership(_Group, frozen=True):
    """Who belongs to a generation, and how long to wait for whom."""

    lease_s: Annotated[
        float,
        Meta(ge=0.2, le=300, description="A node that has not renewed its lease for so long counts as dead."),
    ] = 2.0
    join_window_s: Annotated[
        float,
        Meta(
            ge=0,
            le=3600,
            description="The first round closes below the maximum when nobody joined for so long.",
        ),
    ] = 2.0
    join_timeout_s: Annotated[
        float,
        Meta(gt=0, le=86400, description="Below the minimum of nodes for so long ends the job."),
    ] = 900.0


class Store(_Group, frozen=True):
    """The coordination store."""

    lost_limit_s: Annotated[
        float,
        Meta(
            gt=0,
            le=86400,
            description="A store that has not come back for so long ends the job, with a snapshot.",
        ),
    ] = 600.0
    insecure: Annotated[
        bool,
        Meta(
            description="Reach a store over the network without TLS: whoever reaches it can command the job."
        ),
    ] = False


class Tls(_Group, frozen=True):
    """Who we are to the store, and to whom it belongs (docs/tls.md)."""

    ca: Annotated[
        str,
        Meta(max_length=4096, description="PEM file with the CA of everybody's certificate; empty: no TLS."),
    ] = ""
    cert: Annotated[
        str, Meta(max_length=4096, description="PEM file with our certificate, for server and client.")
    ] = ""
    key: Annotated[
        str,
        Meta(max_length=4096, description="PEM file with its key, without a password; not open to others."),
    ] = ""
    server_name: Annotated[
        str,
        Meta(
            max_length=253,
            description="What the certificate of the store is made out to; empty: the host in its address.",
        ),
    ] = ""


class Recovery(_Group, frozen=True):
    """From a fault back to a committed step."""

    unwind_limit_s: Annotated[
        float,
        Meta(
            gt=0, le=3600, description="A survivor that has not left a broken generation by then is replaced."
        ),
    ] = 15.0
    group_timeout_s: Annotated[
        float,
        Meta(gt=0, le=86400, description="Timeout of the collectives and of building process groups."),
    ] = 1800.0


class Snapshot(_Group, frozen=True):
    """When snapshots are taken and how they are written."""

    url: Annotated[
        str,
        Meta(
            max_length=1024,
            description="Where snapshots lie, such as s3://bucket/run (docs/storage.md); "
            "empty: in the run directory.",
        ),
    ] = ""
    interval_steps: Annotated[
        int, Meta(ge=0, description="A snapshot every so many steps; 0: by time only.")
    ] = 0
    interval_s: Annotated[
        float,
        Meta(ge=0, description="A snapshot at the first step boundary after so long; 0: by steps only."),
    ] = 60.0
    pack_bytes_max: Annotated[
        int,
        Meta(ge=1 << 16, le=1 << 36, description="Size at which a pack is closed and the next one begun."),
    ] = 1 << 30
    verify_on_load: Annotated[
        bool, Meta(description="Check the digest of every chunk before it is used.")
    ] = True

    keep_last: Annotated[
        int, Meta(ge=0, description="Keep the newest so many snapshots of the lineage; 0: never remove any.")
    ] = 10
    keep_every_steps: Annotated[
        int, Meta(ge=0, description="Also keep one snapshot of every so many steps; 0: none for that reason.")
    ] = 0
    keep_every_hours: Annotated[
        float,
        Meta(ge=0, description="Also keep one snapshot of every so many hours; 0: none for that reason."),
    ] = 1.0
    keep_best: Annotated[
        int, Meta(ge=0, description="Also keep so many snapshots that are best by keep_best_metric.")
    ] = 0
    keep_best_metric: Annotated[str, Meta(description="Name of a metric that is given to commit.")] = ""
    keep_best_is: Annotated[
        Literal["min", "max"], Meta(description="Whether the best is the smallest or the largest.")
    ] = "min"
    keep_abandoned_hours: Annotated[
        float,
        Meta(ge=0, description="Keep what lies outside of the lineage (rolled back from) for so long."),
    ] = 168.0
    gc_grace_s: Annotated[
        float,
        Meta(
            ge=3600, description="What nothing reaches is removed no earlier: longer than a load or a commit."
        ),
    ] = 7200.0

    def retention(self) -> Retention:
        """What the `keep_` fields say."""
        return Retention(
            keep_last=self.keep_last,
            keep_every_steps=self.keep_every_steps,
            keep_every_hours=self.keep_every_hours,
            keep_best=self.keep_best,
            best_metric=self.keep_best_metric,
            best_is=self.keep_best_is,
            keep_abandoned_hours=self.keep_abandoned_hours,
        )


class Restart(_Group, frozen=True):
    """What counts as progress, which forgives earlier failures; how many may follow each other without any."""

    max_failures: Annotated[
        int,
        Meta(
            ge=0,
            description="A job that commits steps: failures without a new one that do not end it yet "
            "(or --max-restarts, if that is more; for other scripts that alone counts, as under torchrun).",
        ),
    ] = 3

    progress_s: Annotated[
        float,
        Meta(gt=0, description="Where no steps are committed: a group up for so long has made progress."),
    ] = 300.0


class Zygote(_Group, frozen=True):
    """The process that workers are forked from."""

    enabled: Annotated[
        bool, Meta(description="Fork workers from a warm process instead of starting interpreters.")
    ] = True
    preload: Annotated[
        tuple[str, ...],
        Meta(description="Modules to import once, before workers are forked (also --preload)."),
    ] = ()


class Keeper(_Group, frozen=True):
    """The process on each node that makes snapshots durable."""

    memory_max_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Shared memory for staged snapshots on one node; 0: as much as the machine has to spare.",
        ),
    ] = 0
    linger_s: Annotated[
        float,
        Meta(
            ge=0,
            le=86400,
            description="How long it waits for a killed agent or worker to come back before it ends.",
        ),
    ] = 30.0
    nice: Annotated[
        int, Meta(ge=0, le=19, description="How much it yields to the training's processes (as nice).")
    ] = 10


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tree. Durations are seconds (`_s`), sizes are bytes (`_bytes`)."""

    membership: Membership = Membership()
    store: Store = Store()
    tls: Tls = Tls()
    recovery: Recovery = Recovery()
    snapshot: Snapshot = Snapshot()
    restart: Restart = Restart()
    zygote: Zygote = Zygote()
    keeper: Keeper = Keeper()

    def to_json(self) -> str:
        """One line of JSON with every value, for `wire.ENV_SETTINGS`."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Settings:
        """The inverse of `to_json`. Raises `UsageError` for anything that it did not write."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise UsageError(f"settings as JSON: {error}", valid="what Settings.to_json() wrote") from error


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings and, for every dotted name that a source gave, the words for which source."""

    settings: Settings
    provenance: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Field:
    """One setting as the tree declares it."""

    name: str
    type: Any
    default: Any
    description: str

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return ENVIRONMENT_PREFIX + self.name.replace(".", "_").upper()


@dataclass(frozen=True, slots=True)
class Explained:
    """A value and where it came from."""

    name: str
    value: Any
    source: str


def fields() -> Iterator[Field]:
    """Every setting, in the order of the tree."""
    defaults = Settings()
    for group in msgspec.structs.fields(Settings):
        section = getattr(defaults, group.name)
        hints = get_type_hints(type(section), include_extras=True)
        for field in msgspec.structs.fields(type(section)):
            hint = hints[field.name]
            meta = next(extra for extra in get_args(hint)[1:] if isinstance(extra, Meta))
            name = f"{group.name}.{field.name}"
            yield Field(name, hint, getattr(section, field.name), meta.description or "")


_FIELDS: Final = {field.name: field for field in fields()}
_VARIABLES: Final = {field.variable: field for field in _FIELDS.values()}
_GROUP_NAMES: Final = frozenset(group.name.upper() for group in msgspec.structs.fields(Settings))
_LEAVES_WITH_UNIT: Final = frozenset(
    leaf.upper() for leaf in (name.partition(".")[2] for name in _FIELDS) if leaf.endswith(("_s", "_bytes"))
)
_LAUNCH_VARIABLES: Final = frozenset({"AUTOGLM_STORE"})
"""What launch/ is told: the whole name of a group, and no group of settings."""


def load(
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Iterable[tuple[str, str, str]] = (),
) -> Loaded:
    """The settings from all sources, each value checked where it is named.

    Args:
        file: a YAML file, or None.
        environ: environment variables. One that looks like a setting's name and is none is refused; other
            names that begin with `AUTOGLM_` (those of `wire`, or a user's own) are not ours to judge.
        overrides: (dotted name, value as text, words for its source), later ones win; see `override`.

    Raises:
        UsageError: an unreadable file, an unknown name, a wrong type or range; names the place.
    """
    values: dict[str, Any] = {}
    provenance: dict[str, str] = {}

    def put(name: str, value: Any, source: str) -> None:
        values[name] = _checked(_FIELDS[name], value, source)
        provenance[name] = source

    if file is not None:
        for name, value in _read_yaml(Path(file)):
            put(name, value, f"file {file}")
    for variable, text in sorted((environ or {}).items()):
        if variable in _VARIABLES:
            put(_VARIABLES[variable].name, text, f"environment {variable}")
        elif _looks_like_setting(variable):
            raise _unknown_variable(variable)
    for name, text, source in overrides:
        _require_known(name, source)
        put(name, text, source)

    tree: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, _, leaf = name.partition(".")
        tree.setdefault(group, {})[leaf] = value
    return Loaded(msgspec.convert(tree, Settings), provenance)


def override(text: str) -> tuple[str, str, str]:
    """`group.field=value`, as given to `--set`, for `load`. Raises `UsageError` when there is no `=`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}", valid="--set group.field=value, such as --set membership.lease_s=5")
    return name.strip(), value.strip(), f"flag --set {name.strip()}"


def explain(loaded: Loaded) -> list[Explained]:
    """Every setting with its value and source (`default` when nobody set it), in the order of the tree."""
    return [
        Explained(name, _value(loaded.settings, name), loaded.provenance.get(name, "default"))
        for name in _FIELDS
    ]


def reference() -> str:
    """The settings as a Markdown table, for the docs."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    lines += [
        f"| `{field.name}` | `{show(field.default)}` | {field.description} |" for field in _FIELDS.values()
    ]
    return "\n".join(lines) + "\n"


def show(value: Any) -> str:
    """A value as one would write it in the YAML file."""
    return msgspec.json.encode(value).decode()


def to_yaml(explained: Iterable[Explained]) -> str:
    """The settings as a configuration file that gives the same values, each with its source as a comment."""
    lines: list[str] = []
    group = ""
    for item in explained:
        section, _, leaf = item.name.partition(".")
        if section != group:
            group = section
            lines.append(f"{group}:")
        lines.append(f"{f'  {leaf}: {show(item.value)}':<40}  # {item.source}")
    return "\n".join(lines) + "\n"


def json_schema() -> str:
    """The JSON schema of a configuration file, for editors and other tools (docs/settings.schema.json)."""
    schema = msgspec.json.schema(Settings)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "autoglm-run --config",
        **schema,
    }
    return msgspec.json.format(msgspec.json.encode(schema), indent=2).decode() + "\n"


def defaults_yaml() -> str:
    """`configs/default.yaml`: every setting at its default, under its meaning."""
    lines = [
        "# Every setting at its default. Give a file with the ones to change: autoglm-run --config FILE …"
    ]
    group = ""
    for field in _FIELDS.values():
        section, _, leaf = field.name.partition(".")
        if section != group:
            group = section
            lines += ["", f"{group}:"]
        lines += [f"  # {field.description}", f"  {leaf}: {show(field.default)}"]
    return "\n".join(lines) + "\n"


def _value(settings: Settings, name: str) -> Any:
    group, _, leaf = name.partition(".")
    return getattr(getattr(settings, group), leaf)


def _checked(field: Field, value: Any, source: str) -> Any:
    if isinstance(value, str) and field.type.__origin__ == tuple[str, ...]:
        value = [item for item in (part.strip() for part in value.split(",")) if item]
    try:
        checked = msgspec.convert(value, field.type, strict=False)
        if not isinstance(checked, float) or math.isfinite(checked):
            return checked
    except msgspec.ValidationError:
        pass
    raise UsageError(
        f"{field.name} is {_words.quoted(value)} ({source})", valid=_words.valid(field.name, field.type)
    )


def _require_known(name: str, source: str) -> None:
    if name not in _FIELDS:
        raise UsageError(f"{name}: no such setting ({source})", do=_words.nearest(name, _FIELDS))


def _looks_like_setting(variable: str) -> bool:
    name = variable.upper()
    if not name.startswith(ENVIRONMENT_PREFIX) or name in _LAUNCH_VARIABLES:
        return False
    rest = name.removeprefix(ENVIRONMENT_PREFIX)
    return (
        rest.partition("_")[0] in _GROUP_NAMES
        or rest in _LEAVES_WITH_UNIT
        or bool(difflib.get_close_matches(name, _VARIABLES, cutoff=0.8))
    )


def _unknown_variable(variable: str) -> UsageError:
    got = f"environment variable {variable}"
    if variable.upper().removeprefix(ENVIRONMENT_PREFIX) in _GROUP_NAMES:
        one = next(name for name in _VARIABLES if name.startswith(f"{variable.upper()}_"))
        return UsageError(f"{got}: a group of settings", valid=f"a variable for each of them, such as {one}")
    return UsageError(f"{got}: no such setting", do=_words.nearest(variable, _VARIABLES))


def _read_yaml(path: Path) -> Iterator[tuple[str, Any]]:
    document = _yaml.read(path)
    if document is None:
        return
    source = f"file {path}"
    if not isinstance(document, dict):
        raise UsageError(
            f"configuration {path}: {type(document).__name__}", valid="a mapping of groups to settings"
        )
    groups = {name.partition(".")[0] for name in _FIELDS}
    for group, section in document.items():
        if group in _FIELDS:
            outer, _, leaf = group.partition(".")
            raise UsageError(
                f"{group}: a setting and no group ({source})", valid=f"{outer}: {{{leaf}: {section}}}"
            )
        if group not in groups:
            raise UsageError(
                f"{group}: no such group of settings ({source})", do=_words.nearest(str(group), groups)
            )
        if section is None:
            continue
        if not isinstance(section, dict):
            raise UsageError(f"{group} is {section!r} ({source})", valid="a mapping of settings")
        for leaf, value in section.items():
            name = f"{group}.{leaf}"
            _require_known(name, source)
            yield name, value
