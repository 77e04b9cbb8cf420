"""How much memory the tensors of a forward pass take: those that its operators made, as long as anything holds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class LiveTensors:
    """Counts the bytes of the tensors that are made and still exist.

    Args:
        known: tensors that do not count, nor views of them.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        """The most that `count` found."""

    def made(self, out: Any) -> None:
        """Take note of what an operator returned: a tensor, or several."""
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._known:
                reference = StorageWeakRef(storage)
                self._made.setdefault(reference.cdata, (reference, storage.nbytes()))

    def count(self) -> int:
        """Bytes of those that still exist."""
        self._made = {key: found for key, found in self._made.items() if not found[0].expired()}
        total = sum(size for _, size in self._made.values())
        self.peak = max(self.peak, total)
        return total
