"""What engines of several processes share: everything but the few exchanges that each does in its own way."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import SettingsError
from .launch import Launch
from .machine import own_processors

ADDED_AS = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.uint8: torch.int64,
    torch.int8: torch.int64,
    torch.int16: torch.int64,
}
"""Types that an engine cannot add, or not without loss, and the type in which they are added."""


class Processes(ABC):
    """One of several processes that share a run.

    Attributes:
        rank, world_size: number of this process, and of all.
        local_size: processes on this machine.
        device: the device of this process.
    """

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self.rank, self.world_size = launch.rank, launch.world_size
        self.local_rank, self.local_size = launch.local_rank, launch.local_size
        self.device = device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files, logs and bars."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """True on one process of each machine."""
        return self.local_rank == 0

    @abstractmethod
    def _add(self, values: Tensor) -> Tensor:
        """Sum over all processes of a contiguous float32, float64, int32 or int64 tensor on the device; it may be
        overwritten."""

    @abstractmethod
    def _collect(self, values: Tensor) -> list[Tensor]:
        """The one-dimensional uint8 tensors, of any lengths, of all processes in the order of their ranks, on the
        CPU."""

    @abstractmethod
    def _send(self, values: Tensor, source: int) -> Tensor:
        """The one-dimensional uint8 tensor of the process `source`, on the device; `values`, of the same length, may be
        overwritten."""

    @abstractmethod
    def wrap_model(self, model: nn.Module) -> nn.Module:
        """The model to call in training steps, so that gradients are averaged over the processes when a backward pass
        ends."""

    @abstractmethod
    def lost_contact(self, error: Exception) -> bool:
        """True if `error` says that another process went away."""

    @abstractmethod
    def close(self) -> None:
        """Take leave of the others; called where all processes are done."""

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum of `values` over all processes, in their type and on their device.

        Raises:
            TypeError: they are neither floating-point numbers nor integers.
        """
        if values.dtype == torch.bool or values.is_complex():
            raise TypeError(f"{values.dtype} cannot be added; convert to a number first")
        wide = values.detach().to(self.device, ADDED_AS.get(values.dtype, values.dtype), copy=True).contiguous()
        return self._add(wide).to(values.device, values.dtype)

    def gather(self, rows: Sequence[Any]) -> list[Any]:
        """The rows of all processes, in the order of their ranks, on every process.

        Args:
            rows: objects that JSON can hold (tuples arrive as lists). They travel as text: nothing that arrives is
                executed.
        """
        text = json.dumps(list(rows), separators=(",", ":")).encode()
        parts = self._collect(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return [row for part in parts for row in json.loads(part.numpy().tobytes())]

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite `tensors` (same shapes and types everywhere) with those of the process `source`; any type."""
        if not tensors:
            return
        with torch.no_grad():
            # as bytes, in one message: there is no type that an engine could refuse, and no rounding
            flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(self.device) for tensor in tensors]
            arrived = self._send(torch.cat(flat), source).split([part.numel() for part in flat])
            if self.rank != source:
                for tensor, part in zip(tensors, arrived, strict=True):
                    tensor.copy_(part.clone().view(tensor.dtype).reshape(tensor.shape))

    def barrier(self) -> None:
        """Wait for all processes."""
        self._add(torch.zeros(1, device=self.device))

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:  # noqa: ARG002 (of Engine)
        """`optimizer` itself, as the gradients that it finds are averaged already; a state that it brings along becomes
        rank 0's."""
        states = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        self.broadcast([value for state in states for _, value in sorted(state.items()) if isinstance(value, Tensor)])
        return optimizer

    def average_buffers(self, model: nn.Module) -> None:
        """Give the running statistics of all processes' models their mean: each has seen its own images."""
        with torch.no_grad():
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.sum(buffer.double() if self.device.type != "mps" else buffer) / self.world_size)


def device_for(launch: Launch, device: torch.device) -> torch.device:
    """The device of this process: one CUDA device for each process of a machine, or the CPU; threads are shared out
    alike.

    Raises:
        SettingsError: a device that several processes cannot use together, or fewer CUDA devices than processes.
    """
    if device.type == "mps":
        raise SettingsError("device: mps works with one process only; use --device cpu for several")
    if device.type == "cuda":
        n_devices = torch.cuda.device_count()
        if device.index is not None and launch.local_size > 1:
            raise SettingsError(
                f"device: {device} would be shared by {launch.local_size} processes; use --device cuda, which gives "
                "each its own "
                "(CUDA_VISIBLE_DEVICES chooses among them)"
            )
        index = launch.local_rank if device.index is None else device.index
        if index >= n_devices:
            raise SettingsError(
                f"device: {launch.local_size} processes were started on this machine, which has {n_devices} CUDA "
                "devices; "
                f"start at most {n_devices} here, or use --device cpu"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if "OMP_NUM_THREADS" not in os.environ:  # each process would take all processors
        torch.set_num_threads(own_processors())
    return device
