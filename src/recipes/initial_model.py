"""Networks in: published weights, a user's own state dict, or a compressed file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from .. import architectures
from ..architectures.architecture import Architecture
from ..common.errors import CheckpointError, PlanError, SettingsError
from ..common.paths import find
from ..compression.quantize.plan import QuantizationSpec, make_plan
from ..model_files.building import build_and_load
from ..model_files.open_model_file import architecture_of, build_packed
from ..model_files.packed import PackedFile, is_packed, load_packed
from ..model_files.pth import is_compressed, load_state, read_tensors
from ..settings import Settings, given_on_command_line, require
from .specs import quantization_spec

PAPER_MODELS_ADVICE = "The authors' models are downloaded and verified by: make paper-models"


def load_compressed(path: Path, architecture: Architecture, spec: QuantizationSpec) -> nn.Module:
    """Build `architecture` for the file's classes and coding, without clustering anything, and load the file; on the CPU.

    An ordinary state dict gives the dense network.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        PlanError: the coding settings do not fit the architecture.
    """
    state = architecture.current_state(read_tensors(path))
    coded = is_compressed(state)
    return build_and_load(
        lambda: architecture.build_for(state),
        (lambda dense: make_plan(dense, spec)) if coded else None,
        state,
        str(path),
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
    return find(
        weights, "model.weights", "Expected pretrained, none, or the path of a state dict (.pth or .safetensors)"
    )


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
            print(
                f"note: {source} holds a classifier: the backbone starts from it, the other layers from random weights",
                file=sys.stderr,
            )
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
        raise SettingsError(
            "model.state_dict_compressed: the file to evaluate is not set; use --model.state_dict_compressed PATH"
        )
    require(settings, "model.state_dict_compressed")
    packed = packed_file_of(settings)
    if packed is not None:
        return load_packed_for(settings, packed, architecture, is_main), f"{architecture.name}, {packed}"
    path = find(settings.model.state_dict_compressed, "model.state_dict_compressed", PAPER_MODELS_ADVICE)
    return load_compressed(path, architecture, quantization_spec(settings)), f"{architecture.name}, {path}"


def packed_file_of(settings: Settings) -> Path | None:
    """The packed file that the settings ask to evaluate; None where they ask for anything else.

    Raises:
        SettingsError: the file is not there.
    """
    given = settings.model.state_dict_compressed
    if not settings.model.use_compression or given is None or not given.endswith(".safetensors"):
        return None
    path = find(given, "model.state_dict_compressed", "python -m src.convert makes packed files from others")
    return path if is_packed(path) else None


def architecture_to_evaluate(settings: Settings, task: str) -> Architecture:
    """The architecture that a packed file names, or that of the settings.

    Raises:
        CheckpointError: the file cannot be read, or names an architecture that is not known for `task`.
        SettingsError: the command line says another one than the file, or `model.arch` is not known.
    """
    path = packed_file_of(settings)
    if path is None:
        return architectures.get(settings.model.arch, task)
    found = architecture_of(load_packed(path), task)
    if settings.model.arch != found.name and given_on_command_line(settings, "model.arch"):
        raise SettingsError(
            f"{path} holds a {found.name}, and the command line says --model.arch {settings.model.arch}; leave that out"
        )
    return found


def load_packed_for(settings: Settings, path: Path, architecture: Architecture, is_main: bool) -> nn.Module:
    """The network of a packed file; what the settings say about its coding is compared with the file, which has the last word.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        SettingsError: the command line contradicts the file. A settings file that does is overridden, with a note.
    """
    packed = load_packed(path)
    model = build_packed(packed, architecture)
    difference = _difference(settings, packed, architecture)
    if difference and given_on_command_line(settings, "model.compression_parameters"):
        raise SettingsError(
            f"{path} says how it was coded, and the settings contradict it: {difference}. Leave --model.compression_parameters out of the command"
        )
    if difference and is_main:
        print(
            f"note: {path} says how it was coded; what the settings file says about that is not used ({difference})",
            file=sys.stderr,
        )
    return model


def _difference(settings: Settings, packed: PackedFile, architecture: Architecture) -> str | None:
    """The first difference between the settings and a packed file; None: they mean the same."""
    if settings.model.arch != architecture.name:
        return f"model.arch is {settings.model.arch}, the file holds a {architecture.name}"
    with torch.device("meta"):
        dense = architecture.build(packed.info.num_classes or architecture.n_classes)
    try:
        wanted = make_plan(dense, quantization_spec(settings)).layers
    except PlanError as error:
        return str(error)
    for name in {**packed.layers, **wanted}:
        mine, theirs = wanted.get(name), packed.layers.get(name)
        if mine is None or theirs is None:
            return f"layer {name} is {'coded' if theirs else 'dense'} in the file, {'coded' if mine else 'dense'} with the settings"
        for what, own, other in (("k", mine.k, theirs.k), ("d", mine.d, theirs.d)):
            if own != other:
                return f"layer {name} has {what} = {other} in the file, {own} with the settings"
    return None
