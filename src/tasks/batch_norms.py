"""Batch norms need more than one value per channel to have a variance; which of them would not have it is found out
before any work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.errors import SettingsError
from ..compression.finetune.task import evaluating


def check_lone_values(model: nn.Module, run: Callable[[nn.Module], object], advice: str) -> None:
    """Raises SettingsError where a batch norm of `model` sees one value per channel.

    Args:
        model: on the CPU, in evaluation or training mode; comes back as it was.
        run: calls the network on the smallest batch of the training.
        advice: what the user can do, at the end of the message.
    """
    lone: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if norm.track_running_stats and inputs[0].numel() == inputs[0].shape[1]:
                lone.append(name)

        return look

    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(watch(name)) for name, norm in norms]
    try:
        with evaluating(model), torch.no_grad():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    if lone:
        raise SettingsError(
            f"dataloader.batch_size: a process trains on single images, of which {len(lone)} batch norms (the first is "
            f"{lone[0]}) would see one value per channel, which has no variance. {advice}"
        )
