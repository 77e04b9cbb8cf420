"""A quantized network in a user's own program: whatever it does with modules and weights, what is computed is what is
saved, or an error says what to do."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from src.compression.quantize.dequantize import dequantized_state
from src.compression.quantize.layers import QuantizedLayer
from src.compression.quantize.plan import LayerSpec
from src.model_files.packed import ModelInfo, save_packed
from src.model_files.pth import read_tensors, save_compressed
from tests.support.helpers import quantized, spec


class Small(nn.Module):
    """A convolution, a norm, attention over the positions, and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.linear(self.linear(x).relu()).mean(1)


def small() -> nn.Module:
    torch.manual_seed(0)
    return quantized(Small(), spec(8)).eval()


def dense_of(model: nn.Module) -> nn.Module:
    dense = Small()
    dense.load_state_dict(dequantized_state(model))
    return dense.train(model.training)


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Of float32: compiled operators and the batched ones of attention add in another order."""


class Graphs:
    """A backend for torch.compile that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        self.n += 1
        return graph.forward


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_compiling_gives_one_graph_and_recompiles_nothing(training: bool, gradients: bool) -> None:
    torch._dynamo.reset()
    model, graphs = small().train(training), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch.set_grad_enabled(gradients):
        for _ in range(4):
            wanted = copy.deepcopy(model)(X)
            found = compiled(X)
            assert torch.allclose(found, wanted, **CLOSE)
            if gradients:
                optimizer.zero_grad()
                found.square().sum().backward()
                optimizer.step()
    assert graphs.n == 1


def test_a_compiled_network_has_the_gradients_of_the_plain_one() -> None:
    torch._dynamo.reset()
    model, plain = small().train(), small().train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(X).square().sum().backward()
    plain(X).square().sum().backward()
    for (name, found), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("training", [False, True])
def test_exporting_keeps_codebooks_and_codes(training: bool) -> None:
    model = small().train(training)
    program = torch.export.export(model, (X,))
    assert {"conv.codebook", "conv.codes_matrix", "attention.in_proj_weight_quantized.codebook"} <= set(
        program.state_dict
    )
    assert not [name for name in program.state_dict if name.endswith("weight") and not name.startswith("norm")]
    with torch.no_grad():
        assert torch.allclose(program.module()(X), copy.deepcopy(model)(X), **CLOSE)


def test_tracing_and_scripting() -> None:
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8)), spec(8)).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and used all the same
        wanted = model(X)
        traced = torch.jit.trace(model, X)
        scripted = torch.jit.script(model)
        for program in (traced, scripted):
            assert torch.equal(program(X), wanted)
            assert {"0.codebook", "0.codes_matrix"} <= set(program.state_dict())
        with torch.no_grad():
            dict(traced.named_parameters())["3.codebook"].zero_()
        assert torch.equal(traced(X), model[3].bias.expand(2, -1))  # nothing was baked in


def test_symbolic_traces_and_feature_extractors() -> None:
    torch.manual_seed(0)
    model = quantized(resnet18(num_classes=4), spec(8)).eval()
    x = torch.randn(1, 3, 32, 32)
    graph = torch.fx.symbolic_trace(model)
    features = create_feature_extractor(model, {"layer2": "map", "fc": "logits"})
    for optimizer_step in (False, True):
        if optimizer_step:
            with torch.no_grad():
                model.fc.codebook.mul_(2)
                model.layer1[0].conv1.codebook.mul_(2)
        with torch.no_grad():
            wanted = model(x)
            assert torch.equal(graph(x), wanted)
            found = features(x)
            assert torch.equal(found["logits"], wanted)
            assert found["map"].shape == (1, 128, 4, 4)


def test_functions_of_parameters() -> None:
    model = small()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().sum()

    model(X).square().sum().backward()
    found = torch.func.grad(loss)(parameters, X)
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-4, atol=1e-5), name
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X[:, None])
    for name, per_image in each.items():
        assert torch.allclose(per_image.sum(0), found[name], rtol=1e-3, atol=1e-4), name

    linear = nn.Sequential(quantized(nn.Sequential(nn.Linear(16, 16)), spec(8))[0]).eval()
    own = {name: p.detach() for name, p in linear.named_parameters()}
    x = torch.randn(3, 16)
    value, slope = torch.func.jvp(
        lambda p: torch.func.functional_call(linear, p, (x,)),
        (own,),
        ({name: torch.ones_like(p) for name, p in own.items()},),
    )
    assert torch.allclose(value, linear(x), **CLOSE)
    assert torch.allclose(slope, x.sum(1, keepdim=True).expand(-1, 16) + 1, **CLOSE)  # ones in every weight and bias


def test_threads_share_a_network() -> None:
    model = small()
    inputs = [torch.randn(2, 4, 6, 6) for _ in range(8)]
    with torch.no_grad():
        wanted = [copy.deepcopy(model)(x) for x in inputs]
    wrong: list[object] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                for turn in range(6):
                    barrier.wait(timeout=60)
                    if number == 0 and turn % 2:
                        model.eval()  # drops what is kept
                    for x, y in zip(inputs, wanted, strict=True):
                        if not torch.equal(model(x), y):
                            wrong.append((number, turn))
        except Exception as error:  # for the test's own thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


WRITES: dict[str, Callable[[QuantizedLayer], object]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "an item": lambda layer: layer.weight.__setitem__((0, 0), 1.0),
    "augmented": lambda layer: layer.weight.__imul__(2),
    "a view": lambda layer: layer.weight[0].zero_(),
    "a transpose": lambda layer: layer.weight.t().fill_(1),
    "data": lambda layer: layer.weight.data.copy_(torch.zeros(16, 16)),
    "data, replaced": lambda layer: setattr(layer.weight, "data", torch.zeros(16, 16)),
    "detached": lambda layer: layer.weight.detach().add_(1),
    "copied into": lambda layer: layer.weight.copy_(torch.zeros(16, 16)),
    "an initialiser": lambda layer: nn.init.zeros_(layer.weight),
    "the attribute": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(16, 16))),
    "numpy": lambda layer: layer.weight.detach().numpy().__setitem__((0, 0), 1.0),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("training", [False, True])
def test_writing_into_a_dequantized_weight_is_refused_and_changes_nothing(how: str, training: bool) -> None:
    model = small().train(training)
    before = copy.deepcopy(model)
    error = ValueError if how == "numpy" else (RuntimeError, AttributeError)
    with torch.no_grad(), pytest.raises(error, match=r"read-only|codebook") as caught:
        WRITES[how](model.linear)
    if how != "numpy":
        assert "set_codes" in str(caught.value)
    with torch.no_grad():
        assert torch.equal(model(X), before(X))


def test_a_write_that_no_method_sees_is_noticed_at_the_next_forward() -> None:
    model = small()
    with torch.no_grad():
        model(X)
        torch._foreach_mul_([model.linear.weight], 2.0)
        with pytest.raises(RuntimeError, match="was written into"):
            model(X)
        assert torch.equal(model(X), small()(X))  # it was made anew


CHANGES: dict[str, Callable[[QuantizedLayer], object]] = {
    "in place": lambda layer: layer.codebook.mul_(2),
    "data": lambda layer: layer.codebook.data.mul_(2),
    "detached": lambda layer: layer.codebook.detach().mul_(2),
    "numpy": lambda layer: layer.codebook.detach().numpy().__imul__(2),
    "data, replaced": lambda layer: setattr(layer.codebook, "data", layer.codebook.data * 2),
    "the parameter": lambda layer: setattr(layer, "codebook", nn.Parameter(layer.codebook.detach() * 2)),
    "a list of tensors": lambda layer: torch._foreach_mul_([layer.codebook], 2.0),
    "a vector of parameters": lambda layer: nn.utils.vector_to_parameters(
        layer.codebook.detach().flatten() * 2, [layer.codebook]
    ),
    "set_codes": lambda layer: layer.set_codes(layer.codebook.detach() * 2, layer.codes_matrix),
    "a state dict": lambda layer: layer.load_state_dict(
        {**layer.state_dict(), "codebook": layer.state_dict()["codebook"] * 2}
    ),
    "codes": lambda layer: layer.codes_matrix.copy_((layer.codes_matrix + 1) % layer.k),
    "codes, data": lambda layer: layer.codes_matrix.data.copy_((layer.codes_matrix + 1) % layer.k),
    "codes, numpy": lambda layer: layer.codes_matrix.numpy().__setitem__(
        slice(None), (layer.codes_matrix.numpy() + 1) % layer.k
    ),
}


@pytest.mark.parametrize("how", CHANGES)
def test_evaluation_follows_every_change_of_codebook_and_codes(how: str, tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        before = model(X)
        CHANGES[how](model.linear)
        after = model(X)
        assert not torch.equal(after, before)
        assert torch.equal(after, dense_of(model)(X))
        save_compressed(model, tmp_path / "model.pth")
        state = read_tensors(tmp_path / "model.pth")
        book, codes = state["linear.codebook"].float(), state["linear.codes_matrix"].long()
        assert torch.equal(book[codes].reshape(16, 16), model.linear.weight.detach())


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_evaluation_follows_every_optimizer(options: dict[str, bool]) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    for _ in range(2):
        model(X).square().sum().backward()  # fine-tuned in evaluation mode, as with frozen norms
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert torch.equal(model(X), dense_of(model)(X))


def test_an_average_over_codes_is_refused_before_it_is_used_or_saved(tmp_path: Path) -> None:
    model = small().train()
    lower = AveragedModel(model, avg_fn=lambda mean, new, _: 0.9 * mean + 0.1 * new, use_buffers=True)
    for _ in range(4):
        lower.update_parameters(model)
    # averages of equal codes, cut off to whole numbers
    assert not torch.equal(lower.module.linear.codes_matrix, model.linear.codes_matrix)
    for use in (
        lambda: lower(X),
        lambda: save_compressed(lower.module, tmp_path / "model.pth"),
        lambda: save_packed(lower.module, tmp_path / "model.safetensors", ModelInfo()),
        lambda: lower.module.linear.dequantize(),
    ):
        with pytest.raises(RuntimeError, match="average over buffers") as caught:
            use()
        assert "use_buffers=False" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    good = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    good.update_parameters(model)
    assert torch.equal(good.module.linear.codes_matrix, model.linear.codes_matrix)
    good.eval()(X)


def test_copies_are_independent_and_keep_nothing() -> None:
    model = small()
    with torch.no_grad():
        wanted = model(X)
        twin = copy.deepcopy(model)
        model.linear.codebook.zero_()
        assert torch.equal(twin(X), wanted)
        assert not torch.equal(model(X), wanted)
        twin.linear.codebook.zero_()
        assert torch.equal(model(X), twin(X))


def test_a_layer_of_the_users_choice_is_left_dense_and_is_an_ordinary_parameter() -> None:
    torch.manual_seed(0)
    model = quantized(Small(), spec(8, ignored=["linear"], layers={"conv": LayerSpec(k=4)}))
    assert type(model.linear.weight) is nn.Parameter
    assert model.conv.k == 4
    with torch.no_grad():
        model.linear.weight.mul_(2)


@pytest.mark.parametrize("compiled", [False, True])
def test_pruned_blocks_stay_zero_in_training(compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        pruned = torch.rand(64, 16, 1) < 0.5
        dense[0].weight.mul_(~pruned.expand(-1, -1, 4).reshape(64, 64))
    model = quantized(dense, spec(8)).train()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    before = model[0].codebook.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        run(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
    blocks = model[0].dequantize().detach().reshape(64, 16, 4)
    assert bool((blocks[pruned[..., 0]] == 0).all())
    moved = (model[0].codebook != before).any(1)
    assert int(moved.sum()) == 7  # all others


def test_a_weight_that_begins_at_zero_is_trained() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    nn.init.zeros_(model[0].weight)
    model = quantized(model, spec(8)).train()
    model(torch.randn(8, 16)).sum().backward()
    assert float(model[0].codebook.grad.abs().sum()) > 0
