"""A batch norm over the processes' joint batch is, in one process, torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from src.engines.batch_norm import JointBatchNorm, join_batch_norms
from src.engines.launch import Launch
from src.engines.single import SingleProcess
from src.model_files.pth import read_tensors, save_compressed
from src.model_files.state_dict import load_state
from tests.support.helpers import lively, quantized, spec

ENGINE = SingleProcess(Launch(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(5), (4, 5, 3, 2)),
        (nn.BatchNorm2d(5, momentum=None), (4, 5, 3, 2)),
        (nn.BatchNorm2d(5, affine=False), (4, 5, 3, 2)),
        (nn.BatchNorm2d(5, track_running_stats=False), (4, 5, 3, 2)),
        (nn.BatchNorm1d(5, eps=0.1, momentum=0.3), (8, 5)),
        (nn.BatchNorm3d(5).double(), (2, 5, 2, 3, 2)),
        (nn.BatchNorm2d(5), (1, 5, 1, 2)),
    ],
)
def test_it_computes_what_torch_computes(norm: nn.Module, shape: tuple[int, ...]) -> None:
    lively(nn.Sequential(norm))
    theirs, ours = copy.deepcopy(norm).train(), join_batch_norms(copy.deepcopy(norm).train(), ENGINE)
    assert isinstance(ours, JointBatchNorm)
    kind = torch.float64 if isinstance(norm, nn.BatchNorm3d) else torch.float32
    torch.manual_seed(0)
    for _ in range(2):
        x = (torch.randn(shape, dtype=kind) * 3 + 100).requires_grad_()  # a mean far from zero
        y = x.detach().clone().requires_grad_()
        weights = torch.randn(shape, dtype=kind)
        (theirs(x) * weights).sum().backward()
        (ours(y) * weights).sum().backward()
        torch.testing.assert_close(ours(y), theirs(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-3)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours.eval()(y), theirs.eval()(x), rtol=1e-4, atol=1e-4)


def test_joining_replaces_every_trained_norm_and_keeps_parameters_and_files(tmp_path) -> None:
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(16)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), shared, nn.Sequential(nn.Conv2d(16, 16, 1), shared), FrozenBatchNorm2d(16)
    )
    model = quantized(lively(model), spec(4, pw=4))
    before, parameters = {name: tensor.clone() for name, tensor in model.state_dict().items()}, list(model.parameters())
    save_compressed(model, tmp_path / "before.pth")
    joined = join_batch_norms(model, ENGINE)
    assert isinstance(joined[1], JointBatchNorm)
    assert isinstance(joined[2][1], JointBatchNorm)
    assert type(joined[3]) is FrozenBatchNorm2d
    assert all(one is other for one, other in zip(joined.parameters(), parameters, strict=True))
    assert all(torch.equal(joined.state_dict()[name], tensor) for name, tensor in before.items())
    save_compressed(joined, tmp_path / "after.pth")
    first, second = (read_tensors(tmp_path / f"{name}.pth") for name in ("before", "after"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    load_state(joined, second, "after.pth")


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        join_batch_norms(nn.BatchNorm1d(3), ENGINE)(torch.randn(3))
