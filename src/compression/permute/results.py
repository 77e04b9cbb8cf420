"""What is asked of a search of permutations, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PermutationSpec:
    """How the permutation of one child's input is searched (`permutation_specs.<layer>`); None: as for all."""

    reshape: tuple[int, ...] | None = None
    optimization: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SearchSpec:
    """How permutations are searched; the names are those of the settings (`model.<name>`).

    Attributes:
        search: `best` scores all children of a group together and searches until nothing is gained; `published` is the
            paper's procedure: greedy start, then `sls_iterations` swaps, scored on the first child that depends on the
            permutation.
        sls_iterations: swaps tried per group by `published`, and for the published candidate of `best`.
        search_seconds: `best` stops in all groups after about so long; the result then depends on the machine. None: no
            limit.
        permutation_specs: by name of the child.
        thorough: False: `best` only tries the paper's swaps, on all children. What its further searches gain for the
            weights, most of its time, is nothing for the outputs of a network that is calibrated afterwards
            (docs/measurements.md).
    """

    search: str = "best"
    sls_iterations: int = 10_000
    search_seconds: float | None = None
    permutation_specs: Mapping[str, PermutationSpec] = field(default_factory=dict)
    thorough: bool = True

    @property
    def reshapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes (C_out, C_in, h, w) of linear layers that consume a flattened feature map, by name."""
        return {name: spec.reshape for name, spec in self.permutation_specs.items() if spec.reshape}


@dataclass(frozen=True)
class GroupResult:
    """What was done to one group.

    Attributes:
        label: names the group.
        children: the layers that were scored; empty where no child depends on the permutation.
        before: weighted mean of the log det(Cov) of their subvectors before.
        after: the same afterwards.
        permutation: p (C,) as applied; None where the group was left as it was.
    """

    label: str
    children: tuple[str, ...]
    before: float
    after: float
    permutation: Tensor | None


def group_row(result: GroupResult) -> list[Any]:
    """A result as JSON can hold it; its label is left out."""
    permutation = None if result.permutation is None else result.permutation.tolist()
    return [result.children, result.before, result.after, permutation]


def group_result(label: str, row: list[Any]) -> GroupResult:
    """From `group_row`."""
    children, before, after, permutation = row
    return GroupResult(
        label=label,
        children=tuple(children),
        before=before,
        after=after,
        permutation=None if permutation is None else torch.tensor(permutation),
    )
