"""Core ML packages: an ML program in which every quantized weight stays codebook and codes.

The traced network becomes an ML program whose weights are constants under the parameters' names; before anything is
folded, each quantized one gives way to `constexpr_lut_to_dense`, which holds the codebook as a table and the codes in
1, 2, 3, 4, 6 or 8 bits, whichever is the first that holds them. A table's vectors run along one axis. Where a
subvector is a kernel of several values no axis has it: the table fills a matrix (rows, values of a row), which is
reshaped.

What is computed is computed in 16-bit floats, without which the Neural Engine computes nothing. A 16-bit codebook is
its table as it stands. One of 8 bits is a table of whole numbers with its scale, one with a scale of its own a table of
32-bit floats: the weights are then the file's to the last bit too, and rounded to 16 bits when they are used. A batch
norm becomes a factor and a summand per channel, rounded once; behind a dense convolution coremltools folds it.

The package coremltools is needed: pip install pqf[coreml]. It builds packages on Linux too, where nothing runs them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.errors import RunError, SettingsError
from ..common.paths import write_folder_atomically
from ..compression.quantize.layers import QuantizedLayer
from ..compression.quantize.placing import dense_name

INPUT, OUTPUT = "images", "logits"
CODE_BITS = (1, 2, 3, 4, 6, 8)
"""What a code may take in a package."""
LARGEST_K = 1 << CODE_BITS[-1]


def check_installed() -> None:
    """Check that packages can be made here.

    Raises:
        SettingsError: the package coremltools is missing.
    """
    with _quiet():
        _coremltools()


def traced_program(model: nn.Module, image_size: int) -> Any:
    """The ML program of a dense network in evaluation mode: one image (1, 3, S, S) in, logits out; nothing is folded.

    Args:
        model: takes images (B, 3, H, W) and gives one tensor.
        image_size: side S of the images, which is fixed.

    Raises:
        SettingsError: the package coremltools is missing.
        RunError: the network has an operation that coremltools cannot convert.
    """
    with _quiet() as said:
        ct = _coremltools()
        try:
            traced = torch.jit.trace(model.eval(), torch.zeros(1, 3, image_size, image_size), check_trace=False)
            return ct.convert(
                traced,
                inputs=[ct.TensorType(name=INPUT, shape=(1, 3, image_size, image_size))],
                outputs=[ct.TensorType(name=OUTPUT)],
                convert_to="milinternal",
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32,
                pass_pipeline=ct.PassPipeline.EMPTY,
            )
        except Exception as error:  # of whatever type: converters of single operations raise what they like
            where = next((line.removeprefix("ERROR - ").rstrip(": ") for line in said if "converting" in line), "")
            raise RunError(
                f"Core ML: coremltools cannot convert this network: {_first_line(error)}"
                + (f" ({where})" if where else "")
            ) from error


def put_codes(program: Any, quantized: nn.Module) -> dict[str, str]:
    """Replace the dense weights of `program` by codebooks and codes, in place.

    Args:
        program: from `traced_program` of the dequantized network.
        quantized: the network with quantized layers, of the same names.

    Returns:
        The quantized weights that stay dense there, by name, and why.
    """
    layers = {dense_name(name, layer): layer for name, layer in _quantized(quantized)}
    function = program.functions["main"]
    dense: dict[str, str] = {}
    done: set[int] = set()
    with function:
        for constant in list(function.operations):
            layer = layers.get(constant.name) if constant.op_type == "const" else None
            if layer is None or not _is_weight(constant, layer):
                continue
            if reason := _why_dense(constant, layer):
                dense[constant.name] = reason
            else:
                with _place_of(constant):
                    _replace(function, constant, _decoded(constant, layer))
            done.add(id(layer.codebook))
    missing = {name: "is not in the ML program under its name" for name, layer in layers.items()
               if id(layer.codebook) not in done and name not in dense}  # fmt: skip
    return dense | missing


def write_package(program: Any, path: Path, about: Mapping[str, str]) -> None:
    """Write a package with metadata that says what it is, atomically; `program` is used up.

    Raises:
        RunError: it cannot be written, or coremltools cannot finish the network.
    """

    def write(temporary: Path) -> None:
        with _quiet():
            model = _finished(program)
            for key, value in about.items():
                model.user_defined_metadata[key] = value
            model.short_description = f"{about['arch']}, weights: {about['weights']}"
            package = temporary / "written.mlpackage"
            model.save(str(package))
        for part in package.rglob("*"):  # coremltools makes some that only their owner may read
            shutil.copymode(temporary if part.is_dir() else package / "Manifest.json", part)
        for part in list(package.iterdir()):
            part.rename(temporary / part.name)
        package.rmdir()

    write_folder_atomically(path, write)


def _finished(program: Any) -> Any:
    ct = _coremltools()
    _norms_in_two(program.functions["main"])
    try:
        model = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT16,
            skip_model_load=True,
        )
    except (ValueError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        raise RunError(f"Core ML: coremltools cannot finish this network: {_first_line(error)}; try --dense") from error
    for op in model._mil_program.functions["main"].operations:
        value = op.outputs[0].val if op.op_type == "const" else None
        if isinstance(value, np.ndarray) and value.dtype == np.float16 and not np.isfinite(value).all():
            raise RunError(
                f"not written: {op.name} holds values that 16-bit floats cannot hold (above 65,504 or not finite), and "
                "Core ML computes in them"
            )
    return model


def _quantized(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)]


def _is_weight(constant: Any, layer: QuantizedLayer) -> bool:
    """Whether a constant is what `layer` stands for: other things have been known to have a weight's name."""
    value = constant.outputs[0].val
    weight = layer.dequantize_stored().detach().cpu().numpy()
    return value.shape == weight.shape and bool(np.array_equal(value, weight))


def _why_dense(constant: Any, layer: QuantizedLayer) -> str | None:
    """Why a weight cannot be table and codes; None: it can."""
    if layer.k > LARGEST_K:
        return f"k = {layer.k} is above {LARGEST_K}"
    if _axis(layer) is not None:
        return None
    for user in constant.outputs[0].child_ops:
        types = user.input_spec.input_types
        for name, given in user.inputs.items():
            # a linear layer becomes a matrix product
            if given is constant.outputs[0] and types[name].const and user.op_type != "linear":
                return (
                    f"a {user.op_type} takes no reshaped table, and its subvectors of {layer.d} lie along no one axis"
                )
    return None


def _axis(layer: QuantizedLayer) -> int | None:
    """The axis of the weight along which its subvectors run; None: a matrix has to be reshaped."""
    shape = layer.weight_shape
    last = max((axis for axis, size in enumerate(shape) if size > 1), default=1)
    return last if last >= 1 and shape[last] % layer.d == 0 else None


def _decoded(constant: Any, layer: QuantizedLayer) -> Any:
    """The variable, of 32-bit floats, that decodes a weight; made before `constant`."""
    mb = _builder()
    bits = next(bits for bits in CODE_BITS if layer.k <= 1 << bits)
    shape, axis = layer.weight_shape, _axis(layer)
    if axis is None:
        indices_shape, along = tuple(layer.codes_matrix.shape), 1
    else:
        indices_shape, along = (*shape[:axis], shape[axis] // layer.d, *shape[axis + 1 :]), axis
    codes = layer.codes_matrix.cpu().numpy().reshape(indices_shape).astype(_unsigned(bits))
    table = _table(layer, 1 << bits, len(indices_shape), constant)
    name = f"{constant.name}_coded"
    decoded = mb.constexpr_lut_to_dense(
        indices=codes, lut=table, vector_axis=np.int32(along), name=name, before_op=constant
    )
    if axis is None:
        decoded = mb.reshape(x=decoded, shape=shape, name=f"{name}_shaped", before_op=constant)
    return mb.cast(x=decoded, dtype="fp32", name=f"{name}_wide", before_op=constant)


def _table(layer: QuantizedLayer, rows: int, rank: int, before: Any) -> Any:
    """The codebook as a table (1, ..., 1, rows, d), filled up with zeros, for indices of `rank` axes."""
    stored, scale = layer.stored_codebook().cpu(), layer.stored_scale()
    if scale is not None and layer.codebook_bits == 16:
        stored, scale = stored.float() * scale.cpu(), None
    table = torch.zeros(rows, layer.d, dtype=stored.dtype)
    table[: layer.k] = stored
    values = table.numpy().reshape(*[1] * rank, rows, layer.d)
    if scale is None:
        return values
    mb = _builder()
    factor = np.full([1] * (rank + 2), float(scale), np.float32)
    return mb.constexpr_blockwise_shift_scale(data=values, scale=factor, before_op=before)


def _replace(function: Any, constant: Any, new: Any) -> None:
    function.replace_uses_of_var_after_op(
        anchor_op=constant, old_var=constant.outputs[0], new_var=new, force_replace=True
    )
    function.remove_ops([constant])


def _norms_in_two(function: Any) -> None:
    """Batch norms with mean 0 and variance 1: two vectors instead of four, rounded to 16 bits once and not thrice."""
    mb = _builder()
    with function:
        for norm in list(function.operations):
            if norm.op_type != "batch_norm":
                continue
            mean, variance, gamma, beta = (
                None if given is None else given.val for given in (norm.mean, norm.variance, norm.gamma, norm.beta)
            )
            if mean is None or variance is None:
                continue
            one = np.ones(1) if gamma is None else gamma.astype(np.float64)
            factor = one / np.sqrt(variance.astype(np.float64) + norm.epsilon.val)
            summand = (0 if beta is None else beta.astype(np.float64)) - mean.astype(np.float64) * factor
            with _place_of(norm):
                new = mb.batch_norm(
                    x=norm.x,
                    mean=np.zeros_like(mean),
                    variance=np.ones_like(variance),
                    gamma=(factor * np.sqrt(1 + norm.epsilon.val)).astype(np.float32),
                    beta=summand.astype(np.float32),
                    epsilon=norm.epsilon,
                    name=f"{norm.name}_two",
                    before_op=norm,
                )
            _replace(function, norm, new)


def _builder() -> Any:
    from coremltools.converters.mil.mil import Builder

    return Builder


def _place_of(operation: Any) -> Any:
    """A context in which new operations belong to the part of the network that `operation` belongs to."""
    from coremltools.converters.mil.mil.scope import ScopeInfo

    return _builder().scope(*[ScopeInfo(source, data) for source, data in operation.scopes.items()])


def _unsigned(bits: int) -> Any:
    """The type of numpy's that stands for codes of so many bits."""
    from coremltools.converters.mil.mil.types import type_mapping as mapping

    return mapping.nptype_from_builtin(mapping.string_to_builtin(f"uint{bits}"))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep what coremltools says of versions, progress and errors from the screen; gives its lines."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.extend(line.strip() for line in record.getMessage().splitlines() if line.strip())

    logger, handler = logging.getLogger("coremltools"), Kept()
    passed_on = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = passed_on


def _coremltools() -> Any:
    try:
        import coremltools
    except ImportError as error:
        raise SettingsError(
            "Core ML packages need the package coremltools, which is not installed: pip install pqf[coreml], or pip "
            "install coremltools"
        ) from error
    return coremltools
