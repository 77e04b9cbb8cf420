"""A network's passes over all batches, each of which waits where it came to a weight or a batch norm.

All batches come to an item, what it is given there is looked at, the item is put right, and the passes go on: each
layer computes once per batch. What waiting passes hold is bounded. Where a batch's activations do not fit its pass is
given up and begins anew for the next item, which gives the same. That happens where activations are large: in most
networks at the beginning, where little has to be done again.

A weight that is used several times in a pass is looked at by a pass of its own, with the weight still as it was in all
uses. So is everything on a batch on which a network comes to its weights in another order than on the first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .live import LiveTensors
from .norms import norms_of
from .passes import Item, Key, Run, Taken, inputs_of_norm, inputs_of_weights
from .paused import PausedWork, torch_state
from .uses import Use, Watcher

T = TypeVar("T")

MOST_PASSES = 512
"""That wait at a time in both networks, at most: each has a thread."""


THREAD = "calibration pass"
"""What the thread of a pass is called."""


class Holding:
    """How much the waiting passes of some networks hold.

    Args:
        limit: bytes, at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[object, int] = {}

    def fits(self, who: object, size: int) -> bool:
        """Whether a pass may hold so many bytes; it is then counted with them."""
        self._held.pop(who, None)
        fits = sum(self._held.values()) + size <= self._limit and len(self._held) < MOST_PASSES
        if fits:
            self._held[who] = size
        return fits

    def leave(self, who: object) -> None:
        """The pass holds nothing any more."""
        self._held.pop(who, None)


@dataclass(frozen=True)
class _Arrival:
    """Where a pass waits, and what it has there: the use of a weight, or the input of a norm."""

    key: Key
    use: Use | None
    inputs: Tensor | None


class Arrivals:
    """The passes of one network.

    Args:
        model: in evaluation mode; its parameters and statistics may change while passes wait.
        weights: parameters of the model, by name.
        items: that will be asked for, in this order.
        run: runs the network.
        batches: of inputs; passes are known by the number of theirs.
        holding: of this network and others.
        device: where it computes.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        items: Sequence[Item],
        run: Run,
        batches: Sequence[Any],
        holding: Holding,
        device: torch.device,
    ) -> None:
        self._model, self._weights, self._norms = model, weights, norms_of(model)
        self._run, self._batches, self._holding, self._device = run, batches, holding, device
        self._ahead = {item.key for item in items if item.happens_once}
        self._waiting: dict[int, _Pass] = {}
        self._over: set[int] = set()
        self._irregular: set[int] = set()

    def uses(self, item: Item, number: int, take: Callable[[int, Use], Tensor]) -> list[Taken]:
        """What `take` makes of the uses of a weight on a batch, as `passes.inputs_of_weights`."""

        def look(arrival: _Arrival) -> list[Taken]:
            assert arrival.use is not None
            return [Taken(arrival.use.paired, take(0, arrival.use))]

        found = self._look(item, number, look)
        if found is not None:
            return found
        if number in self._over:
            return []
        weights = {item.name: self._weights[item.name]}
        return inputs_of_weights(self._model, [item], weights, self._run, self._batches[number], take)[item.name]

    def given(self, item: Item, number: int, look: Callable[[Sequence[Tensor]], T]) -> T:
        """What `look` makes of the inputs of a norm on a batch; there may be none."""

        def look_at(arrival: _Arrival) -> T:
            assert arrival.inputs is not None
            return look([arrival.inputs])

        found = self._look(item, number, look_at)
        if found is not None:
            return found
        if number in self._over:
            return look([])
        return look(inputs_of_norm(self._norms[item.name], self._model, item, self._run, self._batches[number]))

    def done(self, item: Item) -> None:
        """Passes need not wait for the item any more."""
        self._ahead.discard(item.key)

    def close(self) -> None:
        """End all passes."""
        for number in list(self._waiting):
            self._give_up(number)

    def _look(self, item: Item, number: int, look: Callable[[_Arrival], T]) -> T | None:
        """Look at the item where the pass comes to it; None: it must be run for this alone, or is over."""
        if item.key not in self._ahead or number in self._over or number in self._irregular:
            return None
        one = self._waiting.get(number) or self._begun(number)
        if one is None:
            return None
        arrival = one.work.go_on()
        if arrival is None:
            self._over.add(number)
        elif arrival.key != item.key:
            self._irregular.add(number)
        else:
            found = look(arrival)
            del arrival  # what it holds counts only as long as the pass holds it
            if not self._holding.fits((id(self), number), one.live.count()):
                self._give_up(number)
            return found
        self._give_up(number)
        return None

    def _begun(self, number: int) -> _Pass | None:
        """A new pass; None: this machine allows no further thread."""
        weights = {name: weight for name, weight in self._weights.items() if (name, False) in self._ahead}
        batch = self._batches[number]
        one = _Pass(self._model, weights, self._ahead, lambda net: self._run(net, batch), self._device)
        self._waiting[number] = one
        if one.work.begin():
            return one
        self._give_up(number)
        return None

    def _give_up(self, number: int) -> None:
        self._holding.leave((id(self), number))
        self._waiting.pop(number).work.close()


class _Pass:
    """A pass that waits at every item ahead of it, where it comes to it for the first time.

    Args:
        model: the network.
        weights: that it may wait for.
        ahead: items that it has to wait for; fewer and fewer.
        run: runs the network.
        device: where that computes.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        ahead: Container[Key],
        run: Callable[[nn.Module], object],
        device: torch.device,
    ) -> None:
        self._model, self._weights, self._ahead, self._run = with_own_modules(model), weights, ahead, run
        self._state = torch_state(device)
        self._seen: set[Key] = set()
        self.live = LiveTensors([*model.parameters(), *model.buffers()])
        self.work: PausedWork[_Arrival] = PausedWork(self._do, THREAD)

    def _do(self, stand: Callable[[_Arrival], None]) -> None:
        def arrive(key: Key, use: Use | None, inputs: Tensor | None) -> None:
            if key in self._ahead and key not in self._seen:
                self._seen.add(key)
                stand(_Arrival(key, use, inputs))

        def used(use: Use) -> None:
            arrive((use.name, False), use, None)

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, inputs: arrive((name, True), None, inputs[0])

        for name, norm in norms_of(self._model).items():
            norm.register_forward_pre_hook(hook(name))
        with self._state(), Watcher(self._weights.items(), used, each=self.live.made, by=self.work.let_do):
            self._run(self._model)


def with_own_modules(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are those of the model, so that passes which take turns do not disturb each
    other: some modules keep what they computed in their attributes until later in the pass."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
