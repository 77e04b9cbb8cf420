"""Weights of every kind of module: it stays what it was, and computes with what codebook and codes say."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.compression.quantize.compress import build_quantized
from src.compression.quantize.dequantize import dequantized_state
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import LayerSpec, make_plan
from src.compression.quantize.weights import RESERVED
from src.model_files.packed import ModelInfo, check_layers_of, load_packed, save_packed
from src.model_files.pth import read_tensors, save_compressed
from src.model_files.size import model_size
from src.model_files.state_dict import load_state
from tests.support.helpers import quantized, spec


class SamePadding(nn.Conv2d):
    """A convolution that pads by itself, as EfficientNet-Lite's do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """A convolution that computes with something else than its weight, as NFNets' do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Attention(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.recurrent = kind(8, 16, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


class Pair(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


def images(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


WORDS = torch.tensor([[1, 2, 3], [4, 0, 31]])
MODULES = {
    "Conv1d": (lambda: nn.Conv1d(4, 16, 3), images(4, 9)),
    "Conv3d": (lambda: nn.Conv3d(4, 16, (1, 2, 3)), images(4, 3, 4, 5)),
    "depthwise": (lambda: nn.Conv2d(32, 32, 3, groups=32), images(32, 6, 6)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 16, 3, stride=2), images(8, 9)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(8, 4, 2), images(8, 3, 3, 3)),
    "subclass": (lambda: SamePadding(4, 16, 3), images(4, 7, 7)),
    "standardised": (lambda: Standardised(4, 16, 3), images(4, 7, 7)),
    "Linear on a sequence": (lambda: nn.Linear(16, 16), images(5, 16)),
    "Embedding": (lambda: nn.Embedding(32, 16), WORDS),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(32, 16), WORDS),
    "Bilinear": (lambda: Pair(8, 8, 8), images(8)),
    "attention": (lambda: Attention(), images(5, 16)),
    "attention of other widths": (lambda: Attention(kdim=16, vdim=16, bias=False), images(5, 16)),
    "LSTM": (lambda: Recurrent(nn.LSTM, num_layers=2, proj_size=8), images(5, 8)),
    "GRU both ways": (lambda: Recurrent(nn.GRU, bidirectional=True), images(5, 8)),
    "GRUCell": (lambda: nn.GRUCell(8, 16), images(8)),
}
each_module = pytest.mark.parametrize("name", MODULES)


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The quantized module, the dense one with the dequantized weights, and an input; in evaluation mode."""
    make, x = MODULES[name]
    torch.manual_seed(0)
    model = quantized(make(), spec(8)).eval()
    dense = make().eval()
    dense.load_state_dict(dequantized_state(model))
    return model, dense, x


@each_module
def test_a_quantized_module_computes_what_the_dense_one_computes_with_the_dequantized_weights(name: str) -> None:
    model, dense, x = pair(name)
    assert any(isinstance(module, QuantizedLayer) for module in model.modules())
    assert model_size(model).ratio > 1.2
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            # kernels of recurrent layers and attention add in an order that depends on where weights lie; float32
            assert torch.allclose(model(x), dense(x), rtol=1e-5, atol=1e-6)
    model.train()
    model(x).square().sum().backward()
    for name, module in model.named_modules():
        # a cell without a state multiplies its second weight by zeros
        if isinstance(module, QuantizedLayer) and not name.startswith("weight_hh"):
            assert float(module.codebook.grad.abs().sum()) > 0


@each_module
def test_every_weight_of_two_axes_is_quantized_and_the_module_keeps_its_class(name: str) -> None:
    make, _ = MODULES[name]
    dense = make()
    plan = make_plan(dense, spec(8))
    assert plan.dense == ()
    model = quantized(copy.deepcopy(dense), spec(8))
    assert not [name for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith("codebook")]
    for original, module in zip(dense.modules(), [m for m in model.modules() if not _is_holder(m, model)], strict=True):
        assert isinstance(module, type(original))


def _is_holder(module: nn.Module, model: nn.Module) -> bool:
    return type(module).__name__ == "QuantizedParameter" and module is not model


@each_module
def test_copies_pickles_and_files_hold_the_same_network(name: str, tmp_path: Path) -> None:
    model, _, x = pair(name)
    wanted = model(x).detach()
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert torch.equal(loaded(x), wanted)
    assert type(loaded) is type(model)
    make, _ = MODULES[name]
    save_compressed(model, tmp_path / "model.pth")
    save_packed(model, tmp_path / "model.safetensors", ModelInfo(arch="own", num_classes=1))
    packed = load_packed(tmp_path / "model.safetensors")
    for state, plan in (
        (read_tensors(tmp_path / "model.pth"), make_plan(make(), spec(8))),
        (packed.state(), packed.plan),
    ):
        fresh = make().eval()
        check_layers_of(fresh, packed)
        fresh = build_quantized(fresh, plan)
        load_state(fresh, state, "file")
        assert torch.allclose(fresh(x), wanted, rtol=1e-5, atol=1e-6)


def test_hooks_attributes_buffers_and_a_forward_of_its_own_survive() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 12))
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[3].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0,))
    model[4].forward = lambda x: torch.zeros(x.shape[0], 12) + x.sum() * 0
    model[1].register_buffer("scale", torch.ones(3))
    model[1].register_parameter("gate", nn.Parameter(torch.ones(2)))
    model[1].tag = "mine"
    modules = list(model)
    model = quantized(model, spec(8))
    assert all(before is after for before, after in zip(modules, model, strict=True))
    model.eval()(images(3, 5, 5)).sum().backward()
    assert calls == ["forward", "backward"]
    with torch.no_grad():
        assert torch.equal(model[3](images(16)), model[3].bias.expand(2, -1))  # the input was set to zero
        assert float(model(images(3, 5, 5)).abs().max()) == 0
    assert {"1.scale", "1.gate", "1.codebook", "1.codes_matrix"} <= set(model.state_dict())
    assert model[1].tag == "mine"


def test_a_module_that_uses_the_names_of_a_quantized_layer_itself_keeps_them() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 16)
            self.k, self.members = 3, "mine"

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.k

    torch.manual_seed(0)
    dense = nn.Sequential(Own())
    assert list(make_plan(dense, spec(8)).layers) == ["0.weight"]
    model = quantized(dense, spec(8)).eval()
    assert (model[0].k, model[0].members) == (3, "mine")
    holder = model.get_submodule("0.weight_quantized")
    assert isinstance(holder, QuantizedLayer)
    x = images(16)
    with torch.no_grad():
        assert torch.equal(model(x), 3 * F.linear(x, holder.dequantize_stored(), model[0].bias))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_everything_that_a_quantized_layer_adds_is_reserved() -> None:
    public = {name for name in vars(QuantizedLayer) if not name.startswith("_")}
    assert public - {"train", "extra_repr", "weight"} <= RESERVED


def test_a_parameter_of_an_own_module_is_quantized_where_it_is_named_and_listed_where_it_is_not() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Parameter(torch.randn(64, 32))
            self.linear = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.linear.weight.sum() * x, self.proj)

    torch.manual_seed(0)
    plan = make_plan(Own(), spec(8))
    assert [(weight.name, weight.n_values) for weight in plan.dense] == [("proj", 2048)]
    assert plan.notes == (
        "proj: is a parameter of a Own, which is quantized only where layer_specs names it, left uncompressed "
        "(88.89 % of all weights)",
    )
    how = spec(8, layers={"proj": LayerSpec(subvector_size=8)})
    model = quantized(Own(), how).eval()
    assert make_plan(Own(), how).layers["proj"].d == 8
    x = images(32)
    with torch.no_grad():
        assert torch.equal(model(x), F.linear(model.linear.weight.sum() * x, model.proj_quantized.weight))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(32, 16, max_norm=1.0), "max_norm"),
        (nn.Embedding(32, 16, sparse=True), "sparse gradients"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), "what another weight is computed from"),
    ],
)
def test_what_cannot_be_quantized_is_named_with_reason_and_share(module: nn.Module, reason: str) -> None:
    plan = make_plan(nn.Sequential(module, nn.Linear(16, 32)), spec(8))
    assert list(plan.layers) == ["1"]
    assert any(reason in note and "% of all weights" in note for note in plan.notes)
    assert all(weight.name.startswith("0") for weight in plan.dense)
