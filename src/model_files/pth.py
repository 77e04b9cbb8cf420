"""Reading and writing model files in the published `.pth` format.

A plain dict of tensors:
- coded layer L: `L.codes_matrix` (R x m; uint8 if k <= 256, int16 if k <= 32768, else int32; int16 is read as unsigned),
  `L.codebook` (k x d, float16), `L.bias` if any;
- batch norm B: two vectors `B.weight`, `B.bias`. On load running_mean = 0 and running_var = 1;
- everything else as in the state dict of the dense network.
A file with running statistics is an ordinary state dict. How a norm is folded stands in `norms`. Files are read with `weights_only=True`, always.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..common.errors import CheckpointError
from ..common.paths import write_atomically
from ..compression.quantize.layers import QuantizedLayer
from ..compression.quantize.subvectors import Layer
from .norms import NORM_STATISTICS, NORM_VECTORS, fold_norm, is_folded_norm, norm_problem, unfold_norm
from .pickle_safety import check_pickle_safety, check_tensors
from .safetensors_file import read_container, read_metadata, write_container

_OURS = {"written_by": "pqf"}
"""Metadata of dense `.safetensors` files with a checksum."""
CODE_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _key(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def codes_dtype(k: int) -> torch.dtype:
    """The smallest type of the format that holds the codes 0 ... k-1 (int16 is read as unsigned)."""
    return torch.uint8 if k <= 256 else torch.int16 if k <= 32768 else torch.int32


def compressed_state(model: nn.Module) -> dict[str, Tensor]:
    """The contents of a published-format file for `model`, on the CPU; works for networks without coded layers too.

    Raises:
        CheckpointError: a codebook holds values that 16-bit floats cannot hold.
    """
    state: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            half = module.codebook.detach().to(torch.float16)
            if not torch.isfinite(half).all():
                raise CheckpointError(
                    f"layer {prefix!r}: its codebook holds values that 16-bit floats cannot hold (NaN, or beyond 65504)"
                )
            state[_key(prefix, "codes_matrix")] = module.codes_matrix.to(codes_dtype(module.k))
            state[_key(prefix, "codebook")] = half
            own: dict[str, Tensor | None] = {"bias": module.bias}
        elif is_folded_norm(module):
            own = dict(zip(NORM_VECTORS, fold_norm(module), strict=True))
        else:
            skipped = module._non_persistent_buffers_set
            own = {**module._parameters, **{name: b for name, b in module._buffers.items() if name not in skipped}}
        state.update({_key(prefix, name): tensor.detach() for name, tensor in own.items() if tensor is not None})
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}


def save_compressed(model: nn.Module, path: Path) -> None:
    """Write `model` in the published format, atomically.

    Raises:
        RunError: the disk is full or the folder cannot be written; an existing file is unchanged.
        CheckpointError: a codebook that 16-bit floats cannot hold.
    """
    state = compressed_state(model)
    write_atomically(path, partial(_save, state))


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    """Equal contents give equal bytes: into an open file, as torch would put the name of a path into the archive."""
    with open(path, "wb") as file:
        torch.save(dict(state), file)


def save_dense(model: nn.Module, path: Path) -> None:
    """Write the ordinary state dict of `model`, atomically. Raises RunError as `save_compressed`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, partial(_save, state))


def save_dense_safetensors(model: nn.Module, path: Path) -> None:
    """Write the ordinary state dict of `model` as safetensors, for any framework, atomically; with a checksum.

    Raises RunError as `save_compressed`.
    """
    write_container(
        path, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}, {"format": "pt", **_OURS}
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file, on the CPU, without executing anything the file may carry.

    Raises:
        CheckpointError: not such a file, truncated, or it holds something else than named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            ours = _OURS.items() <= read_metadata(path).items()
            contents: object = read_container(path)[0] if ours else load_file(path)
        else:
            check_pickle_safety(path)
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = (
            "it holds Python objects, which could execute code when read"
            if "Unsupported" in str(error) or "GLOBAL" in str(error)
            else "it is not a model file, or damaged"
        )
        raise CheckpointError(
            f"{path} was refused: {reason}. Expected a dict of tensors saved with torch.save, or a .safetensors file."
        ) from error
    except (
        Exception
    ) as error:  # damaged bytes make the readers fail in any way: struct.error, AssertionError, SafetensorError, ...
        raise CheckpointError(
            f"{path} cannot be read: truncated, damaged or not a model file ({_first_line(error)})."
        ) from error
    for wrapper in ("state_dict", "model"):
        # training scripts often wrap the state dict
        if isinstance(contents, dict) and isinstance(contents.get(wrapper), Mapping):
            contents = contents[wrapper]
    if (
        not isinstance(contents, Mapping)
        or not contents
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in contents.items())
    ):
        raise CheckpointError(f"{path} does not hold named tensors; expected a state dict or a compressed model")
    check_tensors(contents, path)
    return _without_prefix(dict(contents))


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the `module.` that DataParallel puts before every name (as in the semi-supervised ResNet-50)."""
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def is_compressed(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are those of a network with coded layers."""
    return any(name.rpartition(".")[2] in ("codes_matrix", "codes_packed", "codes_entropy") for name in state)


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put the tensors of a file into `model`, whose coded layers were built for the same coding; in place.

    Args:
        model: dense or with coded layers, on any device.
        state: from `read_tensors`; compressed or an ordinary state dict.
        source: the file, for messages.

    Raises:
        CheckpointError: as `check_state`. The model is unchanged.
    """
    check_state(model, state, source)
    expected, optional, norms = _expected(model, state)
    with torch.no_grad():
        for name, target in expected.items():
            if isinstance(target, Tensor):
                target.copy_(_unsigned(state[name]) if name.endswith("codes_matrix") else state[name])
        for name in optional & set(state):
            optional_target = _buffer(model, name)
            if optional_target is not None:
                optional_target.copy_(state[name])
        for prefix, norm in norms:
            unfold_norm(norm, state[_key(prefix, "weight")], state[_key(prefix, "bias")])


def check_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Check that the tensors of a file fit `model`, which may be on the meta device: nothing is allocated for it yet.

    Raises:
        CheckpointError: keys are missing or left over, shapes or kinds of numbers differ, a code is not below k, or a value is not
            finite. The message lists every one of them.
    """
    expected, optional, norms = _expected(model, state)
    problems = _key_problems(state, expected, optional, source)
    if not problems:
        problems = [p for name, target in expected.items() if (p := _value_problem(name, state[name], target))]
    if not problems:
        problems = [
            f"{prefix}: {p}"
            for prefix, norm in norms
            if (p := norm_problem(norm, *(state[_key(prefix, name)] for name in NORM_VECTORS)))
        ]
    if problems:
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"{source} does not fit the network:\n  " + "\n  ".join(problems[:12]) + more)
    check_codes(state, source)


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
        _key(prefix, name) in state for prefix, module in modules if is_folded_norm(module) for name in NORM_STATISTICS
    )
    for prefix, module in modules:
        if is_folded_norm(module) and not has_statistics:
            norms.append((prefix, module))
            for name in NORM_VECTORS:
                expected[_key(prefix, name)] = _Vector(module.running_mean.shape)
            continue
        skipped = module._non_persistent_buffers_set
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in skipped:
                continue
            if name == "num_batches_tracked":
                optional.add(_key(prefix, name))  # files written by old torch versions have none
            else:
                expected[_key(prefix, name)] = tensor
        if type(module).__name__ == "FrozenBatchNorm2d":
            optional.add(_key(prefix, "num_batches_tracked"))
    return expected, optional, norms


def _key_problems(
    state: Mapping[str, Tensor], expected: Mapping[str, object], optional: set[str], source: str
) -> list[str]:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected and name not in optional]
    problems = []
    coded_in_file = {name.removesuffix(".codes_matrix") for name in unexpected if name.endswith(".codes_matrix")}
    coded_in_model = {name.removesuffix(".codes_matrix") for name in missing if name.endswith(".codes_matrix")}
    for layers, text in (
        (coded_in_file, "coded in the file but not with these settings"),
        (coded_in_model, "to be coded with these settings but dense in the file"),
    ):
        if layers:
            problems.append(f"{text} (use_compression, ignored_modules, k): {_some(sorted(layers))}")
    if missing:
        problems.append(f"{len(missing)} keys missing: {_some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} keys unexpected: {_some(unexpected)}")
    return problems


def _some(names: list[str], most: int = 40) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def _unsigned(codes: Tensor) -> Tensor:
    """Codes as int64, so that none wraps before it is looked at; what was stored as int16 is unsigned."""
    wide = codes.to(torch.int64)
    return wide & 0xFFFF if codes.dtype == torch.int16 else wide


def _value_problem(name: str, value: Tensor, target: Tensor | _Vector) -> str | None:
    leaf = name.rpartition(".")[2]
    if value.shape != target.shape:
        advice = ""
        if leaf in ("codebook", "codes_matrix") and value.dim() == 2:
            advice = _quantization_advice(name.removesuffix("." + leaf), leaf, value.shape, target.shape)
        elif target.shape and value.shape and value.shape[1:] == target.shape[1:]:
            advice = f": the file is for {value.shape[0]} outputs"
        return f"{name} is {tuple(value.shape)} in the file, {tuple(target.shape)} in the network{advice}"
    if leaf == "codes_matrix":
        return None if value.dtype in CODE_DTYPES else f"{name} holds {value.dtype}, expected integers"
    wanted = target.dtype.is_floating_point if isinstance(target, Tensor) else True
    if wanted != value.dtype.is_floating_point or value.dtype.is_complex:
        return f"{name} holds {value.dtype}, expected {'floating-point' if wanted else 'whole'} numbers"
    if value.dtype.is_floating_point and not torch.isfinite(value).all():
        return f"{name} holds values that are not finite"
    return None


def _quantization_advice(layer: str, leaf: str, found: torch.Size, wanted: torch.Size) -> str:
    key = f"--model.compression_parameters.layer_specs.{layer}"
    if leaf == "codebook" and found[0] != wanted[0]:
        return f": the file was coded with k = {found[0]} here, the settings give {wanted[0]}; for this file use {key}.k {found[0]}"
    if leaf == "codebook":
        return f": the file's subvectors have {found[1]} values, the settings give {wanted[1]} (large_subvectors, pw_subvector_size, fc_subvector_size)"
    return ": another subvector size (large_subvectors, pw_subvector_size, fc_subvector_size) or another architecture"


def check_codes(state: Mapping[str, Tensor], source: str) -> None:
    """Check that every code is below the number of its layer's centroids.

    Raises:
        CheckpointError: one is not; names the layer.
    """
    for name, codes in state.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf != "codes_matrix" or codes.dtype not in CODE_DTYPES or not codes.numel():
            continue
        codebook = state.get(_key(prefix, "codebook"))
        if codebook is None or codebook.dim() != 2:
            continue
        wide = _unsigned(codes)
        if int(wide.max()) >= codebook.shape[0] or int(wide.min()) < 0:
            raise CheckpointError(
                f"{source}: layer {prefix!r} holds codes up to {int(wide.max())}, but its codebook has {codebook.shape[0]} centroids; the file is damaged"
            )
