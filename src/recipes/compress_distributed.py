"""Permute and quantize over several processes: each takes its share of groups and layers, and all end with the same
network.

Every group and every layer draws from a random stream of its own and does not depend on the others, so the result is
that of one process, bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from torch import Tensor, nn

from ..compression.permute.binding import AnyGroup, bind, chains
from ..compression.permute.permute import GroupResult, forget_computed, group_result, group_row
from ..compression.quantize.compress import LayerResult, build_quantized, places_of, with_scales
from ..compression.quantize.placing import quantized_layers
from ..compression.quantize.plan import LayerPlan, Plan
from ..compression.quantize.weights import WeightPlace
from ..engines.engine import Engine


def permute_together(
    engine: Engine,
    model: nn.Module,
    groups: Sequence[AnyGroup],
    reshapes: dict[str, tuple[int, ...]],
    search: Callable[[nn.Module, Sequence[AnyGroup], Sequence[int]], list[GroupResult]],
) -> list[GroupResult]:
    """Search every group on one of the processes and permute `model` alike on all, in place.

    Groups that are searched one after the other stay together.

    Args:
        engine: the processes.
        model: the dense network, the same everywhere.
        groups: of the network.
        reshapes: of flattened layers, by name.
        search: permutes a network by some groups, in place; told which of all they are.
    """
    if engine.world_size == 1:
        return search(model, groups, range(len(groups)))
    mine = sorted(number for chain in chains(groups)[engine.rank :: engine.world_size] for number in chain)
    found = search(
        copy.deepcopy(model), [groups[number] for number in mine], mine
    )  # on a copy: all are applied at the end, in order
    rows = [[number, group_row(result)] for number, result in zip(mine, found, strict=True)]
    results = []
    for group, (_, row) in zip(bind(model, groups, reshapes), sorted(engine.gather(rows)), strict=True):
        result = group_result(group.label, row)
        if result.permutation is not None:
            group.apply(result.permutation)
        results.append(result)
    forget_computed(model)
    return results


def quantize_together(
    engine: Engine,
    model: nn.Module,
    plan: Plan,
    code: Callable[[nn.Module, Plan], tuple[nn.Module, list[LayerResult]]],
) -> tuple[nn.Module, list[LayerResult]]:
    """Code every planned layer on one of the processes, in place, and send codes and codebooks to all.

    Args:
        engine: the processes.
        model: the dense network, the same everywhere.
        plan: for the network.
        code: codes the layers of a plan, in place.
    """
    if engine.world_size == 1:
        return code(model, plan)
    plan = with_scales(model, plan)
    owners = _owners(model, plan, engine.world_size)
    mine = {name: layer for name, layer in plan.layers.items() if owners[name] == engine.rank}
    others = {name: layer for name, layer in plan.layers.items() if owners[name] != engine.rank}
    model, results = code(model, replace(plan, layers=mine))
    model = build_quantized(model, replace(plan, layers=others))
    layers = quantized_layers(model, plan.layers)
    for source in range(engine.world_size):
        tensors: list[Tensor] = []
        for name in plan.layers:
            if owners[name] == source:
                tensors += [layers[name].codebook, layers[name].codes_matrix]
        engine.broadcast(tensors, source)
    place = {name: number for number, name in enumerate(plan.layers)}
    gathered = [LayerResult(**row) for row in engine.gather([asdict(result) for result in results])]
    return model, sorted(gathered, key=lambda result: place[result.name])


def agreed(engine: Engine, plan: Plan) -> Plan:
    """The plan of the first process: what was chosen for a size might differ between kinds of processors."""
    if engine.world_size == 1:
        return plan
    rows = engine.gather(
        [[name, one.d, one.k, one.codebook_bits, one.k_means_n_iters] for name, one in plan.layers.items()]
    )
    layers = {
        name: replace(plan.layers[name], d=d, k=k, codebook_bits=bits, k_means_n_iters=iterations)
        for name, d, k, bits, iterations in rows[: len(plan.layers)]
    }
    return replace(plan, layers=layers)


def _owners(model: nn.Module, plan: Plan, world_size: int) -> dict[str, int]:
    """Which process codes each layer: the costliest first, always to the one with least to do; layers with one weight
    stay together."""
    places = places_of(model, plan)
    tied: dict[int, list[str]] = {}
    for name, place in places.items():
        tied.setdefault(id(place.parameter), []).append(name)
    load = [0.0] * world_size
    owners: dict[str, int] = {}
    for names in sorted(tied.values(), key=lambda names: -_cost(places[names[0]], plan.layers[names[0]])):
        owner = load.index(min(load))
        load[owner] += _cost(places[names[0]], plan.layers[names[0]])
        owners |= dict.fromkeys(names, owner)
    return owners


def _cost(place: WeightPlace, layer: LayerPlan) -> float:
    """Multiplications of clustering: every value meets every centroid in every iteration."""
    return float(place.parameter.numel()) * layer.k * (layer.k_means_n_iters + 1)
