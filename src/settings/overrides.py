"""Dotted overrides from the command line: `--a.b value` and `--a.b=value`, put into the tree that a file gave."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..common.errors import SettingsError
from .keys import Path, advice, layer_section_of, resolve, section_of
from .schema import Settings
from .section import Section
from .values import is_text, shown
from .yaml_text import parse

COMMAND_LINE = "command line"
Tree = dict[str, Any]


def pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """The (dotted key, text of the value) pairs of a command line.

    Raises:
        SettingsError: an argument is not an override, or an override has no value.
    """
    rest = iter(arguments)
    following = next(rest, None)
    while following is not None:
        argument, following = following, next(rest, None)
        key, equals, text = argument.partition("=")
        if not key.startswith("--") or key == "--":
            raise SettingsError(
                f"{COMMAND_LINE}: {shown(argument)} belongs to no key; write --dotted.key value or --dotted.key=value"
            )
        if not equals:
            if following is None or following.startswith("--"):
                raise SettingsError(f"{COMMAND_LINE}: {key} has no value; write {key} VALUE or {key}=VALUE")
            text, following = following, next(rest, None)
        if not text.strip():
            raise SettingsError(f"{COMMAND_LINE}: {key} has an empty value; write null if you mean none")
        yield key[2:], text


def apply(tree: Tree, arguments: list[str]) -> tuple[set[Path], list[str]]:
    """Put every override into `tree`, in order.

    Returns:
        The paths that were set, and one message for each key that the schema does not have.

    Raises:
        SettingsError: an argument is not an override, has no value, or its value is not YAML.
    """
    touched: set[Path] = set()
    problems: list[str] = []
    for key, text in pairs(arguments):
        value = literal(text) if _holds_text(key) else parse(text, f"{COMMAND_LINE}, value of --{key}")
        try:
            path = locate(key, value)
        except KeyError as error:
            problems.append(f"{COMMAND_LINE}: {key} = {shown(value)}: {error.args[0]}")
        else:
            _put(tree, path, value, touched)
    return touched, problems


def literal(text: str) -> object:
    """What a text on the command line is for a key that holds text: itself, as the shell passed it.

    Only what YAML reads as a number, True or False, or null is that, and quotes around the whole may protect it.
    """
    try:
        value = parse(text, COMMAND_LINE)
    except SettingsError:  # a path need not be YAML
        return text
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    bare = not any(mark in text for mark in "#&!|>*") and not isinstance(value, str | list | dict)
    return value if bare or (quoted and isinstance(value, str)) else text


def _holds_text(key: str) -> bool:
    try:
        _, field = resolve(locate(key))
    except KeyError:  # `apply` says what is wrong with it
        return False
    return field is not None and is_text(field)


def locate(key: str, value: object = None) -> Path:
    """The path of a dotted key, with a layer's name, dots and all, as one part.

    Raises:
        KeyError: the schema has no such key; its argument is a message.
    """
    parts = key.split(".")
    section: type[Section] = Settings
    for index, name in enumerate(parts):
        field = section.model_fields.get(name)
        if field is None:
            raise KeyError(f"unknown key; {advice((*parts[:index], *parts[index:]))}")
        below, layers, rest = section_of(field), layer_section_of(field), parts[index + 1 :]
        if not rest:
            return tuple(parts)
        if layers:
            return (*parts[: index + 1], *_locate_in_layer(tuple(parts[: index + 1]), layers, rest, value))
        if not below:
            raise KeyError(f"{'.'.join(parts[: index + 1])} holds a value, no keys; set it as a whole")
        section = below
    raise AssertionError("a key has at least one part")


def _locate_in_layer(place: Path, section: type[Section], rest: list[str], value: object) -> Path:
    *layer, name = rest
    if name not in section.model_fields:
        if isinstance(value, dict):
            return (".".join(rest),)
        raise KeyError(f"unknown key; {advice((*place, '.'.join(layer), name))}")
    if not "".join(layer):
        raise KeyError(f"the layer's name is missing; write {'.'.join(place)}.LAYER.{name}")
    return ".".join(layer), name


def _put(tree: Tree, path: Path, value: Any, touched: set[Path]) -> None:
    """Set `path` in `tree`; a mapping given for a section or a map of layers merges into what is there."""
    section, field = resolve(path)
    if isinstance(value, dict) and (section or (field and layer_section_of(field))):
        for name, inner in value.items():
            _put(tree, (*path, name), inner, touched)
        if value:
            return
    touched.add(path)
    for part in path[:-1]:
        if tree.get(part) is None:
            tree[part] = {}
        if not isinstance(tree[part], dict):
            return  # the file holds a value where a section belongs, which validation reports
        tree = tree[part]
    if not (value == {} and isinstance(tree.get(path[-1]), dict)):
        tree[path[-1]] = value
