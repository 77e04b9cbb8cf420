"""A network without its code: modules of the file's names that hold the file's tensors and compute nothing.

Enough to count, to list, and to write another file that holds the same; what needs a forward pass, or to know what a
module is, needs the network itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..common.errors import CheckpointError
from ..compression.quantize.placing import quantize_weight
from ..compression.quantize.plan import LayerPlan, Plan
from ..compression.quantize.subvectors import Layer
from ..compression.quantize.weights import SUFFIX, WeightPlace
from .norm_training import key_of
from .norms import NORM_VECTORS, TRAINING_VECTORS
from .packed import PackedFile
from .pth import scaled
from .state_dict import check_codes, load_state

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Quantized layer -> its kind and the shape of its weight."""


class Unknown(nn.Module):
    """A module of which only the tensors are known."""


def skeleton_of_packed(packed: PackedFile) -> nn.Module:
    """The skeleton of a packed file.

    Raises:
        CheckpointError: its tensors do not fit together.
    """
    state = packed.state()
    shapes = {name: (layer.kind, layer.shape) for name, layer in packed.layers.items()}
    return _skeleton(state, shapes, packed.plan.layers, packed.source)


def skeleton_of_state(state: Mapping[str, Tensor], source: str) -> nn.Module:
    """The skeleton of a published or dense file; kernels are not told apart from channels there.

    Raises:
        CheckpointError: its tensors do not fit together.
    """
    shapes = {}
    for name, codes in state.items():
        prefix, _, leaf = name.rpartition(".")
        codebook = state.get(key_of(prefix, "codebook"))
        if leaf == "codes_matrix" and codebook is not None and codes.dim() == codebook.dim() == 2:
            shapes[prefix] = ("quantized", (codes.shape[0], codes.shape[1] * codebook.shape[1]))
    layers = {n: LayerPlan(name=n, d=1, k=2, k_means_type="kmeans", k_means_n_iters=0) for n in shapes}
    return _skeleton(state, shapes, scaled(Plan(layers=layers, notes=()), state, source).layers, source)


def _skeleton(state: Mapping[str, Tensor], shapes: Shapes, plans: Mapping[str, LayerPlan], source: str) -> nn.Module:
    check_codes(state, source)
    root = Unknown()
    own = {key_of(name, leaf) for name in shapes for leaf in ("codes_matrix", "codebook", "codebook_scale")}
    norms = _norms(state)
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        if name in own or prefix in norms:
            continue
        _put(_part(root, prefix, source), leaf, tensor)
    for prefix in norms:
        _put_norm(root, prefix, state[key_of(prefix, NORM_VECTORS[0])].numel(), source)
    for name, (kind, shape) in shapes.items():
        _quantized(root, name, kind, shape, state, plans[name], source)
    load_state(root, state, source)
    return root.eval()


def _norms(state: Mapping[str, Tensor]) -> set[str]:
    """Norms of which a file says how they train: certainly two vectors that are folded."""
    return {
        prefix
        for name in state
        for prefix, _, leaf in [name.rpartition(".")]
        if leaf == TRAINING_VECTORS[0] and all(key_of(prefix, vector) in state for vector in NORM_VECTORS)
    }


def _part(root: nn.Module, name: str, source: str) -> nn.Module:
    """The module of a name, made where it is not there."""
    here: nn.Module = root
    for part in name.split(".") if name else ():
        if part not in here._modules:
            if part in here._parameters or part in here._buffers:
                raise CheckpointError(f"{source}: {name!r} cannot be a tensor and a module")
            here._modules[part] = Unknown()
        found = here._modules[part]
        assert found is not None
        here = found
    return here


def _put(part: nn.Module, leaf: str, tensor: Tensor) -> None:
    empty = torch.empty_like(tensor)
    if tensor.is_floating_point() or tensor.is_complex():
        part._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
    else:
        part._buffers[leaf] = empty


def _put_norm(root: nn.Module, prefix: str, width: int, source: str) -> None:
    parent, _, leaf = prefix.rpartition(".")
    norm = nn.BatchNorm1d(width)
    norm.requires_grad_(False)
    _part(root, parent, source)._modules[leaf] = norm


def _quantized(
    root: nn.Module,
    name: str,
    kind: str,
    shape: tuple[int, ...],
    state: Mapping[str, Tensor],
    plan: LayerPlan,
    source: str,
) -> None:
    """Put an empty quantized weight where `name` says."""
    codebook = state[key_of(name, "codebook")]
    k, d = codebook.shape
    prefix, _, leaf = name.rpartition(".")
    below = leaf.endswith(SUFFIX)
    host: Layer = _part(root, prefix if below else name, source)
    attribute = leaf.removesuffix(SUFFIX) if below else "weight"
    if plan.layout == "input" and math.prod(shape[1:]) % d:
        raise CheckpointError(f"{source}: layer {name!r}: subvectors of {d} do not fill its rows")
    with torch.device("meta"):
        weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
    host._parameters[attribute] = weight
    place = WeightPlace(host=host, attribute=attribute, name=name, below=below)
    layer = quantize_weight(place, d, k, plan.scale, plan.codebook_bits, plan.layout)
    layer.to_empty(device="cpu")
    layer.quantized_kind = kind
