"""Settings as keyword arguments of a Python function, with the names that they have in settings files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..common.errors import SettingsError
from .model_schema import BudgetSettings, CompressionSettings, ModelSettings
from .values import describe, shown

SEARCH = ("use_permutations", "search", "search_seconds", "sls_iterations", "permutations", "permutation_specs")
BUDGET = ("size", "ratio")


def model_settings(keywords: Mapping[str, Any]) -> ModelSettings:
    """The settings of a network's compression from keyword arguments.

    Args:
        keywords: keys of `model.compression_parameters`, and those of `model` that are about the search; those of
            `BUDGET` are for `budget_settings`.

    Raises:
        SettingsError: a name is unknown, or a value is not what the key takes; names every one.
    """
    known = [*CompressionSettings.model_fields, *SEARCH, *BUDGET]
    problems = []
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            problems.append(f"{name}: unknown setting; " + (f"did you mean {near[0]}?" if near else ", ".join(known)))
    if problems:
        raise SettingsError("\n".join(problems))
    own = {name: value for name, value in keywords.items() if name not in (*SEARCH, *BUDGET)}
    search = {name: value for name, value in keywords.items() if name in SEARCH}
    if isinstance(search.get("permutations"), list | tuple):
        search["permutations"] = [_group(group) for group in search["permutations"]]
    try:
        return ModelSettings.model_validate({"compression_parameters": own, **search})
    except ValidationError as error:
        raise SettingsError("\n".join(_problem(details) for details in error.errors(include_url=False))) from None


def budget_settings(keywords: Mapping[str, Any]) -> BudgetSettings:
    """The wanted size, from the keyword arguments `size` and `ratio` among others.

    Raises:
        SettingsError: one is wrong, or both are given.
    """
    given = {name: keywords[name] for name in BUDGET if keywords.get(name) is not None}
    if len(given) > 1:
        raise SettingsError("size or ratio, not both")
    try:
        return BudgetSettings.model_validate(given)
    except ValidationError as error:
        raise SettingsError("\n".join(_problem(details) for details in error.errors(include_url=False))) from None


def _group(group: Any) -> Any:
    """A group as the settings take it: a map, or an object with parents and children."""
    if hasattr(group, "parents") and hasattr(group, "children"):
        return {"parents": list(group.parents), "children": list(group.children)}
    return group


def _problem(details: Any) -> str:
    place = [part for part in details["loc"] if part != "compression_parameters"]
    name = ".".join(map(str, place))
    fields = {**ModelSettings.model_fields, **CompressionSettings.model_fields, **BudgetSettings.model_fields}
    words = str(details.get("ctx", {}).get("error", "")) if details["type"] == "value_error" else ""
    if not words and len(place) == 1 and place[0] in fields:
        words = describe(fields[str(place[0])])
    return f"{name} = {shown(details['input'])}: expected {words or details['msg']}"
