"""docs/events.md, drawn from the event classes.

    python -m autoglm_elastic.observe.document > docs/events.md

May touch: the source of `events.py`, for reading. Must never: be needed to run a job.
"""

from __future__ import annotations

import ast
import inspect
import sys

import msgspec

from autoglm_elastic.observe import events

_HEAD = """# Events

Drawn from `observe/events.py` by `python -m autoglm_elastic.observe.document > docs/events.md`.

Every run writes `RUN/events.jsonl`: one JSON object a line, below 4 KiB, appended by every agent of the run.

| key | meaning |
|---|---|
| `wall_time` | seconds since the epoch, by the clock of the host that wrote the line |
| `source` | the node, or node/rank, that it is from |
| `name` | one of the names below; the set is closed |
| `fields` | the fields of that event |

Phases of a recovery (`incident.closed`, `phases_s`), in order: {phases}.
What is derived from the log: `autoglm report RUN`.

`RUN/metrics.jsonl` has one line a committed step, written by rank 0 when the step after it commits: `step`,
`generation`, `wall_time`, `loss`, `world_size`, `values`. `loss` is the mean over the samples of the global
batch; after an incident that of the last step before it is the mean over the samples of those who are left,
and null when nobody is. `values` are as rank 0 gives them. A step that was redone appears again with a newer
generation.

## Events by name
"""


def markdown() -> str:
    """The whole document."""
    phases = ", ".join(f"`{phase}`" for phase in events.PHASES)
    return _HEAD.format(phases=phases) + "".join(_section(name, cls) for name, cls in events.EVENTS.items())


def _section(name: str, cls: type[events.Event]) -> str:
    notes = _field_notes(cls)
    rows = []
    for field in msgspec.structs.fields(cls):
        default = "" if field.required else _default(field)
        kind = str(cls.__annotations__[field.name]).replace("|", "\\|")
        rows.append(f"| `{field.name}` | {kind} | {default} | {notes.get(field.name, '')} |")
    table = "\n".join(["| field | type | default | |", "|---|---|---|---|", *rows])
    return f"\n### `{name}`\n\n{_joined(inspect.getdoc(cls) or '')}\n\n{table}\n"


def _default(field: msgspec.structs.FieldInfo) -> str:
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{value!r}`"


def _field_notes(cls: type[events.Event]) -> dict[str, str]:
    """The string that follows a field in the source, by field."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    notes: dict[str, str] = {}
    name = ""
    for statement in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            notes[name] = _joined(str(statement.value.value))
    return notes


def _joined(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.stdout.write(markdown())
