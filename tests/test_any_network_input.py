"""What users bring to `compress` and `groups`: networks that do not run, run oddly, or have nothing to permute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import src as pqf
import src.compress as command
from src.common.errors import GroupError
from tests.conftest import ROOT
from tests.support.own_network import Net

FAST = {"k": 16, "k_means_n_iters": 2, "show_progress": False}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
OWN = ["--model.weights", "none", "--model.compression_parameters.k_means_n_iters", "1"]


class Two(nn.Module):
    """Needs two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last((self.first(x) + self.second(y)).relu())


class Dynamic(nn.Module):
    """Takes a way that depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.often, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if float(x.sum()) > 0:
            x = self.often(x).relu()
        return self.last(x)


def test_a_network_that_does_not_run_on_the_example_is_one_error_and_stays_as_it_was() -> None:
    for make, example, why in ((Net, torch.randn(2, 5, 16, 16), "5 channels"), (Two, torch.randn(2, 8), "'y'")):
        model = make().train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(GroupError, match="does not run on the example inputs") as error:
            pqf.compress(model, example, **FAST)
        assert why in str(error.value)
        assert "tuple of arguments" in str(error.value)
        assert model.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_inputs(kind: str) -> None:
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    example = (x, y) if kind == "tuple" else {"x": x, "y": y}
    (group,) = pqf.groups(Two(), example)
    assert set(group.parents) == {"first", "second"}
    model, report = pqf.compress(Two(), example, **FAST)
    assert report.groups[0].children == ("last",)
    model(x, y)


def test_dynamic_control_flow_is_followed_where_the_example_leads() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    model = Dynamic().eval()
    assert len(pqf.groups(model, x)) == 2
    with torch.no_grad():
        wanted = model(x)
        for group in pqf.groups(model, x):
            group.apply(model, group.random(torch.Generator().manual_seed(0)))
        assert torch.allclose(model(x), wanted, atol=1e-6)


def test_a_network_without_a_group_is_quantized_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    assert pqf.groups(model, torch.randn(2, 32)) == []
    assert len(pqf.compress(model, torch.randn(2, 32), **FAST)[1].layers) == 1


def test_pruned_weights_stay_pruned_and_masks_are_named() -> None:
    torch.manual_seed(0)
    masked = Net().eval()
    prune.l1_unstructured(masked.attention.out_proj, "weight", 0.5)
    _, report = pqf.compress(masked, X, **FAST)
    assert any("out_proj.weight_orig: is what another weight is computed from" in note for note in report.notes)
    model = Net().eval()
    with torch.no_grad():
        model.head.weight[:, ::2] = 0
        model.head.weight[:5] = 0
    model, _ = pqf.compress(model, X, **FAST, use_permutations=False)
    assert bool((model.head.weight[:5] == 0).all())


def test_weights_that_another_program_quantized_are_left_alone() -> None:
    dense = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model = torch.ao.quantization.quantize_dynamic(dense, {nn.Linear})
    x = torch.randn(2, 16)
    wanted = model(x)
    model, report = pqf.compress(model, x, **FAST)
    assert report.layers == ()
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.arch", "vit_b_16", "--calibration.image_size", "64"], "does not run on the example inputs"),
        (["--model.arch", "tests.support.own_network:of_width"], "missing 1 required positional argument: 'width'"),
        (["--model.arch", "r3d_18"], "for video"),
    ],
)
def test_the_command_says_it_in_one_message(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*OWN, *flags, "--output_path", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_timm_that_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['timm'] = None; from src.compress import main; "
        f"sys.exit(main(['--model.arch', 'timm:resnet10t', '--output_path', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'pqf[timm]'" in done.stderr
    assert "Traceback" not in done.stderr
