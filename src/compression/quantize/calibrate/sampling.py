"""The moments of each weight's inputs, from places that are drawn: the same ones in the dense network and in the one
that is being quantized; and of what batch norms see."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from ....common.randomness import stream
from .arrivals import Arrivals
from .moments import Moments, MomentSums
from .norms import Statistics, added, statistics, sums_of, wide
from .passes import Item, Taken
from .reading import Reading
from .sharing import Processes
from .uses import Use

PLACES = 40_000
"""Places of each weight's inputs that are drawn, over all batches."""


class Samples:
    """Draws places, and looks at what both networks have there.

    Args:
        dense: the passes of the dense network.
        quantized: those of the network whose earlier weights are quantized.
        readings: of the weights that are calibrated.
        n_batches: of all processes.
        seed: of the draws.
        processes: that share the batches: each takes every so many-th.
    """

    def __init__(
        self,
        dense: Arrivals,
        quantized: Arrivals,
        readings: Mapping[str, Reading],
        n_batches: int,
        seed: int,
        processes: Processes,
    ) -> None:
        self._dense, self._quantized, self._readings = dense, quantized, readings
        self._n_batches, self._seed, self._processes = n_batches, seed, processes
        self._own = range(processes.rank, n_batches, processes.world_size)

    def moments(self, name: str, changed: bool) -> Moments:
        """Of the inputs of a weight.

        Args:
            name: of the weight.
            changed: whether anything before it is quantized.
        """
        reading = self._readings[name]
        sums = MomentSums(reading.weight)
        for number in self._own:
            seen = self._quantized.uses(reading.item, number, partial(self._inputs, number))
            then: list[Taken] = []
            if changed and any(now.paired for now in seen):
                then = self._dense.uses(reading.item, number, partial(self._outputs, number))
            for use_number, (now, before) in enumerate(zip_longest(seen, then[: len(seen)])):
                paired = before is not None and now.paired and before.paired
                same = paired and before.values.shape[1] == now.values.shape[1]
                sums.add(reading.part(use_number), now.values, before.values if same else None)
        sums.add_over(self._processes.sum)
        return sums.moments()

    def statistics(self, item: Item, running: Tensor) -> tuple[Statistics, Statistics] | None:
        """What a batch norm sees in the dense and in the quantized network; None: one of them never comes to it.

        Args:
            item: the norm.
            running: (C,) its running mean.
        """
        found = []
        for arrivals in (self._dense, self._quantized):
            own = added(arrivals.given(item, number, sums_of) for number in self._own)
            sums = self._processes.sum(wide(running.new_zeros(3, len(running))) if own is None else own)
            if not bool(sums[0].all()):
                return None
            found.append(statistics(sums))
        return found[0], found[1]

    def _inputs(self, number: int, use_number: int, use: Use) -> Tensor:
        """Inputs of a weight at places drawn for the batch of this number."""
        draw = stream(self._seed, "calibrated places", use.name, number, use_number)
        most = max(1, PLACES // (self._n_batches * len(self._readings[use.name].item.uses)))
        n = use.n_places
        places = torch.arange(n) if n <= most else torch.randperm(n, generator=draw)[:most].sort().values
        return self._readings[use.name].cut(use.at(places).float())

    def _outputs(self, number: int, use_number: int, use: Use) -> Tensor:
        """What the weight makes of them."""
        reading = self._readings[use.name]
        weight = reading.weight[reading.part(use_number)]
        return self._inputs(number, use_number, use) @ weight.transpose(1, 2)
