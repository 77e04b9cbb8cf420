"""Groups are tried: right ones pass, wrong ones are found, whatever the network's vectors are."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import GroupError
from src.compression.permute.channels import ChannelGroup, Places
from src.compression.permute.follow.find import find_groups
from src.compression.permute.groups import Group, check_function
from src.compression.permute.verification import Trial, check_groups, make_channels_differ

from .networks import CASES, Net, conv


def rows(tensor: str, width: int, rank: int, reads: bool = False) -> Places:
    """All positions along axis 0, or along axis 1 of what is read."""
    shape = [width if axis == int(reads) else 1 for axis in range(rank)]
    return Places(tensor, tuple(shape), torch.arange(width).reshape(-1, 1), reads)


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.LayerNorm(8))))


def right(number: int) -> ChannelGroup:
    """The channels between two linear layers of `chain`."""
    names = (f"{2 * number}.weight", f"{2 * number}.bias", f"{2 * number + 1}.weight", f"{2 * number + 1}.bias")
    places = (
        rows(names[0], 8, 2),
        *(rows(name, 8, 1) for name in names[1:]),
        rows(f"{2 * number + 2}.weight", 8, 2, True),
    )
    return ChannelGroup(f"between {number} and {number + 1}", places)


X = torch.rand(3, 8)


def run(net: nn.Module) -> Tensor:
    return net(X)


def test_right_groups_pass_and_the_network_is_not_changed() -> None:
    model = chain()
    before = copy.deepcopy(model.state_dict())
    kept, dropped = check_groups(model, [right(n) for n in range(7)], run)
    assert len(kept) == 7
    assert dropped == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("missing", range(1, 5))
@pytest.mark.parametrize("bad", [(2,), (0, 6), (1, 2, 3)])
def test_a_group_with_a_place_missing_is_found_among_right_ones(bad: tuple[int, ...], missing: int) -> None:
    groups = [right(n) for n in range(7)]
    for number in bad:
        places = groups[number].places
        groups[number] = replace(groups[number], places=places[:missing] + places[missing + 1 :])
    kept, dropped = check_groups(chain(), groups, run)
    assert [group.label for group in dropped] == [groups[number].label for number in bad]
    assert len(kept) == 7 - len(bad)


def test_groups_that_are_wrong_only_together_do_not_all_stay() -> None:
    """The same channels twice, in two halves of what moves: each alone is wrong; and a right one stays."""
    first = right(1)
    halves = [
        replace(first, label=f"half {n}", places=part) for n, part in enumerate((first.places[:2], first.places[2:]))
    ]
    kept, dropped = check_groups(chain(), [*halves, right(4)], run)
    assert [group.label for group in kept] == ["between 4 and 5"]
    assert len(dropped) == 2


def test_users_own_groups_are_tried_with_every_vector_random() -> None:
    """A fresh layer norm has equal weights: only random ones show that it was forgotten."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(GroupError, match=r"permutations\[0\]"):
        check_function(model, [Group(("0",), ("2",))], torch.rand(4, 6))


def test_a_layer_of_zeros_hides_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    nn.init.zeros_(model[2].weight)
    with pytest.raises(GroupError, match=r"permutations\[0\]"):
        check_function(model, [Group(("0",), ("2",))], torch.rand(4, 6))


def test_the_tolerance_follows_the_network() -> None:
    """Each step multiplies a difference by about 30: rounding reaches 1e-7 at the end, which is no fault of a group."""

    def sensitive(net: Net, x: Tensor) -> Tensor:
        x = net.b(torch.relu(net.a(x)))
        for _ in range(6):
            x = torch.sin(30 * x)
        return x

    torch.manual_seed(0)
    model = Net(sensitive, a=nn.Linear(8, 64), b=nn.Linear(64, 3))
    found = find_groups(model, run)
    assert Trial(model, run, 0).tolerance > 1e-8
    kept, dropped = check_groups(model, found.groups, run)
    assert len(kept) == 1
    wrong = replace(found.groups[0], places=found.groups[0].places[:2])
    assert check_groups(model, [wrong], run) == ([], [wrong])
    del dropped


def test_outputs_that_cannot_be_compared_are_an_error_that_says_so() -> None:
    model = chain()
    with pytest.raises(GroupError, match="not finite"):
        check_groups(model, [right(0)], lambda net: net(X) / 0)
    with pytest.raises(GroupError, match="empty"):
        check_groups(model, [right(0)], lambda _net: [])
    with pytest.raises(GroupError, match="by rounding"):
        check_groups(model, [right(0)], lambda net: net(X) + torch.rand(3, 8))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_a_network_that_asks_for_less_than_float64_is_tried_in_float64(kind: torch.dtype) -> None:
    model = Net(lambda m, x: m.b(m.a(x).to(kind).relu().float()), a=nn.Linear(8, 6), b=nn.Linear(6, 3))
    found = find_groups(model, run)
    assert Trial(model, run, 0).tolerance < 1e-11
    assert len(check_groups(model, found.groups, run)[0]) == 1


def test_every_vector_and_every_constant_tensor_gets_values_of_its_own() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.PReLU(4), nn.LayerNorm(4), nn.Linear(4, 4))
    model.register_parameter("scale", nn.Parameter(torch.full((4, 1, 1), 1e-6)))
    nn.init.zeros_(model[4].weight)
    make_channels_differ(model, torch.Generator().manual_seed(0))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            assert tensor.unique().numel() == tensor.numel(), name
    assert (model[1].running_var > 0).all()


def test_a_fixed_seed_tries_the_same_permutations() -> None:
    build, shape, _ = CASES["heads"]
    model, x = build(), torch.rand(shape)
    trials = [Trial(model, lambda net: net(x), 3) for _ in range(2)]
    assert trials[0].tolerance == trials[1].tolerance
    assert all(
        torch.equal(a, b) for a, b in zip(trials[0].model.parameters(), trials[1].model.parameters(), strict=True)
    )


class Keeps(nn.Module):
    """In evaluation it computes its scale once and keeps it, until it trains again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(8, 6), nn.Linear(6, 3), nn.Parameter(torch.rand(6))
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> Keeps:
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.scale.exp().detach()
        return self.b(self.a(x) * self.kept)


def test_what_a_network_computed_from_its_weights_and_kept_is_computed_again() -> None:
    model = Keeps().eval()
    run(model)
    (group,) = find_groups(model, run).groups
    assert set(group.parents) == {"a", ""}
    assert check_groups(model, [group], run) == ([group], [])
    assert not model.training
    before = run(model)
    find_groups(model, run)
    group.apply(model, torch.arange(6).roll(1))
    assert torch.allclose(run(model), before, atol=1e-6), "what was kept from the pass no longer fits"
