"""ONNX files: the dense network, or the same graph with every quantized weight as codebook and codes, so that the small
size survives.

A file is checked before it is there: onnxruntime has to compute what PyTorch computes, for the size of images that it
was made with and, where it says that any size will do, for another one. The package onnx is needed for writing,
onnxruntime for checking: pip install pqf[onnx].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import RunError, SettingsError
from ..common.paths import write_atomically
from ..common.randomness import stream
from .onnx_check import NotTheSame, Wanted, check, wanted_of
from .onnx_compact import compact
from .onnx_outputs import INPUT, Called
from .onnx_package import exporting_program, needed
from .onnx_trace import (
    BATCH,
    DYNAMO,
    FIXED,
    FREE,
    LOWEST_OPSET,
    OPSET,
    TORCHSCRIPT,
    Skeleton,
    reason,
    skeleton,
)  # fmt: skip
from .onnx_weights import Filled, check_size, fill

UserFailure = SettingsError | RunError

AUTO = "auto"
SIZES, EXPORTERS = (AUTO, FREE, FIXED), (AUTO, TORCHSCRIPT, DYNAMO)
OTHER_SIZES = ((37, 50), (32, 64))
"""What is added to height and width for another size of images; the first that the network takes counts."""


@dataclass(frozen=True)
class OnnxOptions:
    """How an ONNX file is made.

    Attributes:
        image_size: side of the images that trace and check it.
        size: whether height and width stay free: `auto` where they can, `free`, `fixed`.
        opset: of the graph.
        exporter: torch's `torchscript` or `dynamo`; `auto`: the second where the first cannot and it is installed.
    """

    image_size: int = 224
    size: str = AUTO
    opset: int = OPSET
    exporter: str = AUTO


@dataclass(frozen=True)
class Written:
    """What became of a network.

    Attributes:
        free: what of the images' shape is free (`onnx_trace.FREE`, `BATCH`, `FIXED`).
        why_not_free: why height and width are not, where that was tried.
        exporter: that made it.
        off: largest difference from PyTorch, see `check`; None: not checked.
        filled: which weights are coded.
        outputs: their names.
    """

    free: str
    why_not_free: str
    exporter: str
    off: float | None
    filled: Filled
    outputs: tuple[str, ...]


@dataclass
class _Wanted:
    """What PyTorch gives for the images of every check, computed when it is first asked for."""

    called: Called
    side: int
    found: dict[tuple[int, int, int], Wanted] = field(default_factory=dict)

    def of(self, batch: int, height: int, width: int) -> Wanted:
        shape = (1 if self.called.detects else batch, height, width)
        if shape not in self.found:
            draw = stream(0, "onnx check", *shape)
            self.found[shape] = wanted_of(self.called, torch.randn(shape[0], 3, *shape[1:], generator=draw))
        return self.found[shape]

    def usual(self, batch: int) -> Wanted:
        """For the size of the trace.

        Raises:
            SettingsError: the network does not take it.
        """
        try:
            return self.of(batch, self.side, self.side)
        except Exception as error:  # what a user's own code raises
            raise SettingsError(
                f"the network cannot take {batch} images of {self.side} x {self.side} pixels: {reason(error)}; "
                "--image_size N sets another size"
            ) from error

    def other(self) -> Wanted:
        """For another size.

        Raises:
            SettingsError: the network takes none.
        """
        failed: list[Exception] = []
        for height, width in OTHER_SIZES:
            with _noted(failed):
                return self.of(1, self.side + height, self.side + width)
        raise SettingsError(f"it takes images of one size only ({reason(failed[-1])})") from failed[-1]


@contextlib.contextmanager
def _noted(failed: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what a user's own code raises
        failed.append(error)


def write_onnx(
    dense: nn.Module, quantized: nn.Module | None, path: Path, how: OnnxOptions, about: Mapping[str, str]
) -> Written:
    """Write a network as an ONNX file, atomically, and only if it computes what it should.

    Args:
        dense: the dense network, which is exported.
        quantized: the network with quantized layers, of the same names, whose codebooks and codes are written and with
            which the file is compared; None: dense weights.
        path: of the file.
        how: size, opset, exporter.
        about: properties of the file.

    Raises:
        SettingsError: a package is missing, or the network cannot be exported as asked; says what is in the way.
        RunError: the file would not compute the network, or cannot be written.
    """
    needed()
    check_options(how)
    check_size(_tensors(dense), quantized)
    called, reference = Called(dense, with_heads=True), Called(quantized or dense, with_heads=True)
    wanted = _Wanted(reference, how.image_size)
    failed: dict[str, UserFailure] = {}
    why_not_free = ""
    try:
        wanted.usual(1)
        for exporter, free in _attempts(how, called.detects):
            made = _attempt(called, quantized, wanted, path, how, about, exporter, free)
            if isinstance(made, Written):
                return replace(made, why_not_free=why_not_free)
            why_not_free = why_not_free or (str(made) if free == FREE else "")
            failed[exporter] = made
        raise failed.get(TORCHSCRIPT) or next(iter(failed.values()))
    finally:
        called.leave()
        reference.leave()


def _attempt(
    called: Called,
    quantized: nn.Module | None,
    wanted: _Wanted,
    path: Path,
    how: OnnxOptions,
    about: Mapping[str, str],
    exporter: str,
    free: str,
) -> Written | UserFailure:
    """Write the file by one exporter with one choice of free sizes; returns why that cannot be."""
    try:
        checks = _checks(wanted, free)
        wanted.called.eval()  # which drops the dense weights that quantized layers keep
        traced = skeleton(called, checks[0].images[:1], free, exporter, how.opset)
        if free == FREE and how.size == AUTO and traced.doubts and not called.detects:
            raise SettingsError(f"Python code in it looks at the size ({traced.doubts[0]})")
        tensors = _tensors(called.net)
        filled = fill(traced.graph, tensors, quantized)
        off = _write(traced, path, about, checks, sum(one.numel() for one in tensors.values()))
    except (SettingsError, NotTheSame) as error:
        return error
    return Written(
        free=free,
        why_not_free="",
        exporter=exporter,
        off=off,
        filled=filled,
        outputs=tuple(one.name for one in traced.graph.graph.output),
    )


def graph_of(dense: nn.Module, quantized: nn.Module | None, image_size: int) -> Any:
    """The ONNX graph of a network for images of any size, not checked.

    Args:
        dense: the dense network.
        quantized: the one with quantized layers; None: dense weights.
        image_size: side of the images that trace it.
    """
    traced = skeleton(Called(dense), torch.zeros(1, 3, image_size, image_size), FREE, TORCHSCRIPT, OPSET)
    fill(traced.graph, _tensors(dense), quantized)
    compact(traced.graph, frozenset())
    return traced.graph


def check_options(how: OnnxOptions) -> None:
    """See that the options can be followed.

    Raises:
        SettingsError: they cannot.
    """
    constants = torch.onnx._constants
    highest = constants.ONNX_MAX_OPSET if how.exporter == DYNAMO else constants.ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET
    lowest = OPSET if how.exporter == DYNAMO else LOWEST_OPSET
    highest = min(highest, needed().defs.onnx_opset_version())
    if not lowest <= how.opset <= highest:
        raise SettingsError(
            f"--opset {how.opset}: expected {lowest} to {highest}, which this version of torch can write"
            + (f" with --exporter {how.exporter}" if how.exporter != AUTO else "")
        )
    if how.exporter == DYNAMO:
        exporting_program()


def _attempts(how: OnnxOptions, detects: bool) -> Iterator[tuple[str, str]]:
    """Which exporter is to leave what of the images' shape free, in the order in which it is tried."""
    sizes = {AUTO: (FREE, BATCH, FIXED), FREE: (FREE,), FIXED: (BATCH, FIXED)}[how.size]
    exporters = [TORCHSCRIPT, DYNAMO] if how.exporter == AUTO else [how.exporter]
    for exporter in exporters:
        if how.exporter == AUTO and exporter == DYNAMO and (detects or not _has_dynamo(how.opset)):
            continue
        yield from ((exporter, size) for size in sizes)


def _has_dynamo(opset: int) -> bool:
    try:
        exporting_program()
    except SettingsError:
        return False
    return opset >= OPSET


def _checks(wanted: _Wanted, free: str) -> list[Wanted]:
    """What a file is compared on: with so many images and sizes as it leaves free."""
    usual = wanted.usual(1 if free == FIXED else 2)
    return [usual, wanted.other()] if free == FREE else [usual]


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names, those that no state dict holds too."""
    tensors = dict(net.named_parameters(remove_duplicate=False))
    return {name: one.detach() for name, one in (*tensors.items(), *net.named_buffers(remove_duplicate=False))}


def _write(traced: Skeleton, path: Path, about: Mapping[str, str], checks: list[Wanted], n_values: int) -> float | None:
    compact(traced.graph, frozenset([INPUT, *(one.name for one in traced.heads)]))
    needed().helper.set_model_props(traced.graph, dict(about))
    contents = traced.graph.SerializeToString(deterministic=True)
    found: list[float | None] = []

    def write(temporary: Path) -> None:
        temporary.write_bytes(contents)
        found.append(check(temporary, traced.heads, checks, n_values))

    write_atomically(path, write)
    return found[0]
