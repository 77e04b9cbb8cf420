"""Small networks, each with something that exporters of ONNX graphs stumble over."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pooled(nn.Module):
    """Average pooling into 3 x 5 places, which no side of an image need be a multiple of."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d((3, 5))
        self.head = nn.Linear(16 * 15, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(F.relu(self.conv(x))).flatten(1))


class Maps(nn.Module):
    """A dict with an auxiliary output; transposed, grouped and depthwise convolutions."""

    def __init__(self, num_classes: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.up = nn.ConvTranspose2d(32, num_classes, 2, stride=2)
        self.beside = nn.Conv2d(16, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = F.relu(self.conv(x))
        deep = F.relu(self.depthwise(F.relu(self.grouped(first))))
        return {"out": self.up(deep), "aux": self.beside(first)}


class Tied(nn.Module):
    """Attention over a sequence and a recurrent layer; a weight with two names; a tuple."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 4, stride=4)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.lstm = nn.LSTM(32, 16, batch_first=True)
        self.first, self.again = nn.Linear(32, 32), nn.Linear(32, 32)
        self.again.weight = self.first.weight
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.again(F.relu(self.first(x)))
        sequence, _ = self.lstm(x)
        return self.head(sequence[:, -1]), x


class Branching(nn.Module):
    """Python code that looks at the size: a graph follows the one branch that was traced."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.shape[2] > 64:
            x = x * 0.5
        return self.head(x.mean((2, 3)))


class OneSize(nn.Module):
    """A linear layer that fits images of one size."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.head = nn.Linear(16 * 64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


class Unknown(nn.Module):
    """An operation that ONNX does not have."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(torch.special.bessel_j0(x))
