"""Tensors of a network that bear names which a packed file uses for itself: they stand in it under names of their own.

The metadata `renamed` say which: stored name -> the network's name. A file without such tensors has no such metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count

from torch import Tensor

from ..common.errors import CheckpointError

RENAMED = "renamed"
HEADER_OF_METADATA = "__metadata__"
"""The entry of every safetensors header that is no tensor."""


def stored_names(names: Mapping[str, Tensor], leaves: tuple[str, ...], whole: tuple[str, ...]) -> dict[str, str]:
    """Stored name -> own name of every one of `names` that the file uses for itself.

    Args:
        names: the network's tensors as they would be stored, without those that the file's own format renames.
        leaves: last parts of names that the format uses.
        whole: names that the format uses.
    """
    taken = [name for name in names if name in (*whole, HEADER_OF_METADATA) or name.rpartition(".")[2] in leaves]
    free = (name for number in count() if (name := f"{RENAMED}.{number}") not in names)
    return dict(zip(free, taken, strict=False))


def read_renamed(source: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata `renamed` of a file, checked against its tensors; empty where there are none.

    Raises:
        CheckpointError: they are not as `packed` writes them.
    """
    try:
        found = json.loads(metadata.get(RENAMED, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{source}: its metadata are damaged ({RENAMED})")
    if not set(found) <= set(tensors):
        raise CheckpointError(f"{source}: its metadata are damaged ({RENAMED})")
    return found
