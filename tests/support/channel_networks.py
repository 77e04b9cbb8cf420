"""Small networks whose channels a name of a layer cannot describe, with their groups of channels written by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from src.compression.permute.channels import ChannelGroup, Places

NORM = ("weight", "bias", "running_mean", "running_var")


def rows(tensor: str, channels: range | Tensor, of: int, rank: int = 4, reads: bool = False) -> Places:
    """Channels that are rows of a tensor of `of` rows."""
    return Places(tensor, (of, *[1] * (rank - 1)), column_of(channels), reads)


def columns(tensor: str, channels: range | Tensor, of: int, rank: int = 4, reads: bool = True) -> Places:
    """Channels that are positions of the second axis, which has `of`."""
    return Places(tensor, (1, of, *[1] * (rank - 2)), column_of(channels), reads)


def column_of(channels: range | Tensor) -> Tensor:
    return torch.tensor(list(channels))[:, None] if isinstance(channels, range) else channels[:, None]


def norm(name: str, channels: range, of: int) -> list[Places]:
    return [rows(f"{name}.{leaf}", channels, of, rank=1) for leaf in NORM]


class DenseBlock(nn.Module):
    """Each layer reads all maps before it, one behind the other (DenseNet)."""

    def __init__(self, growth: int = 8, layers: int = 3, classes: int = 5, kernel: int = 1) -> None:
        super().__init__()
        self.growth = growth
        self.stem = nn.Conv2d(3, growth, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(growth * (n + 1)) for n in range(layers))
        self.layers = nn.ModuleList(
            nn.Conv2d(growth * (n + 1), growth, kernel, padding=kernel // 2, bias=False) for n in range(layers)
        )
        self.fc = nn.Linear(growth * (layers + 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for normalise, layer in zip(self.norms, self.layers, strict=True):
            maps.append(layer(normalise(torch.cat(maps, 1)).relu()))
        return self.fc(torch.cat(maps, 1).mean((2, 3)))

    def groups(self) -> list[ChannelGroup]:
        found = []
        for n in range(len(self.layers) + 1):
            here = range(n * self.growth, (n + 1) * self.growth)
            own = range(self.growth)
            name = "stem" if n == 0 else f"layers.{n - 1}"
            places = [rows(f"{name}.weight", own, self.growth)]
            if n == 0:
                places.append(rows("stem.bias", own, self.growth, rank=1))
            for later in range(n, len(self.layers)):
                width = self.growth * (later + 1)
                places += norm(f"norms.{later}", here, width)
                places.append(columns(f"layers.{later}.weight", here, width))
            places.append(columns("fc.weight", here, self.fc.in_features, rank=2))
            found.append(ChannelGroup(f"maps of {name}", tuple(places)))
        return found


class Shuffled(nn.Module):
    """Two branches whose channels are mixed and parted again (ShuffleNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.branch = nn.Conv2d(16, 16, 1)
        self.left, self.right = nn.Conv2d(16, 6, 1), nn.Conv2d(16, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mixed = nn.functional.channel_shuffle(torch.cat([x, self.branch(x.relu())], 1), 2)
        left, right = mixed.chunk(2, 1)
        return torch.cat([self.left(left).mean((2, 3)), self.right(right).mean((2, 3))], 1)

    def groups(self) -> list[ChannelGroup]:
        found = []
        for half, side in enumerate(("left", "right")):
            here = range(half * 8, half * 8 + 8)
            for first, name in enumerate(("stem", "branch")):
                places = [rows(f"{name}.weight", here, 16), rows(f"{name}.bias", here, 16, rank=1)]
                if first == 0:
                    places.append(columns("branch.weight", here, 16))
                places.append(columns(f"{side}.weight", range(first, 16, 2), 16))
                found.append(ChannelGroup(f"{name}, read by {side}", tuple(places)))
        return found


class Attention(nn.Module):
    """Channels between two linear layers, and those within each head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 6)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(2).transpose(1, 2))
        return self.last(self.attention(x, x, x, need_weights=False)[0])

    def groups(self) -> list[ChannelGroup]:
        all16 = range(16)
        weight, bias = "attention.in_proj_weight", "attention.in_proj_bias"
        out = "attention.out_proj"
        both = torch.stack([torch.arange(16), torch.arange(16, 32)], 1)  # of a query and of a key
        return [
            ChannelGroup(
                "into the attention",
                (
                    rows("first.weight", all16, 16, rank=2),
                    rows("first.bias", all16, 16, rank=1),
                    columns(weight, all16, 16, rank=2),
                ),
            ),
            ChannelGroup(
                "queries and keys", (Places(weight, (48, 1), both, False), Places(bias, (48,), both, False)), 2
            ),
            ChannelGroup(
                "values",
                (
                    rows(weight, range(32, 48), 48, rank=2),
                    rows(bias, range(32, 48), 48, rank=1),
                    columns(f"{out}.weight", all16, 16, rank=2),
                ),
                2,
            ),
            ChannelGroup(
                "out of the attention",
                (
                    rows(f"{out}.weight", all16, 16, rank=2),
                    rows(f"{out}.bias", all16, 16, rank=1),
                    columns("last.weight", all16, 16, rank=2),
                ),
            ),
        ]


def of_blocks(tensor: str, n_rows: int, per_row: int, n_blocks: int) -> Places:
    """The inputs of a convolution with groups: each block of rows reads channels of its own."""
    row = torch.arange(n_rows).reshape(n_blocks, 1, -1)
    positions = row * per_row + torch.arange(per_row)[None, :, None]
    return Places(tensor, (n_rows, per_row, 1, 1), positions.reshape(n_blocks * per_row, -1), True)


class Blocks(nn.Sequential):
    """Convolutions with groups of 4 and of 2 blocks (ResNeXt), and one that reads them."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.ReLU())
        self.extend([nn.Conv2d(16, 12, 1, groups=2), nn.ReLU(), nn.Conv2d(12, 6, 1)])

    def groups(self) -> list[ChannelGroup]:
        first = (rows("0.weight", range(16), 16), rows("0.bias", range(16), 16, rank=1))
        second = (rows("2.weight", range(16), 16), rows("2.bias", range(16), 16, rank=1))
        third = (rows("4.weight", range(12), 12), rows("4.bias", range(12), 12, rank=1))
        return [
            ChannelGroup("into 4 blocks", (*first, of_blocks("2.weight", 16, 4, 4)), 4),
            ChannelGroup("from 4 blocks into 2", (*second, of_blocks("4.weight", 12, 8, 2)), 4),
            ChannelGroup("from 2 blocks", (*third, columns("6.weight", range(12), 12)), 2),
        ]


class Transposed(nn.Sequential):
    """A transposed convolution, whose outputs are the second axis of its weight."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 1, stride=2), nn.ReLU())
        self.append(nn.Conv2d(12, 6, 1))

    def groups(self) -> list[ChannelGroup]:
        first = (rows("0.weight", range(8), 8), rows("0.bias", range(8), 8, rank=1))
        second = (columns("2.weight", range(12), 12, reads=False), rows("2.bias", range(12), 12, rank=1))
        return [
            ChannelGroup("into the transposed one", (*first, rows("2.weight", range(8), 8, reads=True))),
            ChannelGroup("out of it", (*second, columns("4.weight", range(12), 12))),
        ]


class Flattened(nn.Sequential):
    """A map of two by three is flattened in front of a linear layer, behind which channels are read twice."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(48, 8))
        self.last = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:5]:
            x = layer(x)
        return self.last(torch.cat([x.relu(), (-x).relu()], 1))

    def groups(self) -> list[ChannelGroup]:
        flat = Places("4.weight", (1, 48), torch.arange(48).reshape(8, 6), True)
        twice = Places("last.weight", (1, 16), torch.stack([torch.arange(8), torch.arange(8, 16)], 1), True)
        own = (rows("4.weight", range(8), 8, rank=2), rows("4.bias", range(8), 8, rank=1))
        return [
            ChannelGroup("flattened", (rows("0.weight", range(8), 8), rows("0.bias", range(8), 8, rank=1), flat)),
            ChannelGroup("read twice", (*own, twice)),
        ]


NETWORKS = {kind.__name__: kind for kind in (DenseBlock, Shuffled, Attention, Blocks, Transposed, Flattened)}
SCORED = {
    "DenseBlock": [
        ["layers.0", "layers.1", "layers.2", "fc"],
        ["layers.1", "layers.2", "fc"],
        ["layers.2", "fc"],
        ["fc"],
    ],
    "Shuffled": [["branch", "left"], ["left"], ["branch", "right"], ["right"]],
    "Attention": [["attention.in_proj_weight"], [], ["attention.out_proj"], ["last"]],
    "Blocks": [["2"], ["4"], ["6"]],
    "Transposed": [[], ["2", "4"]],
    "Flattened": [["4"], ["last"]],
}
"""The weights of each group whose subvectors depend on its permutation, for d = 4, and 18 for 3x3 kernels."""


def below(group: ChannelGroup, prefix: str) -> ChannelGroup:
    """The same group in a network of which its own is a part."""
    places = tuple(replace(place, tensor=f"{prefix}.{place.tensor}") for place in group.places)
    return replace(group, label=f"{prefix}: {group.label}", places=places)


def correlated(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights whose columns are of unequal size and alike in pairs that do not stand together: something to gain."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.shape[1] > 3:
                size = torch.rand(1, parameter.shape[1], *[1] * (parameter.dim() - 2), generator=draw) * 2 + 0.2
                value = torch.randn(parameter.shape, generator=draw) * size
                parameter.copy_((value + 0.8 * value.roll(parameter.shape[1] // 2, 1)).to(parameter.dtype) * 0.3)
    return model
