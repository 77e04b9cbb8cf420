"""Quantizing a network weight by weight, in the order in which it computes, with what each weight is given.

Two copies of the network run: the dense one, and the one whose earlier weights are quantized already. The second
runs anew on all batches for every weight, up to it, and the first as seldom as memory allows (`sampling`): what is held
is one batch's activations, one weight's moments, and outputs of the dense network at the places that are drawn. The
time grows with the square of the depth.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....common.errors import DataError
from ....common.progress import bar
from ....common.randomness import stream
from ..clustering import Clustering
from ..compress import check_weights, cluster_weight, one_of_each, places_of, with_scales
from ..plan import LayerPlan, Plan
from .inputs import run_on
from .layer import quantize_layer
from .moments import finite
from .norms import Statistics, move_norm, norms_of, output_statistics, seen_by, statistics_of
from .passes import Item, Run, inputs_of_norm, inspectable, order_of
from .reading import Reading, read
from .sampling import MEMORY, Samples


@dataclass
class Calibration:
    """What calibrating found. Given to `compress` as its finished clusterings.

    Attributes:
        clusterings: of every planned weight, by name, of tied ones the first.
        lost: of every calibrated weight: after each step, which share of the energy of its outputs is lost.
        norms: running mean and variance of the batch norms that see something else now, by name.
        plain: the weights that it could not serve, which were clustered plainly, with the reason.
    """

    clusterings: dict[str, Clustering] = field(default_factory=dict)
    lost: dict[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)

    def recall(self, name: str, weight: Tensor) -> Clustering | None:
        """The clustering of a weight, where it has as many values."""
        found = self.clusterings.get(name)
        fits = found is not None and found.codes.numel() * found.codebook.shape[1] == weight.numel()
        return found if fits else None

    def keep(self, name: str, weight: Tensor, clustering: Clustering) -> None:
        """There is nothing to keep: all are known."""

    def put_norms(self, model: nn.Module) -> None:
        """Set the running statistics of a network, dense or quantized."""
        norms = norms_of(model)
        for name, (mean, variance) in self.norms.items():
            for own, found in zip(statistics_of(norms[name]), (mean, variance), strict=True):
                own.copy_(found)

    def lost_after(self) -> dict[str, float]:
        """The share of the energy of outputs that is lost after each step, the mean over all calibrated weights."""
        steps = list(zip(*self.lost.values(), strict=True))
        return {step[0][0]: sum(share for _, share in step) / len(step) for step in steps}

    def summary(self, n_inputs: int) -> str:
        """What was done, in a line."""
        after = list(self.lost_after().values()) or [0.0]
        return (
            f"calibrated {len(self.lost)} weights with {n_inputs:,} inputs: {100 * after[-1]:.2f} % of the energy of "
            f"their outputs lost on average, {100 * after[0]:.2f} % by clustering alone; running statistics of "
            f"{len(self.norms)} batch norms adjusted"
        )

    def notes(self) -> list[str]:
        """Which weights were clustered plainly, a line for every reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.plain.items():
            reasons.setdefault(reason, []).append(name or "(the network itself)")
        return [f"{', '.join(names)}: {reason}; quantized without it" for reason, names in reasons.items()]


def calibrate(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    *,
    run: Run | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    show_progress: bool = True,
    memory: int = MEMORY,
) -> Calibration:
    """Find codebooks and codes that keep what a network computes on some inputs.

    Args:
        model: the dense network; it is copied, not changed.
        plan: from `make_plan`.
        batches: of inputs, without labels; run through several times, so not a generator.
        run: runs a network on a batch; None: calls it with the batch (a dict: as keywords), moved to the device.
        seed: the run's seed; each layer draws from streams of its own.
        device: where to compute; None: where the network is.
        show_progress: show a progress bar.
        memory: bytes that are held of the dense network's outputs, at most, unless those of one weight are more: with
            fewer it runs more often, to the same result.

    Raises:
        DataError: there are no batches, or the inputs of a layer are not finite; names it.
        PlanError: a weight that cannot be clustered.
    """
    if not len(batches):
        raise DataError("calibration: there are no inputs")
    check_weights(model, plan)
    place = torch.device(device or next((p.device for p in model.parameters()), "cpu"))
    with inspectable():
        walk = _Walk(model, with_scales(model, plan), batches, run or partial(run_on, place), seed, place)
        walk.samples.memory = memory
        for item in bar(walk.items, "calibrate", len(walk.items), show_progress, "layer"):
            walk.pass_item(item)
    return walk.found


class _Walk:
    """The way of `calibrate` through a network."""

    def __init__(
        self, model: nn.Module, plan: Plan, batches: Sequence[Any], run: Run, seed: int, device: torch.device
    ) -> None:
        self.dense = copy.deepcopy(model).eval().to(device)
        self.quantized = copy.deepcopy(model).eval().to(device)
        self.jobs: dict[str, LayerPlan] = {job.name: job for job in one_of_each(model, plan)}
        self.weights = {name: place.parameter.detach() for name, place in places_of(self.dense, plan).items()}
        self.becoming = {name: place.parameter.detach() for name, place in places_of(self.quantized, plan).items()}
        self.norms = norms_of(self.dense), norms_of(self.quantized)
        self.batches, self.run, self.seed, self.device = batches, run, seed, device
        self.found = Calibration()
        self.items = order_of(self.dense, {name: self.weights[name] for name in self.jobs}, run, batches[0])
        self.readings: dict[str, Reading] = {}
        reasons = dict.fromkeys(self.jobs, "calibration does not reach it")
        for item in self.items:
            if not item.calls:
                reading, reasons[item.name] = read(item, self.weights[item.name], self.jobs[item.name].d)
                if reading is not None:
                    self.readings[item.name] = reading
        self.samples = Samples(self.dense, self.weights, self.readings, batches, run, seed)
        self.followers = {
            item.follows: item.name
            for item in self.items
            if item.calls == 1 and item.follows in self.readings and self.readings[item.follows].is_whole
        }
        for name, reason in reasons.items():
            if name not in self.readings:
                self._plainly(name, reason)

    def pass_item(self, item: Item) -> None:
        """Quantize a weight, or put a norm right."""
        if item.name in self.readings and not item.calls:
            self._weight(item.name)
        elif item.calls and self.found.clusterings and item.name not in self.found.norms:
            self._norm(item)

    def _weight(self, name: str) -> None:
        job, reading = self.jobs[name], self.readings[name]
        moments = self.samples.moments(name, self.quantized, self.becoming, bool(self.found.clusterings))
        if not finite([moments.hessian, moments.cross, moments.mean]):
            raise DataError(
                f"calibration: the inputs of layer {name!r} are not finite (NaN or infinity): check the images, and "
                "the dense network on them"
            )
        draw = stream(self.seed, "codebook", name)
        found = quantize_layer(self.weights[name], reading.layout, moments, job, draw)
        self.found.lost[name] = found.lost
        subvectors = self._put(name, found.clustering)
        if name in self.followers:
            before = Statistics(moments.output_mean.flatten(), moments.output_variance.flatten())
            made = subvectors[reading.layout].flatten(2).float()
            self._move(self.followers[name], before, output_statistics(made, moments.hessian, moments.mean))

    def _plainly(self, name: str, reason: str) -> None:
        self.found.plain[name] = reason
        job, draw = self.jobs[name], stream(self.seed, "codebook", name)
        self._put(name, cluster_weight(self.weights[name], job, draw))

    def _put(self, name: str, clustering: Clustering) -> Tensor:
        """Put a weight into the quantized network; returns its subvectors (n, d)."""
        self.found.clusterings[name] = clustering
        weight = self.becoming[name]
        codebook = clustering.codebook.to(self.device, weight.dtype) * self.jobs[name].scale
        subvectors = codebook[clustering.codes.to(self.device).long()]
        weight.copy_(subvectors.view(weight.shape))
        return subvectors

    def _norm(self, item: Item) -> None:
        seen = []
        for net, norms in zip((self.dense, self.quantized), self.norms, strict=True):
            show = partial(inputs_of_norm, norms[item.name], net, item, self.run)
            seen.append(seen_by(map(show, self.batches)))
        if seen[0] is not None and seen[1] is not None:
            self._move(item.name, seen[0], seen[1])

    def _move(self, name: str, before: Statistics, after: Statistics) -> None:
        dense, quantized = (norms[name] for norms in self.norms)
        move_norm(quantized, dense, before, after)
        mean, variance = statistics_of(quantized)
        self.found.norms[name] = mean.cpu().clone(), variance.cpu().clone()
