"""Laws of permuting: the function stays, parameters stay themselves, and groups that do not fit are refused."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from src.architectures import ARCHITECTURES
from src.common.errors import GroupError
from src.compression.permute.groups import Group, check_function, resolve
from tests.conftest import ROOT
from tests.support.helpers import lively, outputs, relative, shuffle

EXACT = 1e-9
"""Only the order of additions changes: float64 keeps about 1e-16 per addition, and at most some 1e4 of them follow each
other."""


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_random_permutations_of_all_groups_keep_a_resnets_outputs(name: str) -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model = lively(architecture.build(10).double())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before, weights = outputs(model, x), copy.deepcopy(model.state_dict())
    shuffle(model, architecture.groups(model))
    assert relative(outputs(model, x), before) < EXACT
    # every layer took part, but for the stem's input and the sequence of classes
    still = [key for key, value in model.state_dict().items() if value.numel() > 1 and torch.equal(value, weights[key])]
    assert still == ["fc.bias"]


def test_a_resnet_with_frozen_batch_norms_keeps_its_outputs() -> None:
    torch.manual_seed(0)
    model = lively(resnet18(num_classes=10, norm_layer=FrozenBatchNorm2d).double())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = outputs(model, x)
    shuffle(model, ARCHITECTURES["resnet18"].groups(model))
    assert relative(outputs(model, x), before) < EXACT


def test_a_resnet_in_training_mode_keeps_its_outputs() -> None:
    torch.manual_seed(0)
    model = lively(resnet18(num_classes=10).double())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    twin = copy.deepcopy(model)
    shuffle(model, ARCHITECTURES["resnet18"].groups(model))
    assert relative(outputs(model.train(), x), outputs(twin.train(), x)) < EXACT


@pytest.mark.parametrize("depth", [18, 50])
def test_the_groups_written_in_the_settings_files_are_the_architectures(depth: int) -> None:
    written = yaml.safe_load((ROOT / "config" / f"train_resnet{depth}.yaml").read_text())["model"]["permutations"]
    from_file = {(frozenset(item[0]["parents"]), frozenset(item[1]["children"])) for item in written}
    architecture = ARCHITECTURES[f"resnet{depth}"]
    from_code = {(frozenset(g.parents), frozenset(g.children)) for g in architecture.groups(architecture.build(10))}
    assert from_file == from_code
    assert len(written) == len(from_code)


def grouped() -> nn.Module:
    """Convolutions with groups as child, as parent and as both."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.PReLU(12), nn.Conv2d(12, 24, 3, groups=4), nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 5, 1),
    )  # fmt: skip


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )


def depthwise_transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 3, stride=2, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


def transposed() -> nn.Module:
    """A transposed convolution as child, as parent and as both."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2), nn.ReLU(), nn.Conv2d(6, 5, (1, 3)),
    )  # fmt: skip


def transposed_with_groups() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3, groups=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.ConvTranspose2d(12, 16, 2, groups=2), nn.ReLU(), nn.Conv2d(16, 5, 1, groups=1),
    )  # fmt: skip


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(48, 16),
        nn.BatchNorm1d(16), nn.PReLU(16), nn.Linear(16, 5, bias=False),
    )  # fmt: skip


FLATTENED_RESHAPE = {"5": [16, 8, 2, 3]}
SMALL_NETWORKS = [
    (grouped, [Group(("0", "1", "2"), ("3",)), Group(("3", "4"), ("6",)), Group(("6",), ("8",))], None),
    (depthwise, [Group(("0", "1", "3", "4"), ("6",))], None),
    (depthwise_transposed, [Group(("0", "1"), ("3",))], None),
    (transposed, [Group(("0",), ("2",)), Group(("2", "3"), ("5",)), Group(("5",), ("7",))], None),
    (transposed_with_groups, [Group(("0",), ("2",)), Group(("2", "3"), ("5",)), Group(("5",), ("7",))], None),
    (flattened, [Group(("0", "1"), ("5",)), Group(("5", "6", "7"), ("8",))], FLATTENED_RESHAPE),
]
each_network = pytest.mark.parametrize(
    ("build", "groups", "reshapes"), SMALL_NETWORKS, ids=[build.__name__ for build, *_ in SMALL_NETWORKS]
)


@each_network
def test_random_permutations_keep_the_outputs_for_every_layer_type(build, groups, reshapes) -> None:
    torch.manual_seed(0)
    model = lively(build().double())
    x = torch.randn(2, 3, 10, 11, dtype=torch.float64)
    before = outputs(model, x)
    for seed in range(5):
        shuffle(model, groups, seed, reshapes)
    assert relative(outputs(model, x), before) < EXACT


@each_network
def test_every_parameter_stays_the_same_object_frozen_or_not(build, groups, reshapes) -> None:
    torch.manual_seed(0)
    model = lively(build())
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = [(id(p), p.requires_grad, p.dtype, p.data_ptr()) for p in model.parameters()]
    shuffle(model, groups, 0, reshapes)
    assert [(id(p), p.requires_grad, p.dtype, p.data_ptr()) for p in model.parameters()] == before
    assert all(p.is_leaf and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_network
def test_permuting_in_another_precision_moves_the_same_values(build, groups, reshapes, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = lively(build())
    other = copy.deepcopy(model).to(dtype)
    shuffle(model, groups, 0, reshapes)
    shuffle(other, groups, 0, reshapes)
    wanted = model.to(dtype).state_dict()
    assert all(
        torch.equal(value, wanted[key]) and value.dtype == wanted[key].dtype
        for key, value in other.state_dict().items()
    )


def test_channels_last_weights_keep_their_layout_and_function() -> None:
    torch.manual_seed(0)
    model = lively(grouped().double()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 10, 11, dtype=torch.float64)
    before = outputs(model, x)
    shuffle(model, SMALL_NETWORKS[0][1])
    assert relative(outputs(model, x), before) < EXACT
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_permutation_that_leaves_the_blocks_of_a_grouped_convolution_is_refused_and_changes_nothing() -> None:
    model = grouped()
    (group, *_) = resolve(model, SMALL_NETWORKS[0][1])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GroupError, match="blocks"):
        group.apply(torch.arange(12).flip(0))
    with pytest.raises(GroupError, match="permutation of 12"):
        group.apply(torch.zeros(12, dtype=torch.int64))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def two_linears_tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


REFUSED = [
    (grouped, Group(("O",), ("3",)), None, ["permutations[0]", "'O'"]),
    (lambda: resnet18(num_classes=4), Group(("layer1.0.conv1",), ("layer1.0.conv22",)), None, ["layer1.0.conv22", "nearest", "layer1.0.conv2"]),
    (grouped, Group(("0", "1"), ("8",)), None, ["8 has 16", "0 has 12"]),
    (flattened, Group(("0", "1"), ("5",)), None, ["5 has 48", "permutation_specs.5.reshape: [16, 8, h, w]", "h*w = 6"]),
    (flattened, Group(("0", "1"), ("5",)), {"5": [16, 8, 2, 2]}, ["permutation_specs.5.reshape", "[16, 8, 2, 2]", "48"]),
    (flattened, Group(("0", "1"), ("5",)), {"5": [15, 8, 2, 3]}, ["permutation_specs.5.reshape", "[15, 8, 2, 3]"]),
    (transposed, Group(("0",), ("2",)), {"2": [8, 12, 3, 3]}, ["permutation_specs.2.reshape", "linear", "ConvTranspose2d"]),
    (depthwise, Group(("0", "1"), ("3",)), None, ["3 is a depthwise convolution", "parents"]),
    (grouped, Group(("0", "1"), ("5",)), None, ["5 is a ReLU", "cannot be a child"]),
    (grouped, Group(("0", "5"), ("3",)), None, ["5 is a ReLU", "cannot be a parent"]),
    (grouped, Group(("0",), ("1",)), None, ["1 is a BatchNorm2d", "cannot be a child"]),
    (grouped, Group(("0", "0"), ("3",)), None, ["output of 0", "twice"]),
    (two_linears_tied, Group(("0", "2"), ("4",)), None, ["output of 2", "twice"]),
]  # fmt: skip


@pytest.mark.parametrize(("build", "group", "reshapes", "words"), REFUSED, ids=[words[0] for *_, words in REFUSED])
def test_a_group_that_does_not_fit_is_refused_with_its_name(build, group: Group, reshapes, words: list[str]) -> None:
    with pytest.raises(GroupError) as error:
        resolve(build(), [group], reshapes)
    for word in words:
        assert word in str(error.value)


def test_a_layer_permuted_by_two_groups_is_refused_naming_both() -> None:
    for second, what in ((Group(("1",), ("6",)), "output of 1"), (Group(("4",), ("3",)), "input of 3")):
        with pytest.raises(GroupError, match=rf"permutations\[1\].*{what}.*twice.*permutations\[0\]"):
            resolve(grouped(), [Group(("0", "1", "2"), ("3",)), second])


def test_convolution_groups_that_do_not_nest_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1, groups=3), nn.Conv2d(12, 8, 1, groups=4))
    with pytest.raises(GroupError, match="do not nest"):
        resolve(model, [Group(("0",), ("1",))])


def test_check_function_passes_for_the_right_groups_and_changes_nothing() -> None:
    for build, groups, reshapes in SMALL_NETWORKS:
        model = lively(build())
        before = copy.deepcopy(model.state_dict())
        check_function(model, groups, torch.randn(1, 3, 10, 11), reshapes)
        assert all(
            torch.equal(value, before[key]) and value.dtype == before[key].dtype
            for key, value in model.state_dict().items()
        )


WRONG = [
    ("a norm is missing", Group(("conv1", "layer1.0.conv2", "layer1.0.bn2", "layer1.1.conv2", "layer1.1.bn2"),
                                   ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"))),
    ("a consumer is missing", Group(("conv1", "bn1", "layer1.0.conv2", "layer1.0.bn2", "layer1.1.conv2", "layer1.1.bn2"),
                                       ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"))),
    ("a producer is missing", Group(("conv1", "bn1", "layer1.0.conv2", "layer1.0.bn2"),
                                       ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"))),
    ("the wrong consumer", Group(("layer1.0.conv1", "layer1.0.bn1"), ("layer1.1.conv2",))),
]  # fmt: skip


@pytest.mark.parametrize("wrong", [group for _, group in WRONG], ids=[case for case, _ in WRONG])
def test_check_function_finds_a_group_that_breaks_the_network_and_names_it(wrong: Group) -> None:
    torch.manual_seed(0)
    model = lively(resnet18(num_classes=5))
    right = [
        g
        for g in ARCHITECTURES["resnet18"].groups(model)
        if g.children in (("layer2.0.conv2",), ("layer4.1.conv1", "fc"))
    ]
    assert len(right) == 2
    with pytest.raises(GroupError) as error:
        check_function(model, [right[0], wrong, right[1]], torch.randn(1, 3, 32, 32))
    assert "permutations[1]" in str(error.value)
    for name in wrong.parents + wrong.children:
        assert name in str(error.value)
