"""Fewer centroids for a quantized layer, for formats with shorter codes: k-means of what its codes stand for.

The subvectors of a quantized weight are its centroids, each as often as its code is used, so it is the k old centroids
that are clustered, weighted by their use. Shapes: k old centroids of length d, K new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..common.randomness import stream
from ..compression.quantize.assign import assign, squared_distances
from ..compression.quantize.layers import QuantizedLayer

ITERATIONS = 100


@dataclass(frozen=True)
class Fitted:
    """A layer with fewer centroids than before.

    Attributes:
        name: of the layer.
        k: centroids that it had.
        lost: squared difference from the weight as it was, over the sum of its squares.
    """

    name: str
    k: int
    lost: float


def fit_centroids(model: nn.Module, largest: int, seed: int = 0) -> list[Fitted]:
    """Give every quantized layer with more than `largest` centroids that many, in place.

    Args:
        model: with quantized layers, in evaluation mode.
        largest: most centroids, a power of two.
        seed: each layer draws its first centroids from its own stream.

    Returns:
        The layers that were changed; one that is tied to another stands under its first name.
    """
    found: list[Fitted] = []
    by_codebook: dict[int, list[tuple[str, QuantizedLayer]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.k > largest:
            by_codebook.setdefault(id(layer.codebook), []).append((name, layer))
    for tied in by_codebook.values():
        name, first = tied[0]
        before = first.dequantize_stored().detach().double()
        k = first.k
        codebook, codes = _fewer(first, largest, stream(seed, "fewer centroids", name))
        parameter = nn.Parameter(codebook, first.codebook.requires_grad)
        for _, layer in tied:
            layer._parameters["codebook"] = parameter
            layer.codes_matrix.copy_(codes.reshape(layer.codes_matrix.shape))
            layer.forget()
        power = float(before.square().sum())
        lost = float((first.dequantize_stored().detach().double() - before).square().sum())
        found.append(Fitted(name=name, k=k, lost=lost / power if power else 0.0))
    return found


def _fewer(layer: QuantizedLayer, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codebook (K, d) and the codes in it (R*m,)."""
    codes = layer.codes_matrix.reshape(-1).long()
    used = torch.bincount(codes, minlength=layer.k).float()
    old = layer.codebook.detach().float()
    centroids = old[_spread(old, used, k, generator)].clone()
    nearest, _ = assign(old, centroids)
    for _ in range(ITERATIONS):
        sums = torch.zeros_like(centroids).index_add_(0, nearest, old * used[:, None])
        weights = torch.zeros(k).index_add_(0, nearest, used)
        centroids = torch.where(weights[:, None] > 0, sums / weights.clamp(min=1)[:, None], centroids)
        before = nearest
        nearest, _ = assign(old, centroids)
        if torch.equal(nearest, before):
            break
    return centroids.type_as(layer.codebook), nearest[codes].type_as(layer.codes_matrix)


def _spread(old: Tensor, used: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Indices (K,) of k-means++: each is drawn with a chance of its use times its squared distance to the nearest one
    before it."""
    chosen = torch.multinomial(used, 1, generator=generator)
    nearest = squared_distances(old, old, chosen.expand(len(old)))
    for _ in range(k - 1):
        chances = used * nearest
        if not float(chances.sum()) > 0:  # fewer different centroids than asked for
            chances = torch.ones_like(used)
        new = torch.multinomial(chances, 1, generator=generator)
        chosen = torch.cat([chosen, new])
        nearest = torch.minimum(nearest, squared_distances(old, old, new.expand(len(old))))
    return chosen
