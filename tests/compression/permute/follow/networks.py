"""Tiny networks, each with one thing that channels can go through."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.compression.permute.channels import ChannelGroup


class Net(nn.Module):
    """Layers by name, and how they are put together."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._through = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._through(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **settings)


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def attention(net: Net, x: Tensor) -> Tensor:
    """(B, N, 12) with 3 heads of 4 channels."""
    b, n, _ = x.shape
    q, k, v = net.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    return net.out((scores @ v).transpose(1, 2).reshape(b, n, 12))


def fused_attention(net: Net, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = net.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4)
    return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 12))


def biased_attention(net: Net, x: Tensor) -> Tensor:
    """As above; each head adds positions of its own to the scores."""
    b, n, _ = x.shape
    q, k, v = net.qkv(x).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    at = torch.arange(n)[:, None] - torch.arange(n) + n - 1
    bias = net.table[at.reshape(-1)].view(n, n, 3).permute(2, 0, 1)
    scores = (q @ k.transpose(-2, -1) + bias).softmax(-1)
    return net.out((scores @ v).transpose(1, 2).reshape(b, n, 12))


GRID = torch.tensor([[abs(a // 2 - b // 2) * 2 + abs(a % 2 - b % 2) for b in range(4)] for a in range(4)])
"""Number of the offset (rows, columns) between any two positions of a 2 x 2 map."""


def attention_on_a_grid(net: Net, x: Tensor) -> Tensor:
    """Heads with a bias for every offset. Offsets by a row and by a column stand at as many places, yet differ."""
    b = x.shape[0]
    q, k, v = net.qkv(x[:, :4]).reshape(b, 4, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1) + net.table[:, GRID]).softmax(-1)
    return net.out((scores @ v).transpose(1, 2).reshape(b, 4, 12))


def squeezed(net: Net, x: Tensor) -> Tensor:
    x = net.a(x)
    gate = net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))).sigmoid()
    return net.b(x * gate)


def chosen(net: Net, x: Tensor) -> Tensor:
    """The channels that are read depend on the input."""
    x = net.a(x)
    order = x.mean((0, 2, 3)).argsort()
    return net.b(x[:, order])


def written(net: Net, x: Tensor) -> Tensor:
    """One half of the rows of a map goes through a second layer."""
    x = net.a(x)
    total = torch.zeros_like(x)
    total[:, :, :2] = x[:, :, :2]
    total[:, :, 2:] = net.b(x[:, :, 2:])
    return net.c(total)


Expected = set[tuple[int, int, str, str]]
"""(channels, blocks, parents, children)."""

MAP, TOKENS = (2, 3, 6, 6), (2, 5, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Expected]] = {
    "a chain": (
        lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)),
        MAP,
        {(8, 1, "0 1", "3")},
    ),
    "a residual": (
        lambda: Net(lambda m, x: m.c((y := m.a(x)) + m.b(F.relu(y))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)),
        MAP,
        {(8, 1, "a b", "b c")},
    ),
    "concatenation": (
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 8), b=conv(3, 6), c=conv(14, 4)),
        MAP,
        {(8, 1, "a", "c"), (6, 1, "b", "c")},
    ),
    "split": (
        lambda: Net(lambda m, x: m.b((y := m.a(x))[:, :6]) + m.c(y[:, 6:]), a=conv(3, 8), b=conv(6, 4), c=conv(2, 4)),
        MAP,
        {(6, 1, "a", "b"), (2, 1, "a", "c")},
    ),
    "channel shuffle": (
        lambda: Net(lambda m, x: m.b(shuffled(m.a(x), 2)), a=conv(3, 8), b=conv(8, 4)),
        MAP,
        {(8, 1, "a", "b")},
    ),
    "depthwise": (
        lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=8), nn.PReLU(8), conv(8, 4)),
        MAP,
        {(8, 1, "0 1 2", "3")},
    ),
    "depthwise with two rows per channel": (
        lambda: nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 4)),
        MAP,
        {(4, 1, "0 1", "2")},
    ),
    "grouped": (
        lambda: nn.Sequential(conv(3, 12), conv(12, 6, groups=3), conv(6, 4)),
        MAP,
        {(12, 3, "0", "1"), (6, 3, "1", "2"), (3, 1, "0 1", "2")},
    ),
    "transposed": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2), conv(6, 4)),
        MAP,
        {(8, 1, "0", "1"), (6, 1, "1", "2")},
    ),
    "transposed and grouped": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), conv(6, 4)),
        MAP,
        {(8, 2, "0", "1"), (6, 2, "1", "2"), (2, 1, "0 1", "1 2")},
    ),
    "pooling, flattening, linear": (
        lambda: nn.Sequential(conv(3, 8), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 2)),
        MAP,
        {(8, 1, "0", "3"), (5, 1, "3", "5")},
    ),
    "squeeze and excite": (
        lambda: Net(squeezed, a=conv(3, 8), down=conv(8, 5, 1), up=conv(5, 8, 1), b=conv(8, 4)),
        MAP,
        {(8, 1, "a up", "b down"), (5, 1, "down", "up")},
    ),
    "gated": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Linear(8, 3)),
        TOKENS,
        {(8, 1, "0", "2")},
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
        TOKENS,
        {(8, 1, "0 1", "2")},
    ),
    "group norm": (
        lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 4)),
        MAP,
        {(8, 2, "0 1", "2"), (2, 1, "0 1", "2")},
    ),
    "instance norm": (
        lambda: nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), conv(8, 4)),
        MAP,
        {(8, 1, "0 1", "2")},
    ),
    "heads": (
        lambda: Net(attention, qkv=nn.Linear(6, 36), out=nn.Linear(12, 6)),
        TOKENS,
        {(12, 3, "qkv", ""), (12, 3, "qkv", "out"), (3, 1, "qkv", "out")},
    ),
    "heads, fused": (
        lambda: Net(fused_attention, qkv=nn.Linear(6, 36), out=nn.Linear(12, 6)),
        TOKENS,
        {(12, 3, "qkv", ""), (12, 3, "qkv", "out"), (3, 1, "qkv", "out")},
    ),
    "heads with a bias of their own": (
        lambda: Net(
            biased_attention, qkv=nn.Linear(6, 36), out=nn.Linear(12, 6), table=nn.Parameter(torch.randn(9, 3))
        ),
        TOKENS,
        {(12, 3, "qkv", ""), (12, 3, "qkv", "out"), (3, 1, "qkv table", "out")},
    ),
    "heads with a bias for each offset on a grid": (
        lambda: Net(
            attention_on_a_grid, qkv=nn.Linear(6, 36), out=nn.Linear(12, 6), table=nn.Parameter(torch.randn(3, 4))
        ),
        TOKENS,
        {(12, 3, "qkv", ""), (12, 3, "qkv", "out"), (3, 1, "qkv table", "out")},
    ),
    "grouped, the weight computed from another": (
        lambda: nn.Sequential(conv(3, 12), nn.utils.parametrizations.weight_norm(conv(12, 6, groups=3)), conv(6, 4)),
        MAP,
        {
            (12, 3, "0", "1.parametrizations.weight"),
            (6, 3, "1 1.parametrizations.weight", "2"),
            (3, 1, "0 1 1.parametrizations.weight", "2"),
        },
    ),
    "a transformer's layer": (
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.TransformerEncoderLayer(12, 3, 7, batch_first=True), nn.Linear(12, 2)
        ),
        TOKENS,
        {
            (12, 1, "0 1.linear2 1.norm1 1.norm2 1.self_attn.out_proj", "1.linear1 1.self_attn 2"),
            (12, 3, "1.self_attn", ""),
            (12, 3, "1.self_attn", "1.self_attn.out_proj"),
            (3, 1, "1.self_attn", "1.self_attn.out_proj"),
            (7, 1, "1.linear1", "1.linear2"),
        },
    ),
    "padding of channels": (
        lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 0, 2))), a=conv(3, 8), b=conv(10, 4)),
        MAP,
        {(8, 1, "a", "b")},
    ),
    "unflattening": (
        lambda: nn.Sequential(nn.Linear(5, 32), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 3, 2)),
        (2, 5),
        {(8, 1, "0", "2")},
    ),
    "written in two parts": (
        lambda: Net(written, a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)),
        MAP,
        {(8, 1, "a b", "b c")},
    ),
    "a tied weight": (lambda: tied(), TOKENS, {(8, 1, "a b", "b d")}),
    "an embedding": (
        lambda: Net(lambda m, x: m.out(m.table(x.argmax(-1))), table=nn.Embedding(6, 8), out=nn.Linear(8, 3)),
        TOKENS,
        {(8, 1, "table", "out")},
    ),
    "weights that are computed": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Linear(8, 3)),
        TOKENS,
        {(8, 1, "0 0.parametrizations.weight", "1")},
    ),
    "the product of two outputs": (
        lambda: Net(lambda m, x: m.a(x) @ m.b(x).transpose(1, 2), a=nn.Linear(6, 8), b=nn.Linear(6, 8)),
        TOKENS,
        {(8, 1, "a b", "")},
    ),
    "an order that depends on data": (lambda: Net(chosen, a=conv(3, 8), b=conv(8, 4)), MAP, set()),
    "positions told apart by a constant": (
        lambda: Net(lambda m, x: m.b(m.a(x) * torch.arange(8.0)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)),
        TOKENS,
        set(),
    ),
    "a running sum": (
        lambda: Net(lambda m, x: m.b(m.a(x).cumsum(-1)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)),
        TOKENS,
        set(),
    ),
    "an output": (lambda: nn.Sequential(nn.Linear(6, 8)), TOKENS, set()),
}


def tied() -> nn.Module:
    """b and c are one weight, so their outputs and inputs are the same channels."""
    net = Net(lambda m, x: m.d(m.c(F.relu(m.b(F.relu(m.a(x)))))), a=nn.Linear(6, 8), b=nn.Linear(8, 8, bias=False),
              c=nn.Linear(8, 8, bias=False), d=nn.Linear(8, 2))  # fmt: skip
    net.c.weight = net.b.weight
    return net


def described(groups: list[ChannelGroup]) -> Expected:
    """Names in alphabetical order; of parameters of the network itself, their own."""

    def names(group: ChannelGroup, reads: bool) -> str:
        tensors = [place.tensor for place in group.places if place.reads == reads]
        return " ".join(sorted({tensor.rpartition(".")[0] or tensor for tensor in tensors}))

    return {(group.width, group.n_blocks, names(group, False), names(group, True)) for group in groups}
