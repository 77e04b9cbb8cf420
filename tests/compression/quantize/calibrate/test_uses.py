"""A weight is found wherever a pass multiplies with it, with the inputs that make its outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.compression.quantize.calibrate.layout import layout_of
from src.compression.quantize.calibrate.passes import inspectable
from src.compression.quantize.calibrate.uses import Use, Watcher

CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 8, 3, groups=2, padding="same"), (3, 4, 6, 6)),
    (nn.Conv2d(6, 6, 3, groups=6, stride=2), (2, 6, 9, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    (nn.Conv2d(4, 6, 2, padding="same"), (2, 4, 6, 6)),
    (nn.Conv1d(4, 6, 5, stride=3, padding=2), (2, 4, 17)),
    (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 5, 6)),
    (nn.ConvTranspose1d(3, 5, 4, stride=3, padding=3, dilation=2), (2, 3, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda one: str(one).replace(" ", ""))
def test_windows_times_weight_are_the_outputs(layer: Any, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[Use, Tensor]] = []
    layer = layer.to(memory_format=torch.channels_last) if len(shape) == 4 else layer

    def used(use: Use) -> None:
        seen.append((use, use.at(torch.arange(use.n_places))))

    with inspectable(), Watcher([("layer", layer.weight)], used):
        outputs = layer(inputs) - layer.bias.view(-1, *[1] * (len(shape) - 2))
    ((use, windows),) = seen
    layout = layout_of(layer.weight.shape, 1, use.groups, use.transposed)
    assert layout is not None
    weight = layer.weight.detach().reshape(-1, 1)[layout].flatten(2)
    assert windows.shape == (use.groups, use.n_places, use.n_columns)
    found = (windows @ weight.transpose(1, 2)).transpose(0, 1).flatten(1)  # (places, outputs)
    assert torch.allclose(found, outputs.transpose(0, 1).flatten(1).T, atol=1e-5)
    some = torch.tensor([0, use.n_places // 2, use.n_places - 1])
    assert torch.equal(use.at(some), windows[:, some])


def uses_of(module: nn.Module, weight: Tensor, *inputs: Tensor) -> list[Use]:
    found: list[Use] = []
    with inspectable(), Watcher([("w", weight)], found.append):
        module.eval()(*inputs)
    return found


def test_attention_shows_which_rows_have_which_inputs() -> None:
    q, k, v = torch.randn(3, 2, 5, 8).unbind(0)
    attention: Any = nn.MultiheadAttention(8, 2, batch_first=True)
    whole = uses_of(attention, attention.in_proj_weight, q, q, q)
    assert [(use.start, use.stop) for use in whole] == [(0, 24)]
    own = uses_of(attention, attention.in_proj_weight, q, k, k)
    assert [(use.start, use.stop) for use in own] == [(0, 8), (8, 24)]
    each = uses_of(attention, attention.in_proj_weight, q, k, v)
    assert [(use.start, use.stop) for use in each] == [(0, 8), (8, 16), (16, 24)]
    assert torch.equal(each[2].inputs.view(5, 2, 8).transpose(0, 1), v)
    (out,) = uses_of(attention, attention.out_proj.weight, q, k, v)
    assert out.inputs.shape == (10, 8)
    other: Any = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    for name, n in (("q_proj_weight", 8), ("k_proj_weight", 6), ("v_proj_weight", 4)):
        (use,) = uses_of(other, getattr(other, name), q, k[..., :6], v[..., :4])
        assert use.n_columns == n


def test_a_fused_transformer_layer_is_seen_inside() -> None:
    layer: Any = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for weight in (layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight, layer.linear1.weight):
        assert len(uses_of(layer, weight, torch.randn(2, 5, 8))) == 1


def test_weights_are_known_by_their_storage_not_by_a_module() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Conv2d(3, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.first.weight[1:3]) + (x @ self.first.weight.T)[..., :2]

    net = Own()
    assert [(use.start, use.stop) for use in uses_of(net, net.first.weight, torch.randn(7, 6))] == [(1, 3), (0, 4)]
    assert uses_of(net, net.second.weight, torch.randn(7, 6)) == []
    assert uses_of(nn.Linear(6, 4), net.first.weight, torch.randn(7, 6)) == []


def test_a_weight_that_another_is_computed_from_is_not_taken_for_it() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean())

    layer = Standardized(3, 4, 3)
    assert uses_of(layer, layer.weight, torch.randn(2, 3, 5, 5)) == []


def test_places_chosen_by_values_are_no_pairs() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.before(x)
            return self.after(x[x[:, 0] > 0])

    net = Choosing()
    assert [use.paired for use in uses_of(net, net.before.weight, torch.randn(20, 4))] == [True]
    assert [use.paired for use in uses_of(net, net.after.weight, torch.randn(20, 4))] == [False]
