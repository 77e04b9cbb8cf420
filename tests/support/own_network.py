"""A user's own network, which no registry knows: built by `tests.support.own_network:Net`."""

from __future__ import annotations

from torch import Tensor, nn


class Net(nn.Module):
    """Convolutions with batch norms, attention over the positions, and a linear layer."""

    def __init__(self, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 1),
            nn.BatchNorm2d(2 * width, eps=1e-3),
            nn.ReLU(),
        )
        self.attention = nn.MultiheadAttention(2 * width, 2, batch_first=True)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def fixed() -> nn.Module:
    """One whose number of classes nobody can choose."""
    return Net(num_classes=7)


def broken() -> nn.Module:
    """One that cannot be built."""
    raise RuntimeError("no weights of any kind")


def nothing() -> object:
    """Not a network."""
    return "text"


def of_width(width: int) -> nn.Module:
    """One that wants other arguments than a number of classes."""
    return Net(width=width)
