"""What each operator does to channels: one table, keyed by the operator's name."""

from __future__ import annotations

from typing import Any

import torch

from ..call import Rule
from .convolution import CONVOLUTIONS
from .joins import JOINS
from .moves import MOVES
from .norms import NORMS
from .pointwise import POINTWISE, pointwise
from .products import PRODUCTS
from .reductions import REDUCTIONS
from .spatial import SPATIAL

FACTORIES = frozenset(
    (
        *("zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros"),
        *("new_ones", "new_empty", "new_full", "empty_strided", "new_empty_strided"),
    )
)
"""Operators whose result has the same value everywhere, so that whatever joins it names its channels."""

RULES: dict[str, Rule] = {
    **MOVES,
    **POINTWISE,
    **CONVOLUTIONS,
    **PRODUCTS,
    **NORMS,
    **SPATIAL,
    **REDUCTIONS,
    **JOINS,
}


def rule_for(func: Any) -> Rule | None:
    """The rule of an operator; None: there is none."""
    if "out" in func._overloadname.split("_"):
        return None
    found = RULES.get(func.overloadpacket.__name__)
    if found is None and torch.Tag.pointwise in func.tags:
        return pointwise
    return found
