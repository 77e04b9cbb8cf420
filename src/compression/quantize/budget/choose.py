"""One option for each of several items, so that the sum of losses is least and the sum of bits within a budget.

The options of an item that are worth having for some price of a bit lie on the lower convex hull of its points (bits,
loss). Walking down all hulls together, the steepest step first, gives for every price the best choice there is: the
path. Between two points of the path a budget is left over; it is spent by more steps of the items that still fit. From
there, and from some points before and behind, the best change of one or two items is looked for.

A larger budget never has a larger loss. Every choice for a budget on the path's piece from one point to the next loses
at least what the straight line between them says, so at least what the second point loses. On one piece, the same
arrangements are tried whatever the budget, and those are kept that are within it.

Shapes: c options of an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

AROUND = 4
"""Points of the path before and behind a budget, from which changes are tried."""

NOBODY = -1
"""The item that changes where only one does."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """What can be done with an item.

    Attributes:
        bits: (c,) of each option.
        loss: (c,) of each option, at least 0; infinite where it is excluded. One is not.
    """

    bits: Ints
    loss: Floats

    @cached_property
    def best(self) -> Ints:
        """The options that no other one beats in bits and loss, by rising bits and falling loss."""
        order = np.lexsort((self.loss, self.bits))
        order = order[np.isfinite(self.loss[order])]
        least = np.minimum.accumulate(self.loss[order])
        falls = np.concatenate([[True], self.loss[order][1:] < least[:-1]])
        return order[falls]

    @cached_property
    def hull(self) -> Ints:
        """Those of the best options that lie on the lower convex hull, whose slopes become flatter and flatter."""
        kept: list[int] = []
        for option in self.best:
            while len(kept) > 1 and self._slope(kept[-2], kept[-1]) <= self._slope(kept[-1], int(option)):
                kept.pop()
            kept.append(int(option))
        return np.array(kept, dtype=np.int64)

    def _slope(self, first: int, second: int) -> float:
        """The loss that a bit saves on the way from one option to another."""
        return float((self.loss[first] - self.loss[second]) / (self.bits[second] - self.bits[first]))


@dataclass(frozen=True)
class _Step:
    """From one option of an item on its hull to the next."""

    item: int
    option: int
    bits: int
    gain: float


@dataclass(frozen=True)
class Choice:
    """An option for every item.

    Attributes:
        options: the number of the option of each item.
        bits: of all together.
        loss: of all together.
    """

    options: tuple[int, ...]
    bits: int
    loss: float


class Chooser:
    """Chooses among the options of some items, for any budget."""

    def __init__(self, items: Sequence[Options]) -> None:
        self.items = items
        steps = [
            _Step(
                number, int(after), int(one.bits[after] - one.bits[before]), float(one.loss[before] - one.loss[after])
            )
            for number, one in enumerate(items)
            for before, after in zip(one.hull[:-1], one.hull[1:], strict=True)
        ]
        self._steps = sorted(steps, key=lambda step: -step.gain / step.bits)  # stable: of an item, the steepest first
        self._start = [int(one.hull[0]) for one in items]
        start_bits = sum(int(one.bits[option]) for one, option in zip(items, self._start, strict=True))
        self._bits = np.cumsum([start_bits, *(step.bits for step in self._steps)])

    @property
    def smallest(self) -> int:
        """Bits of the smallest choice."""
        return int(self._bits[0])

    @property
    def largest(self) -> int:
        """Bits of the choice that loses least."""
        return int(self._bits[-1])

    def path(self) -> list[Choice]:
        """The best choice for every price of a bit, from the smallest on."""
        options, found = list(self._start), []
        for step in [None, *self._steps]:
            if step is not None:
                options[step.item] = step.option
            found.append(self._choice(options))
        return found

    def within(self, budget: int) -> Choice:
        """The best choice found of at most `budget` bits.

        Raises:
            ValueError: even the smallest is larger.
        """
        if budget < self.smallest:
            raise ValueError(f"{budget} bits are fewer than the smallest choice has, {self.smallest}")
        last = int(np.searchsorted(self._bits, budget, side="right")) - 1
        chain = self._chain(last, budget)
        near = range(max(0, last - AROUND), min(len(self._steps), last + AROUND) + 1)
        starts = [chain[-1], *(self._choice(self._options_at(steps)) for steps in near)]
        found = [choice for start in starts if (choice := self._changed(start, budget)) is not None]
        best = min(found, key=_rank)
        lowest = chain[0].loss
        for earlier, later in zip(chain[-2::-1], chain[:0:-1], strict=True):
            room = later.bits - 1  # what a smaller budget, for which `earlier` is where the changes start, may spend
            if self._bound(last, lowest, room) >= best.loss:
                break
            changed = self._changed(earlier, room)
            assert changed is not None, "it fits as it is"
            best = min(best, changed, key=_rank)
        return best

    def _choice(self, options: Sequence[int]) -> Choice:
        pairs = list(zip(self.items, options, strict=True))
        bits = sum(int(one.bits[option]) for one, option in pairs)
        return Choice(tuple(options), bits, float(sum(one.loss[option] for one, option in pairs)))

    def _options_at(self, steps: int) -> list[int]:
        options = list(self._start)
        for step in self._steps[:steps]:
            options[step.item] = step.option
        return options

    def _chain(self, taken: int, budget: int) -> list[Choice]:
        """The point of the path, and after it further steps in the same order, as long as they are within `budget`; the
        item whose step comes next is left out, as that step is what does not fit."""
        options = self._options_at(taken)
        chain = [self._choice(options)]
        if taken == len(self._steps):
            return chain
        blocked = self._steps[taken].item
        for step in self._steps[taken + 1 :]:
            if step.item == blocked:
                continue
            if chain[-1].bits + step.bits > budget:
                break
            options[step.item] = step.option
            chain.append(self._choice(options))
        return chain

    def _bound(self, taken: int, loss: float, budget: int) -> float:
        """What any choice of `budget` bits loses at least, between a point of the path and the next."""
        if taken == len(self._steps):
            return loss
        step = self._steps[taken]
        return loss - step.gain * (budget - int(self._bits[taken])) / step.bits

    def _changed(self, choice: Choice, budget: int) -> Choice | None:
        """The best that changing at most two items of `choice` leads to, within `budget`; None: they are not enough."""
        room = budget - choice.bits
        if not self.items:
            return choice
        more, gains, options, owners = [], [], [], []
        for number, (one, chosen) in enumerate(zip(self.items, choice.options, strict=True)):
            known = np.union1d(one.best, [chosen])
            known = known[np.argsort(one.bits[known], kind="stable")]
            more.append(one.bits[known] - one.bits[chosen])
            gains.append(one.loss[chosen] - one.loss[known])
            options.append(known)
            owners.append(np.full(known.size, number))
        for parts, nothing in ((more, 0), (gains, 0.0), (options, -1), (owners, NOBODY)):  # one item may change alone
            parts.append(np.array([nothing]))
        all_more, all_gains, all_owners = (np.concatenate(part) for part in (more, gains, owners))
        best_gain, best_bits, best = 0.0 if room >= 0 else -np.inf, 0, None
        for number in range(len(self.items)):
            # the best option of this item for every change of another one, no change among them
            place = np.searchsorted(more[number], room - all_more, side="right") - 1
            top, where = _running_best(gains[number])
            possible = (place >= 0) & (all_owners != number)
            total = np.where(possible, all_gains + top[np.maximum(place, 0)], -np.inf)
            winner = int(np.argmax(total))
            if total[winner] < best_gain or total[winner] == -np.inf:
                continue
            own = int(where[place[winner]])
            bits = int(all_more[winner] + more[number][own])
            if total[winner] > best_gain or (best is not None and bits < best_bits):
                best_gain, best_bits = float(total[winner]), bits
                best = (number, int(options[number][own]), int(all_owners[winner]), winner)
        if best is None:
            return choice if room >= 0 else None
        changed = list(choice.options)
        changed[best[0]] = best[1]
        if best[2] != NOBODY:
            changed[best[2]] = int(np.concatenate(options)[best[3]])
        return self._choice(changed)


def _rank(choice: Choice) -> tuple[float, int]:
    return choice.loss, choice.bits


def _running_best(gains: Floats) -> tuple[Floats, Ints]:
    """The largest of the values up to each one, and where it stands first."""
    top = np.maximum.accumulate(gains)
    new = np.concatenate([[True], gains[1:] > top[:-1]])
    return top, np.maximum.accumulate(np.where(new, np.arange(gains.size), 0))
