"""The way through a network, weight by weight and batch norm by batch norm."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ....common.errors import DataError
from ....common.randomness import stream
from ..clustering import Clustering
from ..compress import cluster_weight, one_of_each, places_of
from ..plan import LayerPlan, Plan
from ..subvectors import from_subvectors
from .arrivals import Arrivals, Holding
from .found import Calibration, Part
from .layer import quantize_layer
from .layout import rows_of
from .live import LiveTensors
from .moments import finite
from .norms import Statistics, move_norm, norms_of, output_statistics, statistics_of
from .passes import Item, Run, order_of
from .paused import interleaved_modes
from .reading import Reading, read
from .sampling import Samples
from .sharing import Alone, Processes, agreed


class Parts(Protocol):
    """Keeps what is finished, so that a calibration that begins anew after a crash does not repeat it.

    Both methods are called for every part, in the order in which the network is walked, which is always the same.
    """

    def recall(self, label: str) -> Part | None:
        """The part of this label, if it was kept after the very same parts."""

    def keep(self, label: str, part: Part) -> None:
        """Keep a part: a new one, or the one that was recalled."""


@dataclass(frozen=True)
class Surroundings:
    """What a calibration takes place in.

    Attributes:
        run: runs a network on a batch; None: calls it with the batch (a dict: as keywords), moved to the device.
        processes: that share the batches; all of them have all.
        parts: keeps what is finished.
    """

    run: Run | None = None
    processes: Processes = field(default_factory=Alone)
    parts: Parts | None = None


class Walk:
    """The way of `calibrate` through a network.

    Args:
        model: the dense network.
        plan: with scales.
        batches: of inputs.
        run: runs a network on one.
        seed: of the run.
        device: where to compute.
        memory: bytes of activations, at most.
        around: processes and finished parts.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        batches: Sequence[Any],
        run: Run,
        seed: int,
        device: torch.device,
        memory: int,
        around: Surroundings,
    ) -> None:
        self._seed, self._device, self._around = seed, device, around
        self.found = Calibration()
        self.dense = copy.deepcopy(model).eval().to(device)
        self._jobs: dict[str, LayerPlan] = {job.name: job for job in one_of_each(model, plan)}
        self._weights = {name: place.parameter.detach() for name, place in places_of(self.dense, plan).items()}
        live = LiveTensors([*self.dense.parameters(), *self.dense.buffers()])
        wanted = {name: self._weights[name] for name in self._jobs}
        items = agreed(around.processes, order_of(self.dense, wanted, run, batches[0], live))
        holding = Holding(_left(memory, live.peak))
        self.quantized = copy.deepcopy(self.dense)
        self._becoming = {name: place.parameter.detach() for name, place in places_of(self.quantized, plan).items()}
        self._norms = norms_of(self.dense), norms_of(self.quantized)
        self._readings, self._plain = self._read(items)
        self._followers = {
            item.follows: item.name
            for item in items
            if item.calls == 1 and item.follows in self._readings and self._readings[item.follows].is_whole
        }
        """Batch norms, by the weight whose outputs they see; they are put right with it."""
        following = set(self._followers.values())
        self.items = [
            item for item in items if (item.name not in following if item.calls else item.name in self._readings)
        ]
        self._arrivals = [
            Arrivals(net, weights, self.items, run, batches, holding, device)
            for net, weights in ((self.dense, self._weights), (self.quantized, self._becoming))
        ]
        self._samples = Samples(
            self._arrivals[0], self._arrivals[1], self._readings, len(batches), seed, around.processes
        )

    @contextmanager
    def going(self) -> Iterator[None]:
        """Items are passed in here; at the end nothing of a pass is left, however it ends."""
        with interleaved_modes():
            try:
                for name, reason in self._plain.items():
                    self.found.plain[name] = reason
                    self._part(name, partial(self._plainly, name))
                yield
            finally:
                for arrivals in self._arrivals:
                    arrivals.close()

    def pass_item(self, item: Item) -> None:
        """Quantize a weight, or put a norm right.

        Raises:
            DataError: the inputs of a weight are not finite, or the network fails on its inputs.
            PlanError: a weight that cannot be clustered.
        """
        if not item.calls:
            self._part(item.name, partial(self._weight, item.name))
        elif self.found.clusterings:
            self._part(f"{item.name} (batch norm)", partial(self._norm, item))
        for arrivals in self._arrivals:
            arrivals.done(item)

    def _read(self, items: Sequence[Item]) -> tuple[dict[str, Reading], dict[str, str]]:
        """How weights are read; and why those are clustered plainly that cannot be."""
        readings: dict[str, Reading] = {}
        reasons = dict.fromkeys(self._jobs, "calibration does not reach it")
        for item in items:
            if not item.calls:
                reading, reasons[item.name] = read(item, self._weights[item.name], *self._cut(item.name))
                if reading is not None:
                    readings[item.name] = reading
        return readings, {name: reason for name, reason in reasons.items() if name not in readings}

    def _cut(self, name: str) -> tuple[int, str]:
        return self._jobs[name].d, self._jobs[name].layout

    def _part(self, label: str, find: Callable[[], Part]) -> None:
        """Recall what was found, or find it; all processes alike, as to find it they need each other."""
        parts = self._around.parts
        if parts is None:
            self.found.add(label, find())
            return
        part = parts.recall(label)
        if all(self._around.processes.gather([part is not None])) and part is not None:
            self._put(label, part)
        else:
            part = find()
        parts.keep(label, part)
        self.found.add(label, part)

    def _put(self, name: str, part: Part) -> None:
        """Put what was recalled into the quantized network."""
        if part.clustering is not None:
            self._set_weight(name, part.clustering)
        for norm, found in part.norms.items():
            for own, value in zip(statistics_of(self._norms[1][norm]), found, strict=True):
                own.copy_(value)

    def _weight(self, name: str) -> Part:
        job, reading = self._jobs[name], self._readings[name]
        moments = self._samples.moments(name, bool(self.found.clusterings))
        if not finite([moments.hessian, moments.cross, moments.mean]):
            raise DataError(
                f"calibration: the inputs of layer {name!r} are not finite (NaN or infinity): check the images, and "
                "the dense network on them"
            )
        draw = stream(self._seed, "codebook", name)
        found = quantize_layer(self._weights[name], reading.layout, moments, job, draw)
        subvectors = self._set_weight(name, found.clustering)
        moved = {}
        if name in self._followers:
            before = Statistics(moments.output_mean.flatten(), moments.output_variance.flatten())
            made = rows_of(subvectors[reading.layout], job.layout).float()
            moved = self._move(self._followers[name], before, output_statistics(made, moments.hessian, moments.mean))
        return Part(clustering=found.clustering, lost=found.lost, norms=moved)

    def _plainly(self, name: str) -> Part:
        clustering = cluster_weight(self._weights[name], self._jobs[name], stream(self._seed, "codebook", name))
        self._set_weight(name, clustering)
        return Part(clustering=clustering)

    def _set_weight(self, name: str, clustering: Clustering) -> Tensor:
        """Put a weight into the quantized network; returns its subvectors (n, d)."""
        weight = self._becoming[name]
        codebook = clustering.codebook.to(self._device, weight.dtype) * self._jobs[name].scale
        subvectors = codebook[clustering.codes.to(self._device).long()]
        weight.copy_(from_subvectors(subvectors, weight.shape, self._jobs[name].layout))
        return subvectors

    def _norm(self, item: Item) -> Part:
        seen = self._samples.statistics(item, statistics_of(self._norms[0][item.name])[0])
        return Part() if seen is None else Part(norms=self._move(item.name, *seen))

    def _move(self, name: str, before: Statistics, after: Statistics) -> dict[str, tuple[Tensor, Tensor]]:
        dense, quantized = (norms[name] for norms in self._norms)
        move_norm(quantized, dense, before, after)
        mean, variance = statistics_of(quantized)
        return {name: (mean.cpu().clone(), variance.cpu().clone())}


def _left(memory: int, needed: int) -> int:
    """Bytes for passes that wait, beside what one that runs needs.

    Raises:
        DataError: there is not enough for that one.
    """
    if memory < needed:
        have, least = memory / 2**20, math.ceil(needed / 2**20)
        raise DataError(
            f"calibration: {have:.1f} MiB of memory are too little: the network needs {least:,} MiB for what it "
            "computes from the first batch. Allow at least as much (calibration.memory), or show it fewer inputs at a "
            "time (calibration.batch_size)"
        )
    return memory - needed
