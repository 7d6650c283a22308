"""A configuration file as plain data. May read that file and nothing else; must never build an object that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from autoglm_elastic.errors import UsageError

FILE_BYTES_MAX: Final = 1 << 20
"""A configuration is a page or two; anything larger is some other file."""


def read(path: Path) -> Any:
    """Raises UsageError for what is no YAML, or gives a key twice."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(
            f"configuration {path}: {error.strerror or error}", valid="a readable YAML file"
        ) from error
    if len(data) > FILE_BYTES_MAX:
        raise UsageError(
            f"configuration {path}: larger than {FILE_BYTES_MAX} bytes", valid="a YAML file of settings"
        )
    try:
        return yaml.load(data, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise UsageError(f"configuration {path}: not valid YAML: {_yaml_problem(error)}") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which plain YAML would silently drop one. Numbers are decimal
    ones: what YAML 1.1 takes for octal (010) or for minutes and seconds (1:30) stays text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _as_number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    if ":" in text or text.lstrip("+-").startswith(tuple(f"0{digit}" for digit in "01234567_bx")):
        return text
    if node.tag.endswith(":int"):
        return loader.construct_yaml_int(node)
    return loader.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _as_number)


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {problem}" if mark else problem
