"""Packed model files: `.safetensors` of the size that is reported, with everything in it that rebuilds the network.

Tensors (L: quantized layer, B: batch norm):
- `L.codes_packed`: U8, the codes at log2(k) bits each (`bit_packing`), or `L.codes_huffman`: the same entropy coded
  (`entropy`; in files of format 1 `L.codes_entropy`, see `rans`);
- `L.codebook`: F16 or I8 (k, d), and `L.codebook_scale` as in the published format; `.norms`: U8, the folded norms of
  32-bit floats and how they train (`packed_norms`); `B.weight`, `B.bias`: a norm that is known as two vectors only;
  everything else as in the published format (`pth`);
- `permutations`: U8, the permutations that were applied, one after the other, ceil(log2(width)) bits per channel.

Metadata, JSON but for the first four: `format` (pqf), `format_version`, `producer`, `checksum`; `model`: architecture,
number of classes, compression settings and metric, null where not known, and where the network was calibrated
`outputs_lost`, the share of the energy of each layer's outputs that was lost; `layers`: for each quantized layer type,
weight shape, d, k, and "output" where its subvectors run along outputs; `norms`: width of each norm in `.norms`, in
their order; `permutations`: parents, children, width and reshapes of each group, or width, blocks and places of a group
of channels, then deflated as a whole (`stored_places`); `tied`: names that share another's tensors; `renamed`, where
there are any: tensors under other names than the network's (`renamed`). A file without `.norms` has the format version
2, one with places 4, one with codebooks of 8-bit values 5, one with subvectors along outputs 6.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import CheckpointError
from ..compression.quantize.layers import QuantizedLayer
from ..compression.quantize.plan import LayerPlan, Plan
from ..compression.quantize.subvectors import bits_per_code, codes_shape
from ..compression.quantize.weights import find_weight
from . import entropy, rans
from .bit_packing import Bytes, pack, packed_size, unpack
from .metadata import (
    AppliedPermutation,
    ModelInfo,
    describe,
    group_entry,
    index_bits,
    norm_widths,
    shares,
)
from .packed_layer import PackedLayer, described_layer, version_for_layers
from .packed_norms import STREAM, put_norms, take_norms
from .pth import compressed_state, key_of, scaled
from .renamed import RENAMED, read_renamed, stored_names
from .safetensors_file import read_container, read_metadata, write_container
from .stored_places import deflated
from .tied import tied_names

FORMAT = "pqf"
FORMAT_VERSION = 3
VERSION_WITHOUT_NORMS = 2
VERSION_WITH_PLACES = 4
READABLE_VERSIONS = ("1", "2", "3", "4", "5", "6")
PACKED, HUFFMAN, RANS = "codes_packed", "codes_huffman", "codes_entropy"
CODES = (PACKED, HUFFMAN, RANS)
PERMUTATIONS = "permutations"


@dataclass(frozen=True)
class PackedFile:
    """A packed file, checked; its codes are unpacked when `state` is asked for.

    Attributes:
        source: the file, for messages.
        info: what it says about the model.
        layers: the quantized layers by name.
        tensors: of the network, as they stand in the file.
        tied: name -> the name that holds its tensor.
        renamed: name of one of `tensors` -> its name in the network, where that is another one.
    """

    source: str
    info: ModelInfo
    layers: Mapping[str, PackedLayer]
    tensors: Mapping[str, Tensor]
    tied: Mapping[str, str]
    renamed: Mapping[str, str]

    def own_name(self, name: str) -> str:
        """The name that one of `tensors` has in the published format."""
        layer, _, leaf = name.rpartition(".")
        is_codes = leaf in CODES and layer in self.layers
        return self.renamed.get(name, key_of(layer, "codes_matrix") if is_codes else name)

    @property
    def plan(self) -> Plan:
        """What builds the quantized network, without any setting."""
        layers = {
            name: LayerPlan(
                name=name, d=layer.d, k=layer.k, k_means_type="kmeans", k_means_n_iters=0, layout=layer.layout
            )
            for name, layer in self.layers.items()
        }
        tied = {name: self.tensors[owner] for name, owner in self.tied.items() if owner in self.tensors}
        return scaled(Plan(layers=layers, notes=()), {**self.tensors, **tied}, self.source)

    def state(self) -> dict[str, Tensor]:
        """The tensors as the published format names them, codes as int32 (R, m).

        Raises:
            CheckpointError: codes that are damaged or not below k.
        """
        state = {}
        for name, tensor in self.tensors.items():
            layer, _, leaf = name.rpartition(".")
            if leaf in CODES and layer in self.layers and name not in self.renamed:
                tensor = _unpacked(self.source, layer, self.layers[layer], leaf, tensor)
            state[self.own_name(name)] = tensor
        return {**state, **{name: state[owner] for name, owner in self.tied.items()}}


def save_packed(model: nn.Module, path: Path, info: ModelInfo, *, entropy_coding: bool = False) -> None:
    """Write `model` as a packed file, atomically; equal models and infos give equal files.

    Args:
        model: with quantized layers.
        path: ends in .safetensors.
        info: what to say about the model.
        entropy_coding: entropy-code the codes of every layer where that is smaller.

    Raises:
        RunError: the disk is full or the folder cannot be written; an existing file is unchanged.
        CheckpointError: a codebook that 16-bit floats cannot hold.
    """
    state = compressed_state(model)
    tied = tied_names(model, state)
    norms, stream = take_norms(model, state, tied)
    tensors, renamed = _stored(model, {name: state[name] for name in state if name not in tied}, entropy_coding)
    layers = {
        prefix: described_layer(module)
        for prefix, module in model.named_modules()  # a layer used twice once
        if isinstance(module, QuantizedLayer)
    }
    groups = None
    if info.permutations is not None:
        groups = [group_entry(group) for group in info.permutations]
        if groups:
            streams = [
                pack(g.permutation.numpy().astype(np.int32), index_bits(g.permutation.numel()))
                for g in info.permutations
            ]
            tensors[PERMUTATIONS] = torch.from_numpy(np.concatenate(streams))
    known = {
        "arch": info.arch,
        "num_classes": info.num_classes,
        "settings": info.settings,
        "metric": None if info.metric is None else {name: float(value) for name, value in info.metric.items()},
        **shares(info, layers),
    }
    described = {"model": known, "layers": layers, "permutations": groups, "tied": tied}
    if renamed:
        described[RENAMED] = renamed
    if norms:
        tensors[STREAM], described["norms"] = stream, norms
    version = FORMAT_VERSION if norms else VERSION_WITHOUT_NORMS
    if any(group.places is not None for group in info.permutations or ()):
        version, described["permutations"] = VERSION_WITH_PLACES, deflated(groups)
    version = version_for_layers(model) or version
    metadata = {"format": FORMAT, "format_version": str(version), "producer": info.producer}
    for name, value in described.items():
        metadata[name] = json.dumps(value, separators=(",", ":"))
    write_container(path, tensors, metadata)


def _stored(
    model: nn.Module, state: Mapping[str, Tensor], entropy_coding: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `state` as they stand in a file, and the network's names of those that are stored under others."""
    modules = dict(model.named_modules(remove_duplicate=False))
    codes: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        module = modules[prefix]
        if isinstance(module, QuantizedLayer) and leaf == "codes_matrix":
            written_as, packed = _packed(module, entropy_coding)
            codes[key_of(prefix, written_as)] = torch.from_numpy(packed)
        else:
            others[name] = tensor
    renamed = stored_names(others, CODES, (PERMUTATIONS,))
    now = {own: stored for stored, own in renamed.items()}
    return {**codes, **{now.get(name, name): tensor for name, tensor in others.items()}}, renamed


def is_packed(path: Path) -> bool:
    """Whether a file calls itself a packed model; nothing else of it is checked."""
    return path.suffix == ".safetensors" and path.is_file() and read_metadata(path).get("format") == FORMAT


def load_packed(path: Path) -> PackedFile:
    """Read a packed file and check it: checksum, sizes, and that every quantized layer has what it needs.

    Raises:
        CheckpointError: it cannot be read, is damaged, or was written by a later version.
    """
    tensors, metadata = read_container(path)
    source = str(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{source} is not a packed model: its metadata do not say format {FORMAT}")
    if metadata.get("format_version") not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{source} has the format version {metadata.get('format_version', '?')[:20]!r} (written by "
            f"{metadata.get('producer', '?')[:40]}); "
            f"this program reads versions {' and '.join(READABLE_VERSIONS)}"
        )
    info, layers, tied = describe(source, metadata, tensors.pop(PERMUTATIONS, None))
    renamed = read_renamed(source, metadata, tensors)
    if STREAM in tensors:
        tensors, tied = put_norms(source, tensors, norm_widths(source, metadata), tied)
    packed = PackedFile(source=source, info=info, layers=layers, tensors=tensors, tied=tied, renamed=renamed)
    _check_layers(packed)
    return packed


def check_layers_of(model: nn.Module, packed: PackedFile) -> None:
    """Check that every quantized layer of the file is a layer of that type and shape in `model` (may be on the meta
    device).

    Raises:
        CheckpointError: one is not.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in packed.layers.items():
        place = find_weight(modules, name)
        if place is None or tuple(place.parameter.shape) != layer.shape or place.kind != layer.kind:
            found = "no such layer" if place is None else f"a {place.kind} {tuple(place.parameter.shape)}"
            raise CheckpointError(
                f"{packed.source}: layer {name!r} is a {layer.kind} {layer.shape} in the file, {found} in the network"
            )


def _check_layers(packed: PackedFile) -> None:
    """Every quantized layer has one tensor of codes of the right size and a codebook; nothing calls itself codes
    without a layer."""
    held = {packed.own_name(name) for name in packed.tensors}
    for name, owner in packed.tied.items():
        if name in held:
            raise CheckpointError(f"{packed.source}: {name!r} is tied to {owner!r} and yet there")
        if owner not in held:
            raise CheckpointError(f"{packed.source}: {name!r} is tied to {owner!r}, which the file does not hold")
    for name, layer in packed.layers.items():
        codes = [leaf for leaf in CODES if key_of(name, leaf) in packed.tensors]
        if len(codes) + (key_of(name, "codes_matrix") in packed.tied) != 1:
            raise CheckpointError(f"{packed.source}: layer {name!r} must have its codes once")
        codebook = packed.tensors.get(packed.tied.get(key_of(name, "codebook"), key_of(name, "codebook")))
        fits = codebook is not None and codebook.dtype in (torch.float16, torch.int8)
        if codebook is None or tuple(codebook.shape) != (layer.k, layer.d) or not fits:
            raise CheckpointError(
                f"{packed.source}: layer {name!r} has no codebook of {layer.k} x {layer.d} 16-bit floats or 8-bit "
                "integers"
            )
        for leaf in codes:
            stream = packed.tensors[key_of(name, leaf)]
            exact = leaf != PACKED or stream.numel() == packed_size(layer.n_codes, bits_per_code(layer.k))
            if stream.dtype != torch.uint8 or stream.dim() != 1 or not exact:
                raise CheckpointError(
                    f"{packed.source}: layer {name!r}: {stream.numel()} bytes are not {layer.n_codes} codes below "
                    f"{layer.k}"
                )
    if len(held) != len(packed.tensors):
        raise CheckpointError(f"{packed.source}: two of its tensors have the same name in the network")
    for name in packed.tensors:
        prefix, _, leaf = name.rpartition(".")
        if leaf in CODES and prefix not in packed.layers and name not in packed.renamed:
            raise CheckpointError(f"{packed.source}: {name!r} belongs to no layer")


def _packed(layer: QuantizedLayer, entropy_coding: bool) -> tuple[str, Bytes]:
    """Name and bytes of a layer's codes."""
    codes = layer.codes_matrix.detach().cpu().reshape(-1).numpy().astype(np.int32)
    packed = pack(codes, bits_per_code(layer.k))
    if entropy_coding:
        stream = entropy.encode(codes, layer.k)
        if stream.size < packed.size:
            return HUFFMAN, stream
    return PACKED, packed


def _unpacked(source: str, name: str, layer: PackedLayer, leaf: str, stream: Tensor) -> Tensor:
    try:
        if leaf == PACKED:
            codes = unpack(stream.numpy(), layer.n_codes, bits_per_code(layer.k))
        else:
            codes = (entropy if leaf == HUFFMAN else rans).decode(stream.numpy(), layer.n_codes, layer.k)
    except ValueError as error:
        raise CheckpointError(f"{source}: the codes of layer {name!r} are damaged: {error}") from error
    return torch.from_numpy(codes).view(codes_shape(layer.shape, layer.d, layer.layout))


__all__ = [
    "AppliedPermutation", "ModelInfo", "PackedFile", "PackedLayer", "check_layers_of", "is_packed", "load_packed",
    "save_packed",
]  # fmt: skip
