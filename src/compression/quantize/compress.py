"""Coding a whole network: every planned layer is clustered and replaced, or built from shapes alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...common.errors import PlanError
from ...common.progress import bar
from ...common.randomness import stream
from ...engines.machine import own_processors
from .assign import one_thread
from .clustering import Clustering
from .kmeans import cluster
from .layers import CODES_DTYPE, QUANTIZED_LAYERS, QuantizedLayer
from .plan import LayerPlan, Plan
from .sixteen_bits import energies, rounding_loss, weight_problem
from .subvectors import Layer, to_subvectors


@dataclass(frozen=True)
class LayerResult:
    """How well one layer was quantized.

    Attributes:
        name: the layer.
        d: subvector length.
        k: centroids.
        n_subvectors: subvectors quantized.
        distortion: squared error summed over the weight.
        power: sum of squares of the weight; distortion / power is the relative error.
        iterations: mean updates that the clustering made.
        rounding: share of the power that 16-bit floats lose by themselves, part of the distortion.
    """

    name: str
    d: int
    k: int
    n_subvectors: int
    distortion: float
    power: float
    iterations: int
    rounding: float

    @property
    def relative_error(self) -> float:
        """Share of the weight's energy that is lost, 0 (nothing) to 1."""
        return self.distortion / self.power if self.power else 0.0


class Clusterings(Protocol):
    """Keeps finished clusterings, so that a run that resumes after a crash does not repeat them."""

    def recall(self, name: str, weight: Tensor) -> Clustering | None:
        """The clustering of layer `name` if it was kept for this very weight."""

    def keep(self, name: str, weight: Tensor, clustering: Clustering) -> None:
        """Keep one; called in the thread of `compress`'s caller."""


def compress(
    model: nn.Module,
    plan: Plan,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    show_progress: bool = True,
    finished: Clusterings | None = None,
) -> tuple[nn.Module, list[LayerResult]]:
    """Cluster and replace every planned layer, in place.

    Args:
        model: the dense network (permuted or not). A bare layer is replaced as a whole, so use the returned model.
        plan: from `make_plan`.
        seed: the run's seed; each layer draws from its own stream.
        device: where to cluster; None: where the weight is.
        show_progress: show a progress bar.
        finished: is given every finished layer, and asked for it first.

    Returns:
        The network with quantized layers, and how well each was quantized, in the network's order.

    Raises:
        PlanError: a weight that cannot be clustered (not finite, or of values that 16-bit floats cannot hold); before
            any is, and with all layers of which that is so.
    """
    check_weights(model, plan)
    found = _cluster_layers(model, plan, seed, device, show_progress, finished)
    results = []

    def code(plan: LayerPlan, dense: Layer) -> QuantizedLayer:
        layer: QuantizedLayer = QUANTIZED_LAYERS[type(dense)](dense, plan.d, plan.k)
        weight: Tensor = dense.weight.detach()
        clustering = found.pop(plan.name)
        layer.set_codes(clustering.codebook.to(weight.device, weight.dtype), clustering.codes.to(weight.device))
        lost, power = energies(weight.cpu(), clustering.codebook.cpu(), clustering.codes.cpu())
        results.append(
            LayerResult(
                name=plan.name,
                d=plan.d,
                k=plan.k,
                n_subvectors=clustering.codes.shape[0],
                distortion=lost,
                power=power,
                iterations=clustering.iterations,
                rounding=rounding_loss(weight.cpu()),
            )
        )
        return layer

    return _replace(model, plan, code), results


def check_weights(model: nn.Module, plan: Plan) -> None:
    """Check that 16-bit codebooks can hold every planned weight.

    Raises:
        PlanError: one is not finite, too large or too small for them; names every such layer.
    """
    modules = dict(model.named_modules())
    weights = {name: modules[name].weight for name in plan.layers}
    problems = [
        f"layer {name!r}: {problem}"
        for name, weight in weights.items()
        if isinstance(weight, Tensor) and (problem := weight_problem(weight.detach()))
    ]
    if problems:
        raise PlanError("\n  ".join(problems))


MANY_VECTORS = 1024
CANDIDATE_STARTS, CANDIDATE_VISITS, CANDIDATE_ITERATIONS = 4, 1500, (6, 60)
"""A candidate's measure of a layer with fewer subvectors per centroid than the first: clusterings; subvectors times
iterations of each, per centroid; at least and at most so many iterations."""


def candidate_distortion(plan: Plan, seed: int) -> Callable[[str, Tensor], NDArray[np.float64] | None]:
    """A measure of how well a layer of `plan` would be quantized: (name, subvectors (n, d)) -> about its distortion,
    (`CANDIDATE_STARTS`,).

    Short annealings from as many starts, always the same ones, so that two orders of the channels are compared on equal
    terms. None for a layer with `MANY_VECTORS` per centroid or more: there the score of the search is close enough, and
    the look costs more.
    """

    def measure(name: str, vectors: Tensor) -> NDArray[np.float64] | None:
        layer = plan.layers[name]
        n = vectors.shape[0]
        if n >= MANY_VECTORS * layer.k:
            return None
        one_thread()  # groups are searched side by side
        least, most = CANDIDATE_ITERATIONS
        iterations = min(max(least, CANDIDATE_VISITS * layer.k // n), most)
        ready = vectors.float().cpu()
        # the label seeds the candidates: with another one every result would change
        starts = [stream(seed, f"quick look {number}", name) for number in range(CANDIDATE_STARTS)]
        found = [cluster("src", ready, layer.k, iterations, start, 1.0) for start in starts]  # each one short annealing
        return n * np.array([clustering.distortion for clustering in found])

    return measure


def _cluster_layers(
    model: nn.Module,
    plan: Plan,
    seed: int,
    device: torch.device | str | None,
    show_progress: bool,
    finished: Clusterings | None,
) -> dict[str, Clustering]:
    """The clustering of every planned layer, of tied ones the first, by name.

    On the CPU as many layers at a time as this process has processors, each on one of them, the longest first: small
    layers would not keep more than one busy. The result of a layer depends on its weight and the seed alone. Elsewhere
    one after the other.
    """
    modules = dict(model.named_modules())
    jobs = list({id(modules[name].weight): plan.layers[name] for name in reversed(list(plan.layers))}.values())
    jobs.sort(key=lambda job: -modules[job.name].weight.numel() * job.k * job.k_means_n_iters)
    on_cpu = all(torch.device(device or modules[job.name].weight.device).type == "cpu" for job in jobs)
    clusterings: dict[str, Clustering] = {}
    if finished is not None:
        known = {job.name: finished.recall(job.name, modules[job.name].weight.detach()) for job in jobs}
        clusterings = {name: clustering for name, clustering in known.items() if clustering is not None}
        jobs = [job for job in jobs if job.name not in clusterings]
    workers = min(own_processors(), len(jobs)) if on_cpu else 1
    stop = threading.Event()

    def run(job: LayerPlan) -> tuple[str, Clustering]:
        weight: Tensor = modules[job.name].weight.detach()
        vectors = to_subvectors(weight, job.d).float().to(device or weight.device)
        generator = stream(seed, "codebook", job.name)
        try:
            found = cluster(
                job.k_means_type, vectors, job.k, job.k_means_n_iters, generator, job.k_means_tolerance, stop.is_set
            )
        except ValueError as error:
            raise PlanError(f"layer {job.name!r}: {error}") from None
        return job.name, replace(found, codes=found.codes.to(CODES_DTYPE))

    def done(result: tuple[str, Clustering]) -> None:
        name, clusterings[result[0]] = result
        if finished is not None:
            finished.keep(name, modules[name].weight.detach(), result[1])

    n_known = len(clusterings)
    if workers <= 1:
        for job in bar(jobs, "quantize", n_known + len(jobs), show_progress, "layer", n_known):
            done(run(job))
        return clusterings
    with ThreadPoolExecutor(workers, initializer=one_thread) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            for future in bar(
                as_completed(futures), "quantize", n_known + len(futures), show_progress, "layer", n_known
            ):
                done(future.result())
            return clusterings
        except BaseException:  # Ctrl-C and a layer that cannot be clustered end the others too
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def build_quantized(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace every planned layer by a quantized layer of the same shape with an empty codebook; nothing is clustered.

    The values come from a file. Works on the meta device.
    """
    return _replace(model, plan, lambda layer, dense: QUANTIZED_LAYERS[type(dense)](dense, layer.d, layer.k))


def _replace(model: nn.Module, plan: Plan, make: Callable[[LayerPlan, nn.Module], QuantizedLayer]) -> nn.Module:
    modules = dict(model.named_modules())
    made: dict[int, QuantizedLayer] = {}
    by_weight: dict[int, QuantizedLayer] = {}
    for name, layer in plan.layers.items():
        dense = modules[name]
        twin = by_weight.get(id(dense.weight))
        if twin is not None:
            quantized = QUANTIZED_LAYERS[type(dense)](dense, layer.d, layer.k)
            _share(quantized, twin)
        else:
            quantized = by_weight[id(dense.weight)] = make(layer, dense)
        made[id(dense)] = quantized
    if id(model) in made:
        return made[id(model)]
    # every place that holds a replaced module, so that a module used twice stays one module
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in made:
                parent._modules[child_name] = made[id(child)]
    return model


def _share(quantized: QuantizedLayer, twin: QuantizedLayer) -> None:
    """Tie two quantized layers whose dense weights were one parameter."""
    quantized.codebook = twin.codebook
    quantized.codes_matrix = twin.codes_matrix
