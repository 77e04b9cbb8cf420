"""What calibrating a network finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..clustering import Clustering
from .norms import norms_of, statistics_of


@dataclass(frozen=True)
class Part:
    """What is found for one weight or one batch norm.

    Attributes:
        clustering: of the weight; None: it is a norm.
        lost: after each step, which share of the energy of the weight's outputs is lost; empty: it was not calibrated.
        norms: running mean and variance of the batch norms that are put right with it, by name.
    """

    clustering: Clustering | None = None
    lost: tuple[tuple[str, float], ...] = ()
    norms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class Calibration:
    """What calibrating found. Given to `compress` as its finished clusterings.

    Attributes:
        clusterings: of every planned weight, by name, of tied ones the first.
        lost: of every calibrated weight: after each step, which share of the energy of its outputs is lost.
        norms: running mean and variance of the batch norms that see something else now, by name.
        plain: the weights that it could not serve, which were clustered plainly, with the reason.
    """

    clusterings: dict[str, Clustering] = field(default_factory=dict)
    lost: dict[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, part: Part) -> None:
        """Take what was found for the weight, or batch norm, of this name."""
        if part.clustering is not None:
            self.clusterings[name] = part.clustering
        if part.lost:
            self.lost[name] = part.lost
        self.norms.update(part.norms)

    def recall(self, name: str, weight: Tensor) -> Clustering | None:
        """The clustering of a weight, where it has as many values."""
        found = self.clusterings.get(name)
        fits = found is not None and found.codes.numel() * found.codebook.shape[1] == weight.numel()
        return found if fits else None

    def keep(self, name: str, weight: Tensor, clustering: Clustering) -> None:
        """There is nothing to keep: all are known."""

    def put_norms(self, model: nn.Module) -> None:
        """Set the running statistics of a network, dense or quantized."""
        norms = norms_of(model)
        for name, (mean, variance) in self.norms.items():
            for own, found in zip(statistics_of(norms[name]), (mean, variance), strict=True):
                own.copy_(found)

    def lost_after(self) -> dict[str, float]:
        """The share of the energy of outputs that is lost after each step, the mean over all calibrated weights."""
        steps = list(zip(*self.lost.values(), strict=True))
        return {step[0][0]: sum(share for _, share in step) / len(step) for step in steps}

    def summary(self, n_inputs: int) -> str:
        """What was done, in a line."""
        after = list(self.lost_after().values()) or [0.0]
        return (
            f"calibrated {len(self.lost)} weights with {n_inputs:,} inputs: {100 * after[-1]:.2f} % of the energy of "
            f"their outputs lost on average, {100 * after[0]:.2f} % by clustering alone; running statistics of "
            f"{len(self.norms)} batch norms adjusted"
        )

    def notes(self) -> list[str]:
        """Which weights were clustered plainly, a line for every reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.plain.items():
            reasons.setdefault(reason, []).append(name or "(the network itself)")
        return [f"{', '.join(names)}: {reason}; quantized without it" for reason, names in reasons.items()]
