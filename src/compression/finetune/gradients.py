"""Which gradient was the first that was no number: the question after a loss has become none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class GradientWatch:
    """Remembers the step at which each gradient was first not finite.

    Nothing is read from the device while watching, so that it does not have to wait; `first` does.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch all trained parameters of `model`."""
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        device = next(iter(self._parameters.values())).device
        self._since = torch.zeros(len(self._parameters), dtype=torch.int64, device=device)
        self._zero = torch.zeros(1, device=device)
        self._order: list[str] = []
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._arrived(name)) for name, p in self._parameters.items()
        ]

    def _arrived(self, name: str) -> Callable[[Tensor], None]:
        return lambda _: self._order.append(name)

    def end_of_pass(self) -> None:
        """A backward pass is over: one is enough to know the order in which gradients come."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def check(self, step: int) -> Tensor:
        """Check the gradients of step `step` (from 1), after its backward pass; a truth value on the device: all are
        finite."""
        gradients = [self._zero if p.grad is None else p.grad for p in self._parameters.values()]
        # all norms in a few launches, as clip_grad_norm_ takes them; isfinite would be eight times slower on the CPU
        norms = torch.stack([value.float() for value in torch._foreach_norm(gradients, 2.0)])
        bad = ~torch.isfinite(norms)
        self._since = torch.where(bad & (self._since == 0), step, self._since)
        return ~bad.any()

    def first(self) -> tuple[int, str] | None:
        """The first step with a gradient that is not finite, and of its gradients the one that the backward pass
        reached first."""
        steps = dict(zip(self._parameters, self._since.tolist(), strict=True))
        spoilt = {name: step for name, step in steps.items() if step}
        if not spoilt:
            return None
        first = min(spoilt.values())
        return first, min((name for name, step in spoilt.items() if step == first), key=self._place)

    def _place(self, name: str) -> int:
        return self._order.index(name) if name in self._order else len(self._order)


def explain(found: tuple[int, str] | None, layers: Mapping[str, nn.Module]) -> str:
    """A sentence about what `GradientWatch.first` found; empty where that is nothing."""
    if found is None:
        return ""
    step, name = found
    layer, _, leaf = name.rpartition(".")
    kind = type(layers[layer]).__name__ if layer in layers else "network"
    return f"The gradient of layer {layer or 'model'!r} ({kind}, its {leaf}) went first, at step {step}. "
