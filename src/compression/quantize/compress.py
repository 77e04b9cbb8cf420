"""Coding a whole network: every planned layer is clustered and replaced, or built from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...progress import bar
from ...randomness import stream
from ..subvectors import Layer, to_subvectors
from .kmeans import cluster
from .layers import CODED_LAYERS, CodedLayer
from .plan import LayerPlan, Plan


@dataclass(frozen=True)
class LayerResult:
    """How well one layer was coded.

    Attributes:
        name: the layer.
        d: subvector length.
        k: centroids.
        n_subvectors: subvectors coded.
        distortion: squared error summed over the weight.
        power: sum of squares of the weight; distortion / power is the relative error.
    """

    name: str
    d: int
    k: int
    n_subvectors: int
    distortion: float
    power: float

    @property
    def relative_error(self) -> float:
        """Share of the weight's energy that is lost, 0 (nothing) to 1."""
        return self.distortion / self.power if self.power else 0.0


def compress(
    model: nn.Module, plan: Plan, *, seed: int = 0, device: torch.device | str | None = None, show_progress: bool = True
) -> tuple[nn.Module, list[LayerResult]]:
    """Cluster and replace every planned layer, in place.

    Args:
        model: the dense network (permuted or not). A bare layer is replaced as a whole, so use the returned model.
        plan: from `make_plan`.
        seed: the run's seed; each layer draws from its own stream.
        device: where to cluster; None: where the weight is.
        show_progress: show a progress bar.

    Returns:
        The network with coded layers, and how well each was coded, in the network's order.

    Raises:
        PlanError: a weight that cannot be clustered (not finite).
    """
    results = []

    def code(plan: LayerPlan, dense: Layer) -> CodedLayer:
        layer: CodedLayer = CODED_LAYERS[type(dense)](dense, plan.d, plan.k)
        weight: Tensor = dense.weight.detach()
        vectors = to_subvectors(weight, plan.d).float().to(device or weight.device)
        try:
            found = cluster(
                plan.k_means_type, vectors, plan.k, plan.k_means_n_iters, stream(seed, "codebook", plan.name), plan.k_means_tolerance
            )
        except ValueError as error:
            raise PlanError(f"layer {plan.name!r}: {error}") from None
        layer.set_codes(found.codebook.to(weight.device, weight.dtype), found.codes.to(weight.device))
        power = float(weight.cpu().double().square().sum())
        results.append(LayerResult(plan.name, plan.d, plan.k, vectors.shape[0], found.distortion * vectors.shape[0], power))
        return layer

    return _replace(model, plan, code, lambda items: bar(items, "quantize", show=show_progress, unit="layer")), results


def build_coded(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace every planned layer by a coded layer of the same shape with an empty codebook; nothing is clustered.

    The values come from a file. Works on the meta device.
    """
    return _replace(model, plan, lambda layer, dense: CODED_LAYERS[type(dense)](dense, layer.d, layer.k), iter)


def _replace(model: nn.Module, plan: Plan, make: Callable[[LayerPlan, nn.Module], CodedLayer], progress: Callable) -> nn.Module:
    modules = dict(model.named_modules())
    made: dict[int, CodedLayer] = {}
    by_weight: dict[int, CodedLayer] = {}
    for name in progress(list(plan.layers)):
        layer, dense = plan.layers[name], modules[name]
        twin = by_weight.get(id(dense.weight))
        if twin is not None:
            coded = CODED_LAYERS[type(dense)](dense, layer.d, layer.k)
            _share(coded, twin)
        else:
            coded = by_weight[id(dense.weight)] = make(layer, dense)
        made[id(dense)] = coded
    if id(model) in made:
        return made[id(model)]
    # every place that holds a replaced module, so that a module used twice stays one module
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in made:
                parent._modules[child_name] = made[id(child)]
    return model


def _share(coded: CodedLayer, twin: CodedLayer) -> None:
    """Tie two coded layers whose dense weights were one parameter."""
    coded.codebook = twin.codebook
    coded.codes_matrix = twin.codes_matrix
