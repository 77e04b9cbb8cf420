"""The graph of a network without its weights: every parameter and buffer is an input of the graph, under its name.

The values are put in afterwards (`onnx_weights`), as codebook and codes or densely. So no exporter can rename, fold,
transpose or merge them, and no graph comes near the 2 GB that a protobuf message may have. Two exporters of torch's
are known: `torchscript`, which traces, and `dynamo` (torch.export), which needs the package onnxscript.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import SettingsError
from .onnx_outputs import HEADS, INPUT, Called
from .onnx_package import exporting_program, needed
from .onnx_pooling import by_products

OPSET = 18
LOWEST_OPSET = 13
"""Of an opset that has 8- and 16-bit codes, and everything that traced networks use."""
TORCHSCRIPT, DYNAMO = "torchscript", "dynamo"
FREE, BATCH, FIXED = "free", "batch", "fixed"
"""What of the images' shape stays free: batch, height and width; the batch; nothing."""
TORCH = Path(torch.__file__).parent
NET = "net."
"""Before the names of the network's tensors in the module that is exported."""


@dataclass(frozen=True)
class Skeleton:
    """A graph without weights.

    Attributes:
        graph: the ONNX model; its inputs are the images, and the network's tensors under their names.
        heads: what is not among its outputs: values of a detector's heads, as outputs that can be added.
        doubts: where Python code, other than torch's own checks of its arguments, looked at values while it was traced:
            the graph follows what it did then.
    """

    graph: Any
    heads: tuple[Any, ...]
    doubts: tuple[str, ...]


def skeleton(called: Called, images: Tensor, free: str, exporter: str, opset: int) -> Skeleton:
    """Export a network without its weights.

    Args:
        called: the dense network.
        images: (B, 3, H, W) to trace with.
        free: what of the images' shape stays free, see `FREE`.
        exporter: `torchscript` or `dynamo`.
        opset: of the graph.

    Raises:
        SettingsError: the network cannot be exported; says which operation is in the way.
    """
    with torch.no_grad():
        shapes = [one.shape for one in called(images)]
    axes = {INPUT: _free_axes(free), **_free_outputs(called, [*map(tuple, shapes)], tuple(images.shape), free)}
    export = partial(_traced if exporter == TORCHSCRIPT else _exported, called, images, axes, opset)
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as seen, _quiet(said), _slow_attention():
        warnings.simplefilter("always")
        try:
            with torch.no_grad(), by_products(called):
                graph = export()
        except SettingsError:
            raise
        except Exception as error:  # what an exporter or a user's own code raises
            raise SettingsError(f"the network cannot be written as ONNX (opset {opset}): {reason(error)}") from error
    doubts = tuple(
        f"{Path(one.filename).name}, line {one.lineno}"
        for one in seen
        if issubclass(one.category, torch.jit.TracerWarning) and TORCH not in Path(one.filename).parents
    )
    outputs = list(graph.graph.output)
    heads = tuple(one for one in outputs if one.name.startswith(f"{HEADS}."))
    del graph.graph.output[:]
    graph.graph.output.extend(one for one in outputs if one not in heads)
    return Skeleton(graph=graph, heads=heads, doubts=doubts)


def reason(error: BaseException) -> str:
    """Why an export failed, in one line that names the operation."""
    whole = " ".join(str(error).split())
    for pattern in (
        r"[Ee]xporting the operator '?([\w:.]+)'?",
        r"ONNX export of operator ([\w:.]+)",
        r"No ONNX function found for <OpOverload\(op='([\w:.]+)'",
        r"No decompositions registered for .*?'([\w:.]+)'",
    ):
        found = re.search(pattern, whole)
        if found:
            said = re.split(r"(?<=[a-z0-9'])\. |Please |<class|⬆", whole[found.start() :])[0].strip(" .,")
            return f"there is no ONNX for the operation {found[1]} ({said[:200]})"
    first = re.split(r"⬆|The error above|\(Refer to", whole)[0].strip()
    return f"{type(error).__name__}: {first[:300] or 'no message'}"


def _free_axes(free: str) -> dict[int, str]:
    return {} if free == FIXED else {0: "batch"} if free == BATCH else {0: "batch", 2: "height", 3: "width"}


def _free_outputs(
    called: Called, shapes: list[tuple[int, ...]], images: tuple[int, ...], free: str
) -> dict[str, dict[int, str]]:
    """Which axes of the outputs are free. The number of a detector's findings always is."""
    axes: dict[str, dict[int, str]] = {}
    for name, shape in zip(called.names, shapes, strict=True):
        if called.detects:
            axes[name] = {} if name.startswith(HEADS) else {0: "detections"}
            continue
        axes[name] = {} if free == FIXED or not shape else {0: "batch"}
        if free == FREE:
            same = shape[2:] == images[2:]
            for axis in range(2, len(shape)) if len(shape) == 4 else ():
                side = ("height", "width")[axis - 2]
                axes[name][axis] = side if same else f"{name}_{side}"
    return axes


@contextlib.contextmanager
def _quiet(said: io.StringIO) -> Iterator[None]:
    """What exporters print of graphs, thousands of lines, goes to `said`; their log too."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """Attention in operators that exporters know, instead of torch's one for all of a layer."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _traced(called: Called, images: Tensor, axes: dict[str, dict[int, str]], opset: int) -> Any:
    """By torch's older exporter; it leaves weights out when it is asked to."""
    free = {name: one for name, one in axes.items() if one}
    if called.detects:
        free[INPUT] = {axis: name for axis, name in free.get(INPUT, {}).items() if axis}
    buffer: Any = io.BytesIO()
    torch.onnx.export(
        called, (images,), buffer, dynamo=False, opset_version=opset, input_names=[INPUT],
        output_names=list(called.names), dynamic_axes=free, do_constant_folding=False, export_params=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )  # fmt: skip
    return _named_as_the_network(needed().load_from_string(buffer.getvalue()))


def _exported(called: Called, images: Tensor, axes: dict[str, dict[int, str]], opset: int) -> Any:
    """By torch.export, whose weights stay apart from the graph until it is written."""
    ir = exporting_program()
    dims = dict.fromkeys(axes[INPUT], torch.export.Dim.AUTO)
    program: Any = torch.onnx.export(
        called, (images,), None, dynamo=True, opset_version=opset, input_names=[INPUT],
        output_names=list(called.names), dynamic_shapes=({**dims},) if dims else None, optimize=False,
        external_data=False, verbose=False,
    )  # fmt: skip
    model = program.model
    for name in [name for name in model.graph.initializers if name.startswith(NET)]:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    return _named_as_the_network(ir.to_proto(model))


def _named_as_the_network(graph: Any) -> Any:
    """The network's tensors under the names that they have in its state dict; in place."""
    values = [one.name for one in graph.graph.input]
    values += [name for node in graph.graph.node if node.op_type == "Identity" for name in node.output]  # equal tensors
    rename(graph.graph, {name: name.removeprefix(NET) for name in values if name.startswith(NET)})
    return graph


def rename(graph: Any, names: dict[str, str]) -> None:
    """Give values of a graph, and of the graphs in its nodes, other names; in place."""
    for one in (*graph.input, *graph.output, *graph.initializer):
        one.name = names.get(one.name, one.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for below in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                rename(below, names)
