"""What a model file holds, layer by layer, and what it lost against the dense network; in words, for whoever shows
it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..common.errors import CheckpointError, GroupError
from ..compression.quantize.layers import QuantizedLayer, dense_type, own_tensors
from ..compression.quantize.placing import dense_name
from ..compression.quantize.plan import DenseWeight, dense_notes
from ..compression.quantize.subvectors import Layer, bits_per_code, codebook_size
from ..compression.quantize.weights import SUFFIX, matrices, why_dense
from .building import build_and_load
from .compression_report import permute_alike
from .inspected import Inspection, Row
from .metadata import ModelInfo
from .norms import is_folded_norm
from .open_model_file import OpenModelFile, open_model_file, state_for
from .pth import is_compressed, read_tensors
from .size import model_size, tensor_bits


def examine(path: Path, dense: Path | None = None, arch: str | None = None) -> Inspection:
    """Read a file and, if given, the dense network it came from; arguments and errors as `recipes.inspect`."""
    opened = open_model_file(path, arch, needs_network=dense is not None)
    rows = _rows(opened.model, opened.info)
    notes = _left_dense(opened.model, opened.info) if opened.quantized else []
    if opened.why_unknown:
        notes.insert(0, f"shown without its network, so that only tensors are known: {opened.why_unknown}")
    if dense is not None:
        original, more = _dense_permuted_alike(dense, opened)
        notes += more
        rows = [_compared(row, opened.model, original) for row in rows]
    size = model_size(opened.model)
    missing = size.bits - sum(row.bits for row in rows)
    if missing:
        notes.append(f"{-missing:,} bits are shared by layers and counted once in the totals")
    return Inspection(
        path=path,
        file_bytes=path.stat().st_size,
        kind=opened.kind,
        architecture=opened.architecture.name,
        info=opened.info,
        rows=tuple(rows),
        size=size,
        against=str(dense) if dense else None,
        notes=tuple(notes),
    )


def examine_model(model: nn.Module, info: ModelInfo | None = None) -> Inspection:
    """What a network holds that is in no file."""
    info = info or ModelInfo()
    quantized = any(isinstance(module, QuantizedLayer) for module in model.modules())
    return Inspection(
        path=None,
        file_bytes=None,
        kind="quantized" if quantized else "dense",
        architecture=dense_type(model).__name__,
        info=info,
        rows=tuple(_rows(model, info)),
        size=model_size(model),
        against=None,
        notes=tuple(_left_dense(model, info) if quantized else ()),
    )


def _rows(model: nn.Module, info: ModelInfo) -> list[Row]:
    rows = [row for name, module in model.named_modules() if (row := _row(name, module)) is not None]
    lost = info.outputs_lost or {}
    return [replace(row, outputs_lost=lost.get(row.name.removesuffix(SUFFIX))) for row in rows]


def _left_dense(model: nn.Module, info: ModelInfo) -> list[str]:
    """What a quantized network keeps as it was, and why as far as the file tells."""
    parameters = (info.settings or {}).get("compression_parameters")
    ignored = parameters.get("ignored_modules", ()) if isinstance(parameters, Mapping) else ()
    ignored = [name for name in ignored if isinstance(name, str)] if isinstance(ignored, list | tuple) else []
    quantized = sum(math.prod(layer.weight_shape) for layer in model.modules() if isinstance(layer, QuantizedLayer))
    left = []
    for place in matrices(model):
        if isinstance(place.host, QuantizedLayer) and place.attribute == "codebook":
            continue
        if any(f"{place.name}.".startswith(f"{name}.") for name in ignored):
            reason = "named in ignored_modules"
        else:
            reason = why_dense(place) or "was not quantized when the file was made"
        left.append(DenseWeight(name=place.name, n_values=place.parameter.numel(), reason=reason))
    return dense_notes(left, quantized + sum(weight.n_values for weight in left))


def _row(name: str, module: Layer) -> Row | None:
    """The row of a module; None where it holds nothing itself."""
    if isinstance(module, QuantizedLayer):
        counts = torch.bincount(module.codes_matrix.reshape(-1), minlength=module.k)
        share = counts[counts > 0].double() / counts.sum()
        used = module.stored_codebook()[counts > 0]
        n_codes = module.codes_matrix.numel()
        return Row(
            name=name,
            kind=module.quantized_kind,
            shape=tuple(module.weight_shape),
            codes_bits=n_codes * bits_per_code(module.k),
            codebook_bits=codebook_size(module.codebook.numel(), module.codebook_bits, module.has_scale),
            other_bits=sum(map(tensor_bits, own_tensors(module).values())),
            d=module.d,
            k=module.k,
            value_bits=module.codebook_bits,
            layout=module.layout,
            n_codes=n_codes,
            used=int(torch.unique(used, dim=0).shape[0]),
            entropy=float(-(share * share.log2()).sum()) + 0.0,
            frequencies=tuple(sorted(counts.tolist(), reverse=True)),
        )
    if is_folded_norm(module):
        mean = module.running_mean
        return Row(name=name, kind=type(module).__name__, shape=tuple(mean.shape), other_bits=2 * tensor_bits(mean))
    own = list(own_tensors(module).values())
    if not own:
        return None
    largest = max(own, key=torch.numel)
    bits = sum(map(tensor_bits, own))
    return Row(name=name, kind=dense_type(module).__name__, shape=tuple(largest.shape), other_bits=bits)


def _dense_permuted_alike(path: Path, opened: OpenModelFile) -> tuple[nn.Module, list[str]]:
    """The dense network with its channels permuted as those of the opened one, and what to know about that."""
    state = state_for(opened.architecture, read_tensors(path), str(path))
    if is_compressed(state):
        raise CheckpointError(f"--against: {path} is a compressed model, and the dense one is wanted here")
    model = build_and_load(lambda: opened.architecture.build_for(state), None, state, str(path))
    permutations = opened.info.permutations
    if permutations is None:
        return model, ["the permutations that were applied are not known: the dense network is compared as it is"]
    try:
        permute_alike(model, permutations)
    except GroupError as error:
        raise CheckpointError(f"--against: {path} cannot be permuted like the quantized network: {error}") from error
    return model, [
        f"{len(permutations)} permutations were applied to the dense network before it was compared"
    ] if permutations else []


def _compared(row: Row, quantized: nn.Module, dense: nn.Module) -> Row:
    if row.k is None:
        return row
    layer: Layer = quantized.get_submodule(row.name)
    original = dense.get_parameter(dense_name(row.name, layer))
    if tuple(original.shape) != row.shape:
        raise CheckpointError(f"--against: {row.name} has another shape in the dense network than {row.shape}")
    with torch.no_grad():
        weight = original.double()
        signal, noise = (
            float(weight.square().sum()),
            float((weight - layer.dequantize_stored().double()).square().sum()),
        )
    sqnr = math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
    return replace(row, sqnr=sqnr)
