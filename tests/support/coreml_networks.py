"""Small networks with the kinds of weights that a Core ML package may or may not hold."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Kinds(nn.Module):
    """Grouped, depthwise, dilated, transposed and pointwise convolutions, one of one axis, and linear layers, two of
    which share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 32, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.transposed = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.pointwise_transposed = nn.ConvTranspose2d(32, 32, 1)
        self.pointwise = nn.Conv2d(32, 32, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.line = nn.Conv1d(32, 32, 3)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.grouped(torch.cat([x, x[:, :1]], 1)))
        x = self.pointwise_transposed(self.transposed(self.dilated(x)))
        x = self.line(torch.relu(self.norm(self.pointwise(x))).flatten(2)).mean(2)
        return self.head(self.two(torch.relu(self.one(x))))


class Unknown(nn.Module):
    """Holds an operation that Core ML has nothing for."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.special.erfcx(self.conv(x)).mean((2, 3)))


def two_layers() -> nn.Module:
    """A convolution and a linear layer."""
    pool, flat = nn.AdaptiveAvgPool2d(4), nn.Flatten()
    layers = {"conv": nn.Conv2d(3, 256, 3), "pool": pool, "flat": flat, "fc": nn.Linear(4096, 10)}
    return nn.Sequential(OrderedDict(layers))
