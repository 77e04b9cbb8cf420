"""Processes started by torchrun (or by anything that sets its variables): torch.distributed and
DistributedDataParallel."""

from __future__ import annotations

import inspect
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common.errors import SettingsError
from .launch import Launch
from .meeting import store_of_this_start
from .processes import Processes, device_for

MEETING_TIME = timedelta(minutes=5)
"""How long processes wait for each other at the start."""

WORKING_TIME = timedelta(days=2)
"""How long one may work (search, cluster) while others wait; a process that dies is the launcher's to notice."""

GIVING_BACK = 0.2
"""Seconds that gloo's threads get to finish with the last exchange."""


class TorchRun(Processes):
    """One of several processes that talk through torch.distributed: NCCL between GPUs, Gloo between CPUs."""

    def __init__(self, launch: Launch, device: torch.device) -> None:
        """Meet the others.

        Raises:
            SettingsError: the port is taken, the others do not come, or the device does not fit.
        """
        super().__init__(launch, device_for(launch, device))
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            store = store_of_this_start(launch, MEETING_TIME)
            dist.init_process_group(
                backend, timeout=MEETING_TIME, store=store, rank=self.rank, world_size=self.world_size
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise SettingsError(_no_meeting(error, launch)) from error
        group = dist.new_group(timeout=WORKING_TIME)
        assert isinstance(group, dist.ProcessGroup), "a group of all processes has this one in it"
        self._group = group

    def _add(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self._group)
        return values

    def _collect(self, values: Tensor) -> list[Tensor]:
        mine = torch.tensor([values.numel()], device=self.device)
        sizes = [torch.zeros_like(mine) for _ in range(self.world_size)]
        dist.all_gather(sizes, mine, group=self._group)
        counts = [int(size) for size in sizes]
        padded = torch.zeros(max(counts), dtype=torch.uint8, device=self.device)
        padded[: values.numel()] = values.to(self.device)
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self._group)
        return [part[:count].cpu() for part, count in zip(parts, counts, strict=True)]

    def _send(self, values: Tensor, source: int) -> Tensor:
        dist.broadcast(values, source, group=self._group)
        return values

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """`model` in DistributedDataParallel, with rank 0's values; running statistics are averaged once per epoch
        instead of sent."""
        wrapper: Any = nn.parallel.DistributedDataParallel
        devices = [self.device.index] if self.device.type == "cuda" else None
        # torch 2.14 renamed the argument
        sending = (
            "forward_sync_buffers"
            if "forward_sync_buffers" in inspect.signature(wrapper).parameters
            else "broadcast_buffers"
        )
        return wrapper(
            model, device_ids=devices, process_group=self._group, gradient_as_bucket_view=True, **{sending: False}
        )

    def lost_contact(self, error: Exception) -> bool:
        """True if `error` is Gloo's or NCCL's complaint about a connection that ended."""
        words = (
            "Connection closed by peer",
            "Connection reset by peer",
            "Broken pipe",
            "NCCL",
            "Socket closed",
            "Connection was likely closed",
        )
        return isinstance(error, RuntimeError) and any(word in str(error) for word in words)

    def close(self) -> None:
        """Leave the group."""
        # a thread of gloo may still be giving back the tensors of the last exchange, for which it needs Python's lock;
        # the group's end holds that lock and waits for the thread (seen to hang with torch 2.6)
        time.sleep(GIVING_BACK)
        dist.destroy_process_group()


def _no_meeting(error: Exception, launch: Launch) -> str:
    host, port = os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"engine: port {port} of {host} is taken by another program, perhaps another run. Choose another port with "
            "torchrun --master-port PORT (or the variable MASTER_PORT), or let torchrun --standalone find a free one "
            "on one machine"
        )
    return (
        f"engine: the {launch.world_size} processes did not meet at {host}:{port} ({said}). Start all of them within "
        f"{int(MEETING_TIME.total_seconds() // 60)} minutes, with the same address and port, and let the machines "
        "reach each other"
    )
