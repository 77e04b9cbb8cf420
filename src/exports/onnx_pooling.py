"""Adaptive average pooling in operators that every exporter knows, for inputs of any size.

Row i of an output of n rows is the average of the rows floor(i H / n) to ceil((i + 1) H / n) - 1 of an input of H rows:
a product with a matrix (n, H), computed from H where the size is free. Exporters write the pooling themselves only
for one place, or where n divides a fixed H.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def by_products(net: nn.Module) -> Iterator[None]:
    """Have adaptive average poolings in 2-d that give more than one place compute products of matrices."""
    changed: list[Any] = []
    for module in net.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d) and "forward" not in vars(module):
            wanted: Any = module.output_size
            height, width = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
            if (height, width) != (1, 1):
                vars(module)["forward"] = partial(pooled, height=height, width=width)
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def pooled(x: Tensor, height: int | None, width: int | None) -> Tensor:
    """What `adaptive_avg_pool2d` makes of x (..., H, W): (..., height, width); None: as many as x has."""
    if height is not None:
        x = torch.matmul(averaging(x, -2, height), x)
    return x if width is None else torch.matmul(x, averaging(x, -1, width).transpose(0, 1))


def averaging(x: Tensor, axis: int, n: int) -> Tensor:
    """The matrix (n, size of x along the axis) of the average over each of n ranges."""
    size = x.shape[axis]
    place, target = torch.arange(size, device=x.device), torch.arange(n, device=x.device)
    first = torch.div(target * size, n, rounding_mode="floor")
    behind = torch.div((target + 1) * size + (n - 1), n, rounding_mode="floor")
    inside = (place[None, :] >= first[:, None]) & (place[None, :] < behind[:, None])
    return inside.to(x.dtype) / (behind - first)[:, None].to(x.dtype)
