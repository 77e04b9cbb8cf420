"""The score of a permutation over several children whose channels stand at any columns (`PlacedChild`).

The same sum as `GroupObjective`; the compiled loop is another one, `placed_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...common.compiling import CompiledLoop
from .group_objective import GroupObjective
from .objective import Floats, Ints
from .placed_child import PlacedChild


def _run_placed_swaps() -> Any:
    from .placed_kernel import run_placed_swaps

    return run_placed_swaps


RUN_PLACED_SWAPS = CompiledLoop(_run_placed_swaps)


class PlacedObjective(GroupObjective):
    """Weighted sum of the children's scores, see `GroupObjective`."""

    loop = RUN_PLACED_SWAPS

    def _flatten(self) -> None:
        children: list[PlacedChild] = self.children
        n = self.n_channels

        def joined(name: str) -> Any:
            arrays = [getattr(child, name).reshape(-1) for child in children]
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

        def starts(lengths: Sequence[int]) -> Ints:
            return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)

        def moved_on(name: str, steps: Ints) -> Ints:
            """The arrays of all children one after the other, numbers in them counted over all children."""
            return np.concatenate(
                [getattr(c, name).reshape(-1) + step for c, step in zip(children, steps, strict=True)]
            )

        length = np.array([child.d for child in children], np.int64)
        n_vectors = np.array([len(child.slot) for child in children], np.int64)
        touched_at = moved_on("touched_at", starts([child.touched.size for child in children]))
        ends = np.cumsum([n + 1] * len(children)) - 1  # one more than slots for each child: its end is the next start
        gram, gram_at = joined("gram"), moved_on("gram_at", starts([child.gram.size for child in children]))
        if len(children) > 1:
            for child, start in zip(children, starts([child.gram.size for child in children]).tolist(), strict=True):
                child.gram = gram[start : start + child.gram.size]  # the same memory
        self._layout = (
            length,
            np.delete(touched_at, ends[:-1]),
            moved_on("touched", starts(n_vectors.tolist())),
            starts(np.repeat(length, n_vectors).tolist()),
            joined("slot"),
            moved_on("track", starts([len(child.track_columns) for child in children])),
            joined("track_columns"),
            gram_at,
            joined("width"),
            moved_on("sum_at", starts([child.column_sum.size for child in children])),
            gram,
            joined("column_sum"),
            self.weights,
            np.array([child.ridge[0, 0] for child in children]),
            children[0].block_size,
            starts((length**2).tolist()),
            starts(length.tolist()),
        )

    def _run_compiled(self, swaps: tuple[Ints, Ints, Floats, Floats]) -> tuple[float, Ints, int] | None:
        permutation = self.permutation.copy()
        best = permutation.copy()
        present = [
            np.concatenate([getattr(child, name).reshape(-1) for child in self.children])
            for name in ("columns", "moment", "mean")
        ]
        logdet = np.array([child.value for child in self.children])
        arguments = (swaps, self._layout, (permutation, *present, logdet, best))
        run_placed_swaps = self.loop.ready(*arguments)
        if run_placed_swaps is None:
            return None
        _, lowest, made = run_placed_swaps(*arguments)
        if made:
            self.reset(permutation)
        return lowest, best, made
