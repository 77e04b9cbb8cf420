"""How well one layer was quantized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .plan import LayerPlan
from .sixteen_bits import CHUNK, energies, rounding_loss
from .stored_codebook import eight_bit_scale


@dataclass(frozen=True)
class LayerResult:
    """How well one layer was quantized.

    Attributes:
        name: the layer.
        d: subvector length.
        k: centroids.
        n_subvectors: subvectors quantized.
        distortion: squared error summed over the weight.
        power: sum of squares of the weight; distortion / power is the relative error.
        iterations: mean updates that the clustering made.
        rounding: share of the power that would be lost by rounding alone, if every value of the weight became one that
            such a codebook can have.
        codebook_bits: of a value of the codebook, 16 or 8.
    """

    name: str
    d: int
    k: int
    n_subvectors: int
    distortion: float
    power: float
    iterations: int
    rounding: float
    codebook_bits: int = 16

    @property
    def relative_error(self) -> float:
        """Share of the weight's energy that is lost, 0 (nothing) to 1."""
        return self.distortion / self.power if self.power else 0.0


def result_of(plan: LayerPlan, weight: Tensor, codebook: Tensor, codes: Tensor, iterations: int) -> LayerResult:
    """What became of a layer.

    Args:
        plan: for it.
        weight: the dense one (R, ...), on the CPU.
        codebook: (k, d), as files hold it.
        codes: (n,).
        iterations: mean updates that the clustering made.
    """
    lost, power = energies(weight, codebook, codes, plan.layout)
    if plan.codebook_bits == 16:
        rounding = rounding_loss(weight, plan.scale)
    else:
        rounding = _lost_by_steps(weight, float(eight_bit_scale(codebook.to(weight.dtype)))) / power if power else 0.0
    return LayerResult(
        name=plan.name,
        d=plan.d,
        k=plan.k,
        n_subvectors=codes.shape[0],
        distortion=lost,
        power=power,
        iterations=iterations,
        rounding=rounding,
        codebook_bits=plan.codebook_bits,
    )


def _lost_by_steps(weight: Tensor, step: float) -> float:
    """Sum of squares of what is lost where every value becomes a whole number of steps."""
    lost = 0.0
    for chunk in weight.reshape(-1).split(CHUNK):
        exact = chunk.double()
        lost += float((exact - (exact / step).round() * step).square().sum())
    return lost
