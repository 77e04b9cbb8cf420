"""From a settings file and a command line to one validated `Settings`, or to an error that lists what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ..common.errors import SettingsError
from ..common.paths import find
from .keys import Path, advice, resolve
from .model_schema import GroupSettings
from .overrides import COMMAND_LINE, apply
from .schema import Settings
from .values import describe, shown
from .yaml_text import parse

MOST_PROBLEMS = 10

LONGEST_KEY = 100
"""Characters of one part of a dotted key in a message."""


def load(config_path: str, overrides: Sequence[str] = ()) -> Settings:
    """Read a settings file and put the overrides of a command line over it.

    Args:
        config_path: YAML file, looked up from the current folder, then from the package's.
        overrides: `--dotted.key value` and `--dotted.key=value` as they stand on the command line.

    Raises:
        SettingsError: the file is missing or not YAML, or keys or values are wrong; every problem is one line that
            gives its source, key, value, and what was expected.
    """
    path = find(config_path, "settings file", "Name another file with --config.")
    tree = parse(_read(path), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: expected `key: value` lines, got {shown(tree)}")
    return _validated(tree, overrides, str(path))


def from_command_line(overrides: Sequence[str]) -> Settings:
    """Settings without a file: the defaults, and over them the overrides of a command line; errors as for `load`."""
    return _validated({}, overrides, "")


def _validated(tree: dict[str, Any], overrides: Sequence[str], file: str) -> Settings:
    touched, problems = apply(tree, list(overrides))
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        problems += [_problem(details, tree, touched, file) for details in error.errors(include_url=False)]
    if problems:
        more = [f"... and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise SettingsError("\n".join([*problems[:MOST_PROBLEMS], *more]))
    settings._file = file
    settings._command_line = frozenset(touched)
    return settings


def _read(path: FilePath) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error


def _problem(details: ErrorDetails, tree: dict[str, Any], touched: set[Path], file: str) -> str:
    """One line for one of pydantic's findings, in the terms of a settings file."""
    place, value = details["loc"], details["input"]
    if details["type"] == "missing" and place and isinstance(place[-1], int):
        place = place[:-1]  # a list that is too short: the list is wrong, not the item it lacks
    names = tuple(str(part) for part in _until_index(place))
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" for part in place).lstrip(".")
    if details["type"] == "extra_forbidden":
        verdict = "unknown key; " + advice(names)
    else:
        verdict = "expected " + _expected(details, place)
    return f"{_source(names, tree, touched, file)}: {dotted} = {shown(value)}: {verdict}"


def _cut(name: str) -> str:
    """A key as a message shows it: those of damaged files may have hundreds of characters."""
    return name if len(name) <= LONGEST_KEY else name[: LONGEST_KEY - 3] + "..."


def _until_index(place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    for index, part in enumerate(place):
        if isinstance(part, int):
            return place[:index]
    return place


def _expected(details: ErrorDetails, place: tuple[int | str, ...]) -> str:
    own_words = str(details.get("ctx", {}).get("error", ""))
    if details["type"] == "value_error" and own_words:
        return own_words
    names = tuple(str(part) for part in _until_index(place))
    section, field = resolve(names)
    if field is not None and place[-1] in GroupSettings.model_fields:
        field = GroupSettings.model_fields[str(place[-1])]
    words = describe(field) if field is not None else "keys and their values" if section else "another value"
    is_number = isinstance(details["input"], int | float) and not isinstance(details["input"], bool)
    return words + (
        "; put quotes around a number that is meant as text" if is_number and details["type"] == "string_type" else ""
    )


def _source(names: Path, tree: dict[str, Any], touched: set[Path], file: str) -> str:
    if any(names[: len(path)] == path for path in touched):
        return COMMAND_LINE
    here: Any = tree
    for name in names:
        if not isinstance(here, dict) or name not in here:
            return f"{file} (default value)"
        here = here[name]
    return file
