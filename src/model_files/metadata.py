"""What a packed file says about its model besides the tensors, and the reading of it: JSON that anyone may have
written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import CheckpointError
from ..compression.quantize.weights import SUFFIX
from .bit_packing import packed_size, unpack
from .packed_layer import PackedLayer, read_layer
from .stored_places import StoredPlaces, inflated, read_rows


@dataclass(frozen=True)
class AppliedPermutation:
    """A permutation that was applied to a group of layers, or of channels.

    Attributes:
        parents: producers, whose output channels were permuted.
        children: consumers, whose input channels were permuted alike.
        permutation: p (C,).
        reshapes: of consumers that read a flattened map.
        places: where the channels stand, of a group of channels; None: whole sides of parents and children.
        n_blocks: of a group of channels.
    """

    parents: tuple[str, ...]
    children: tuple[str, ...]
    permutation: Tensor
    reshapes: Mapping[str, tuple[int, ...]]
    places: tuple[StoredPlaces, ...] | None = None
    n_blocks: int = 1


@dataclass(frozen=True)
class ModelInfo:
    """What a file says about its model besides the tensors; None where it is not known.

    Attributes:
        arch: name of the architecture.
        num_classes: classes it tells apart.
        settings: the compression settings it was made with (`model.compression_parameters` and the search's).
        metric: what was measured on it, by name.
        permutations: those that were applied, in order; None: not known (an empty tuple: none were).
        producer: program and version that wrote the file.
        outputs_lost: of weights that were quantized with calibration, by name: the share of the energy of their outputs
            that was lost then.
    """

    arch: str | None = None
    num_classes: int | None = None
    settings: Mapping[str, Any] | None = None
    metric: Mapping[str, float] | None = None
    permutations: tuple[AppliedPermutation, ...] | None = None
    producer: str = ""
    outputs_lost: Mapping[str, float] | None = None


OUTPUTS_LOST = "outputs_lost"
"""What `shares` gives, in the table of the model; there only where the network was calibrated."""


def shares(info: ModelInfo, layers: Iterable[str]) -> dict[str, list[float | None]]:
    """What the metadata hold of `info.outputs_lost`: a number with three digits for each quantized layer."""
    if not info.outputs_lost:
        return {}
    found = (info.outputs_lost.get(name.removesuffix(SUFFIX)) for name in layers)
    return {OUTPUTS_LOST: [None if share is None else float(f"{share:.3g}") for share in found]}


def index_bits(width: int) -> int:
    """Bits of a channel's number among `width`."""
    return max(1, (width - 1).bit_length())


def group_entry(group: AppliedPermutation) -> dict[str, Any]:
    """What the metadata hold of a permutation: everything but its numbers."""
    if group.places is not None:
        blocks = {"blocks": group.n_blocks} if group.n_blocks > 1 else {}
        return {"width": group.permutation.numel(), **blocks, "places": [places.row() for places in group.places]}
    entry: dict[str, Any] = {"parents": group.parents, "children": group.children, "width": group.permutation.numel()}
    return {**entry, "reshapes": group.reshapes} if group.reshapes else entry


def describe(
    source: str, metadata: Mapping[str, str], permutations: Tensor | None
) -> tuple[ModelInfo, dict[str, PackedLayer], dict[str, str]]:
    """What the metadata of a packed file say: about the model, its quantized layers, and which names share a tensor.

    Args:
        source: the file, for messages.
        metadata: as `packed` lists them.
        permutations: the tensor of permutations, if the file has one.

    Raises:
        CheckpointError: something is missing or not as `packed` writes it.
    """
    return _Reader(source, metadata).read(permutations)


def norm_widths(source: str, metadata: Mapping[str, str]) -> dict[str, int]:
    """Channels of each norm of a packed file's stream of norms, in their order.

    Raises:
        CheckpointError: they are not as `packed` writes them.
    """
    return _Reader(source, metadata).norms()


class _Reader:
    """Reads JSON metadata field by field; whatever is not as written is a CheckpointError."""

    def __init__(self, source: str, metadata: Mapping[str, str]) -> None:
        self.source, self.metadata = source, metadata

    def read(self, packed: Tensor | None) -> tuple[ModelInfo, dict[str, PackedLayer], dict[str, str]]:
        """Everything, see `describe`."""
        known = self._table("model")
        layers = {name: self._layer(name, entry) for name, entry in self._table("layers").items()}
        info = ModelInfo(
            arch=self._text_or_none("arch", known.get("arch")),
            num_classes=self._whole_or_none("num_classes", known.get("num_classes")),
            settings=self._table_or_none("settings", known.get("settings")),
            metric=self._figures_or_none("metric", known.get("metric")),
            permutations=self._permutations(packed),
            producer=self.metadata.get("producer", ""),
            outputs_lost=self._shares(known.get(OUTPUTS_LOST), list(layers)),
        )
        tied = self._table("tied")
        if not all(isinstance(owner, str) for owner in tied.values()):
            raise self._wrong("tied")
        return info, layers, tied

    def norms(self) -> dict[str, int]:
        """See `norm_widths`."""
        found = self._table("norms")
        if not found or not all(type(width) is int and 1 <= width < 1 << 31 for width in found.values()):
            raise self._wrong("norms")
        return found

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: its metadata are damaged ({what})")

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self.metadata[name])
        except (KeyError, ValueError, RecursionError) as error:
            raise self._wrong(name) from error

    def _table(self, name: str) -> dict[str, Any]:
        found = self._json(name)
        if not isinstance(found, dict):
            raise self._wrong(name)
        return found

    def _text_or_none(self, what: str, found: Any) -> str | None:
        if found is not None and not isinstance(found, str):
            raise self._wrong(what)
        return found

    def _whole_or_none(self, what: str, found: Any) -> int | None:
        if found is not None and (type(found) is not int or not 1 <= found < 1 << 31):
            raise self._wrong(what)
        return found

    def _table_or_none(self, what: str, found: Any) -> dict[str, Any] | None:
        if found is not None and not isinstance(found, dict):
            raise self._wrong(what)
        return found

    def _figures_or_none(self, what: str, found: Any) -> dict[str, float] | None:
        table = self._table_or_none(what, found)
        if table is not None and not all(type(value) in (int, float) for value in table.values()):
            raise self._wrong(what)
        return table

    def _shares(self, found: Any, layers: list[str]) -> dict[str, float] | None:
        """One for each quantized layer, null where it is not known."""
        if found is None:
            return None
        fits = isinstance(found, list) and len(found) == len(layers)
        if not fits or not all(share is None or type(share) in (int, float) for share in found):
            raise self._wrong(OUTPUTS_LOST)
        shares = zip(layers, found, strict=True)
        return {name.removesuffix(SUFFIX): float(share) for name, share in shares if share is not None}

    def _layer(self, name: str, entry: Any) -> PackedLayer:
        try:
            return read_layer(entry)
        except ValueError as error:
            raise self._wrong(": ".join(filter(None, (f"layer {name!r}", str(error))))) from None

    def _permutations(self, packed: Tensor | None) -> tuple[AppliedPermutation, ...] | None:
        groups = self._json("permutations")
        if isinstance(groups, str):
            try:
                groups = inflated(groups)
            except ValueError as error:
                raise self._wrong("permutations") from error
        if groups is None and packed is None:
            return None
        if not isinstance(groups, list) or (packed is not None and (packed.dtype != torch.uint8 or packed.dim() != 1)):
            raise self._wrong("permutations")
        stream = np.empty(0, np.uint8) if packed is None else packed.numpy()
        found, at = [], 0
        for number, entry in enumerate(groups):
            what = f"permutations, group {number}"
            if (
                not isinstance(entry, dict)
                or type(width := entry.get("width")) is not int
                or not 1 <= width <= 8 * stream.size
            ):
                raise self._wrong(what)
            about = self._members(what, entry, width)
            size = packed_size(width, index_bits(width))
            try:
                p = unpack(stream[at : at + size], width, index_bits(width))
            except ValueError as error:
                raise self._wrong(what) from error
            if not np.array_equal(np.sort(p), np.arange(width)):
                raise self._wrong(f"{what} is not a permutation")
            at += size
            found.append(replace(about, permutation=torch.from_numpy(p.astype(np.int64))))
        if at != stream.size:
            raise self._wrong("permutations")
        return tuple(found)

    def _members(self, what: str, entry: dict[str, Any], width: int) -> AppliedPermutation:
        """The layers or channels of a group, without the numbers of its permutation."""
        none = torch.empty(0, dtype=torch.int64)
        if "places" not in entry:
            parents, children = self._names(what, entry.get("parents")), self._names(what, entry.get("children"))
            return AppliedPermutation(parents, children, none, self._reshapes(what, entry.get("reshapes", {})))
        blocks = entry.get("blocks", 1)
        if type(blocks) is not int or not 1 <= blocks <= width or width % blocks:
            raise self._wrong(what)
        try:
            places = read_rows(entry["places"], width)
        except ValueError as error:
            raise self._wrong(f"{what}: {error}") from error
        return AppliedPermutation((), (), none, {}, places, blocks)

    def _names(self, what: str, found: Any) -> tuple[str, ...]:
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise self._wrong(what)
        return tuple(found)

    def _reshapes(self, what: str, found: Any) -> dict[str, tuple[int, ...]]:
        if not isinstance(found, dict) or not all(_is_shape(shape) for shape in found.values()):
            raise self._wrong(what)
        return {name: tuple(shape) for name, shape in found.items()}


def _is_shape(found: object) -> bool:
    return isinstance(found, list) and 1 <= len(found) <= 8 and all(type(n) is int and 1 <= n < 1 << 31 for n in found)
