"""What compressing did, for people and programs."""

from __future__ import annotations

from dataclasses import dataclass

from ..compression.permute.permute import GroupResult
from ..compression.quantize.compress import LayerResult
from ..compression.quantize.plan import DenseWeight
from .size import ModelSize


@dataclass(frozen=True)
class Report:
    """What compressing did.

    Attributes:
        layers: how well each weight was quantized.
        dense: the weights that stay as they were, with reasons.
        groups: what became of each group of channels.
        size: of the network, before and after.
        notes: what else to know.
        outputs_lost: of a calibrated network, the share of the energy of the weights' outputs that is lost, the mean
            over them: calibration does not keep the weights themselves. None: it was not calibrated.
    """

    layers: tuple[LayerResult, ...]
    dense: tuple[DenseWeight, ...]
    groups: tuple[GroupResult, ...]
    size: ModelSize
    notes: tuple[str, ...]
    outputs_lost: float | None = None

    @property
    def lost(self) -> float:
        """Share of the energy of all quantized weights that is lost, 0 to 1."""
        power = sum(layer.power for layer in self.layers)
        return sum(layer.distortion for layer in self.layers) / power if power else 0.0

    def __str__(self) -> str:
        moved = sum(bool(group.children) and group.after < group.before for group in self.groups)
        share, what = (self.lost, "energy") if self.outputs_lost is None else (self.outputs_lost, "outputs' energy")
        return "\n".join(
            [
                f"{len(self.layers)} weights quantized, {100 * share:.2f} % of their {what} lost; "
                f"{moved} of {len(self.groups)} groups of channels permuted",
                f"size: {self.size.summary()}",
                *(f"note: {text}" for text in self.notes),
            ]
        )
