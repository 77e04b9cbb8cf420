"""What is known beforehand of a network that will be quantized as planned."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Plan


@dataclass(frozen=True)
class PredictedLayer:
    """What a plan does to one weight, as far as it is known beforehand.

    Attributes:
        name: of the weight, of a tied one the first.
        d: subvector length.
        k: centroids.
        codebook_bits: of a value of the codebook.
        bits: of codes and codebook.
        distortion: about the sum of squares that will be lost.
        loss: what that costs the network.
        power: sum of squares of the weight.
        n_values: in the weight.
    """

    name: str
    d: int
    k: int
    codebook_bits: int
    bits: int
    distortion: float
    loss: float
    power: float
    n_values: int


@dataclass(frozen=True)
class Prediction:
    """A plan, its exact size and about what it loses.

    Attributes:
        plan: what to do with every weight.
        layers: what becomes of each.
        bits: of the whole network, exactly.
        dense_bits: of the network before.
        loss: of all weights, summed.
        share: of the energy of all quantized weights together that is lost, each as much as it matters.
        unit: of the loss; empty: sums of squares.
        scales: codebooks that have a scale although the settings do not ask for one.
    """

    plan: Plan
    layers: tuple[PredictedLayer, ...]
    bits: int
    dense_bits: int
    loss: float
    share: float
    unit: str = ""
    scales: int = 0

    @property
    def ratio(self) -> float:
        """Dense / quantized."""
        return self.dense_bits / self.bits
