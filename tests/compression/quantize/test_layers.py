"""Laws of layers whose weight is a codebook and codes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from src.compression.quantize.layers import QuantizedLayer, set_memory_format
from src.compression.quantize.subvectors import from_subvectors
from tests.support.helpers import quantized_layer

LAYERS = [
    (nn.Conv2d(4, 6, 3), 9),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), 18),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2), 9),
    (nn.Conv2d(4, 6, 3, padding="valid"), 9),
    (nn.Conv2d(4, 6, 3, padding=(2, 1), groups=2), 18),
    (nn.Conv2d(4, 8, 3, padding=1, groups=4), 9),
    (nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), 3),
    (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=(2, 1)), 6),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 9),
    (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), 9),
    (nn.Conv2d(4, 6, (1, 3), padding="same", padding_mode="replicate"), 3),
    (nn.Conv2d(4, 6, 1), 4),
    (nn.ConvTranspose2d(4, 6, 3), 9),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False), 18),
    (nn.ConvTranspose2d(4, 6, (2, 3), stride=2, dilation=(1, 2), groups=2), 6),
    (nn.Linear(12, 5), 4),
    (nn.Linear(12, 5, bias=False), 3),
]
each_layer = pytest.mark.parametrize(("dense", "d"), LAYERS, ids=[f"{layer}".replace(" ", "") for layer, _ in LAYERS])
K = 8


def make(
    dense: nn.Module, d: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[QuantizedLayer, nn.Module]:
    """A quantized layer with random codes and codebook (16-bit values), and the dense layer with the same weight; in
    eval mode."""
    draw = torch.Generator().manual_seed(seed)
    dense = copy.deepcopy(dense).to(dtype).eval()
    layer = quantized_layer(copy.deepcopy(dense), d, K)
    codebook = torch.randn(K, d, generator=draw).half().to(dtype)
    codes = torch.randint(K, (layer.codes_matrix.numel(),), generator=draw)
    layer.set_codes(codebook, codes)
    with torch.no_grad():
        dense.weight.copy_(from_subvectors(codebook[codes], dense.weight.shape))
    return layer, dense


def an_input(dense: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (3, 12) if isinstance(dense, nn.Linear) else (2, 4, 7, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_coded_layer_computes_what_the_dense_layer_with_the_decoded_weight_computes(
    dense, d: int, dtype: torch.dtype
) -> None:
    layer, wanted = make(dense, d, dtype=dtype)
    x = an_input(dense, dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted(x))
        layer.train()
        assert torch.equal(layer(x), wanted(x))
        assert layer(x).dtype == dtype
    assert torch.equal(layer.dequantize(), wanted.weight)


def test_a_transposed_convolution_takes_an_output_size() -> None:
    layer, dense = make(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), 9)
    x = an_input(dense)
    for size in ([13, 15], [14, 16], [13, 16]):
        with torch.no_grad():
            assert torch.equal(layer(x, output_size=size), dense(x, output_size=size))
            assert list(layer(x, output_size=size).shape[2:]) == size


@each_layer
@pytest.mark.parametrize("training", [True, False])
def test_the_codebooks_gradient_is_that_of_looking_the_codes_up(dense, d: int, training: bool) -> None:
    layer, wanted = make(dense, d, dtype=torch.float64)
    layer.train(training)
    x = an_input(dense, torch.float64)
    layer(x).square().sum().backward()
    codebook = layer.codebook.detach().clone().requires_grad_()
    weight = codebook.index_select(0, layer.codes_matrix.flatten().long()).reshape(wanted.weight.shape)
    torch.func.functional_call(wanted, {"weight": weight}, (x,)).square().sum().backward()
    assert torch.allclose(layer.codebook.grad, codebook.grad, rtol=1e-12, atol=1e-12)
    assert float(codebook.grad.norm()) > 0


def test_the_codebooks_gradient_is_that_of_finite_differences() -> None:
    layer, _ = make(nn.Conv2d(2, 3, 2), 4, dtype=torch.float64)
    layer.train()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda c: torch.func.functional_call(layer, {"codebook": c}, (x,)), (layer.codebook,)
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_follows_codes_that_were_replaced_after_a_step(training: bool) -> None:
    layer, dense = make(nn.Linear(12, 5), 4, dtype=torch.float64)
    other, _ = make(dense, 4, seed=5, dtype=torch.float64)
    x = an_input(dense, torch.float64)
    layer.train(training)
    replacements: list[Callable[[], object]] = [
        lambda: None,
        lambda: layer.set_codes(layer.codebook.detach(), (layer.codes_matrix + 1) % K),
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: layer.load_state_dict(
            {**other.state_dict(), "codes_matrix": (other.codes_matrix + 3) % K}, assign=True
        ),
    ]
    for replace in replacements:
        replace()
        layer.codebook.grad = None
        layer(x).sum().backward()
        wanted = torch.zeros(K, 4, dtype=torch.float64)
        wanted.index_add_(0, layer.codes_matrix.flatten().long(), x.sum(0).repeat(5, 1).reshape(-1, 4))
        assert torch.allclose(layer.codebook.grad, wanted, rtol=1e-12)


def test_a_gradient_in_half_precision_keeps_its_small_terms() -> None:
    layer, _ = make(nn.Linear(4, 5000, bias=False), 4, dtype=torch.float16)
    layer.set_codes(layer.codebook.detach(), torch.zeros(5000))
    layer.train()
    layer(torch.ones(1, 4, dtype=torch.float16)).sum().backward()
    # 5,000 ones; added up in 16 bits they would stop at 2,048
    assert layer.codebook.grad[0].tolist() == [5000] * 4


@each_layer
def test_only_codebook_and_bias_are_parameters_and_codes_are_a_saved_buffer(dense, d: int) -> None:
    layer, wanted = make(dense, d)
    has_bias = wanted.bias is not None
    assert sorted(name for name, _ in layer.named_parameters()) == (["bias", "codebook"] if has_bias else ["codebook"])
    assert [name for name, _ in layer.named_buffers()] == ["codes_matrix"]
    assert sorted(layer.state_dict()) == sorted(["codebook", "codes_matrix"] + ["bias"] * has_bias)
    assert layer.codes_matrix.shape == (wanted.weight.shape[0], wanted.weight[0].numel() // d)
    assert (layer.k, layer.d) == (K, d)


def test_the_bias_stays_the_same_parameter_and_frozen_stays_frozen() -> None:
    dense = nn.Linear(8, 4)
    dense.weight.requires_grad_(False)
    layer = quantized_layer(dense, 4, 2)
    assert layer.bias is dense.bias
    assert not layer.codebook.requires_grad
    assert quantized_layer(nn.Linear(8, 4), 4, 2).codebook.requires_grad


def test_eval_keeps_the_decoded_weight_where_no_gradient_is_needed() -> None:
    layer, _ = make(nn.Conv2d(4, 6, 3), 9)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert layer.weight is layer.weight
    layer.train()
    with torch.no_grad():
        assert layer.weight is not layer.weight


def step(layer: QuantizedLayer) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer.codebook.grad = torch.ones_like(layer.codebook)
    optimizer.step()


def fused_step(layer: QuantizedLayer) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.5, fused=True)
    layer(an_input(nn.Conv2d(4, 6, 3))).sum().backward()
    optimizer.step()


def load(layer: QuantizedLayer) -> None:
    state = make(nn.Conv2d(4, 6, 3), 9, seed=5)[0].state_dict()
    layer.load_state_dict(state)


def load_by_assignment(layer: QuantizedLayer) -> None:
    state = make(nn.Conv2d(4, 6, 3), 9, seed=5)[0].state_dict()
    layer.load_state_dict(state, assign=True)


def load_in_inference_mode(layer: QuantizedLayer) -> None:
    with torch.inference_mode():
        load(layer)


def new_codes(layer: QuantizedLayer) -> None:
    layer.set_codes(layer.codebook.detach(), (layer.codes_matrix + 1) % K)


def codes_in_place(layer: QuantizedLayer) -> None:
    layer.codes_matrix.copy_((layer.codes_matrix + 1) % K)


def new_codebook_in_inference_mode(layer: QuantizedLayer) -> None:
    with torch.inference_mode():
        layer.set_codes(layer.codebook + 1, layer.codes_matrix)


def to_double(layer: QuantizedLayer) -> None:
    layer.to(torch.float64)


def to_half_and_step(layer: QuantizedLayer) -> None:
    layer.half()
    step(layer)


CHANGES = [
    step, fused_step, load, load_by_assignment, load_in_inference_mode, new_codes, codes_in_place,
    new_codebook_in_inference_mode,
    to_double, to_half_and_step,
]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_eval_notices_every_change(change, mode) -> None:
    layer, _ = make(nn.Conv2d(4, 6, 3), 9)
    with mode():
        old = layer.weight
    change(layer)
    with mode():
        now = layer.weight
        half = layer.codebook.half().to(layer.codebook.dtype)
        assert torch.equal(now, half[layer.codes_matrix.flatten()].reshape(6, 4, 3, 3))
        assert now.dtype == layer.codebook.dtype
        assert now.dtype != old.dtype or not torch.equal(now, old)


def test_inference_mode_and_training_can_follow_each_other() -> None:
    layer, _ = make(nn.Conv2d(4, 6, 3), 9)
    x = an_input(nn.Conv2d(4, 6, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        layer.eval()
        with torch.inference_mode():
            losses.append(float(layer(x).square().mean()))
        with torch.no_grad():
            assert float(layer(x).square().mean()) == losses[-1]
        layer.train()
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


def test_a_layer_made_in_inference_mode_works_there() -> None:
    with torch.inference_mode():
        layer, dense = make(nn.Linear(12, 5), 4)
        x = an_input(dense)
        assert torch.equal(layer(x), dense(x))
        assert torch.equal(layer(x), dense(x))


def test_every_training_step_sees_the_codebook_of_the_step_before() -> None:
    layer, dense = make(nn.Linear(12, 5), 4, dtype=torch.float64)
    layer.train()
    x = an_input(dense, torch.float64)
    codes = layer.codes_matrix.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    codebook, bias = layer.codebook.detach().clone(), layer.bias.detach().clone()
    for _ in range(4):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        # the same step by hand: y = x W^T + b, d|y|^2/dW = 2 y^T x
        y = x @ codebook[codes.flatten()].reshape(5, 12).T + bias
        gradient = torch.zeros_like(codebook).index_add_(0, codes.flatten().long(), (2 * y.T @ x).reshape(-1, 4))
        codebook, bias = codebook - 0.05 * gradient, bias - 0.05 * 2 * y.sum(0)
        assert torch.allclose(layer.codebook, codebook, rtol=1e-9)
        assert torch.allclose(layer.bias, bias, rtol=1e-9)
    assert torch.equal(layer.codes_matrix, codes)


def test_eval_with_gradients_computes_the_stored_weight_and_gives_gradients() -> None:
    layer, dense = make(nn.Linear(12, 5), 4)
    with torch.no_grad():
        layer.codebook.add_(1e-5)  # below the resolution of 16 bits
    x = an_input(dense)
    layer.eval()
    found = layer(x)
    with torch.no_grad():
        assert torch.equal(found.detach(), layer(x))
        assert not torch.equal(found.detach(), layer.train()(x))
    found.sum().backward()
    assert float(layer.codebook.grad.abs().sum()) > 0


@each_layer
def test_deepcopy_and_state_dict_round_trip(dense, d: int) -> None:
    layer, _ = make(dense, d)
    x = an_input(dense)
    with torch.no_grad():
        wanted = layer(x)  # a kept weight must not stop a copy
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(x), wanted)
        copied.codebook.add_(1)
        assert not torch.equal(copied(x), wanted)
        assert torch.equal(layer(x), wanted)
        fresh, _ = make(dense, d, seed=9)
        if layer.bias is not None:
            fresh.bias.add_(1)
        assert not torch.equal(fresh(x), wanted)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), wanted)


def test_a_whole_layer_can_be_pickled() -> None:
    layer, dense = make(nn.Conv2d(4, 6, 3), 9)
    x = an_input(dense)
    with torch.no_grad():
        wanted = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), wanted)


@each_layer
def test_channels_last_gives_the_same_output(dense, d: int) -> None:
    layer, wanted = make(dense, d, dtype=torch.float64)
    x = an_input(dense, torch.float64)
    set_memory_format(layer, True)
    for training in (False, True):
        layer.train(training)
        with torch.no_grad():
            # another kernel may add in another order; float64
            assert torch.allclose(layer(x), wanted(x), rtol=1e-12, atol=1e-12)
            if layer.weight.dim() == 4:
                assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    set_memory_format(layer, False)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted(x))
        assert layer.weight.is_contiguous()


def test_codes_and_codebooks_that_do_not_fit_are_refused() -> None:
    layer, _ = make(nn.Linear(12, 5), 4)
    good, codes = layer.codebook.detach().clone(), layer.codes_matrix.clone()
    for codebook, wrong in ((good[:4], codes), (good, codes[:2]), (good, codes + K), (good, codes - K)):
        with pytest.raises(ValueError, match="codes"):
            layer.set_codes(codebook, wrong)
    assert torch.equal(layer.codes_matrix, codes)
    with pytest.raises(ValueError, match="does not divide"):
        quantized_layer(nn.Linear(10, 5), 4, 8)
    with pytest.raises(ValueError, match="power of two"):
        quantized_layer(nn.Linear(8, 5), 4, 6)


def test_autocast_gives_gradients_in_the_codebooks_own_precision() -> None:
    layer, dense = make(nn.Conv2d(4, 6, 3), 9)
    layer.train()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(an_input(dense))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.codebook.grad.dtype == torch.float32
    assert torch.isfinite(layer.codebook.grad).all()
