"""From the tensors of a file to a network that fits them: every key, shape, kind of number and code is checked
first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..common.errors import CheckpointError
from ..compression.quantize.layers import QuantizedLayer
from ..compression.quantize.subvectors import Layer
from .norms import (
    NORM_STATISTICS,
    NORM_VECTORS,
    TRAINING_VECTORS,
    is_folded_norm,
    norm_problem,
    set_known_folded,
    set_known_whole,
    unfold_norm,
)
from .pth import CODE_DTYPES, key_of, with_float_codebooks
from .wrapping import fitted, is_wrapped, unknown_prefix


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put the tensors of a file into `model`, whose quantized layers have the d and k of the file; in place.

    Args:
        model: dense or with quantized layers, on any device.
        state: from `read_tensors`; compressed or an ordinary state dict.
        source: the file, for messages.

    Raises:
        CheckpointError: as `check_state`. The model is unchanged.
    """
    state = _named_as_in(model, state, source)
    check_state(model, state, source)
    expected, optional, norms = _expected(model, state)
    codes = _codes_of(model)
    with torch.no_grad():
        for name, target in expected.items():
            if isinstance(target, Tensor):
                target.copy_(_unsigned(state[name]) if name in codes else state[name])
        for name in optional & set(state):
            optional_target = None if name.rpartition(".")[2] in TRAINING_VECTORS else _buffer(model, name)
            if optional_target is not None:
                optional_target.copy_(state[name])
        _finish_quantized([module for module in model.modules() if isinstance(module, QuantizedLayer)])
        _load_norms(dict(norms), state, source)


def _finish_quantized(layers: Sequence[QuantizedLayer]) -> None:
    """Multiply the codebooks that files hold divided by a scale, each once; what was derived is made anew."""
    for layer in {id(layer.codebook): layer for layer in layers if layer.has_scale}.values():
        layer.codebook.mul_(layer.codebook_scale)
    for layer in layers:
        layer.forget()


def _load_norms(norms: Mapping[str, Layer], state: Mapping[str, Tensor], source: str) -> None:
    """Unfold the norms of a file; those of which it does not say how they train will warn when they are trained."""
    folded = {}
    for prefix, norm in norms.items():
        set_known_whole(norm)
        training = _training_vectors(prefix, state)
        unfold_norm(norm, state[key_of(prefix, "weight")], state[key_of(prefix, "bias")], training)
        if training is None and isinstance(norm, _BatchNorm) and norm.weight is not None:
            folded[prefix] = norm
    set_known_folded(folded, source)


def _training_vectors(prefix: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """How the norm `prefix` trains; None: the file does not say it."""
    deviation, bias = (state.get(key_of(prefix, name)) for name in TRAINING_VECTORS)
    return None if deviation is None or bias is None else (deviation, bias)


def check_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Check that the tensors of a file fit `model`, which may be on the meta device: nothing is allocated for it yet.

    Raises:
        CheckpointError: keys are missing or left over, shapes or kinds of numbers differ, a code is not below k, or a
            value is not finite. The message lists every one of them.
    """
    state = _named_as_in(model, state, source)
    expected, optional, norms = _expected(model, state)
    codes = _codes_of(model)
    problems = _key_problems(state, expected, optional)
    if not problems:
        problems = [
            p for name, target in expected.items() if (p := _kind_problem(name, state[name], target, name in codes))
        ]
    if not problems:
        finite = expected.keys() - _infinite_allowed(model)
        infinite = [name for name in expected if name in finite and not torch.isfinite(state[name]).all()]
        problems = [f"{name} holds values that are not finite" for name in infinite]
    if not problems:
        problems = [f"{prefix}: {p}" for prefix, norm in norms if (p := _norm_problem(prefix, norm, state))]
    if problems:
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"{source} does not fit the network:\n  " + "\n  ".join(problems[:12]) + more)
    needed = {*codes, *(key_of(name.rpartition(".")[0], "codebook") for name in codes)}
    check_codes({name: state[name] for name in needed}, source)


def _named_as_in(model: nn.Module, state: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """The file's tensors under the names that `model` has for them, where a known wrapping explains the difference;
    codebooks of 8-bit values as floats."""
    state = with_float_codebooks(state)
    if not is_wrapped(state):
        return state
    expected, optional, _ = _expected(model, state)
    return fitted(state, {*expected, *optional}, source)


def _codes_of(model: nn.Module) -> set[str]:
    """The keys of codes in a file for `model`; other tensors may bear the name too."""
    modules = model.named_modules(remove_duplicate=False)
    return {key_of(prefix, "codes_matrix") for prefix, module in modules if isinstance(module, QuantizedLayer)}


def _infinite_allowed(model: nn.Module) -> set[str]:
    """The keys of buffers that may hold an infinity on purpose, as masks do; those of norms do not."""
    return {
        key_of(prefix, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        if not is_folded_norm(module) and not isinstance(module, _NormBase)
        for name in module._buffers
    }


def _norm_problem(prefix: str, norm: Layer, state: Mapping[str, Tensor]) -> str | None:
    weight, bias = (state[key_of(prefix, name)] for name in NORM_VECTORS)
    training = _training_vectors(prefix, state)
    for name, vector in zip(TRAINING_VECTORS, training or (), strict=False):
        if problem := _kind_problem(key_of(prefix, name), vector, _Vector(weight.shape), is_codes=False):
            return problem
        if not torch.isfinite(vector).all():
            return f"{name} holds values that are not finite"
    return norm_problem(norm, weight, bias, training)


def _buffer(model: nn.Module, name: str) -> Tensor | None:
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix)._buffers.get(leaf)


class _Vector:
    """What a folded norm expects in a file: a vector of this shape."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def _expected(
    model: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor | _Vector], set[str], list[tuple[str, Layer]]]:
    """Keys the file must have with their targets, keys it may have, and the norms it holds folded."""
    expected: dict[str, Tensor | _Vector] = {}
    optional: set[str] = set()
    norms = []
    modules = list(model.named_modules(remove_duplicate=False))
    # other modules (instance norms) may have entries of these names in a compressed file too
    has_statistics = any(
        key_of(prefix, name) in state
        for prefix, module in modules
        if is_folded_norm(module)
        for name in NORM_STATISTICS
    )
    for prefix, module in modules:
        if is_folded_norm(module) and not has_statistics:
            norms.append((prefix, module))
            for name in NORM_VECTORS:
                expected[key_of(prefix, name)] = _Vector(module.running_mean.shape)
            optional.update(key_of(prefix, name) for name in TRAINING_VECTORS)
            continue
        skipped = module._non_persistent_buffers_set
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in skipped:
                continue
            if name == "num_batches_tracked" and isinstance(module, _NormBase):
                optional.add(key_of(prefix, name))  # files written by old torch versions have none
            else:
                expected[key_of(prefix, name)] = tensor
        if type(module).__name__ == "FrozenBatchNorm2d":
            optional.add(key_of(prefix, "num_batches_tracked"))
    return expected, optional, norms


def _key_problems(state: Mapping[str, Tensor], expected: Mapping[str, object], optional: set[str]) -> list[str]:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected and name not in optional]
    problems = []
    quantized_in_file = {name.removesuffix(".codes_matrix") for name in unexpected if name.endswith(".codes_matrix")}
    quantized_in_model = {name.removesuffix(".codes_matrix") for name in missing if name.endswith(".codes_matrix")}
    for layers, text in (
        (quantized_in_file, "quantized in the file but not with these settings"),
        (quantized_in_model, "to be quantized with these settings but dense in the file"),
    ):
        if layers:
            problems.append(f"{text} (use_compression, ignored_modules, k): {_some(sorted(layers))}")
    prefix = unknown_prefix(state, expected) if missing and unexpected else None
    if prefix:
        problems.append(f"every name in the file begins with {prefix!r}, and would fit without it: save it without")
    if missing:
        problems.append(f"{len(missing)} keys missing: {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} keys unexpected: {_some(unexpected)}")
    return problems


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def _unsigned(codes: Tensor) -> Tensor:
    """Codes as int64, so that none wraps before it is checked; what was stored as int16 is unsigned."""
    wide = codes.to(torch.int64)
    return wide & 0xFFFF if codes.dtype == torch.int16 else wide


def _kind_problem(name: str, value: Tensor, target: Tensor | _Vector, is_codes: bool) -> str | None:
    leaf = name.rpartition(".")[2]
    if value.shape != target.shape:
        advice = ""
        if leaf in ("codebook", "codes_matrix") and value.dim() == 2:
            advice = _quantization_advice(name.removesuffix("." + leaf), leaf, value.shape, target.shape)
        elif target.shape and value.shape and value.shape[1:] == target.shape[1:]:
            advice = f": the file is for {value.shape[0]} outputs"
        return f"{name} is {tuple(value.shape)} in the file, {tuple(target.shape)} in the network{advice}"
    if is_codes:
        return None if value.dtype in CODE_DTYPES else f"{name} holds {value.dtype}, expected integers"
    wanted = _kind_of_number(target.dtype) if isinstance(target, Tensor) else "floating-point"
    if _kind_of_number(value.dtype) != wanted:
        return f"{name} holds {value.dtype}, expected {wanted} numbers"
    return None


def _kind_of_number(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "floating-point" if dtype.is_floating_point else "whole"


def _quantization_advice(layer: str, leaf: str, found: torch.Size, wanted: torch.Size) -> str:
    key = f"--model.compression_parameters.layer_specs.{layer}"
    if leaf == "codebook" and found[0] != wanted[0]:
        return (
            f": the file was quantized with k = {found[0]} here, the settings give {wanted[0]}; for this file use "
            f"{key}.k {found[0]}"
        )
    if leaf == "codebook":
        return (
            f": the file's subvectors have {found[1]} values, the settings give {wanted[1]} (large_subvectors, "
            "pw_subvector_size, fc_subvector_size)"
        )
    sizes = "large_subvectors, pw_subvector_size, fc_subvector_size, layout"
    return f": another subvector size ({sizes}) or another architecture"


def check_codes(state: Mapping[str, Tensor], source: str) -> None:
    """Check that every code is below the number of its layer's centroids.

    Raises:
        CheckpointError: one is not; names the layer.
    """
    for name, codes in state.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf != "codes_matrix" or codes.dtype not in CODE_DTYPES or not codes.numel():
            continue
        codebook = state.get(key_of(prefix, "codebook"))
        if codebook is None or codebook.dim() != 2:
            continue
        wide = _unsigned(codes)
        if int(wide.max()) >= codebook.shape[0] or int(wide.min()) < 0:
            raise CheckpointError(
                f"{source}: layer {prefix!r} holds codes up to {int(wide.max())}, but its codebook has "
                f"{codebook.shape[0]} centroids; the file is damaged"
            )
