"""What a compression did, in a few words for the log and in tables for the recorder."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ..common.log import log
from ..compression.permute.permute import GroupResult
from ..compression.quantize.compress import LayerResult
from ..model_files.size import model_size
from .recorder import AnyRecorder


def report_size(model: nn.Module, recorder: AnyRecorder) -> dict[str, float]:
    """Log and record the size of a quantized network; returns its figures."""
    counted = model_size(model)
    log.info("size: %s", counted.summary())
    recorder.table(
        "size",
        ["", "bits", "MB"],
        [
            [name, f"{bits:,}", f"{bits / 8 / 2**20:.2f}"]
            for name, bits in (
                ("codes", counted.codes),
                ("codebooks", counted.codebooks),
                ("other", counted.other),
                ("all", counted.bits),
                (f"dense network, {counted.ratio:.2f} times as large", counted.original),
            )
        ],
    )
    return {"bits": counted.bits, "megabytes": round(counted.megabytes, 4), "ratio": round(counted.ratio, 4)}


def permutation_summary(results: Sequence[GroupResult]) -> str:
    """How many groups were permuted, and what that gained."""
    if not results:
        return "permute: no groups"
    improved = [r for r in results if r.children and r.after < r.before]
    fixed = sum(not r.children for r in results)
    mean = sum(r.after - r.before for r in improved) / len(improved) if improved else 0.0
    text = f"permute: {len(improved)} of {len(results)} groups permuted, log det(Cov) changed by {mean:.3f} on average"
    return text + (f"; {fixed} do not depend on a permutation" if fixed else "")


def quantization_summary(layers: Sequence[LayerResult]) -> str:
    """What share of the weights' energy was lost, and where most."""
    if not layers:
        return "quantize: no layer was quantized"
    lost = sum(layer.distortion for layer in layers) / (sum(layer.power for layer in layers) or math.nan)
    worst = max(layers, key=lambda layer: layer.relative_error)
    most = f"most in {worst.name or 'the model'}: {100 * worst.relative_error:.2f} %"
    return f"quantize: {len(layers)} layers quantized, {100 * lost:.2f} % of the weights' energy lost ({most})"


def distortion_rows(layers: Sequence[LayerResult]) -> list[list[str]]:
    """The layers that lost most first."""
    falling = sorted(layers, key=lambda layer: -layer.relative_error)
    return [[layer.name or "(model)", f"{100 * layer.relative_error:.3f} %"] for layer in falling]
