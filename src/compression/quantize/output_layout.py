"""The layout "output": subvectors of neighbouring output channels, by the rule of Apple's Neural Engine.

A subvector holds what d neighbouring outputs do with one input, so that a permutation of a layer's outputs, which the
layers after it undo, makes alike what stands together. The Neural Engine is said to decode tables along the outputs
with d = 2, 4, 8 or 16 and k d <= 256 while it computes, and other ones before.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from ...common.errors import PlanError
from .subvector_size import BlockRule
from .weights import WeightPlace

SIZES = (2, 4, 8, 16)
MOST_VALUES = 256
"""Of a codebook, k d."""


def check_rule(k: int, rule: BlockRule) -> None:
    """Check what is set for all layers, before any of them is looked at.

    Raises:
        PlanError: these k and subvector lengths are none for this layout.
    """
    for key, d in (("pw_subvector_size", rule.pw_subvector_size), ("fc_subvector_size", rule.fc_subvector_size)):
        if problem := _problem(k, d):
            prefix = "model.compression_parameters"
            raise PlanError(f"{prefix}.layout: output with {prefix}.{key} = {d} and {prefix}.k = {k}: {problem}")


def size_along_outputs(place: WeightPlace, rule: BlockRule, override: int | None) -> tuple[int | None, str | None]:
    """The subvector length d of a weight, and a note where the rule could not be followed; None: its subvectors run
    along the inputs.

    `pw_subvector_size` is d of all convolutions here, `fc_subvector_size` of everything else; where d does not divide
    the outputs, it is the largest smaller one of `SIZES` that does.

    Raises:
        PlanError: `override` (layer_specs) does not divide the outputs.
    """
    if not rows_are_outputs(place):
        return None, "layout: output is for layers whose weight has a row for each output: subvectors run along inputs"
    outputs = place.parameter.shape[0]
    if override is not None:
        if override not in SIZES or outputs % override:
            fitting = map(str, sizes_along_outputs(place))
            raise PlanError(
                f"layout: output: subvector size {override} does not divide its {outputs} outputs, or is not 2, 4, 8 "
                f"or 16; possible sizes: {', '.join(fitting) or 'none (set layout: input)'}"
            )
        return override, None
    key = "pw_subvector_size" if place.is_convolution else "fc_subvector_size"
    wanted = rule.pw_subvector_size if place.is_convolution else rule.fc_subvector_size
    d = max((size for size in SIZES if size <= wanted and outputs % size == 0), default=None)
    if d == wanted:
        return d, None
    if d is None:
        return None, f"layout: output: {outputs} outputs cannot be paired: subvectors run along inputs"
    return d, f"layout: output: {key} {wanted} does not divide {outputs} outputs: subvectors of {d} are used"


def sizes_along_outputs(place: WeightPlace) -> list[int]:
    """The subvector lengths that divide the outputs of a weight, rising."""
    return [size for size in SIZES if place.parameter.shape[0] % size == 0]


def check_size(d: int, k: int) -> None:
    """Check d and k of one weight.

    Raises:
        PlanError: they are none for this layout.
    """
    if problem := _problem(k, d):
        raise PlanError(f"layout: output with d = {d} and k = {k}: {problem}")


def rows_are_outputs(place: WeightPlace) -> bool:
    """Whether the first axis of a weight counts outputs: not of transposed convolutions and embeddings."""
    return not isinstance(place.host, _ConvTransposeNd | nn.Embedding | nn.EmbeddingBag)


def _problem(k: int, d: int) -> str | None:
    if d not in SIZES:
        return "subvectors along outputs have 2, 4, 8 or 16 values"
    if k * d > MOST_VALUES:
        return f"k * d may be {MOST_VALUES} at most: k up to {MOST_VALUES // d} for subvectors of {d}"
    return None
