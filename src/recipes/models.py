"""Networks in: published weights, a user's own state dict, or a compressed file."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from ..architectures.architecture import Architecture
from ..compression.files import is_compressed, load_state, read_tensors
from ..compression.quantize.plan import CodingSpec, make_plan
from ..compression.subvectors import Layer
from ..errors import CheckpointError, SettingsError
from ..paths import find
from ..settings import Settings, require
from .building import build_and_load
from .compressing import coding_spec
from .stored import load_packed_for, packed_file_of

PAPER_MODELS_ADVICE = "The authors' models are downloaded and verified by: make paper-models"


def load_compressed(path: Path, architecture: Architecture, spec: CodingSpec) -> nn.Module:
    """Build `architecture` for the file's classes and coding, without clustering anything, and load the file; on the CPU.

    An ordinary state dict gives the dense network.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        PlanError: the coding settings do not fit the architecture.
    """
    state = architecture.current_state(read_tensors(path))
    coded = is_compressed(state)
    return build_and_load(
        lambda: architecture.build_for(state), (lambda dense: make_plan(dense, spec)) if coded else None, state, str(path)
    )


def weights_source(settings: Settings) -> str | Path:
    """`pretrained`, `none`, or the existing path of a state dict.

    Raises:
        SettingsError: `model.weights` is a placeholder or a path that does not exist.
    """
    weights = settings.model.weights
    if weights in ("pretrained", "none"):
        return weights
    require(settings, "model.weights")
    return find(weights, "model.weights", "Expected pretrained, none, or the path of a state dict (.pth or .safetensors)")


def dense_model(architecture: Architecture, weights: str | Path, n_classes: int, is_main: bool) -> nn.Module:
    """The dense network to start from; `n_classes` counts only where the head has random weights.

    The state dict of a classifier gives the backbone of a network that has such a one; its other layers are random.

    Raises:
        SettingsError: the published weights cannot be downloaded.
        CheckpointError: the user's file cannot be read, does not fit, or is compressed.
    """
    if weights == "none":
        return architecture.build(n_classes)
    if isinstance(weights, Path):
        state, source = read_tensors(weights), str(weights)
        if is_compressed(state):
            raise CheckpointError(f"model.weights: {weights} is a compressed model, and a dense one is wanted here")
    else:
        if architecture.licence and is_main:
            print(f"note: licence of the weights of {architecture.name}: {architecture.licence}", file=sys.stderr)
        state, source = architecture.published_weights(is_main), architecture.weights_url
    state = architecture.current_state(state)
    backbone = architecture.backbone_of(state)
    if backbone is not None:
        if is_main:
            print(f"note: {source} holds a classifier: the backbone starts from it, the other layers from random weights", file=sys.stderr)
        model = architecture.build(n_classes)
        load_state(model.get_submodule(architecture.backbone), backbone, source)
        return model
    model = architecture.build_for(state)
    load_state(model, state, source)
    return model


def model_to_evaluate(settings: Settings, architecture: Architecture, is_main: bool) -> tuple[nn.Module, str]:
    """The network of `state_dict_compressed`, or the dense one of `weights` with `use_compression: False`; and its name.

    Raises:
        SettingsError: the file is not set or not there.
        CheckpointError: it does not fit.
    """
    if not settings.model.use_compression:
        weights = weights_source(settings)
        n_classes = settings.dataloader.num_classes or architecture.n_classes
        return dense_model(architecture, weights, n_classes, is_main).eval(), f"dense {architecture.name}, {weights}"
    if settings.model.state_dict_compressed is None:
        raise SettingsError("model.state_dict_compressed: the file to evaluate is not set; use --model.state_dict_compressed PATH")
    require(settings, "model.state_dict_compressed")
    packed = packed_file_of(settings)
    if packed is not None:
        return load_packed_for(settings, packed, architecture, is_main), f"{architecture.name}, {packed}"
    path = find(settings.model.state_dict_compressed, "model.state_dict_compressed", PAPER_MODELS_ADVICE)
    return load_compressed(path, architecture, coding_spec(settings)), f"{architecture.name}, {path}"


def n_outputs(architecture: Architecture, model: nn.Module) -> int:
    """Number of classes that `model` tells apart."""
    head: Layer = model.get_submodule(architecture.head)
    return int(head.out_features)
