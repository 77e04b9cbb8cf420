"""What the law tests share: networks with lively norms, closeness, and coding in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from src.common.randomness import stream
from src.compression.permute.groups import Group, resolve
from src.compression.quantize.compress import compress
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.placing import quantize_weight
from src.compression.quantize.plan import LayerSpec, QuantizationSpec, make_plan
from src.compression.quantize.subvector_size import BlockRule
from src.compression.quantize.weights import WeightPlace

NORMS = (_BatchNorm, FrozenBatchNorm2d)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norms (negative gains, running statistics, biases) and slopes, so that a forgotten one shows; eval
    mode."""
    draw = stream(seed, "lively")

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=draw, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS):
                if module.running_mean is not None:
                    uniform(module.running_mean, -0.5, 0.5)
                    uniform(module.running_var, 0.3, 3.0)
                if module.weight is not None:
                    uniform(module.weight, 0.5, 1.5)
                    module.weight[::3] *= -1
                if module.bias is not None:
                    uniform(module.bias, -0.5, 0.5)
            elif isinstance(module, nn.PReLU):
                uniform(module.weight, -0.5, 0.9)
    return model.eval()


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| over all values."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs of `model` on x, without gradients."""
    return model(x)


def shuffle(
    model: nn.Module, groups: Sequence[Group], seed: int = 0, reshapes: Mapping[str, Sequence[int]] | None = None
) -> list[Tensor]:
    """Apply a random permutation (never the identity) to every group; returns them."""
    draw = stream(seed, "shuffle")
    drawn = []
    for group in resolve(model, groups, reshapes):
        size = group.width // group.n_blocks
        identity = torch.arange(group.width)
        p = identity
        while torch.equal(p, identity):
            p = torch.cat([torch.randperm(size, generator=draw) + block * size for block in range(group.n_blocks)])
        group.apply(p)
        drawn.append(p)
    return drawn


def spec(
    k: int = 16,
    kind: str = "kmeans",
    iterations: int = 3,
    *,
    fc: int = 4,
    pw: int = 4,
    large: bool = False,
    ignored: Sequence[str] = (),
    layers: Mapping[str, LayerSpec] | None = None,
) -> QuantizationSpec:
    """A coding specification with short names."""
    return QuantizationSpec(k, kind, iterations, BlockRule(fc, pw, large), ignored, layers or {})


def quantized(model: nn.Module, how: QuantizationSpec | None = None, seed: int = 0) -> nn.Module:
    """`model` compressed in place (use what is returned)."""
    return compress(model, make_plan(model, how or spec()), seed=seed, show_progress=False)[0]


def quantized_layer(dense: nn.Module, d: int, k: int) -> QuantizedLayer:
    """`dense` itself, with an empty codebook and codes in the place of its weight."""
    return quantize_weight(WeightPlace(host=dense, attribute="weight", name="layer", below=False), d, k)
