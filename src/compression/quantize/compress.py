"""Quantizing a whole network: every planned weight is clustered and gives way to codebook and codes, or to room for
them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
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
from .kmeans import cluster, never, with_eight_bits
from .layer_result import LayerResult, result_of
from .layers import CODES_DTYPE, QuantizedLayer, share_codes
from .placing import quantize_weight
from .plan import LayerPlan, Plan
from .sixteen_bits import scale_of, weight_problem
from .subvectors import to_subvectors
from .weights import WeightPlace, find_weight


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
    """Cluster every planned weight and put codebook and codes in its place.

    Args:
        model: the dense network (permuted or not). Its modules stay what they are, but for their weights.
        plan: from `make_plan`.
        seed: the run's seed; each layer draws from its own stream.
        device: where to cluster; None: where the weight is.
        show_progress: show a progress bar.
        finished: is given every finished layer, and asked for it first.

    Returns:
        The same network, and how well each weight was quantized, in the network's order.

    Raises:
        PlanError: a weight that cannot be clustered (not finite, or of values that 16-bit floats cannot hold); before
            any is, and with all layers of which that is so.
    """
    check_weights(model, plan)
    plan = with_scales(model, plan)
    found = _cluster_layers(model, plan, seed, device, show_progress, finished)
    results = []

    def code(plan: LayerPlan, place: WeightPlace) -> QuantizedLayer:
        weight = place.parameter.detach()
        layer = _empty(plan, place)
        clustering = found.pop(plan.name)
        clustering = replace(clustering, codebook=clustering.codebook * plan.scale)
        layer.set_codes(clustering.codebook.to(weight.device, weight.dtype), clustering.codes.to(weight.device))
        codebook, codes = clustering.codebook.cpu(), clustering.codes.cpu()
        results.append(result_of(plan, weight.cpu(), codebook, codes, clustering.iterations))
        return layer

    return _replace(model, plan, code), results


def check_weights(model: nn.Module, plan: Plan) -> None:
    """Check that 16-bit codebooks can hold every planned weight.

    Raises:
        PlanError: one is not finite, too large or too small for them; names every such layer.
    """
    problems = [
        f"layer {name!r}: {problem}"
        for name, place in places_of(model, plan).items()
        if (problem := weight_problem(place.parameter.detach()))
    ]
    if problems:
        raise PlanError("\n  ".join(problems))


def with_scales(model: nn.Module, plan: Plan) -> Plan:
    """The plan with the scale of every codebook, which its weight decides."""
    scales = {name: scale_of(place.parameter.detach()) for name, place in places_of(model, plan).items()}
    return replace(plan, layers={name: replace(layer, scale=scales[name]) for name, layer in plan.layers.items()})


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
    weights = {name: place.parameter.detach() for name, place in places_of(model, plan).items()}
    jobs = one_of_each(model, plan)
    jobs.sort(key=lambda job: -weights[job.name].numel() * job.k * job.k_means_n_iters)
    on_cpu = all(torch.device(device or weights[job.name].device).type == "cpu" for job in jobs)
    clusterings: dict[str, Clustering] = {}
    if finished is not None:
        known = {job.name: finished.recall(job.name, weights[job.name]) for job in jobs}
        clusterings = {name: clustering for name, clustering in known.items() if clustering is not None}
        jobs = [job for job in jobs if job.name not in clusterings]
    workers = min(own_processors(), len(jobs)) if on_cpu else 1
    stop = threading.Event()

    def run(job: LayerPlan) -> tuple[str, Clustering]:
        weight = weights[job.name]
        return job.name, cluster_weight(
            weight.to(device or weight.device), job, stream(seed, "codebook", job.name), stop.is_set
        )

    def done(result: tuple[str, Clustering]) -> None:
        name, clusterings[result[0]] = result
        if finished is not None:
            finished.keep(name, weights[name], result[1])

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


def cluster_weight(
    weight: Tensor, layer: LayerPlan, generator: torch.Generator, stopped: Callable[[], bool] = never
) -> Clustering:
    """The clustering of a weight (R, ...) as planned, in units of its scale; arguments as for `kmeans`.

    Raises:
        PlanError: it cannot be clustered.
        InterruptedError: `stopped` said so.
    """
    vectors, iterations = _scaled_subvectors(weight, layer), layer.k_means_n_iters
    try:
        found = cluster(layer.k_means_type, vectors, layer.k, iterations, generator, layer.k_means_tolerance, stopped)
    except ValueError as error:
        raise PlanError(f"layer {layer.name!r}: {error}") from None
    if layer.codebook_bits == 8:
        found = with_eight_bits(vectors, found, weight.dtype)
    return replace(found, codes=found.codes.to(CODES_DTYPE))


def _scaled_subvectors(weight: Tensor, layer: LayerPlan) -> Tensor:
    """The subvectors (n, d) in units of the codebook's scale."""
    vectors = to_subvectors(weight, layer.d, layer.layout)
    return (vectors if layer.scale == 1 else vectors / layer.scale).float()


def build_quantized(model: nn.Module, plan: Plan) -> nn.Module:
    """Put an empty codebook and codes in the place of every planned weight; nothing is clustered.

    The values come from a file. Works on the meta device.
    """
    return _replace(model, plan, _empty)


def _empty(layer: LayerPlan, place: WeightPlace) -> QuantizedLayer:
    return quantize_weight(place, layer.d, layer.k, layer.scale, layer.codebook_bits, layer.layout)


def _replace(model: nn.Module, plan: Plan, make: Callable[[LayerPlan, WeightPlace], QuantizedLayer]) -> nn.Module:
    made: dict[int, QuantizedLayer] = {}
    places = places_of(model, plan)
    parameters = {name: place.parameter for name, place in places.items()}
    for name, layer in plan.layers.items():
        twin = made.get(id(parameters[name]))
        if twin is None:
            made[id(parameters[name])] = make(layer, places[name])
        else:
            share_codes(_empty(layer, places[name]), twin)
    return model


def places_of(model: nn.Module, plan: Plan) -> dict[str, WeightPlace]:
    """Where the weights of a plan are in the dense network.

    Raises:
        PlanError: the network has no such weight: the plan was made for another one.
    """
    modules = dict(model.named_modules())
    places = {}
    for name in plan.layers:
        place = find_weight(modules, name)
        if place is None:
            raise PlanError(f"the network has no weight {name!r}: the plan was made for another one")
        places[name] = place
    return places


def one_of_each(model: nn.Module, plan: Plan) -> list[LayerPlan]:
    """The weights of a plan, of tied ones the first."""
    places = places_of(model, plan)
    return list({id(places[name].parameter): plan.layers[name] for name in reversed(list(plan.layers))}.values())
