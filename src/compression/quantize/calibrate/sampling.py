"""The moments of each weight's inputs, from places that are drawn: the same ones in the dense network and in the one
that is being quantized.

The quantized network is run anew for each weight, up to it. Of the dense one, which stays as it is, only the outputs of
the weights at these places are needed, (places, R) each: one pass takes those of as many weights as fit into the memory
that is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....common.randomness import stream
from .moments import Moments, MomentSums
from .passes import Run, Taken, inputs_of_weights
from .reading import Reading
from .uses import Use

PLACES = 40_000
"""Places of each weight's inputs that are drawn, over all batches."""
MEMORY = 1 << 30
"""Bytes of outputs of the dense network that are held, at most, unless those of one weight are more."""


class Samples:
    """Draws places, and what both networks have there.

    Args:
        dense: the dense network.
        weights: its parameters, by name.
        readings: of the weights that are calibrated, in the order in which the network comes to them.
        batches: of inputs.
        run: runs a network on one.
        seed: of the draws.

    Attributes:
        memory: bytes, see `MEMORY`.
    """

    def __init__(
        self,
        dense: nn.Module,
        weights: Mapping[str, Tensor],
        readings: Mapping[str, Reading],
        batches: Sequence[Any],
        run: Run,
        seed: int,
    ) -> None:
        self._dense, self._weights, self._readings = dense, weights, readings
        self._batches, self._run, self._seed = batches, run, seed
        self.memory = MEMORY
        self._ahead: dict[str, list[list[Taken]]] = {}

    def moments(self, name: str, quantized: nn.Module, weights: Mapping[str, Tensor], changed: bool) -> Moments:
        """Of the inputs of a weight.

        Args:
            name: of the weight.
            quantized: the network whose earlier weights are quantized.
            weights: its parameters, by name.
            changed: whether any are.
        """
        reading = self._readings[name]
        sums = MomentSums(reading.weight)
        dense = self._dense_outputs(name)
        for number, batch in enumerate(self._batches):
            take = partial(self._inputs, number)
            taken = inputs_of_weights(quantized, [reading.item], weights, self._run, batch, take)[name]
            for use_number, now in enumerate(taken):
                then = dense[number][use_number] if use_number < len(dense[number]) else None
                paired = changed and now.paired and then is not None and then.paired
                same = paired and then is not None and then.values.shape[1] == now.values.shape[1]
                outputs = then.values.to(now.values.device) if same and then is not None else None
                sums.add(reading.part(use_number), now.values, outputs)
        return sums.moments()

    def _inputs(self, number: int, use_number: int, use: Use) -> Tensor:
        """Inputs of a weight at places drawn for the batch of this number."""
        draw = stream(self._seed, "calibrated places", use.name, number, use_number)
        most = max(1, PLACES // (len(self._batches) * len(self._readings[use.name].item.uses)))
        n = use.n_places
        places = torch.arange(n) if n <= most else torch.randperm(n, generator=draw)[:most].sort().values
        return self._readings[use.name].cut(use.at(places).float())

    def _outputs(self, number: int, use_number: int, use: Use) -> Tensor:
        """What the weight makes of them."""
        reading = self._readings[use.name]
        weight = reading.weight[reading.part(use_number)]
        return (self._inputs(number, use_number, use) @ weight.transpose(1, 2)).cpu()

    def _dense_outputs(self, name: str) -> list[list[Taken]]:
        """The outputs of a weight in the dense network, per batch."""
        if name not in self._ahead:
            names = list(self._readings)
            some = self._that_fit(names[names.index(name) :])
            self._ahead = {one: [] for one in some}
            items = [self._readings[one].item for one in some]
            for number, batch in enumerate(self._batches):
                take = partial(self._outputs, number)
                taken = inputs_of_weights(self._dense, items, self._weights, self._run, batch, take)
                for one in some:
                    self._ahead[one].append(taken[one])
        return self._ahead.pop(name)

    def _that_fit(self, names: Sequence[str]) -> Sequence[str]:
        """The first of the weights, as many as the memory serves; at least one."""
        left = self.memory
        for number, name in enumerate(names):
            left -= 4 * PLACES * self._readings[name].weight.shape[:2].numel()
            if left < 0:
                return names[: max(1, number)]
        return names
