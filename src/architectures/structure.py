"""Networks without memory for their weights: for looking at shapes, and for files that bring the values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, of which layers make their weights, gives tensors without memory; everything else is computed:
    networks ask their own small tensors for sizes, and keep tables in buffers that no file holds."""

    def __torch_function__(
        self, func: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        of_weights = options.get("dtype") is None or options["dtype"].is_floating_point  # others are tables of places
        if func is torch.empty and of_weights and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` makes, its weights on the meta device; buffers have their values. One that computes
    something while it is built has weights on the CPU."""
    try:
        with _EmptyOnMeta():
            return build()
    except (RuntimeError, NotImplementedError):  # of operators on tensors with and without memory
        return build()


def with_memory(model: nn.Module) -> nn.Module:
    """Give what is on the meta device memory on the CPU, with no values yet; in place. Shared tensors stay shared."""
    made: dict[int, Tensor] = {}

    def real(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="cpu")
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    held[name] = real(tensor)  # type: ignore[assignment]
    return model


def shapes_of(model: nn.Module) -> nn.Module:
    """A copy of `model` without memory for its weights and buffers."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)
