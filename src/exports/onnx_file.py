"""ONNX files: the dense network, or the same graph with every quantized weight as codebook and codes, so that the small
size survives.

A quantized weight is computed by four nodes: Reshape(Gather(Cast(codebook), Cast(codes)), shape), and by a fifth, which
multiplies, where the codebook has a scale. onnxruntime folds
them into the dense weight when it loads the file, so that inference costs what it costs densely. Codes take 8 bits
where k <= 256, else 16 or 32: ONNX has no types between.

The package onnx is needed for writing, onnxruntime for checking: pip install pqf[onnx].
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import RunError, SettingsError
from ..common.paths import write_atomically
from ..compression.quantize.layers import QuantizedLayer
from ..compression.quantize.placing import dense_name

OPSET = 18
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4
"""Accepted difference of onnxruntime's logits from PyTorch's, relative to the largest logit where that is above 1."""


def dense_graph(model: nn.Module, image_size: int) -> Any:
    """The ONNX graph of a dense network in evaluation mode; batch size, height and width stay free.

    Args:
        model: takes images (B, 3, H, W) and gives one tensor.
        image_size: side of the images with which it is traced.

    Raises:
        SettingsError: the package onnx is missing.
    """
    onnx = _needed("onnx")
    free = {INPUT: {0: "batch", 2: "height", 3: "width"}, OUTPUT: {0: "batch"}}
    buffer: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that this exporter is the old one; the new one needs one more package and gives larger graphs
        torch.onnx.export(
            model.eval(), (torch.zeros(1, 3, image_size, image_size),), buffer, dynamo=False, opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT], dynamic_axes=free, do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
    return onnx.load_from_string(buffer.getvalue())


def put_codes(graph: Any, quantized: nn.Module) -> Any:
    """Replace the dense weights of `graph` by codebooks and codes, in place.

    Args:
        graph: from `dense_graph` of the dequantized network.
        quantized: the network with quantized layers, of the same names.

    Raises:
        RunError: the graph does not hold a quantized layer's weight under its name.
    """
    onnx = _needed("onnx")
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    aliases = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "Identity"}
    nodes: list[Any] = []
    for prefix, layer in quantized.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        name = dense_name(prefix, layer)
        name = aliases.get(name, name)  # the exporter stores equal tensors once
        if name not in weights:
            if any(name in node.output for node in nodes):
                continue
            raise RunError(f"the ONNX graph has no weight {name!r}; write the dense graph instead (--dense)")
        graph.graph.initializer.remove(weights.pop(name))
        graph.graph.initializer.extend(
            [
                onnx.numpy_helper.from_array(_narrow(layer.codes_matrix, layer.k), f"{prefix}.codes"),
                onnx.numpy_helper.from_array(layer.stored_codebook().cpu().numpy(), f"{prefix}.codebook"),
                onnx.numpy_helper.from_array(np.array(layer.weight_shape, np.int64), f"{prefix}.shape"),
            ]
        )
        make = onnx.helper.make_node
        nodes += [
            make("Cast", [f"{prefix}.codes"], [f"{prefix}.indices"], to=onnx.TensorProto.INT32),
            *_centroids(graph, prefix, layer),
            make("Gather", [f"{prefix}.centroids", f"{prefix}.indices"], [f"{prefix}.subvectors"], axis=0),
            make("Reshape", [f"{prefix}.subvectors", f"{prefix}.shape"], [name]),
        ]
    old = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*nodes, *old])
    onnx.checker.check_model(graph)
    return graph


def _centroids(graph: Any, prefix: str, layer: QuantizedLayer) -> list[Any]:
    """What makes the centroids of a stored codebook, multiplied by its scale where it has one."""
    onnx, scale, made = _needed("onnx"), layer.stored_scale(), f"{prefix}.centroids"
    cast = partial(onnx.helper.make_node, "Cast", [f"{prefix}.codebook"], to=onnx.TensorProto.FLOAT)
    if scale is None:
        return [cast([made])]
    graph.graph.initializer.append(onnx.numpy_helper.from_array(scale.cpu().numpy(), f"{prefix}.scale"))
    divided = f"{prefix}.divided"
    return [cast([divided]), onnx.helper.make_node("Mul", [divided, f"{prefix}.scale"], [made])]


def write_graph(graph: Any, path: Path, about: dict[str, str], check: Callable[[Path], None]) -> None:
    """Write a graph with properties that say what it is, atomically, and only if `check` of the written file raises
    nothing.

    Raises:
        RunError: as all writing does.
    """
    _needed("onnx").helper.set_model_props(graph, about)
    contents = graph.SerializeToString(deterministic=True)

    def write(temporary: Path) -> None:
        temporary.write_bytes(contents)
        check(temporary)

    write_atomically(path, write)


def difference(path: Path, model: nn.Module, images: Tensor) -> float | None:
    """Largest difference between onnxruntime's logits for the file and PyTorch's for `model`; None where onnxruntime is
    missing.

    Raises:
        RunError: the difference is above `TOLERANCE`.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run([OUTPUT], {INPUT: images.numpy()})
    with torch.no_grad():
        wanted = model.eval()(images).numpy()
    largest = float(np.abs(found - wanted).max())
    if not largest <= TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise RunError(
            f"not written: onnxruntime's logits differ from PyTorch's by {largest:.2e}, more than {TOLERANCE:g}"
        )
    return largest


def _narrow(codes: Tensor, k: int) -> np.ndarray[Any, Any]:
    """Codes (R*m,) in the narrowest type of ONNX that holds them."""
    return codes.cpu().reshape(-1).numpy().astype(np.uint8 if k <= 1 << 8 else np.uint16 if k <= 1 << 16 else np.int32)


def _needed(package: str) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise SettingsError(
            f"ONNX files need the package {package}, which is not installed: pip install pqf[onnx], or pip install "
            "onnx onnxruntime"
        ) from error
    return onnx
