"""Groups of layers that share one permutation: the form users write, checked against the network before any work.

A group lists parents (the producers of the channels) and children (their consumers); paper section 3.2.1.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import GroupError
from ...common.randomness import stream
from .operations import Reshape, Side, check_permutation, check_reshape, flattened_input, side_of
from .verification import Trial, said_by_the_network


@dataclass(frozen=True)
class Group:
    """Names of the layers that share one permutation."""

    parents: tuple[str, ...]
    children: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """A layer in a group, resolved.

    Attributes:
        name: of the layer in the network.
        module: the layer.
        side: its output (a parent) or its input (a child).
        reshape: of a child that is a linear layer and consumes a flattened feature map.
    """

    name: str
    module: nn.Module
    side: Side
    reshape: Reshape


@dataclass(frozen=True)
class ResolvedGroup:
    """A group whose layers were found and fit each other.

    Attributes:
        label: its name in messages, for example `permutations[3] (layer1.0.conv1, layer1.0.bn1 -> layer1.0.conv2)`.
        width: number of channels C that are permuted.
        n_blocks: a permutation must stay within this many equal blocks (1: anything goes).
    """

    label: str
    parents: tuple[Member, ...]
    children: tuple[Member, ...]
    width: int
    n_blocks: int

    def apply(self, p: Tensor) -> None:
        """Reorder the channels of every member by p (C,), in place; the network's function does not change."""
        check_permutation(p, self.width, self.n_blocks)
        for member in self.parents + self.children:
            member.side.permute(member.module, p)


def resolve(
    model: nn.Module, groups: Sequence[Group], reshapes: Mapping[str, Sequence[int]] | None = None
) -> list[ResolvedGroup]:
    """Find the layers of all groups and check that they fit.

    Args:
        model: the dense network.
        groups: names of parents and children.
        reshapes: `permutation_specs.<layer>.reshape` of linear layers that consume a flattened feature map.

    Raises:
        GroupError: unknown layer, a type that cannot be permuted, widths that differ, or a layer permuted twice on one
            side.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    reshapes = reshapes or {}
    resolved = []
    seen: dict[tuple[int, str], str] = {}
    for number, group in enumerate(groups):
        label = f"permutations[{number}] ({_shortened(group.parents, 2)} -> {_shortened(group.children, 1)})"
        parents = tuple(_member(label, name, modules, "parent", reshapes) for name in group.parents)
        children = tuple(_member(label, name, modules, "child", reshapes) for name in group.children)
        for role, members in (("output", parents), ("input", children)):
            for member in members:
                _check_once(label, member, role, seen)
        first, *others = parents + children
        width = first.side.width(first.module)
        for member in others:
            _check_width(label, first.name, width, member)
        blocks = _common_blocks(label, [(m.name, m.side.blocks(m.module)) for m in (first, *others)], width)
        resolved.append(ResolvedGroup(label=label, parents=parents, children=children, width=width, n_blocks=blocks))
    return resolved


def _shortened(names: Sequence[str], most: int) -> str:
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def _member(
    label: str, name: str, modules: dict[str, nn.Module], role: str, reshapes: Mapping[str, Sequence[int]]
) -> Member:
    if name not in modules or not name:
        near = difflib.get_close_matches(name, [known for known in modules if known], n=1, cutoff=0.5)
        raise GroupError(
            f"model.{label}: the network has no layer {name!r}" + (f"; the nearest is {near[0]!r}" if near else "")
        )
    module = modules[name]
    try:
        side = side_of(name, module, role)
        reshape = tuple(int(n) for n in reshapes[name]) if role == "child" and name in reshapes else None
        if reshape:
            check_reshape(name, module, reshape)
            side = flattened_input(reshape)
    except GroupError as error:
        raise GroupError(f"model.{label}: {error}") from None
    return Member(name=name, module=module, side=side, reshape=reshape)


def _check_once(label: str, member: Member, role: str, seen: dict[tuple[int, str], str]) -> None:
    weight = getattr(member.module, "weight", None)
    # two names of one layer, or two layers that share a weight, count as one
    key = (id(weight) if weight is not None else id(member.module), role)
    if key in seen:
        raise GroupError(
            f"model.{label}: the {role} of {member.name} would be permuted twice, here and as {seen[key]}; a layer's "
            f"{role} belongs to one group"
        )
    seen[key] = f"{member.name} in {label.split(' ')[0]}"


def _check_width(label: str, first: str, width: int, member: Member) -> None:
    other = member.side.width(member.module)
    if other == width:
        return
    hint = ""
    if isinstance(member.module, nn.Linear) and member.reshape is None and other % width == 0 and other > width:
        side = other // width
        hint = (
            f"; if it reads a flattened map, set permutation_specs.{member.name}.reshape: "
            f"[{member.module.out_features}, {width}, h, w] with h*w = {side}"
        )
    raise GroupError(
        f"model.{label}: {member.name} has {other} channels on the side that is permuted, but {first} has {width}{hint}"
    )


def _common_blocks(label: str, counts: list[tuple[str, int]], width: int) -> int:
    largest = max(count for _, count in counts)
    for name, count in counts:
        if largest % count:
            raise GroupError(
                f"model.{label}: {name} has {count} convolution groups, which do not nest in the {largest} of another "
                "layer; leave one of them out"
            )
    if largest >= width:
        name = next(name for name, count in counts if count == largest)
        raise GroupError(
            f"model.{label}: {name} has {largest} convolution groups for {width} channels, so no channel can be moved; "
            "take this group out"
        )
    return largest


def random_permutation(width: int, n_blocks: int, generator: torch.Generator) -> Tensor:
    """A random permutation (width,) that stays within `n_blocks` equal blocks."""
    size = width // n_blocks
    return torch.cat([torch.randperm(size, generator=generator) + block * size for block in range(n_blocks)])


Outputs = Callable[[nn.Module, Tensor], Any]
"""(network, example) -> the tensors, in lists or maps, that must not change."""


def call_network(model: nn.Module, example: Tensor) -> Any:
    """The output of a network that takes `example` as it is."""
    return model(example)


def check_function(
    model: nn.Module,
    groups: Sequence[Group],
    example: Tensor,
    reshapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    outputs: Outputs = call_network,
) -> None:
    """Try random permutations of all groups on a float64 copy of the network and compare its output.

    A group that names existing layers of equal width can still be wrong (a consumer forgotten, a norm left out);
    permuting it would break the network silently. This finds it before any work, and names the group.

    Args:
        model: the dense network; not changed.
        groups: as for `resolve`.
        example: one batch of inputs (B, ...), any values.
        reshapes: as for `resolve`.
        seed: of the random permutations.
        outputs: the tensors to compare, for networks that do not take `example` as it is or whose output shows too
            little.

    Raises:
        GroupError: a group changes one of the outputs by more than rounding can (see `verification`), or nothing can
            be compared.
    """
    if not groups:
        return
    trial = Trial(model, said_by_the_network(lambda network: outputs(network, example)), seed)
    resolved = resolve(trial.model, groups, reshapes)
    permutations = [random_permutation(g.width, g.n_blocks, stream(seed, "check", g.label)) for g in resolved]

    def change(numbers: Sequence[int]) -> float:
        for number in numbers:
            resolved[number].apply(permutations[number])
        changed = trial.change()
        for number in reversed(numbers):
            resolved[number].apply(permutations[number].argsort())
        return changed

    if change(range(len(groups))) <= trial.tolerance:
        return
    for number, group in enumerate(groups):
        changed = change([number])
        if changed > trial.tolerance:
            raise GroupError(
                f"model.permutations[{number}]: permuting this group changes the network's output (by {changed:.1e} of "
                "its norm): "
                "a layer that produces or consumes these channels is missing or wrong.\n  parents: "
                f"{', '.join(group.parents)}\n  children: {', '.join(group.children)}"
            )
    raise GroupError(
        "model.permutations: the groups together change the network's output, although each alone does not"
    )
