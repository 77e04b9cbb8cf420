"""The score of a permutation over several children: sum over children of weight * log det(Cov) (paper equation 6).

All consumers of a group's channels share one permutation, so what is good for one child may be bad for another. The
weight of a child says how much its distortion changes with its own log det(Cov) (`permute` chooses the weights); one
child with weight 1 is the published score. The swaps are tried by the compiled kernel; without numba the same is done
in NumPy, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from ...common.compiling import CompiledLoop
from .objective import Floats, Ints


def _run_swaps() -> Any:
    from .kernel import run_swaps

    return run_swaps


RUN_SWAPS = CompiledLoop(_run_swaps)

REFRESH = 4096
"""Swaps tried between two computations of moment and mean from all subvectors: rounding errors of the updates must not
add up."""

NOTHING = np.empty(0)


class Child(Protocol):
    """The score of one child as a function of the permutation, see `ChildObjective`."""

    permutation: Ints
    value: float
    d: int
    n_channels: int
    n_subvectors: int

    @property
    def swap_work(self) -> int:
        """About the multiplications that a swap costs."""

    def reset(self, permutation: Ints) -> None:
        """Take a permutation (C,)."""

    def evaluate(self, permutation: Ints) -> float:
        """The score of another one."""

    def propose(self, i: int, j: int) -> tuple[float, Any]:
        """The score after a swap, and what makes it."""

    def commit(self, proposal: Any) -> None:
        """Make a swap that was proposed."""


class GroupObjective:
    """Weighted sum of the children's scores as a function of the permutation they share.

    Attributes:
        children: the objectives of the single children (`ChildObjective`), at the same permutation.
        weights: (number of children,).
        compiled: whether the kernel is used.
        loop: the kernel.
    """

    loop: ClassVar[CompiledLoop] = RUN_SWAPS

    def __init__(self, children: Sequence[Child], weights: Sequence[float], compiled: bool = True) -> None:
        """Put `children` (of equal n_channels) together; raises ValueError if there are none."""
        if not children:
            raise ValueError("a group objective needs at least one child")
        self.children: list[Any] = list(children)
        self.weights = np.asarray(weights, dtype=np.float64)
        self.n_channels = children[0].n_channels
        self.compiled = compiled and self.loop.function() is not None
        if self.compiled:
            self._flatten()

    @property
    def permutation(self) -> Ints:
        """p (C,), channel p[i] stands at position i."""
        return self.children[0].permutation

    @property
    def value(self) -> float:
        """The score at `permutation`."""
        return float(sum(w * child.value for w, child in zip(self.weights, self.children, strict=True)))

    def reset(self, permutation: Ints) -> None:
        """Start again from `permutation` (C,), exactly computed."""
        for child in self.children:
            child.reset(permutation)

    def evaluate(self, permutation: Ints) -> float:
        """The score of another permutation; that of the objective stays."""
        return float(sum(w * child.evaluate(permutation) for w, child in zip(self.weights, self.children, strict=True)))

    def run(self, first: Ints, second: Ints, temperatures: Floats = NOTHING, draws: Floats = NOTHING) -> int:
        """Try to swap the channels at positions first[t] and second[t] (T,) one after the other; returns how many swaps
        were made.

        A swap is made if the score falls, or, where temperatures (T,) are given, with probability exp(-rise /
        temperature), decided by draws (T,) from [0, 1). With temperatures the result is the best permutation met, not
        the last one.
        """
        made = 0
        annealing = temperatures.size > 0
        best, best_value = self.permutation.copy(), self.value
        for start in range(0, first.size, REFRESH):
            part = slice(start, start + REFRESH)
            before = self.value
            lowest, reached, accepted = self._run_part(first[part], second[part], temperatures[part], draws[part])
            made += accepted
            if annealing and before + lowest < best_value:
                best, best_value = reached, before + lowest
        if annealing:
            self.reset(best)
        return made

    def _run_part(self, first: Ints, second: Ints, temperatures: Floats, draws: Floats) -> tuple[float, Ints, int]:
        """Try some swaps; returns the lowest change of the score, the permutation that reached it, and the swaps
        made."""
        found = self._run_compiled((first, second, temperatures, draws)) if self.compiled else None
        if found is None:
            self.compiled = False
            return self._run_numpy(first, second, temperatures, draws)
        return found

    def _run_compiled(self, swaps: tuple[Ints, Ints, Floats, Floats]) -> tuple[float, Ints, int] | None:
        """The same by the kernel; None where it does not compile."""
        permutation = self.permutation.copy()
        best = permutation.copy()
        present = {
            name: np.concatenate([getattr(child, name).reshape(-1) for child in self.children])
            for name in ("columns", "moment", "mean")
        }
        logdet = np.array([child.value for child in self.children])
        shared = (self._shape, self.weights, self._ridge, self._gram, self._gram_at, self._column_sum, self._column_at)
        arrays = (
            *swaps, permutation, *shared, present["columns"], self._columns_at,
            present["moment"], self._moment_at, present["mean"], self._mean_at, logdet, best,
        )  # fmt: skip
        run_swaps = self.loop.ready(*arrays)
        if run_swaps is None:
            return None
        _, lowest, made = run_swaps(*arrays)
        if made:
            self.reset(permutation)
        return lowest, best, made

    def _run_numpy(self, first: Ints, second: Ints, temperatures: Floats, draws: Floats) -> tuple[float, Ints, int]:
        """What the kernel does, child by child in NumPy."""
        change = lowest = 0.0
        best, made = self.permutation.copy(), 0
        for t, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            proposals = [child.propose(i, j) for child in self.children]
            moves = [value - child.value for child, (value, _) in zip(self.children, proposals, strict=True)]
            delta = float(np.dot(self.weights, moves))
            if not (delta < -1e-12 or (temperatures.size and draws[t] < np.exp(-delta / temperatures[t]))):
                continue
            for child, (_, proposal) in zip(self.children, proposals, strict=True):
                child.commit(proposal)
            made += 1
            change += delta
            if change < lowest:
                lowest, best = change, self.permutation.copy()
        if made:
            self.reset(self.permutation)
        return lowest, best, made

    def _flatten(self) -> None:
        """Prepare what the kernel reads and never changes: the arrays of all children one after the other, and where
        each begins."""

        def starts(lengths: list[int]) -> Ints:
            return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)

        children = self.children
        self._shape = np.array([[child.area, child.d, child.width, child.tail] for child in children], dtype=np.int64)
        self._ridge = np.array([child.ridge[0, 0] for child in children])
        # a view where there is one child: a Gram matrix can have hundreds of megabytes
        self._gram = children[0].table if len(children) == 1 else np.concatenate([child.table for child in children])
        self._gram_at = starts([child.table.size for child in children])
        self._column_sum = np.concatenate([child.column_sum for child in children])
        self._column_at = starts([child.column_sum.size for child in children])
        self._columns_at = starts([child.columns.size for child in children])
        self._moment_at = starts([child.moment.size for child in children])
        self._mean_at = starts([child.mean.size for child in children])
