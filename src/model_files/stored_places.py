"""Where the channels of a group stand, in the few numbers that a file holds of it.

The positions of channels are nearly always nested steps: from a start, so many channels with the same distance, again
and again at a larger distance, and within a channel likewise. A file may have been written by anyone: what it says is
checked when it is read, and positions are counted out only for a tensor that is as large as they claim.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common.errors import GroupError
from ..compression.permute.binding import check_places
from ..compression.permute.channels import ChannelGroup, Places, named_tensor, permuted
from ..compression.permute.operations import check_permutation

Steps = tuple[tuple[int, int], ...]
"""(count, step) of nested loops, the outermost first."""

MOST_AXES = 8
"""Axes of a tensor, and depth of nested steps, that are read."""
LARGEST = 1 << 48
"""Positions that a tensor may be said to have."""
LONGEST = 1 << 24
"""Letters of JSON that are inflated; DenseNet-121's 120 groups have 140,000."""


@dataclass(frozen=True)
class StoredPlaces:
    """`Places` of some tensors of one module, not counted out.

    Attributes:
        module: name of the module.
        leaves: names of its tensors.
        shape, reads: as in `Places`.
        start: the first channel's first position, where there are `channels`.
        channels: steps from channel to channel; empty for a group listed position by position.
        inner: steps within a channel.
        listed: all positions, channel by channel; None where the steps say them.
    """

    module: str
    leaves: tuple[str, ...]
    shape: tuple[int, ...]
    reads: bool
    start: int = 0
    channels: Steps = ()
    inner: Steps = ()
    listed: tuple[int, ...] | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(f"{self.module}.{leaf}" if self.module else leaf for leaf in self.leaves)

    @property
    def n_positions(self) -> int:
        """Positions of all channels together."""
        if self.listed is not None:
            return len(self.listed)
        return math.prod(count for count, _ in (*self.channels, *self.inner))

    def places(self, tensor: str, width: int) -> Places:
        """Counted out, for `width` channels; call it only for a tensor that is as large as `shape` says."""
        if self.listed is not None:
            positions = torch.tensor(self.listed, dtype=torch.int64).reshape(width, -1)
        else:
            positions = self.start + _counted(self.channels)[:, None] + _counted(self.inner)
        return Places(tensor=tensor, shape=self.shape, positions=positions, reads=self.reads)

    def row(self) -> list[Any]:
        """As JSON can hold it."""
        about: list[Any] = [[self.module, *self.leaves], list(self.shape), int(self.reads)]
        if self.listed is not None:
            return [*about, list(self.listed)]
        return [*about, self.start, [list(pair) for pair in self.channels], [list(pair) for pair in self.inner]]


def _counted(steps: Steps) -> Tensor:
    numbers = torch.zeros(1, dtype=torch.int64)
    for count, step in steps:
        numbers = (numbers[:, None] + torch.arange(count) * step).reshape(-1)
    return numbers


def stored(group: ChannelGroup) -> tuple[StoredPlaces, ...]:
    """The places of a group, in few numbers; tensors of one module with the same positions stand together."""
    found: dict[StoredPlaces, list[str]] = {}
    for places in group.places:
        module, _, leaf = places.tensor.rpartition(".")
        form = _compact(places.positions.numpy())
        key = StoredPlaces(module=module, leaves=(), shape=tuple(places.shape), reads=places.reads, **form)
        found.setdefault(key, []).append(leaf)
    return tuple(replace(key, leaves=tuple(leaves)) for key, leaves in found.items())


def _compact(positions: NDArray[np.int64]) -> dict[str, Any]:
    start = int(positions[0, 0])
    if np.array_equal(positions, positions[:, :1] + positions[:1] - start):
        channels, inner = _nested(positions[:, 0]), _nested(positions[0])
        if channels is not None and inner is not None:
            return {"start": start, "channels": channels, "inner": inner}
    return {"listed": tuple(positions.reshape(-1).tolist())}


def _nested(numbers: NDArray[np.int64]) -> Steps | None:
    """The nested steps that count `numbers` out; None where there are none that only rise."""
    if numbers.size == 1:
        return ()
    differences = np.diff(numbers)
    step = int(differences[0])
    others = np.flatnonzero(differences != step)
    run = int(others[0]) + 1 if others.size else numbers.size
    if step <= 0 or numbers.size % run:
        return None
    runs = numbers.reshape(-1, run)
    if not (runs - runs[:, :1] == runs[0] - runs[0, 0]).all():
        return None
    outer = _nested(runs[:, 0])
    return None if outer is None or len(outer) >= MOST_AXES else (*outer, (run, step))


def read_rows(rows: Any, width: int) -> tuple[StoredPlaces, ...]:
    """The places of a group of `width` channels from the rows of a file.

    Raises:
        ValueError: they are not as `StoredPlaces.row` writes them, or claim more positions than the tensors can have.
    """
    if not isinstance(rows, list) or not rows:
        raise ValueError("no list of places")
    found = tuple(_read_row(row, width) for row in rows)
    claimed: dict[tuple[str, tuple[int, ...]], int] = {}
    for places in found:
        for tensor in places.tensors:
            key = (tensor, places.shape)
            claimed[key] = claimed.get(key, 0) + places.n_positions
            if claimed[key] > math.prod(places.shape):
                raise ValueError(f"more positions than {tensor} has")
    return found


def _read_row(row: Any, width: int) -> StoredPlaces:
    if not isinstance(row, list) or len(row) not in (4, 6):
        raise ValueError("not a row of places")
    names, shape, reads, *form = row
    if not _are(names, str) or len(names) < 2 or len(set(names[1:])) < len(names) - 1 or "" in names[1:]:
        raise ValueError("not the names of a module and its tensors")
    if not _are(shape, int) or not 1 <= len(shape) <= MOST_AXES or min(shape) < 1 or math.prod(shape) >= LARGEST:
        raise ValueError("not the shape of a tensor")
    if type(reads) is not int or reads not in (0, 1):
        raise ValueError("not 0 or 1")
    module, *leaves = names
    size = math.prod(shape)
    about = StoredPlaces(module=module, leaves=tuple(leaves), shape=tuple(shape), reads=reads == 1)
    if len(form) == 1:
        (listed,) = form
        if not _are(listed, int) or not listed or len(listed) % width or not 0 <= min(listed) <= max(listed) < size:
            raise ValueError("not positions of the tensor")
        return replace(about, listed=tuple(listed))
    start, channels, inner = form
    if type(start) is not int or not 0 <= start < size:
        raise ValueError("not a position of the tensor")
    outer, within = _read_steps(channels), _read_steps(inner)
    last = start + sum((count - 1) * step for count, step in (*outer, *within))
    if math.prod(count for count, _ in outer) != width or last >= size:
        raise ValueError("not positions of the group's channels")
    return replace(about, start=start, channels=outer, inner=within)


def _read_steps(found: Any) -> Steps:
    if not isinstance(found, list) or len(found) > MOST_AXES:
        raise ValueError("not a list of steps")
    if not all(
        _are(pair, int) and len(pair) == 2 and 1 <= pair[0] < 1 << 31 and 1 <= pair[1] < LARGEST for pair in found
    ):
        raise ValueError("not counts and steps")
    return tuple((count, step) for count, step in found)


def _are(found: Any, kind: type) -> bool:
    return isinstance(found, list) and all(type(item) is kind for item in found)


def deflated(value: Any) -> str:
    """A value as JSON, deflated, in letters: places repeat each other, and quotes in metadata are escaped twice."""
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)).decode()


def inflated(text: str) -> Any:
    """The value of `deflated`.

    Raises:
        ValueError: it is not such a text, or longer than `LONGEST`.
    """
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(base64.b64decode(text, validate=True), LONGEST)
        if not stream.eof or stream.unused_data:
            raise ValueError("not a deflated text, or too long a one")
        return json.loads(data)
    except (zlib.error, RecursionError) as error:
        raise ValueError("not a deflated text of JSON") from error


def apply_stored(model: nn.Module, stored_places: Iterable[StoredPlaces], p: Tensor, n_blocks: int) -> None:
    """Reorder channels by p (C,), in place; what does not fit changes nothing of the tensor that it does not fit.

    Raises:
        GroupError: the network has no such tensor, or one of another shape, or two channels at one position.
    """
    check_permutation(p, p.numel(), n_blocks)
    for held in stored_places:
        for name in held.tensors:
            tensor = named_tensor(model, name)
            if not _fits(held.shape, tensor.shape):
                raise GroupError(f"{name} has the shape {tuple(tensor.shape)}, which does not fit {held.shape}")
            places = held.places(name, p.numel())
            check_places(tensor, places, p.numel())
            if torch.unique(places.positions).numel() < places.positions.numel():
                raise GroupError(f"two channels stand at the same position of {name}")
            tensor.data.copy_(permuted(tensor.data, places, p))


def _fits(counted: Sequence[int], shape: Sequence[int]) -> bool:
    return len(counted) == len(shape) and all(n in (1, size) for n, size in zip(counted, shape, strict=True))
