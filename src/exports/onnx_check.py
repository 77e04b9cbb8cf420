"""Whether a file computes in onnxruntime what the network computes in PyTorch.

Classification, segmentation and the like: every output, to `TOLERANCE` of its largest value where that is above 1.
Detectors: so for what their heads give before boxes are selected. The selection jumps when two scores or overlaps that
are nearly equal change places by a rounding; so of the detections as many have to be the same, and `SAME_DETECTIONS` of
them have to be found on the other side with the same label, a box within `PIXELS` and a score within `SCORE`. Where all
scores are the same to `SCORE`, as without training, any choice of them is right, and only the scores count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import RunError
from .onnx_outputs import HEADS, INPUT, Called
from .onnx_package import needed, runtime

TOLERANCE = 1e-4
SAME_DETECTIONS, PIXELS, SCORE = 0.9, 0.5, 1e-3
LARGE = 1 << 28
"""Values, 1 GB of them."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Wanted:
    """What PyTorch gives for images: (B, 3, H, W) -> arrays by the names of outputs."""

    images: Tensor
    outputs: dict[str, Array]


class NotTheSame(RunError):
    """A file computes something else; `number` says for which of the inputs."""

    number = 0


def wanted_of(called: Called, images: Tensor) -> Wanted:
    """Run the network in PyTorch; whatever it raises passes."""
    with torch.no_grad():
        given = called(images)
    return Wanted(images=images, outputs={name: one.numpy() for name, one in zip(called.names, given, strict=True)})


def check(path: Path, heads: Sequence[Any], wanted: Sequence[Wanted], n_values: int) -> float | None:
    """Compare a file's outputs with PyTorch's.

    Args:
        path: the file.
        heads: values of a detector's heads, which the file computes and does not give.
        wanted: what PyTorch gives.
        n_values: in the dense weights; from `LARGE` on onnxruntime computes them when it needs them, instead of once.

    Returns:
        The largest difference, relative to an output's largest value where that is above 1; None: onnxruntime is not
        installed.

    Raises:
        NotTheSame: the outputs differ, or onnxruntime cannot compute them.
    """
    package = runtime()
    if package is None:
        return None
    options = package.SessionOptions()
    quiet = package.RunOptions()
    options.log_severity_level = quiet.log_severity_level = 4  # what fails is in the exceptions
    unfolded = ["ConstantFolding"] if n_values >= LARGE else None
    source: str | bytes = str(path)
    if heads:
        graph = needed().load(path)
        graph.graph.output.extend(heads)
        source = graph.SerializeToString()
    largest = 0.0
    try:
        session = package.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=unfolded
        )
    except Exception as error:  # of many types
        raise NotTheSame(f"not written: onnxruntime cannot read it: {_first_line(error)}") from error
    for number, one in enumerate(wanted):
        names = list(one.outputs)
        try:
            given = dict(zip(names, session.run(names, {INPUT: one.images.numpy()}, quiet), strict=True))
            largest = max(largest, _compare(given, one.outputs))
        except RunError as error:
            different = NotTheSame(str(error))
            different.number = number
            raise different from error
        except Exception as error:  # of many types
            different = NotTheSame(f"not written: onnxruntime cannot run it: {_first_line(error)}")
            different.number = number
            raise different from error
    return largest


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _compare(given: dict[str, Array], wanted: dict[str, Array]) -> float:
    detects = any(name.startswith(HEADS) for name in wanted)
    continuous = [name for name in wanted if name.startswith(HEADS) or not detects]
    largest = max((_difference(name, given[name], wanted[name]) for name in continuous), default=0.0)
    if detects:
        _compare_detections(given, wanted)
    return largest


def _difference(name: str, given: Array, wanted: Array) -> float:
    if given.shape != wanted.shape:
        raise RunError(f"not written: onnxruntime's {name} has the shape {given.shape}, PyTorch's {wanted.shape}")
    if not wanted.size:
        return 0.0
    off = float(np.abs(given.astype(np.float64) - wanted.astype(np.float64)).max())
    off /= max(1.0, float(np.abs(wanted).max()))
    if not off <= TOLERANCE:
        raise RunError(f"not written: onnxruntime's {name} differ from PyTorch's by {off:.2e}, more than {TOLERANCE:g}")
    return off


def _compare_detections(given: dict[str, Array], wanted: dict[str, Array]) -> None:
    """Detections as sets: see the module's first lines."""
    few, many = sorted((len(given["boxes"]), len(wanted["boxes"])))
    scores = wanted["scores"]
    if len(scores) and few == many and np.ptp(scores) < SCORE:
        found = int((np.abs(np.sort(given["scores"]) - np.sort(scores)) <= SCORE).sum())
    else:
        found = sum(_is_among(wanted, index, given) for index in range(len(scores)))
    if found < SAME_DETECTIONS * many or few < SAME_DETECTIONS * many:
        raise RunError(
            f"not written: onnxruntime finds {len(given['boxes'])} objects and PyTorch {len(wanted['boxes'])}, of "
            f"which {found} are the same"
        )


def _is_among(one: dict[str, Array], index: int, others: dict[str, Array]) -> bool:
    if not len(others["boxes"]):
        return False
    near = np.abs(others["boxes"] - one["boxes"][index]).max(1) <= PIXELS
    near &= np.abs(others["scores"] - one["scores"][index]) <= SCORE
    return bool((near & (others["labels"] == one["labels"][index])).any())
