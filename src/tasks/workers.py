"""What travels from the processes that load images to the main process, and what happens where that fails.

A batch travels as one block of shared memory, whatever tensors it consists of: one file descriptor instead of one for
every tensor. Where the block cannot be had, or the batch not be sent, a `LoadingFailed` travels in its place: torch
would print the error of its sending thread and let the main process wait for ever.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor

from ..common.errors import RunError

ALIGNMENT = 64
"""Bytes: every tensor of a block starts at a multiple of this."""

BROKEN = 70
"""Exit status of a loader's process of which a thread met an error that it could not send."""

ADVICE = (
    "Use fewer --dataloader.num_workers (0 loads in the main process) or a smaller --dataloader.batch_size, or allow "
    "more: shared memory (docker run --shm-size=8g), open files (ulimit -n 65536), processes (ulimit -u), memory"
)
SHORTAGES = {
    errno.EMFILE: "too many files are open in one process (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOSPC: "the shared memory (/dev/shm) is full",
    errno.EAGAIN: "no further process can be started (ulimit -u)",
    errno.ENOMEM: "there is not enough memory",
}


@dataclass(frozen=True)
class LoadingFailed:
    """Takes the place of a batch that could not be sent.

    Attributes:
        reason: why, in a few words.
    """

    reason: str

    def error(self) -> RunError:
        """The error for people that it becomes in the main process."""
        return RunError(f"a process that loads images cannot hand over a batch: {self.reason}. {ADVICE}")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a block, and whether there with the colours of a pixel together."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool

    @property
    def n_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def within(self, block: Tensor) -> Tensor:
        """The tensor, in the memory of the block."""
        values = block[self.start : self.start + self.n_bytes].view(self.dtype)
        if self.channels_last:
            n, channels, height, width = self.shape
            return values.view(n, height, width, channels).permute(0, 3, 1, 2)
        return values.view(self.shape)


@dataclass(frozen=True)
class Shipped:
    """A batch on its way.

    Attributes:
        block: the values of all tensors, (bytes,) uint8.
        rest: the batch, with the place of each of its tensors in `block` instead of the tensor.
    """

    block: Tensor
    rest: Any

    def pin_memory(self) -> Shipped:
        """The same in page-locked memory (the loader calls this for CUDA)."""
        return Shipped(self.block.pin_memory(), self.rest)

    def unpacked(self) -> Any:
        """The batch; its tensors share the memory of `block`."""
        return _exchange(self.rest, _Place, lambda place: place.within(self.block))


def pack(batch: Any) -> Shipped:
    """`batch`, made of dataclasses, dictionaries, tuples and lists of tensors, with its tensors in shared memory.

    Raises:
        RuntimeError: there is not enough shared memory.
        OSError: there are too many open files.
    """
    placed: list[tuple[Tensor, _Place]] = []
    end = 0

    def place_of(tensor: Tensor) -> _Place:
        nonlocal end
        channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        place = _Place(start=end, shape=tensor.shape, dtype=tensor.dtype, channels_last=channels_last)
        placed.append((tensor, place))
        end += -(-place.n_bytes // ALIGNMENT) * ALIGNMENT
        return place

    rest = _exchange(batch, Tensor, place_of)
    storage = torch.UntypedStorage._new_shared(max(end, ALIGNMENT), device="cpu")
    shipped = Shipped(torch.empty(0, dtype=torch.uint8).set_(storage), rest)
    for tensor, place in placed:
        place.within(shipped.block).copy_(tensor)
    return shipped


def _exchange(value: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """`value` with `new(part)` in place of every part that is a `kind`, in the order of the parts."""
    if isinstance(value, kind):
        return new(value)
    if isinstance(value, dict):
        return {key: _exchange(part, kind, new) for key, part in value.items()}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields") and not isinstance(value, torch.Size):
        return type(value)(_exchange(part, kind, new) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _exchange(part, kind, new) for name, part in parts.items()})
    return value


@dataclass(frozen=True)
class CollateToShip:
    """Makes a batch of items, as `collate` does, and packs it to be sent to the main process.

    Attributes:
        collate: makes a batch of items.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: list[Any]) -> Shipped | LoadingFailed:
        """The batch, packed, or why that is impossible on this machine."""
        try:
            return pack(self.collate(items))
        except (OSError, MemoryError, RuntimeError) as error:
            if reason := shortage(error):
                return LoadingFailed(reason)
            raise


def prepare_worker(number: int) -> None:  # noqa: ARG001 (of DataLoader)
    """Called in each loader's process before it loads: errors of its threads reach the main process.

    What the thread that sends batches cannot send is replaced by a `LoadingFailed`. Any other thread's error ends the
    process, which the main process notices within seconds.
    """
    Queue._on_queue_feeder_error = _send_failure  # type: ignore[attr-defined]
    _spare_files()
    sys.excepthook = lambda *_: os._exit(BROKEN)  # multiprocessing's thread that hands over file descriptors
    threading.excepthook = lambda _: os._exit(BROKEN)


def _spare_files() -> None:
    """Keep two files open until this process ends: multiprocessing then removes its temporary folder, for which it
    opens two, and would print a traceback where no more can be opened."""
    for _ in range(2):
        with suppress(OSError):
            Finalize(None, os.close, args=(os.open(os.devnull, os.O_RDONLY),), exitpriority=0)


def _send_failure(queue: Any, error: Exception, item: Any) -> None:
    """Called in the sending thread where it cannot send `item`."""
    try:
        number, _ = item
        queue.put((number, LoadingFailed(shortage(error) or _first_line(error))))
    except Exception:  # nothing can be sent any more
        os._exit(BROKEN)


def shortage(error: BaseException) -> str | None:
    """What the machine lacks if `error` says that it lacks something; None: the error is of another kind."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in SHORTAGES:
        return SHORTAGES[error.errno]
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "Cannot allocate memory" in text:
        return SHORTAGES[errno.ENOMEM]
    if "Too many open files" in text:
        return SHORTAGES[errno.EMFILE]
    if "shared memory" in text or "file </torch_" in text or "No space left on device" in text:
        return SHORTAGES[errno.ENOSPC]
    return None


def loader_death(error: BaseException) -> RunError | None:
    """An error for people if `error` is torch's word for a loader's process or thread that died.

    Torch raises it wherever the main process happens to be when the system tells it, not only where it waits for a
    batch.
    """
    if not isinstance(error, RuntimeError):
        return None
    if "DataLoader worker (pid" in str(error):
        return _died(_first_line(error))
    if "Pin memory thread exited" in str(error) or "Communication with the workers" in str(error):
        return RunError(f"batches no longer arrive from the processes that load images: {_first_line(error)}. {ADVICE}")
    return None


def broken_loader(error: BaseException) -> RunError | None:
    """An error for people if `error`, which the loader raised in the main process, is the machine's fault."""
    if death := loader_death(error):
        return death
    if reason := shortage(error):
        return RunError(f"images cannot be loaded: {reason}. {ADVICE}")
    if isinstance(error, EOFError | ConnectionError):
        return _died(f"the connection to it broke ({type(error).__name__})")
    if isinstance(error, OSError):
        return RunError(f"the processes that load images cannot be started or reached: {error}. {ADVICE}")
    return None


def _died(how: str) -> RunError:
    return RunError(
        f"a process that loads images died: {how}. This is usually a lack of memory or of shared memory (/dev/shm). "
        f"{ADVICE}"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
