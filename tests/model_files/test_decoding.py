"""When weights are decoded in evaluation changes what is held in memory, and nothing of what is computed."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import src as pqf
from src.common.errors import SettingsError
from src.compression.quantize.layers import QuantizedLayer, set_memory_format
from src.model_files.decoding import check_decode, set_decode
from tests.conftest import ROOT
from tests.support import small_runs
from tests.support.launching import environment
from tests.support.memory import evaluate_large_layers, in_a_process_of_its_own
from tests.support.own_network import Net
from tests.support.patience import PATIENCE
from tests.support.words import Words

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.arange(12).view(2, 6)
FAST = {"k": 16, "k_means_type": "kmeans", "k_means_n_iters": 2, "use_permutations": False, "show_progress": False}


@cache
def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    how = {"eight bits": {"codebook_bits": 8}, "along outputs": {"layout": "output"}}.get(name, {})
    return pqf.compress(Words() if name == "words" else Net(), **FAST, **how)[0].eval()


def network(name: str = "own", decode: str = "kept") -> tuple[nn.Module, Tensor]:
    """A network and its input."""
    return set_decode(copy.deepcopy(made(name)), decode), WORDS if name == "words" else X


def layers(model: nn.Module) -> list[QuantizedLayer]:
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


@pytest.mark.parametrize("name", ["own", "words", "eight bits", "along outputs"])
def test_each_forward_computes_the_same_to_the_bit_and_keeps_nothing(name: str) -> None:
    (kept, x), (each, _) = network(name), network(name, "each_forward")
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(each(x), kept(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(each(x), kept(x))
    with torch.no_grad():
        kept(x)
    assert all(layer._kept is not None and layer._seen is not None for layer in layers(kept))
    assert all(layer._kept is None and layer._seen is None for layer in layers(each))
    assert each.state_dict().keys() == kept.state_dict().keys()
    assert all(torch.equal(tensor, kept.state_dict()[key]) for key, tensor in each.state_dict().items())


def test_channels_last_too() -> None:
    (kept, x), (each, _) = network(), network(decode="each_forward")
    for model in (kept, each):
        set_memory_format(model, True)
    assert each.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(each(x), kept(x))


def test_training_and_what_follows_it_are_the_same() -> None:
    found = []
    for decode in ("kept", "each_forward"):
        model, x = network(decode=decode)
        optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            found.append([model.eval()(x), *model.parameters(), *pqf.dequantize(model).parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_copies_pickles_and_dense_networks_are_what_they_were() -> None:
    model, x = network(decode="each_forward")
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not any(layer.keeps_weight for layer in layers(twin))
            assert torch.equal(twin(x), expected)
        dense = pqf.dequantize(model)
        assert not any("keeps_weight" in vars(module) for module in dense.modules())
        assert torch.equal(dense(x), expected)
        earlier = network()[0].head.__getstate__()  # pickled by a version that did not know of this
        del earlier["keeps_weight"]
        again = copy.deepcopy(model.head)
        again.__setstate__(earlier)
        assert again.keeps_weight
        assert torch.equal(again.weight, model.head.weight)


def test_a_change_of_codebook_or_codes_shows_at_once() -> None:
    model, x = network(decode="each_forward")
    with torch.no_grad():
        before = model(x)
        model.head.codebook.data.mul_(2)
        doubled = model(x)
        assert not torch.equal(doubled, before)
        model.head.codes_matrix.zero_()
        assert not torch.equal(model(x), doubled)
        assert model.head.weight[0].unique().numel() <= model.head.d


def test_a_weight_that_is_not_kept_takes_no_memory() -> None:
    """Sixteen layers of 4 MB each, of which one is decoded at a time."""
    assert in_a_process_of_its_own(evaluate_large_layers, "each_forward") < 20 << 20


@pytest.mark.slow
def test_weights_that_are_kept_take_theirs() -> None:
    assert in_a_process_of_its_own(evaluate_large_layers, "kept") > 60 << 20


def test_loading_takes_the_choice_and_refuses_others(tmp_path: Path) -> None:
    pqf.save(network()[0], tmp_path / "model.safetensors")
    loaded = pqf.load(tmp_path / "model.safetensors", Net(), decode="each_forward")
    assert not any(layer.keeps_weight for layer in layers(loaded))
    assert all(layer.keeps_weight for layer in layers(pqf.load(tmp_path / "model.safetensors", Net())))
    with pytest.raises(SettingsError, match="decode = 'never': expected one of kept, each_forward, compiled"):
        pqf.load(tmp_path / "model.safetensors", Net(), decode="never")


@pytest.mark.slow
def test_without_a_compiler_an_evaluation_says_so_before_it_reads_images(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"which is not read before")
    (tmp_path / "images" / "val").mkdir(parents=True)
    arguments = ["--model.state_dict_compressed", str(tmp_path / "model.safetensors"), "--model.decode", "compiled"]
    nowhere = {"CXX": str(tmp_path / "no_compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "src.evaluate_resnet", *arguments, *small_runs.evaluation(),
         "--dataloader.imagenet_path", str(tmp_path / "images")],
        cwd=ROOT, env=environment(nowhere), capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: model.decode compiled: torch.compile does not work here (")
    assert done.stderr.count("\n") == 1
    assert "use model.decode each_forward or kept" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "eight bits"])
def test_compiled_computes_the_same_but_for_rounding_and_trains(name: str) -> None:
    check_decode("compiled", "cpu")
    (kept, x), (compiled, _) = network(name), network(name, "compiled")
    with torch.no_grad():
        assert torch.allclose(compiled(x), kept(x), atol=1e-5)
        assert torch.allclose(compiled(x[:3]), kept(x[:3]), atol=1e-5)
    assert all(layer._kept is None for layer in layers(compiled))
    copied = torch.load(io.BytesIO(_saved(compiled)), weights_only=False)
    with torch.no_grad():
        assert torch.equal(copied(x), kept(x))
    compiled.train()(x).square().sum().backward()
    kept.train()(x).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), kept.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


def _saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()
