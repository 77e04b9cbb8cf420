"""The Python interface, as a user's program uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import src as pqf
from src.common.errors import CheckpointError, DataError, GroupError, PlanError, SettingsError
from src.compression.quantize.layers import QuantizedLayer
from src.model_files.open_model_file import open_model_file
from tests.conftest import ROOT
from tests.support.own_network import Net
from tests.support.words import Words

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FAST = {"k": 16, "k_means_n_iters": 2, "show_progress": False}


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().train()
    for _ in range(4):
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


@pytest.fixture
def compressed() -> nn.Module:
    return pqf.compress(net(), X, **FAST)[0]


def test_compressing_gives_the_same_network_smaller_and_a_report() -> None:
    model = net()
    modules = list(model.modules())
    found, report = pqf.compress(model, X, **FAST)
    assert found is model
    assert all(isinstance(after, type(before)) for before, after in zip(modules[:4], model.modules(), strict=False))
    assert report.size.ratio > 3
    assert len(report.layers) == 5
    assert 0 < report.lost < 0.5
    assert any(group.after < group.before for group in report.groups)
    assert report.dense == ()
    text = str(report)
    assert "5 weights quantized" in text
    assert "smaller than" in text
    assert not model.training


def test_permutations_leave_the_function_as_it_is() -> None:
    """With a centroid for every subvector nothing but the permutations and 16-bit floats changes."""
    model, dense = net(), net()
    _, report = pqf.compress(model, X, k=4096, k_means_n_iters=1, show_progress=False, layer_specs={"head": {"k": 128}})
    assert any(group.permutation is not None for group in report.groups)
    with torch.no_grad():
        assert float((model(X) - dense(X)).norm() / dense(X).norm()) < 0.4
    identical = pqf.compress(net(), X, use_permutations=False, **FAST)[1]
    assert identical.groups == ()


def test_settings_have_the_names_of_settings_files() -> None:
    model, report = pqf.compress(
        net(), X, fc_subvector_size=8, ignored_modules=["body.0"], layer_specs={"head": {"k": 4}}, **FAST
    )
    assert [weight.name for weight in report.dense] == ["body.0"]
    assert model.head.k == 4
    assert model.attention.out_proj.d == 8
    for wrong, words in (
        ({"kk": 3}, "kk: unknown setting; did you mean k"),
        ({"large_subvector": True}, "did you mean large_subvectors"),
        ({"k": 100}, "k = 100: expected a power of two; the nearest are 64 and 128"),
        ({"search": "good"}, "search = 'good': expected one of best, published"),
        ({"layer_specs": {"head": {"k": 3}}}, "layer_specs.head.k"),
    ):
        with pytest.raises(SettingsError) as error:
            pqf.compress(net(), X, show_progress=False, **wrong)
        assert words in str(error.value)
    with pytest.raises(PlanError, match=r"head.*does not divide"):
        pqf.compress(net(), X, show_progress=False, layer_specs={"head": {"subvector_size": 5}})


def test_groups_are_found_listed_and_given() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = pqf.groups(model, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {("body.0", "body.1"), ("body.3", "body.4")} <= {group.parents for group in found}
    by_hand = [{"parents": ["body.0", "body.1"], "children": ["body.3"]}]
    _, report = pqf.compress(net(), X, permutations=by_hand, **FAST)
    assert len(report.groups) == 1
    with pytest.raises(GroupError, match="changes the network's output"):
        pqf.compress(net(), X, permutations=[{"parents": ["body.0"], "children": ["body.3"]}], **FAST)
    _, report = pqf.compress(net(), **FAST)
    assert report.groups == ()
    assert any("without example_inputs" in note for note in report.notes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_is_saved_is_loaded(compressed: nn.Module, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    pqf.save(compressed, file)
    loaded = pqf.load(str(file), into=Net())
    with torch.no_grad():
        assert torch.allclose(loaded(X), compressed(X), atol=1e-6)
    loaded.train()
    optimizer = torch.optim.Adam(loaded.parameters())
    loaded(X).square().sum().backward()
    optimizer.step()
    pqf.save(loaded, file)


def test_a_file_that_does_not_fit_leaves_the_network_as_it_is(compressed: nn.Module, tmp_path: Path) -> None:
    pqf.save(compressed, tmp_path / "model.safetensors")
    other = Net(num_classes=3)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="head"):
        pqf.load(tmp_path / "model.safetensors", into=other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(CheckpointError, match="is compressed already"):
        pqf.load(tmp_path / "model.safetensors", into=compressed)
    with pytest.raises(SettingsError, match="compressed already"):
        pqf.compress(compressed, X)
    with pytest.raises(SettingsError, match=r"expected \.safetensors"):
        pqf.save(compressed, tmp_path / "model.onnx")


def test_a_dense_file_is_loaded_too(tmp_path: Path) -> None:
    model = net()
    torch.save(model.state_dict(), tmp_path / "dense.pth")
    loaded = pqf.load(tmp_path / "dense.pth", into=Net())
    assert not any(isinstance(module, QuantizedLayer) for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


def test_a_dense_copy_computes_the_same_and_is_of_the_same_classes(compressed: nn.Module) -> None:
    dense = pqf.dequantize(compressed)
    assert [type(module) for module in dense.modules()] == [type(module) for module in Net().modules()]
    assert dense.state_dict().keys() == Net().state_dict().keys()
    with torch.no_grad():
        assert torch.equal(dense(X), compressed(X))
    assert isinstance(compressed.head, QuantizedLayer)
    Net().load_state_dict(dense.state_dict())


def test_recurrent_and_tied_weights_become_dense_again() -> None:
    torch.manual_seed(0)
    words = torch.randint(32, (2, 5))
    model, _ = pqf.compress(Words().eval(), words, **FAST)
    dense = pqf.dequantize(model)
    assert dense.out.weight is dense.embedding.weight
    assert type(dense.lstm) is nn.LSTM
    with torch.no_grad():
        assert torch.allclose(dense(words), model(words), atol=1e-6)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_an_optimizer_that_was_made_before_is_noticed(make: type) -> None:
    model = net().train()
    optimizer = make(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    pqf.compress(model, X, **FAST)
    model(X).sum().backward()
    for use in (optimizer.step, optimizer.zero_grad):
        with pytest.raises(RuntimeError, match=r"made before '[\w.]+' was quantized"):
            use()
    make(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("kind", ["tensor", "list", "pairs"])
def test_calibration_keeps_what_the_network_computes(kind: str) -> None:
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + 3
    given = {"tensor": images, "list": list(images.split(8)), "pairs": [(part, None) for part in images.split(8)]}[kind]
    model, report = pqf.compress(net(), X, calibration=given, **FAST)
    assert any("calibrated 5 weights with 16 inputs" in note and "2 batch norms" in note for note in report.notes)
    assert any("16 inputs are few" in note for note in report.notes)
    assert report.outputs_lost is not None
    assert f"{100 * report.outputs_lost:.2f} % of their outputs' energy lost" in str(report)
    plain, same_size = pqf.compress(net(), X, **FAST)
    assert not torch.allclose(model.body[1].running_mean, plain.body[1].running_mean)
    assert not model.training
    assert report.size == same_size.size
    with torch.no_grad():
        wanted, ours, theirs = (one(images) for one in (net(), model, plain))
    assert float((ours - wanted).norm()) < 0.5 * float((theirs - wanted).norm())


def test_a_wanted_size_is_spent_as_calibration_says() -> None:
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + 3
    _, report = pqf.compress(net(), X, calibration=images, ratio=7, k_means_n_iters=2, show_progress=False)
    assert 7 <= report.size.ratio < 7.2
    assert any("are chosen for ratio 7 by what losing them changes" in note for note in report.notes)
    assert report.outputs_lost is not None
    with pytest.raises(DataError, match=r"inputs of layer 'body\.0' are not finite"):
        pqf.compress(net(), X, calibration=images / 0, ratio=7, **FAST)


def test_calibration_without_inputs_or_with_values_that_are_not_finite_is_one_message() -> None:
    with pytest.raises(DataError, match="calibration: there are no inputs"):
        pqf.compress(net(), X, calibration=[], **FAST)
    with pytest.raises(DataError, match=r"inputs of layer 'body\.0' are not finite"):
        pqf.compress(net(), X, calibration=torch.full((4, 3, 16, 16), torch.nan), **FAST)


def test_a_saved_network_that_says_who_builds_it_is_opened_by_the_commands(
    compressed: nn.Module, tmp_path: Path
) -> None:
    own = "tests.support.own_network:Net"
    pqf.save(compressed, tmp_path / "model.safetensors", arch=own)
    opened = open_model_file(tmp_path / "model.safetensors", own)
    assert opened.info.num_classes is None
    with torch.no_grad():
        assert torch.allclose(opened.model(X), compressed(X), atol=1e-6)


def test_inspecting_networks_and_files(compressed: nn.Module, tmp_path: Path) -> None:
    pqf.save(compressed, tmp_path / "model.safetensors", metric={"accuracy": 71.0})
    here, file = pqf.inspect(compressed), pqf.inspect(tmp_path / "model.safetensors")
    assert here.size == file.size
    assert "attention.in_proj_weight_quantized" in str(here)
    assert "measured: accuracy 71" in str(file)
    assert "permutations: " in str(here)
    assert "16x3x3x3" in str(here)
    assert "dense, Net" in str(pqf.inspect(Net()))


def test_commands_of_the_same_names_do_not_hide_the_functions(compressed: nn.Module) -> None:
    import src.compress
    import src.inspect  # noqa: F401

    assert pqf.inspect(compressed).kind == "quantized"
    assert pqf.compress(net(), X, use_permutations=False, **FAST)[1].layers


def test_importing_pqf_costs_nothing_and_using_it_needs_no_logs_or_annotations() -> None:
    code = (
        "import sys, src as pqf; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules); pqf.compress; "
        "heavy = {'tensorboard', 'pycocotools', 'jinja2', 'faiss', 'numba'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_network_computed_from_its_weights_in_evaluation_is_computed_anew() -> None:
    class Cached(nn.Module):
        """A linear layer that keeps what it computed from its weights until it trains, as some attention does."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
            self.kept: torch.Tensor | None = None

        def train(self, mode: bool = True) -> Cached:
            if mode:
                self.kept = None
            return super().train(mode)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training or self.kept is None:
                self.kept = self.first.bias * 1
            return self.second((x @ self.first.weight.t() + self.kept).relu())

    torch.manual_seed(0)
    model, x = Cached().eval(), torch.randn(4, 16)
    with torch.no_grad():
        model(x)
        model, report = pqf.compress(model, x, **FAST)
        assert any(group.permutation is not None for group in report.groups)
        model(x)
    assert torch.equal(model.kept, model.first.bias)
    assert not model.training


def test_codebooks_of_8_bit_values_by_hand(tmp_path: Path) -> None:
    model, report = pqf.compress(net(), X, codebook_bits=8, layer_specs={"head": {"codebook_bits": 16}}, **FAST)
    bits = {layer.name: layer.codebook_bits for layer in report.layers}
    assert bits.pop("head") == 16
    assert set(bits.values()) == {8}
    assert report.size.codebooks < pqf.compress(net(), X, **FAST)[1].size.codebooks
    for name in ("model.pth", "model.safetensors"):
        pqf.save(model, tmp_path / name)
        loaded = pqf.load(tmp_path / name, net())
        pqf.save(loaded, tmp_path / f"again {name}")
        assert torch.equal(loaded.body[0].weight, model.eval().body[0].weight)
        assert "codebook bits" in str(pqf.inspect(loaded))


def test_a_wanted_size_chooses_the_settings(tmp_path: Path) -> None:
    dense = net()
    made, report = pqf.compress(net(), X, size="7KB", k_means_n_iters=2, show_progress=False)
    pqf.save(made, tmp_path / "made.safetensors")
    assert 7168 - 110 <= (tmp_path / "made.safetensors").stat().st_size <= 7168
    assert len([text for text in report.notes if "are chosen for size" in text]) == 1
    (text,) = (text for text in report.notes if "chosen anew for size" in text)
    counted = 7168 - int(text.split(" bytes of a file for other things")[0].split()[-1].replace(",", ""))
    assert 0.98 * counted * 8 <= report.size.bits <= counted * 8
    _, same = pqf.compress(net(), X, ratio=report.size.original / 8 / counted, k_means_n_iters=2, show_progress=False)
    assert 0.98 * counted * 8 <= same.size.bits <= counted * 8  # a ratio is of what counts, scales' places do not
    for wrong, words in (
        ({"size": "tiny"}, "size = 'tiny': expected a size such as 1.2MB"),
        ({"ratio": 0.5}, "ratio = 0.5: expected a number, above 1"),
        ({"size": 3000, "ratio": 8}, "size or ratio, not both"),
        ({"sise": 3000}, "did you mean size"),
        ({"codebook_bits": 7}, "codebook_bits = 7: expected one of 16, 8"),
    ):
        with pytest.raises(SettingsError) as error:
            pqf.compress(dense, X, show_progress=False, **wrong)
        assert words in str(error.value)
    with pytest.raises(PlanError, match=r"^size .* is smaller than this network can be made: from"):
        pqf.compress(dense, X, show_progress=False, size="500B")
    with pytest.raises(PlanError, match=r"is larger than this network can be made: from"):
        pqf.compress(dense, X, show_progress=False, size="1MB")
