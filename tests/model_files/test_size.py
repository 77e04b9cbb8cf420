"""Laws of counting bits: the golden figures of the paper's networks, and small ones counted by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from src.architectures import ARCHITECTURES
from src.compression.quantize.compress import build_quantized
from src.compression.quantize.plan import LayerSpec, make_plan
from src.model_files.size import ModelSize, model_size
from src.recipes import quantization_spec
from src.settings import load
from tests.support.helpers import quantized, spec

GOLDEN = [
    # depth, large blocks, size of 1x1 subvectors, original, codes, codebooks, other, MB, ratio
    (18, False, 4, 374_064_384, 11_516_928, 770_048, 640_256, "1.54", "28.94"),
    (18, True, 4, 374_064_384, 6_634_496, 1_359_872, 640_256, "1.03", "43.32"),
    (50, False, 4, 817_825_024, 39_436_288, 1_245_184, 2_032_896, "5.09", "19.15"),
    (50, True, 8, 817_825_024, 22_277_632, 2_408_448, 2_032_896, "3.19", "30.61"),
]


@pytest.mark.parametrize(("depth", "large", "pw", "original", "codes", "codebooks", "other", "mb", "ratio"), GOLDEN)
def test_the_papers_networks_have_the_golden_sizes(
    depth, large, pw, original, codes, codebooks, other, mb, ratio
) -> None:
    key = "--model.compression_parameters"
    settings = load(
        f"../config/train_resnet{depth}.yaml",
        [f"{key}.large_subvectors", str(large), f"{key}.pw_subvector_size", str(pw)],
    )
    with torch.device("meta"):
        model = ARCHITECTURES[f"resnet{depth}"].build(1000)
    dense = model_size(model)
    assert dense == ModelSize(codes=0, codebooks=0, other=original, original=original)
    size = model_size(build_quantized(model, make_plan(model, quantization_spec(settings))))
    assert size == ModelSize(codes=codes, codebooks=codebooks, other=other, original=original)
    assert size.bits == codes + codebooks + other
    assert (f"{size.megabytes:.2f}", f"{size.ratio:.2f}") == (mb, ratio)
    for figure in (
        f"{size.bits:,} bits",
        f"codes {codes:,}",
        f"codebooks {codebooks:,}",
        f"other {other:,}",
        f"{mb} MB",
        f"{ratio}x",
        f"{original:,}",
    ):
        assert figure in size.summary()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.Flatten(),
        nn.Linear(16, 20),
    )


def test_the_bits_of_a_small_network_are_those_counted_by_hand() -> None:
    model = quantized(small(), spec(16, layers={"3": LayerSpec(large_subvectors=True)}))
    # conv 0: 8 x 27 values, d = 9, 24 subvectors: k = 4, 2 bits each
    # conv 3: 16 x 72 values, d = 18, 64 subvectors: k = 16, 4 bits each
    # linear: 20 x 16 values, d = 4, 80 subvectors: k = 16, 4 bits each
    codes = 24 * 2 + 64 * 4 + 80 * 4
    codebooks = (4 * 9 + 16 * 18 + 16 * 4) * 16
    other = (2 * 8 + 16 + 20) * 32  # the norm as two vectors, two biases
    original = (8 * 27 + 2 * 8 + 16 * 72 + 16 + 20 * 16 + 20) * 32
    assert model_size(model) == ModelSize(codes=codes, codebooks=codebooks, other=other, original=original)


def test_every_kind_of_norm_with_statistics_counts_as_two_vectors() -> None:
    for norm in (
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm1d(8),
        FrozenBatchNorm2d(8),
        nn.SyncBatchNorm(8),
    ):
        assert model_size(nn.Sequential(norm)).bits == 2 * 8 * 32
    assert model_size(nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False))).bits == 2 * 8 * 32
    assert model_size(nn.Sequential(nn.GroupNorm(2, 8))).bits == 2 * 8 * 32


def test_everything_counts_at_its_own_width() -> None:
    assert model_size(nn.Linear(3, 5).half()).bits == (15 + 5) * 16
    assert model_size(nn.Linear(3, 5).double()).bits == (15 + 5) * 64
    model = quantized(nn.Sequential(nn.Linear(16, 16).half()), spec(16))
    assert model_size(model) == ModelSize(codes=64 * 4, codebooks=16 * 4 * 16, other=16 * 16, original=(256 + 16) * 16)
    buffers = nn.Module()
    buffers.register_buffer("kept", torch.zeros(7, dtype=torch.int64))
    buffers.register_buffer("not_saved", torch.zeros(9), persistent=False)
    assert model_size(buffers).bits == 7 * 64


def test_what_is_shared_counts_once() -> None:
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tied[1].weight = tied[0].weight
    assert model_size(tied).original == (256 + 2 * 16) * 32
    assert model_size(quantized(tied, spec(16))) == ModelSize(
        codes=64 * 4, codebooks=16 * 4 * 16, other=2 * 16 * 32, original=(256 + 2 * 16) * 32
    )
    layer, norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
    twice = nn.Sequential(layer, norm, layer, norm)
    assert model_size(quantized(twice, spec(16))) == ModelSize(
        codes=64 * 4, codebooks=16 * 4 * 16, other=(16 + 2 * 16) * 32, original=(256 + 3 * 16) * 32
    )


def test_the_size_does_not_depend_on_mode_or_copy() -> None:
    model = quantized(small())
    size = model_size(model)
    model(torch.randn(2, 3, 5, 5))
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 5, 5))
    assert model_size(model) == model_size(copy.deepcopy(model)) == size
