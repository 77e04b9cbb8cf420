"""What the distortion of each weight costs a network, as inputs show it (beyond the paper).

The sum of squares that a weight loses says little of what the network loses: before a batch norm the size of a weight
means nothing, and some layers matter more than others. So each weight is quantized alone, and what that changes of the
outputs is measured (`changes`). Of that, calibrating leaves a part, which the inputs of a weight decide (`gain`).
Losses of single weights are then added up (`loss`).

The quantization is a quick one (`ITERATIONS` of k-means), with the d and k of the settings; where these take hardly
anything of a weight's energy, or nearly all of it, with others (`MEASURABLE`), as outputs that do not change, or change
completely, say little. A change is never taken for less than `FLOOR` of what is usual for such a share of a weight's
energy: of a weight that hardly matters, rounding and chance are all that is seen, and no weight is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....common.randomness import stream
from ..calibrate.inputs import BATCH, count
from ..calibrate.sharing import Alone, Processes
from ..compress import cluster_weight, places_of
from ..plan import LayerPlan
from ..sixteen_bits import energies
from .changes import Outputs, Trial, call, changes
from .gain import gains
from .loss import Losses, disturbance
from .options import WeightOptions
from .tradeoff import Tradeoff

INPUTS = 128
"""Inputs that are shown, at most, where nobody says it."""
MEASURABLE = (0.03, 0.7)
"""Shares of a weight's energy that are taken away, at least and at most."""
ITERATIONS = 10
"""Of the clustering of a weight alone."""
FLOOR = 0.01
"""Share of the usual change."""


def losses_by_inputs(
    model: nn.Module,
    tradeoff: Tradeoff,
    batches: Sequence[Any],
    *,
    outputs: Outputs = call,
    seed: int = 0,
    device: torch.device | str | None = None,
    show_progress: bool = True,
    processes: Processes | None = None,
) -> Losses:
    """Measure what the distortion of every weight costs the network.

    Args:
        model: the dense network; it is copied, not changed.
        tradeoff: of the network.
        batches: of inputs, without labels, the same in all processes; all are shown: see `some_inputs`.
        outputs: what of the outputs is compared.
        seed: of the run.
        device: where to compute; None: where the network is.
        show_progress: show a progress bar.
        processes: that share the work; None: this one does all.

    Raises:
        DataError: outputs are not finite, or cannot be compared (`changes`).
    """
    place = torch.device(device or next((p.device for p in model.parameters()), "cpu"))
    places = places_of(model, tradeoff.plan)
    trials = [
        _trial(weight, tradeoff.plan.layers[weight.names[0]], places[weight.names[0]].parameter, seed, place)
        for weight in tradeoff.weights
    ]
    team = processes or Alone()
    own = changes(
        model,
        tradeoff.plan,
        trials,
        batches[team.rank :: team.world_size],
        outputs=outputs,
        device=place,
        show_progress=show_progress,
    )
    kind, by_trial = _together(team.gather([[own.kind, own.count, own.sums]]), len(trials))
    mine = [trial.name for trial in trials][team.rank :: team.world_size]
    left = gains(model, tradeoff.plan, mine, batches, outputs=outputs, seed=seed, device=place)
    left = dict(team.gather(list(left.items())))
    by_weight = _sensitivities(tradeoff.weights, trials, by_trial)
    return Losses({name: value * left[name] for name, value in by_weight.items()}, kind, by_disturbance=True)


def some_inputs(batches: Sequence[Any], most: int = INPUTS) -> list[Any]:
    """Batches of about so many inputs, spread evenly over all of them, as inputs often lie sorted by class; tensors of
    one size in equal parts of at most `BATCH`, whatever the batches were, as statistics of a few inputs say little."""
    if not batches:
        return []
    first = batches[0]
    if not isinstance(first, Tensor):
        return [batches[i] for i in _spread(len(batches), -(-most // max(count([first]), 1)))]
    each = -(-most // len(batches))
    chosen = [batches[i][_spread(len(batches[i]), each)] for i in _spread(len(batches), most)]
    if not all(isinstance(one, Tensor) and one.shape[1:] == first.shape[1:] for one in chosen):
        return chosen
    whole = torch.cat(chosen)
    whole = whole[_spread(len(whole), most)]
    return list(whole.tensor_split(-(-len(whole) // BATCH)))


def _spread(n: int, most: int) -> list[int]:
    """So many numbers below n, at most, evenly spread and rising."""
    taken = min(n, most)
    return [i * n // taken for i in range(taken)]


def _trial(weight: WeightOptions, plan: LayerPlan, parameter: Tensor, seed: int, device: torch.device) -> Trial:
    """The weight quantized alone."""
    d, k = _measurable(weight)
    how = replace(
        plan,
        d=d,
        k=k,
        codebook_bits=16,
        scale=weight.scale,
        k_means_type="kmeans",
        k_means_n_iters=ITERATIONS,
        k_means_tolerance=0.0,
    )
    values = parameter.detach().to(device)
    found = cluster_weight(values, how, stream(seed, "quantized alone", plan.name, d, k))
    codebook = (found.codebook.to(device) * weight.scale).to(values.dtype)
    lost, _ = energies(values.cpu(), codebook.cpu(), found.codes.cpu(), how.layout)
    return Trial(name=plan.name, codebook=codebook, codes=found.codes.to(device), distortion=lost, layout=how.layout)


def _measurable(weight: WeightOptions) -> tuple[int, int]:
    """d and k of the settings, or those next to them whose distortion can be measured by."""
    least, most = (share * weight.power for share in MEASURABLE)
    # Python's own number: where next to nothing is lost the share is infinite, of which numpy would warn
    nothing = float(np.finfo(float).tiny)

    def away(option: int) -> tuple[float, float]:
        lost, (d, k) = max(float(weight.distortion[option]), nothing), weight.settings[option][:2]
        outside = max(math.log(least / lost), math.log(lost / most), 0.0) if weight.power else 0.0
        return round(outside, 1), abs(math.log2(d / weight.own.d)) + abs(math.log2(k / weight.own.k))

    d, k = weight.settings[min(range(len(weight.settings)), key=away)][:2]
    return d, k


def _together(rows: Sequence[Any], n_trials: int) -> tuple[str, list[float]]:
    """How outputs were compared, and the mean change by each trial, from the rows of all processes."""
    kind = next((str(kind) for kind, _, _ in rows if kind), "")
    inputs = sum(number for _, number, _ in rows)
    return kind, [sum(sums[trial] for _, _, sums in rows) / max(inputs, 1) for trial in range(n_trials)]


def _sensitivities(
    weights: Sequence[WeightOptions], trials: Sequence[Trial], by_trial: Sequence[float]
) -> dict[str, float]:
    """Change by disturbance of every weight, by its first name."""
    disturbed = {
        weight.names[0]: float(disturbance(np.array(trial.distortion), weight.power))
        for weight, trial in zip(weights, trials, strict=True)
    }
    largest = max((change for change in by_trial if math.isfinite(change)), default=0.0)
    changed = {
        trial.name: change if math.isfinite(change) else largest  # it ruins the network
        for trial, change in zip(trials, by_trial, strict=True)
        if disturbed[trial.name] > 0
    }
    # per share of a weight's energy, in which weights of all sizes are alike
    rates = {
        weight.names[0]: changed[weight.names[0]] / disturbed[weight.names[0]] * weight.power
        for weight in weights
        if weight.names[0] in changed
    }
    usual = median([rate for rate in rates.values() if rate > 0] or [1.0])
    return {
        weight.names[0]: max(rates.get(weight.names[0], usual), FLOOR * usual) / weight.power
        for weight in weights
        if weight.power > 0
    }
