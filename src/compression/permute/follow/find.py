"""The permutation groups of any network, from one forward pass (paper section 3.2.1).

A group is a claim, derived from what every operator says about its channels; `verification.check_groups` tries it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import ChannelGroup
from .assemble import groups_of
from .call import tensors_of
from .components import channels_of
from .follower import Follower, restore, tensors_by_name, watch_modules

Run = Callable[[nn.Module], Any]
"""One forward pass of a network: for a classifier `lambda model: model(example)`."""


@dataclass(frozen=True)
class FoundGroups:
    """What one forward pass shows.

    Attributes:
        groups: in the network's order; whole blocks that may be exchanged (heads of attention) come last.
        left_alone: modules of which no parameter took part in the pass, for example heads that only training uses. If a
            network is permuted, they see channels in another order than before.
        notes: what else was not followed, one sentence each.
    """

    groups: list[ChannelGroup]
    left_alone: tuple[str, ...]
    notes: tuple[str, ...]


def find_groups(model: nn.Module, run: Run) -> FoundGroups:
    """Find all channels that may be exchanged, by following them through one forward pass.

    The pass runs in evaluation mode and without gradients; afterwards the network is as it was, also if the pass fails.
    Activations are not kept: memory is that of the pass and of the labels, which are small.

    Args:
        model: the dense network.
        run: makes the pass; what it raises is raised. All tensors in what it returns keep the order of their channels.
    """
    follower = Follower(model)
    with _evaluation(model, follower):
        outputs = run(model)
    follower.graph.step += 1
    for tensor in _outputs(outputs):
        for label in follower.labels(tensor):
            follower.graph.fix(label)
    groups, skipped = groups_of(channels_of(follower.graph, follower.slots))
    notes = [
        f"channels that meet the operator {name}" + (f" in {module}" if module else "") + " keep their order: there is "
        "no rule for it"
        for name, module in follower.unknown.items()
    ]
    notes += [f"the channels of {label} keep their order: their places do not match" for label in skipped]
    return FoundGroups(groups=groups, left_alone=_unused(model, follower.used), notes=tuple(notes))


@contextmanager
def _evaluation(model: nn.Module, follower: Follower) -> Iterator[None]:
    """Watch a pass in evaluation mode, and leave everything as it was found."""
    training = {module: module.training for module in model.modules()}
    tensors = tensors_by_name(model)
    held: list[tuple[Any, dict[str, Any]]] = [
        (store, dict(store)) for module in model.modules() for store in (module._parameters, module._buffers)
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    end = watch_modules(model, follower)
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # a fused operator that shows nothing of its inside
        model.train()  # some networks keep what they computed from weights in evaluation, until they train again
        model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), follower:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        end()
        model.train()
        for module, was in training.items():
            module.training = was
        for store, before in held:
            if any(store.get(name) is not tensor for name, tensor in before.items()):
                store.update(before)
        restore(tensors, follower.changed)


def _outputs(value: Any) -> list[Tensor]:
    """All tensors of an output, also in objects that hold them as attributes."""
    found = tensors_of(value)
    if not found and hasattr(value, "__dict__"):
        found = [tensor for held in vars(value).values() for tensor in tensors_of(held)]
    return found


def _unused(model: nn.Module, used: set[str]) -> tuple[str, ...]:
    """The outermost modules of which no parameter took part; parameters of their own where a module took part."""
    names = [name for name, _ in model.named_parameters()]
    found: list[str] = []
    for name in names:
        if name in used:
            continue
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            if not any(other == prefix or other.startswith(prefix + ".") for other in used):
                found.append(prefix)
                break
    return tuple(dict.fromkeys(found))
