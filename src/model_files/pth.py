"""Reading and writing model files in the published `.pth` format.

A plain dict of tensors:
- quantized layer L: `L.codes_matrix` (R x m; uint8 if k <= 256, int16 if k <= 32768, else int32; int16 is read as
  unsigned), `L.codebook` (k x d, float16), `L.bias` if any; in files of ours `L.codebook_scale`
  (float32), which the codebook is to be multiplied by, where its values would be beyond 16-bit floats, or where it is
  of 8-bit values (k x d, int8);
- batch norm B: two vectors `B.weight`, `B.bias`. On load running_mean = 0 and running_var = 1;
- everything else as in the state dict of the dense network.
A file with running statistics is an ordinary state dict. How a norm is folded stands in `norms`. In files of ours the
dict has an attribute that says how the norms train, which readers of the format do not see (`norm_training`). Files
are read with `weights_only=True`, always.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..common.errors import CheckpointError
from ..common.paths import write_atomically
from ..compression.quantize.layers import QuantizedLayer, own_tensors
from ..compression.quantize.plan import Plan
from ..compression.quantize.weights import SUFFIX
from .norm_training import key_of, training_vectors_in, training_vectors_of, with_training_vectors
from .norms import NORM_VECTORS, fold_norm, is_folded_norm
from .pickle_safety import check_pickle_safety, check_tensors
from .safetensors_file import read_container, read_metadata, write_container
from .wrapping import unwrapped

_OURS = {"written_by": "pqf"}
"""Metadata of dense `.safetensors` files with a checksum."""
CODE_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def codes_dtype(k: int) -> torch.dtype:
    """The smallest type of the format that holds the codes 0 ... k-1 (int16 is read as unsigned)."""
    return torch.uint8 if k <= 256 else torch.int16 if k <= 32768 else torch.int32


def compressed_state(model: nn.Module) -> dict[str, Tensor]:
    """The contents of a published-format file for `model`, on the CPU; works for networks without quantized layers too.

    Raises:
        CheckpointError: a codebook holds values that 16-bit floats cannot hold, or a tensor is not a plain one.
    """
    state: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            module.check_codes()
            state[key_of(prefix, "codes_matrix")] = module.codes_matrix.to(codes_dtype(module.k))
            state[key_of(prefix, "codebook")] = _stored_codebook(prefix, module)
            scale = module.stored_scale()
            if scale is not None:
                state[key_of(prefix, "codebook_scale")] = scale
            own = own_tensors(module)
        elif is_folded_norm(module):
            own = dict(zip(NORM_VECTORS, fold_norm(module), strict=True))
        else:
            own = own_tensors(module)
        state.update({key_of(prefix, name): tensor.detach() for name, tensor in own.items()})
    return {name: _plain(name, tensor) for name, tensor in state.items()}


def _stored_codebook(prefix: str, layer: QuantizedLayer) -> Tensor:
    """The codebook of the layer `prefix` as files hold it.

    Raises:
        CheckpointError: they cannot.
    """
    stored = layer.stored_codebook()
    if not torch.isfinite(stored if layer.codebook_bits == 16 else layer.codebook).all():
        why = "16-bit floats cannot hold (NaN, or beyond 65504)"
        why = why if layer.codebook_bits == 16 else "are not finite (NaN or infinity)"
        raise CheckpointError(f"layer {prefix!r}: its codebook holds values that {why}")
    return stored


def _plain(name: str, value: object) -> Tensor:
    """An entry of a state dict as files hold it: a contiguous tensor of numbers on the CPU.

    Raises:
        CheckpointError: it is something else, which could not be read back.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        what = f"a {value.layout} tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise CheckpointError(f"{name!r} is {what}; model files hold plain tensors of numbers. Convert or remove it")
    return value.detach().cpu().contiguous()


def save_compressed(model: nn.Module, path: Path) -> None:
    """Write `model` in the published format, atomically.

    Raises:
        RunError: the disk is full or the folder cannot be written; an existing file is unchanged.
        CheckpointError: a codebook that 16-bit floats cannot hold.
    """
    contents = with_training_vectors(compressed_state(model), training_vectors_of(model))
    write_atomically(path, partial(_save, contents))


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    """Equal contents give equal bytes: into an open file, as torch would put the name of a path into the archive."""
    with open(path, "wb") as file:
        torch.save(state, file)


def save_dense(model: nn.Module, path: Path) -> None:
    """Write the ordinary state dict of `model`, atomically. Raises as `save_compressed`."""
    state = {name: _plain(name, tensor) for name, tensor in model.state_dict().items()}
    write_atomically(path, partial(_save, state))


def save_dense_safetensors(model: nn.Module, path: Path) -> None:
    """Write the ordinary state dict of `model` as safetensors, for any framework, atomically; with a checksum.

    Raises as `save_compressed`.
    """
    state = {name: _plain(name, tensor) for name, tensor in model.state_dict().items()}
    write_container(path, state, {"format": "pt", **_OURS})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file, on the CPU, without executing anything the file may carry.

    They have their names in the file; `load_state` takes out what wrappers put into them.

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
    tensors = unwrapped(contents, str(path))
    check_tensors(tensors, path)
    return {**tensors, **training_vectors_in(tensors, str(path))}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def scaled(plan: Plan, state: Mapping[str, Tensor], source: str) -> Plan:
    """The plan of the network of a file, with the bits of its codebooks' values and their scales.

    Raises:
        CheckpointError: a scale is not a positive number, or is missing where the values have 8 bits.
    """
    layers = dict(plan.layers)
    for name, layer in plan.layers.items():
        for prefix in (name, name + SUFFIX):
            codebook, scale = (state.get(key_of(prefix, leaf)) for leaf in ("codebook", "codebook_scale"))
            if codebook is None:
                continue
            bits = 8 if codebook.dtype == torch.int8 else 16
            layers[name] = replace(layer, codebook_bits=bits)
            if scale is None and bits == 16:
                continue
            if scale is None or scale.shape != () or scale.dtype != torch.float32 or not 0 < float(scale) < math.inf:
                raise CheckpointError(f"{source}: {prefix}.codebook_scale must be one positive 32-bit number")
            layers[name] = replace(layer, codebook_bits=bits, scale=float(scale) if bits == 16 else 1.0)
    return replace(plan, layers=layers)


def with_float_codebooks(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file, codebooks of 8-bit values as what they stand for, without their scales."""
    found = dict(state)
    for name, codebook in state.items():
        prefix, _, leaf = name.rpartition(".")
        scale = state.get(key_of(prefix, "codebook_scale"))
        if leaf != "codebook" or codebook.dtype != torch.int8 or scale is None or not _is_quantized(prefix, state):
            continue
        found[name] = codebook.float() * scale
        del found[key_of(prefix, "codebook_scale")]
    return found


def is_compressed(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are those of a network with quantized layers: codes with a codebook beside them."""
    return any(_is_codes(name, tensor, state) for name, tensor in state.items())


def _is_quantized(prefix: str, state: Mapping[str, Tensor]) -> bool:
    name = key_of(prefix, "codes_matrix")
    return name in state and _is_codes(name, state[name], state)


def _is_codes(name: str, tensor: Tensor, state: Mapping[str, Tensor]) -> bool:
    prefix, _, leaf = name.rpartition(".")
    codebook = state.get(key_of(prefix, "codebook"))
    return (
        leaf in ("codes_matrix", "codes_packed", "codes_huffman", "codes_entropy")
        and tensor.dtype in CODE_DTYPES
        and codebook is not None
        and codebook.dim() == 2
        and (codebook.dtype.is_floating_point or codebook.dtype == torch.int8)
    )
