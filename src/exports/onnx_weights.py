"""The network's tensors put into a graph without them: quantized weights as codebook and codes, others densely.

A quantized weight is computed by four nodes: Reshape(Gather(Cast(codebook), Cast(codes)), shape), and by a fifth, which
multiplies, where the codebook has a scale; where subvectors run along outputs a Transpose stands before the Reshape.
onnxruntime folds them into the dense weight when it loads the file, so that
inference costs what it costs densely. Codes take 8 bits where k <= 256, else 16 or 32: ONNX has no types between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import SettingsError
from ..compression.quantize.layers import QuantizedLayer
from ..compression.quantize.placing import dense_name
from .onnx_package import needed
from .onnx_trace import rename

LARGEST = (1 << 31) - (1 << 24)
"""Bytes of the tensors in an ONNX file, whose whole is limited to 2 GB by protobuf."""


@dataclass(frozen=True)
class Filled:
    """Which of the network's tensors a graph holds, and how.

    Attributes:
        coded: quantized weights that are codebook and codes.
        unused: quantized weights that evaluation does not use, such as those of auxiliary heads; they are left out.
    """

    coded: tuple[str, ...]
    unused: tuple[str, ...]


def fill(graph: Any, tensors: Mapping[str, Tensor], quantized: nn.Module | None) -> Filled:
    """Put the network's tensors into a graph, in place.

    Args:
        graph: from `skeleton`.
        tensors: parameters and buffers of the dense network, by name.
        quantized: the network with quantized layers, of the same names; None: all weights are written densely.

    Raises:
        SettingsError: there are quantized weights, and the graph uses none of them.
    """
    layers = {} if quantized is None else _by_name(quantized)
    same = _same_tensors(tensors, layers)
    rename(graph.graph, same)
    used = used_names(graph.graph)
    wanted = {one.name for one in graph.graph.input if one.name in tensors and one.name in used}
    kept = [one for one in graph.graph.input if one.name not in tensors]
    del graph.graph.input[:]
    graph.graph.input.extend(kept)
    nodes: list[Any] = []
    for name in sorted(wanted):
        if name in layers:
            nodes += decoding(graph.graph, name, layers[name])
        else:
            graph.graph.initializer.append(_stored(tensors[name], name))
    old = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*nodes, *old])
    needed().checker.check_model(graph)
    own = [name for name in layers if same.get(name, name) == name]
    made = wanted | {name for node in old if node.op_type == "Identity" for name in node.output}  # equal to another
    coded = tuple(name for name in own if name in made)
    if layers and not coded:
        raise SettingsError(
            "the ONNX graph uses none of the quantized weights; write the dense graph instead (--dense)"
        )
    return Filled(coded=coded, unused=tuple(name for name in own if name not in made))


def check_size(tensors: Mapping[str, Tensor], quantized: nn.Module | None) -> None:
    """See that the tensors fit into one file.

    Raises:
        SettingsError: they do not.
    """
    layers = {} if quantized is None else _by_name(quantized)
    size = sum(one.numel() * one.element_size() for name, one in tensors.items() if name not in layers)
    size += sum(layer.codes_matrix.numel() * _code_type(layer.k).itemsize for layer in layers.values())
    if size > LARGEST:
        advice = "leave --dense out: codes take less" if quantized is None else "quantize more of it"
        raise SettingsError(
            f"the ONNX file would have {size:,} bytes, and the format has at most {LARGEST:,}; {advice}"
        )


def decoding(graph: Any, name: str, layer: QuantizedLayer) -> list[Any]:
    """The nodes that compute the weight `name`; what they read is added to the graph."""
    onnx, make = needed(), needed().helper.make_node
    prefix, along_outputs = name.removesuffix(".weight"), layer.layout == "output"
    codes = layer.codes_matrix if along_outputs else layer.codes_matrix.reshape(-1)
    graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(_narrow(codes, layer.k), f"{prefix}.codes"),
            onnx.numpy_helper.from_array(layer.stored_codebook().cpu().numpy(), f"{prefix}.codebook"),
            onnx.numpy_helper.from_array(np.array(layer.weight_shape, np.int64), f"{prefix}.shape"),
        ]
    )
    ordered = f"{prefix}.rows" if along_outputs else f"{prefix}.subvectors"
    turn = [make("Transpose", [f"{prefix}.subvectors"], [ordered], perm=[0, 2, 1])] if along_outputs else []
    return [
        make("Cast", [f"{prefix}.codes"], [f"{prefix}.indices"], to=onnx.TensorProto.INT32),
        *_centroids(graph, prefix, layer),
        make("Gather", [f"{prefix}.centroids", f"{prefix}.indices"], [f"{prefix}.subvectors"], axis=0),
        *turn,
        make("Reshape", [ordered, f"{prefix}.shape"], [name]),
    ]


def _centroids(graph: Any, prefix: str, layer: QuantizedLayer) -> list[Any]:
    """What makes the centroids of a stored codebook, multiplied by its scale where it has one."""
    onnx, scale, made = needed(), layer.stored_scale(), f"{prefix}.centroids"
    cast = partial(onnx.helper.make_node, "Cast", [f"{prefix}.codebook"], to=onnx.TensorProto.FLOAT)
    if scale is None:
        return [cast([made])]
    graph.initializer.append(onnx.numpy_helper.from_array(scale.cpu().numpy(), f"{prefix}.scale"))
    divided = f"{prefix}.divided"
    return [cast([divided]), onnx.helper.make_node("Mul", [divided, f"{prefix}.scale"], [made])]


def used_names(graph: Any) -> set[str]:
    """The values that nodes of a graph, or of the graphs in them, read, and its outputs."""
    used = {one.name for one in graph.output}
    for node in graph.node:
        used.update(node.input)
        for attribute in node.attribute:
            for below in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                used |= used_names(below)
    return used


def _by_name(quantized: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers by the names of their dense weights; one may have several names."""
    found = quantized.named_modules(remove_duplicate=False)
    return {dense_name(prefix, layer): layer for prefix, layer in found if isinstance(layer, QuantizedLayer)}


def _same_tensors(tensors: Mapping[str, Tensor], layers: Mapping[str, QuantizedLayer]) -> dict[str, str]:
    """The further names of tensors that have several -> the first one: such are stored once."""
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, tensor in tensors.items():
        layer = layers.get(name)
        if layer is None:
            key: Any = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        else:
            key = (id(layer.codebook), id(layer.codes_matrix))
        if tensor.numel() and first.setdefault(key, name) != name:
            same[name] = first[key]
    return same


def _stored(tensor: Tensor, name: str) -> Any:
    values = tensor.detach().cpu().contiguous()
    if values.dtype is torch.bfloat16:
        values = values.float()
    return needed().numpy_helper.from_array(values.numpy(), name)


def _code_type(k: int) -> np.dtype[Any]:
    """The narrowest type of ONNX that holds codes below k."""
    return np.dtype(np.uint8 if k <= 1 << 8 else np.uint16 if k <= 1 << 16 else np.int32)


def _narrow(codes: Tensor, k: int) -> np.ndarray[Any, Any]:
    """Codes (R*m,), along outputs (R/d, values of a row), in the narrowest type of ONNX that holds them."""
    return codes.cpu().numpy().astype(_code_type(k))
