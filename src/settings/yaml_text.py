"""YAML as settings need it: safe, no duplicate keys, keys are always text, and every error says where."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..common.errors import SettingsError

_INT, _FLOAT, _TIMESTAMP = ("tag:yaml.org,2002:" + name for name in ("int", "float", "timestamp"))


MOST_KEYS = 10_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without its traps: repeated keys, `010` (octal), `1:30` (base 60), dates, self-reference."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open_anchors: list[str] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor in self._open_anchors:
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(None, None, f"*{event.anchor} stands inside what it refers to", mark)
        return super().compose_node(parent, index)

    def compose_sequence_node(self, anchor: Any) -> Any:
        self._open_anchors.append(anchor)
        node = super().compose_sequence_node(anchor)
        self._open_anchors.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        self._open_anchors.append(anchor)
        node = super().compose_mapping_node(anchor)
        self._open_anchors.pop()
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a single word or text", key.start_mark)
            if key.value in lines:
                problem = f"the key {key.value!r} stands here a second time (first in line {lines[key.value]})"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"  # a layer may be called 0 or 1.10
        return node

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_KEYS:  # merges of merges multiply
            raise yaml.MarkedYAMLError(None, None, f"more than {MOST_KEYS:,} keys in one place", node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in (_INT, _FLOAT, _TIMESTAMP)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# numbers come back without octal and base 60; nothing here may be wider than PyYAML's own rules, by which `to_yaml`
# quotes
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse(text: str, source: str) -> Any:
    """The value that `text` spells in YAML; `source` names it in errors.

    Raises:
        SettingsError: `text` is not YAML; the message gives source, line and column.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError(f"{source}{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise SettingsError(f"{source}: not usable: brackets are nested too deeply") from error
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # an explicit tag such as `!!int many` reaches Python's own conversions
        raise SettingsError(f"{source}: a value does not fit its YAML type: {str(error).splitlines()[0]}") from error
    finally:
        if loader is not None:
            loader.dispose()
