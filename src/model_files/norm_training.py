"""How each batch norm trains, in files of ours: what makes a folded norm whole (`norms`).

Two numbers of a channel are kept: the logarithm to base 2 of |w| s, the size of the norm's own weight, and
asinh(b / (|w| s)) of its own bias b. Even steps of these are even in the gain's size, and in the bias near zero in
gains, far from it in its own size. w is the folded weight, s the deviation of the input; where w is 0, 1 stands for it.

`.pth`: readers of the published format see a dict of tensors as ever; the two numbers are an attribute of the dict (as
`_metadata` is one of a state dict), 16-bit floats (2, C).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..common.errors import CheckpointError
from .norms import NORM_VECTORS, TRAINING_VECTORS, training_vectors

ATTRIBUTE = "norms_in_training"

TrainingVectors = tuple[Tensor, Tensor]
"""s (C,) and the norm's own bias (C,), float64."""


def training_vectors_of(model: nn.Module) -> dict[str, TrainingVectors]:
    """What a file of `model` holds besides folded norms, on the CPU, by norm; one that is used twice under all its
    names."""
    found = {name: training_vectors(module) for name, module in model.named_modules(remove_duplicate=False)}
    return {name: (one[0].cpu(), one[1].cpu()) for name, one in found.items() if one is not None}


def to_numbers(weights: Tensor, vectors: TrainingVectors) -> Tensor:
    """The two numbers (2, C), float64, of norms with the folded `weights` (C,)."""
    deviation, bias = vectors
    gain = _size(weights) * deviation
    return torch.stack([gain.log2(), (bias / gain).asinh()])


def from_numbers(weights: Tensor, numbers: Tensor) -> TrainingVectors:
    """The inverse of `to_numbers`."""
    gain = numbers[0].double().exp2()
    return gain / _size(weights), numbers[1].double().sinh() * gain


def _size(weights: Tensor) -> Tensor:
    size = weights.double().abs()
    return torch.where(size > 0, size, 1.0)


def with_training_vectors(state: Mapping[str, Tensor], vectors: Mapping[str, TrainingVectors]) -> dict[str, Tensor]:
    """The contents of a `.pth` file: the same dict of tensors, with an attribute that says how its norms train."""
    contents = OrderedDict(state)
    if vectors:
        parts = [to_numbers(state[key_of(name, NORM_VECTORS[0])], one) for name, one in vectors.items()]
        widths = {name: part.shape[1] for name, part in zip(vectors, parts, strict=True)}
        setattr(contents, ATTRIBUTE, {"widths": widths, "numbers": torch.cat(parts, dim=1).half()})
    return contents


def training_vectors_in(contents: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """How the norms in the contents of a `.pth` file train, under the names of `TRAINING_VECTORS`.

    Raises:
        CheckpointError: that is not as `with_training_vectors` writes it.
    """
    found = getattr(contents, ATTRIBUTE, None)
    if found is None:
        return {}
    widths, numbers = (found.get(key) for key in ("widths", "numbers")) if isinstance(found, dict) else (None, None)
    if not isinstance(widths, dict) or not isinstance(numbers, Tensor) or not _fit(widths, numbers):
        raise CheckpointError(f"{source} cannot be read: what it says about the training of its norms is damaged")
    vectors = {}
    for (name, width), part in zip(widths.items(), numbers.split(list(widths.values()), dim=1), strict=True):
        weight = contents.get(key_of(name, NORM_VECTORS[0]))
        if weight is not None and weight.shape == (width,):  # a norm that somebody took out or changed is no error
            vectors[name] = from_numbers(weight, part)
    return named(TRAINING_VECTORS, vectors, list(zip(*vectors.values(), strict=True)))


def _fit(widths: Mapping[object, object], numbers: Tensor) -> bool:
    lengths = [width for width in widths.values() if type(width) is int and width > 0]
    return (
        all(type(name) is str for name in widths)
        and len(lengths) == len(widths)
        and type(numbers) is Tensor
        and (numbers.layout, numbers.dtype, numbers.device.type) == (torch.strided, torch.float16, "cpu")
        and numbers.shape == (2, sum(lengths))
        and numbers.is_contiguous()
    )


def named(leaves: Sequence[str], norms: Iterable[str], parts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Tensors by name: for each leaf one of every norm."""
    return {
        key_of(name, leaf): tensor
        for leaf, tensors in zip(leaves, parts or [[]] * len(leaves), strict=True)
        for name, tensor in zip(norms, tensors, strict=True)
    }


def key_of(prefix: str, name: str) -> str:
    """The name of a tensor of the module `prefix`, which is empty for the network itself."""
    return f"{prefix}.{name}" if prefix else name
