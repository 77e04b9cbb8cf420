"""What each operator does to channels: the groups that are found, and that a random permutation of all of them at once
leaves the function as it is."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from src.compression.permute.follow.find import FoundGroups, find_groups
from src.compression.permute.verification import check_groups

from .networks import CASES, MAP, TOKENS, Net, conv, described


@pytest.mark.parametrize("case", CASES)
def test_the_groups_of_a_tiny_network(case: str) -> None:
    build, shape, expected = CASES[case]
    torch.manual_seed(0)
    model, x = build(), torch.rand(shape)
    found = find_groups(model, lambda net: net(x))
    kept, dropped = check_groups(model, found.groups, lambda net: net(x))
    assert [group.label for group in dropped] == [], "a group that was found changes the function"
    assert described(kept) == expected
    assert len({group.label for group in kept}) == len(kept), "labels name groups, so they must differ"


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    groups=st.integers(1, 3),
    norm=st.booleans(),
    joined=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_groups_of_random_chains_leave_the_function_as_it_is(
    widths: list[int], groups: int, norm: bool, joined: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [conv(3, 6 * widths[0])]
    for before, after in itertools.pairwise(widths):
        if norm:
            layers.append(nn.BatchNorm2d(6 * before))
        layers += [nn.ReLU(), conv(6 * before, 6 * after, groups=groups)]
    body, head = nn.Sequential(*layers), conv(6 * widths[-1] * (2 if joined else 1), 2, 1)
    model = Net(
        lambda m, x: m.head(torch.cat([y := m.body(x), y.flip(1)], 1) if joined else m.body(x)), body=body, head=head
    )
    x = torch.rand(MAP)
    found = find_groups(model, lambda net: net(x))
    assert len(found.groups) >= len(widths) - 1
    _, dropped = check_groups(model, found.groups, lambda net: net(x), seed)
    assert [group.label for group in dropped] == []


def test_an_operator_without_a_rule_freezes_its_channels_and_names_the_layer() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, x)

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), Odd(), nn.Linear(5, 2))
    found = find_groups(model, lambda net: net(torch.rand(TOKENS)))
    assert described(found.groups) == {(8, 1, "0", "2")}
    assert len(found.notes) == 1
    assert "_cdist_forward in 3" in found.notes[0]


def test_heads_that_do_not_run_are_named_and_have_no_part_in_a_group() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
            self.aux = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.body(x)
            return (self.head(y), self.aux(y)) if self.training else self.head(y)

    found = find_groups(TwoHeads(), lambda net: net(torch.rand(TOKENS)))
    assert found.left_alone == ("aux",)
    assert described(found.groups) == {(8, 1, "body", "head")}


def test_a_convolution_of_the_functional_form_is_followed_too() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, net.first)
        return nn.functional.conv2d(nn.functional.relu(x), net.second, groups=2)

    model = Net(forward, first=nn.Parameter(torch.randn(8, 3, 1, 1)), second=nn.Parameter(torch.randn(4, 4, 1, 1)))
    x = torch.rand(MAP)
    found = find_groups(model, lambda net: net(x))
    assert check_groups(model, found.groups, lambda net: net(x))[1] == []


class Counts(nn.Module):
    """Changes a buffer and its random state as it runs, and can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(8))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.layer(x) + torch.rand(())
        self.mean = self.mean + y.mean((0, 1))
        if self.fails:
            raise RuntimeError("does not run")
        return self.last(self.drop(y))


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(fails: bool) -> None:
    torch.manual_seed(0)
    model = Counts()
    model.fails = fails
    model.drop.eval()
    hooked: list[str] = []
    model.layer.register_forward_hook(lambda *_: hooked.append("mine"))
    state = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    mean, random = model.mean, torch.get_rng_state()

    if fails:
        with pytest.raises(RuntimeError, match="does not run"):
            find_groups(model, lambda net: net(torch.rand(TOKENS)))
    else:
        find_groups(model, lambda net: net(torch.rand(TOKENS)))

    assert hooked == ["mine"], "a hook of the user's own runs as always"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.equal(torch.get_rng_state(), random)
    assert model.mean is mean
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_same_pass_gives_the_same_groups() -> None:
    def find() -> FoundGroups:
        torch.manual_seed(0)
        build, shape, _ = CASES["a transformer's layer"]
        model, x = build(), torch.rand(shape)
        return find_groups(model, lambda net: net(x))

    first, second = find(), find()
    assert [group.label for group in first.groups] == [group.label for group in second.groups]
    for one, other in zip(first.groups, second.groups, strict=True):
        for place, twin in zip(one.places, other.places, strict=True):
            assert (place.tensor, place.shape, place.reads) == (twin.tensor, twin.shape, twin.reads)
            assert torch.equal(place.positions, twin.positions)


class AliveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators made and that live at the same time: the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._count(storage, storage.nbytes())
        return result

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self._known.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)

        def gone() -> None:
            self.alive -= size
            self._known.discard(key)

        weakref.finalize(storage, gone)


def test_following_keeps_no_activation_alive() -> None:
    """Twenty layers of the same size: a plain pass holds two or three maps at a time."""
    model = nn.Sequential(*(layer for _ in range(20) for layer in (conv(8, 8), nn.BatchNorm2d(8), nn.ReLU()))).eval()
    x = torch.rand(1, 8, 64, 64)

    def most_alive(run: Callable[[], object]) -> int:
        gc.collect()
        with torch.no_grad(), AliveBytes() as watch:
            run()
        return watch.most

    plain = most_alive(lambda: model(x))
    followed = most_alive(lambda: find_groups(model, lambda net: net(x)))
    assert plain >= x.nbytes
    assert followed <= 1.5 * plain, "activations are kept until the end of the pass"
