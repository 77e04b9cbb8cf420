"""Core ML packages: an ML program in which every quantized weight stays codebook and codes.

The exported network becomes an ML program whose weights are constants. Before anything is folded, each quantized one
gives way to `constexpr_lut_to_dense`, which holds a table and codes (`tables`); where the vectors run along no one
axis of the weight, a reshape follows.

What is computed is computed in 16-bit floats: the Neural Engine has no others. A 16-bit codebook is its table as it
stands. One of 8 bits is a table of whole numbers with its scale, one with a scale of its own a table of 32-bit floats:
decoded they are the file's weights to the last bit too, and are rounded to 16 bits where they are used. A batch norm
becomes a factor and a summand per channel, rounded once; behind a dense convolution coremltools folds it.

The package coremltools is needed: pip install pqf[coreml]. It builds packages on Linux too, where nothing runs them.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.errors import SettingsError
from ..common.paths import write_folder_atomically
from ..compression.quantize.layers import QuantizedLayer
from ..compression.quantize.placing import dense_name
from .quiet import first_line, quiet
from .smaller_program import norms_in_two, replace, small_constants_once
from .tables import LARGEST_K, Table, table_of, vector_axis

INPUT, OUTPUT = "images", "logits"
LITTLE = 1 << 20
"""Bytes with less than which a disk is full."""


@dataclass(frozen=True)
class Program:
    """An ML program before anything is folded.

    Attributes:
        mil: coremltools' own object.
        names: of its constants -> of the network's parameters; those that are not there have the parameter's name.
        image_size: side of the one image that it takes.
    """

    mil: Any
    names: Mapping[str, str]
    image_size: int


def check_installed() -> None:
    """Check that packages can be made here.

    Raises:
        SettingsError: the package coremltools is missing.
    """
    with quiet("coremltools"):
        _coremltools()


def exported_program(model: nn.Module, image_size: int) -> Program:
    """The ML program of a dense network in evaluation mode: one image (1, 3, S, S) in, logits out.

    Args:
        model: takes images (B, 3, H, W) and gives one tensor.
        image_size: side S of the images, which is fixed.

    Raises:
        SettingsError: the package coremltools is missing, or the network has an operation that it cannot convert, or
            values that are too large.
    """
    check_installed()
    _check_range(model)
    images = torch.zeros(1, 3, image_size, image_size)
    problems: list[str] = []
    for follow in (_exported, _traced):  # networks whose Python code depends on values can only be traced
        with quiet("coremltools", "torch") as said:
            try:
                graph, names = follow(model.eval(), images)
                return Program(_converted(graph, image_size), names, image_size)
            except Exception as error:  # of whatever type: converters of single operations raise what they like
                where = [line.removeprefix("ERROR - ").rstrip(": ") for line in said if "converting" in line]
                problems.append(": ".join([*where[-1:], first_line(error)]))
    raise SettingsError(f"Core ML: coremltools cannot convert this network: {problems[0]}")


def put_codes(program: Program, quantized: nn.Module) -> dict[str, str]:
    """Replace the dense weights of `program` by codebooks and codes, in place.

    Args:
        program: of the dequantized network.
        quantized: the network with quantized layers, of the same names.

    Returns:
        The quantized weights that stay dense there, by name, and why.
    """
    layers = {
        dense_name(prefix, layer): layer
        for prefix, layer in quantized.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
    function = program.mil.functions["main"]
    dense: dict[str, str] = {}
    found: set[int] = set()
    with function:
        for constant in list(function.operations):
            name = program.names.get(constant.name, constant.name)
            layer = layers.get(name) if constant.op_type == "const" else None
            if layer is None or not _is_weight(constant, layer):
                continue
            found.add(id(layer.codebook))
            if reason := _why_dense(constant, layer):
                dense[name] = reason
            else:
                with _place_of(constant):
                    replace(function, constant, _decoded(constant, name, table_of(layer)))
    for name, layer in layers.items():
        if id(layer.codebook) not in found:
            dense[name] = "is not in the ML program as it stands in the network"
    return dense


def write_package(program: Program, path: Path, about: Mapping[str, str]) -> None:
    """Write a package with metadata that says what it is, atomically; `program` is used up.

    Args:
        program: with codes or without.
        path: the folder, which ends in `.mlpackage`.
        about: metadata, `arch` and `weights` among it.

    Raises:
        SettingsError: coremltools cannot finish the network.
        RunError: it cannot be written.
    """

    def write(temporary: Path) -> None:
        with quiet("coremltools"):
            model = _finished(program.mil)
            for key, value in about.items():
                model.user_defined_metadata[key] = value
            model.short_description = f"{about['arch']}, weights: {about['weights']}"
            package = temporary / "written.mlpackage"
            model.save(str(package))
        for part in package.rglob("*"):  # coremltools makes some that only their owner may read
            shutil.copymode(temporary if part.is_dir() else package / "Manifest.json", part)
        for name in ("Data", "Manifest.json"):  # and not a list of operations, for debugging
            (package / name).rename(temporary / name)
        shutil.rmtree(package)

    write_folder_atomically(path, write)


Followed = tuple[Any, Mapping[str, str]]
_Follow = Callable[[nn.Module, torch.Tensor], Followed]


def _exported(model: nn.Module, images: torch.Tensor) -> Followed:
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=False).run_decompositions({})
    return program, dict(program.graph_signature.inputs_to_parameters)


def _traced(model: nn.Module, images: torch.Tensor) -> Followed:
    return torch.jit.trace(model, images, check_trace=False), {}


def _converted(graph: Any, image_size: int) -> Any:
    ct = _coremltools()
    return ct.convert(
        graph,
        inputs=[ct.TensorType(name=INPUT, shape=(1, 3, image_size, image_size))],
        outputs=[ct.TensorType(name=OUTPUT)],
        convert_to="milinternal",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
    )


def _finished(mil: Any) -> Any:
    """Everything folded, and in 16-bit floats but for the tables."""
    ct = _coremltools()
    norms_in_two(mil.functions["main"], _builder(), _place_of)
    small_constants_once(mil.functions["main"])
    narrow = ct.transform.FP16ComputePrecision(op_selector=lambda op: not op.op_type.startswith("constexpr_"))
    try:
        model = ct.convert(
            mil,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=narrow,
            skip_model_load=True,
        )
    except (ValueError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        raise SettingsError(
            f"Core ML: coremltools cannot finish this network: {first_line(error)}; try --dense"
        ) from error
    except (RuntimeError, OSError) as error:
        folder = tempfile.gettempdir()
        if shutil.disk_usage(folder).free >= LITTLE:
            raise
        raise OSError(errno.EIO, f"no space left in {folder}, where coremltools writes first") from error
    return model


def _check_range(model: nn.Module) -> None:
    """coremltools makes numbers that are too large for 16 bits smaller without a word."""
    largest = torch.finfo(torch.float16).max
    large = [name for name, parameter in model.named_parameters() if not bool((parameter.abs() <= largest).all())]
    if large:
        raise SettingsError(
            f"Core ML computes in 16-bit floats, and {', '.join(large[:8])} hold{'s' if len(large) == 1 else ''} "
            f"values above {largest:,.0f}, or that are not finite: the package was not written"
        )


def _is_weight(constant: Any, layer: QuantizedLayer) -> bool:
    """Whether a constant is what `layer` stands for, and not something else that has its name."""
    value = constant.outputs[0].val
    weight = layer.dequantize_stored().detach().cpu().numpy()
    return value.shape == weight.shape and bool(np.array_equal(value, weight))


def _why_dense(constant: Any, layer: QuantizedLayer) -> str | None:
    """Why a weight cannot be table and codes; None: it can."""
    if layer.k > LARGEST_K:
        return f"k = {layer.k} is above {LARGEST_K}"
    if vector_axis(layer) is not None and layer.codebook_bits == 16 and layer.stored_scale() is None:
        return None  # the table itself is what is used
    variable = constant.outputs[0]
    refusing = {user.op_type for user in variable.child_ops if not _takes_computed(user, variable)}
    if not refusing:
        return None
    what = "reshaped" if vector_axis(layer) is None else "scaled"
    return f"its table would have to be {what}, and {', '.join(sorted(refusing))} takes constants only"


def _takes_computed(user: Any, weight: Any) -> bool:
    """Whether an operation takes a weight that is computed from a table, as Core ML's description of it says."""
    if user.op_type == "conv":
        return bool((user.dilations.val == 1).all())
    if user.op_type == "linear":
        return True  # becomes a matrix product
    takes = user.input_spec.input_types
    needs_constant = any(given is weight and takes[name].const for name, given in user.inputs.items())
    return not needs_constant and user.op_type != "conv_transpose"


def _decoded(constant: Any, name: str, table: Table) -> Any:
    """The variable, of 32-bit floats, that decodes a weight; made before `constant`."""
    mb, name, ones = _builder(), f"{name}_coded", [1] * table.codes.ndim
    values: Any = table.values.reshape(*ones, *table.values.shape)
    if table.factor is not None:
        factor = np.full([*ones, 1, 1], table.factor)
        values = mb.constexpr_blockwise_shift_scale(data=values, scale=factor, before_op=constant)
    codes = table.codes.astype(_unsigned(table.bits))
    decoded = mb.constexpr_lut_to_dense(
        indices=codes, lut=values, vector_axis=np.int32(table.axis), name=name, before_op=constant
    )
    if table.shape is not None:
        decoded = mb.reshape(x=decoded, shape=table.shape, name=f"{name}_shaped", before_op=constant)
    return mb.cast(x=decoded, dtype="fp32", name=f"{name}_wide", before_op=constant)


def _unsigned(bits: int) -> Any:
    """The type of numpy's that stands for codes of so many bits."""
    from coremltools.converters.mil.mil.types import type_mapping

    return type_mapping.nptype_from_builtin(type_mapping.string_to_builtin(f"uint{bits}"))


def _place_of(operation: Any) -> Any:
    """A context in which new operations belong to the part of the network that `operation` belongs to."""
    from coremltools.converters.mil.mil.scope import ScopeInfo

    return _builder().scope(*[ScopeInfo(source, data) for source, data in operation.scopes.items()])


def _builder() -> Any:
    from coremltools.converters.mil.mil import Builder

    return Builder


def _coremltools() -> Any:
    try:
        import coremltools
    except ImportError as error:
        raise SettingsError(
            "Core ML packages need the package coremltools, which is not installed: pip install pqf[coreml], or pip "
            "install coremltools"
        ) from error
    return coremltools
