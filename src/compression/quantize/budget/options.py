"""What d, k and bits of a codebook's values a weight may have, how many bits each choice costs, and what it would lose.

d divides a row and is at most 32; in a convolution with a larger kernel than one, subvectors hold whole kernels or
equal parts of one, so that a permutation of channels moves whole parts. k is a power of two from 2 to 4,096, with four
subvectors per centroid. Along outputs d and k are those that `output_layout` allows. What the settings themselves would
do is always among the options.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ....common.randomness import stream
from ..output_layout import MOST_VALUES, sizes_along_outputs
from ..plan import LayerPlan, LayerSpec
from ..sixteen_bits import largest_size, scale_of
from ..stored_codebook import CODEBOOK_BITS
from ..subvectors import bits_of, clamp_centroids, to_subvectors
from ..weights import WeightPlace
from .distortion import distortions

LARGEST_D = 32
LARGEST_K = 4096
LEAST_ITERATIONS = 50
"""Iterations of a clustering that are not lowered for the sake of a large k."""


Setting = tuple[int, int, int]
"""d, k and bits of a value of the codebook."""


@dataclass(frozen=True)
class WeightOptions:
    """The options of one weight.

    Attributes:
        names: of the weight in the plan, several where it is tied.
        settings: d, k and bits of the codebook's values of each option.
        bits: (c,) of each option.
        distortion: (c,) sums of squares that it would lose.
        power: sum of squares of the weight.
        n_values: in the weight.
        scale: of its codebook, see `sixteen_bits`.
        own: what the settings would do with it.
    """

    names: tuple[str, ...]
    settings: tuple[Setting, ...]
    bits: NDArray[np.int64]
    distortion: NDArray[np.float64]
    power: float
    n_values: int
    scale: float
    own: LayerPlan

    def number_of(self, planned: LayerPlan) -> int:
        """The option with what is planned.

        Raises:
            ValueError: there is none.
        """
        return self.settings.index((planned.d, planned.k, planned.codebook_bits))


def allowed_sizes(place: WeightPlace) -> list[int]:
    """The subvector lengths that a weight may get, rising."""
    row, area = place.parameter.shape[1:].numel(), place.kernel_area
    divisors = [d for d in range(1, min(row, LARGEST_D) + 1) if row % d == 0]
    return [d for d in divisors if d % area == 0 or area % d == 0]


def settings_for(
    place: WeightPlace, planned: LayerPlan, own: LayerSpec | None, codebook_bits: int | None = None
) -> list[Setting]:
    """What a weight may get, rising.

    Args:
        place: of the weight.
        planned: what the settings would do with it.
        own: overrides of this layer: what they say is not up for choice.
        codebook_bits: what the settings say of them for all layers; None: nothing, so that both are options.
    """
    given = (own.codebook_bits if own is not None else None) or codebook_bits
    choices = [given] if given is not None else sorted(CODEBOOK_BITS)
    return [(d, k, bits) for d, k in _pairs_for(place, planned, own) for bits in choices]


def _pairs_for(place: WeightPlace, planned: LayerPlan, own: LayerSpec | None) -> list[tuple[int, int]]:
    """The (d, k) that a weight may get, rising; arguments as for `settings_for`."""
    n_values, along_outputs = place.parameter.numel(), planned.layout == "output"
    blocks_given = own is not None and own.large_subvectors is not None and place.kernel_area > 1
    fixed_d = blocks_given or (own is not None and own.subvector_size is not None)
    pairs = {(planned.d, planned.k)}
    sizes = sizes_along_outputs(place) if along_outputs else allowed_sizes(place)
    for d in [planned.d] if fixed_d else sizes:
        most = clamp_centroids(MOST_VALUES // d if along_outputs else LARGEST_K, n_values // d)
        if own is not None and own.k is not None:
            k = clamp_centroids(own.k, n_values // d)
            allowed = k >= planned.k  # a size that leaves fewer centroids is no way to get them
            pairs |= {(d, k)} if allowed and not (along_outputs and k > most) else set()
        else:
            pairs |= {(d, 1 << bits) for bits in range(1, most.bit_length())}
    return sorted(pairs)


def measured(
    names: tuple[str, ...], place: WeightPlace, planned: LayerPlan, settings: Iterable[Setting], seed: int
) -> WeightOptions:
    """The options of a weight, with their bits and estimated distortions.

    Args:
        names: of the weight in the plan.
        place: where it is.
        planned: what the settings would do with it.
        settings: of each option, from `settings_for`.
        seed: of the run; each weight and d draws from a stream of its own.
    """
    weight = place.parameter.detach()
    settings, scale, n_values = tuple(settings), scale_of(weight), weight.numel()
    lost: dict[Setting, float] = {}
    for d in sorted({d for d, _, _ in settings}):
        ks = sorted({k for own_d, k, _ in settings if own_d == d})
        generator = stream(seed, "budget", names[0], d)
        for bits, found in zip(
            (16, 8), distortions(to_subvectors(weight, d, planned.layout), ks, generator), strict=True
        ):
            lost |= {(d, k, bits): float(value) for k, value in zip(ks, found, strict=True)}
    return WeightOptions(
        names=names,
        settings=settings,
        bits=np.array([_bits(n_values, setting, scale) for setting in settings], dtype=np.int64),
        distortion=np.array([lost[setting] for setting in settings]),
        power=_power(weight),
        n_values=n_values,
        scale=scale,
        own=planned,
    )


def _bits(n_values: int, setting: Setting, scale: float) -> int:
    d, k, codebook_bits = setting
    return bits_of(n_values // d, d, k, scale, codebook_bits)


def with_option(planned: LayerPlan, name: str, setting: Setting, own: LayerSpec | None) -> LayerPlan:
    """The plan of a weight with another setting.

    A clustering takes time in proportion to k, so a k above that of the settings gets fewer iterations, unless the
    layer has its own number of them: all clusterings together then take about the time that the settings ask for.
    """
    d, k, codebook_bits = setting
    iterations = planned.k_means_n_iters
    if k > planned.k and (own is None or own.k_means_n_iters is None):
        iterations = max(min(LEAST_ITERATIONS, iterations), iterations * planned.k // k)
    return LayerPlan(
        name=name,
        d=d,
        k=k,
        k_means_type=planned.k_means_type,
        k_means_n_iters=iterations,
        k_means_tolerance=planned.k_means_tolerance,
        codebook_bits=codebook_bits,
        layout=planned.layout,
    )


def _power(weight: Tensor, chunk: int = 1 << 20) -> float:
    """Sum of squares, in double precision."""
    size = largest_size(weight) or 1.0
    return sum(float((part.double() / size).square().sum()) for part in weight.reshape(-1).split(chunk)) * size**2
