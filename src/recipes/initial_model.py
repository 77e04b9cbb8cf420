"""Networks in: published weights, a user's own state dict, or a compressed file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from .. import architectures
from ..architectures.architecture import Architecture, n_outputs
from ..architectures.named import canonical
from ..architectures.structure import without_weights
from ..common.errors import CheckpointError, PlanError, SettingsError
from ..common.log import log, note
from ..compression.quantize.plan import Plan, QuantizationSpec, make_plan
from ..compression.quantize.weights import SUFFIX
from ..model_files.compression_report import known_of_run
from ..model_files.decoding import check_decode, set_decode
from ..model_files.norms import TRAINING_VECTORS
from ..model_files.open_model_file import ModelFile, architecture_of, build_network, read_model_file, state_for
from ..model_files.packed import ModelInfo, PackedFile
from ..model_files.pth import read_tensors
from ..model_files.state_dict import load_state
from ..run.agreement import first_here
from ..run.inputs import compressed_file, weights_source
from ..run.open_run import Job
from ..settings import Settings, given_on_command_line
from .specs import quantization_spec, with_current_names

COMPRESSION = "model.compression_parameters"
NEW_HEAD_ADVICE = " To start from these weights with a new last layer for these classes: set model.new_head True."


@dataclass(frozen=True)
class StartingModel:
    """A network to train.

    Attributes:
        model: on the CPU.
        compressed: what the compressed file says that it comes from; None: it is dense.
    """

    model: nn.Module
    compressed: ModelInfo | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """A network to evaluate.

    Attributes:
        model: in evaluation mode, on the CPU.
        architecture: what it is.
        n_outputs: classes that it tells apart.
        source: what it is and where it came from, for the log.
    """

    model: nn.Module
    architecture: Architecture
    n_outputs: int
    source: str


def starting_model(
    settings: Settings, architecture: Architecture, weights: str | Path, n_classes: int, show_progress: bool
) -> StartingModel:
    """The network that a training starts from: dense, as `dense_model`, or that of a compressed file, which is trained
    on.

    Raises:
        SettingsError: as `dense_model`; or the settings contradict a compressed file.
        CheckpointError: as `dense_model`, but a compressed file is none.
    """
    file = read_model_file(weights) if isinstance(weights, Path) else None
    if file is None or not (file.quantized or file.packed is not None):
        new_head = settings.model.new_head
        return StartingModel(dense_model(architecture, weights, n_classes, show_progress, new_head))
    if settings.model.new_head:
        raise SettingsError(
            f"model.new_head: {weights} is a compressed model, and a new last layer needs a dense one: it is quantized "
            f"with the others. Make it dense first: python -m src.convert {weights} dense.safetensors --dense"
        )
    if not settings.model.use_compression:
        raise SettingsError(
            f"model.weights: {weights} is a compressed model, and use_compression False trains a dense one. Leave "
            f"use_compression out, or make it dense first: python -m src.convert {weights} dense.safetensors --dense"
        )
    if (
        file.packed is not None
        and (found := architecture_of(file.packed, architecture.task, architecture.name)).name != architecture.name
    ):
        raise SettingsError(
            f"model.weights: {weights} holds a {found.name}, and model.arch is {architecture.name}; use --model.arch "
            f"{found.name}"
        )
    tensors = file.tensors if file.packed is None else file.packed.tensors
    whole = any(name.rpartition(".")[2] in TRAINING_VECTORS for name in tensors)
    if architecture.build_frozen is not None and not whole:  # norms that were frozen are saved as scale and shift
        architecture = replace(architecture, build=architecture.build_frozen)
    model = build_network(file, architecture)
    note(
        f"{weights} is a compressed model, which is trained on: it is not permuted or quantized again, and settings of "
        "that are not used"
    )
    known = known_of_run(file.path) if file.packed is None else file.packed.info
    return StartingModel(model, known)


def dense_model(
    architecture: Architecture, weights: str | Path, n_classes: int, show_progress: bool, new_head: bool = False
) -> nn.Module:
    """The dense network to start from; `n_classes` counts only where the head has random weights, as with `new_head`.

    The state dict of a classifier gives the backbone of a network that has such a one; its other layers are random.

    Raises:
        SettingsError: the published weights cannot be downloaded.
        CheckpointError: the user's file cannot be read, does not fit, or is compressed.
    """
    if weights == "none":
        if new_head:
            note("model.new_head has no effect: with model.weights none every layer is new")
        return architecture.build(n_classes)
    if isinstance(weights, Path):
        file, source = read_model_file(weights), str(weights)
        if file.quantized or file.packed is not None:
            raise CheckpointError(f"model.weights: {weights} is a compressed model, and a dense one is wanted here")
        state = state_for(architecture, file.tensors, source)
    else:
        if architecture.licence:
            note(f"licence of the weights of {architecture.name}: {architecture.licence}")
        source = architecture.weights_url
        state = architecture.current_state(architecture.published_weights(show_progress))
    backbone = architecture.backbone_of(state)
    if backbone is not None:
        note(f"{source} holds a classifier: the backbone starts from it, the other layers from random weights")
        model = architecture.build(n_classes)
        load_state(model.get_submodule(architecture.backbone), backbone, source)
        return model
    model = architecture.build_for(state, n_classes if new_head else None)
    load_state(model, _with_new_head(architecture, model, state, source) if new_head else state, source)
    return model


def _with_new_head(
    architecture: Architecture, model: nn.Module, state: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """`state` with the heads of `model`, which are random, in place of its own."""
    new = {name: tensor for name, tensor in model.state_dict().items() if architecture.belongs_to_a_head(name)}
    before = (f", before {tuple(state[name].shape)}" if name in state else "" for name in new)
    listed = ", ".join(f"{name} {tuple(new[name].shape)}{text}" for name, text in zip(new, before, strict=True))
    log.info("new random weights: %s; all others are those of %s", listed, source)
    return {**{name: one for name, one in state.items() if not architecture.belongs_to_a_head(name)}, **new}


def load_compressed(path: Path, architecture: Architecture, spec: QuantizationSpec) -> nn.Module:
    """Build `architecture` for the file's classes and quantization, without clustering anything, and load the file; on
    the CPU.

    An ordinary state dict gives the dense network.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        PlanError: the quantization settings do not fit the architecture.
    """
    file = ModelFile(path=path, packed=None, tensors=read_tensors(path))
    return build_network(file, architecture, lambda dense: make_plan(dense, spec))


def model_to_evaluate(job: Job, task: str) -> EvaluatedModel:
    """The network of `state_dict_compressed`, or the dense one of `weights` with `use_compression: False`.

    On every machine one process goes first: what has to be downloaded is there for the others.

    A packed file says what it is and how it was quantized; what the settings say about that is compared with it.

    Raises:
        SettingsError: the file is not set or not there; the command line contradicts it. A settings file that does is
            overridden, with a note. Or weights cannot be decoded as asked.
        CheckpointError: it cannot be read, does not fit, or names an architecture that is not known for `task`.
    """
    decode = job.settings.model.decode
    if job.settings.model.use_compression:
        check_decode(decode, job.engine.device, "model.decode")
    with first_here(job.engine):
        if job.settings.model.use_compression:
            found = _compressed_to_evaluate(job.settings, task)
            return replace(found, model=set_decode(found.model, decode))
        return _dense_to_evaluate(job.settings, task, job.engine.is_main)


def _dense_to_evaluate(settings: Settings, task: str, show_progress: bool) -> EvaluatedModel:
    architecture = architectures.get(settings.model.arch, task)
    weights = weights_source(settings)
    n_classes = settings.dataloader.num_classes or architecture.n_classes
    dense = dense_model(architecture, weights, n_classes, show_progress).eval()
    source = f"dense {architecture.name}, {weights}"
    return EvaluatedModel(dense, architecture, n_outputs(architecture, dense), source)


def _compressed_to_evaluate(settings: Settings, task: str) -> EvaluatedModel:
    file = read_model_file(compressed_file(settings))
    architecture = _architecture_to_evaluate(settings, file, task)
    spec = quantization_spec(with_current_names(settings, architecture))
    plan: Callable[[nn.Module], Plan] = lambda dense: make_plan(dense, spec)  # noqa: E731
    of_a_size = settings.compression.size is not None or settings.compression.ratio is not None
    model = build_network(file, architecture, None if of_a_size else plan)  # then only the file knows d and k
    if file.packed is not None and not of_a_size:
        _compare(settings, file.packed, architecture, plan)
    return EvaluatedModel(model, architecture, n_outputs(architecture, model), f"{architecture.name}, {file.path}")


def _architecture_to_evaluate(settings: Settings, file: ModelFile, task: str) -> Architecture:
    """The architecture that a packed file names, or that of the settings."""
    if file.packed is None:
        return architectures.get(settings.model.arch, task)
    found = architecture_of(file.packed, task, settings.model.arch)
    if canonical(settings.model.arch) != found.name and given_on_command_line(settings, "model.arch"):
        raise SettingsError(
            f"{file.path} holds a {found.name}, and the command line says --model.arch {settings.model.arch}; leave "
            "that out"
        )
    return found


def _compare(
    settings: Settings, packed: PackedFile, architecture: Architecture, plan: Callable[[nn.Module], Plan]
) -> None:
    """Compare what the settings say about the quantization with the file, which has the last word."""
    if canonical(settings.model.arch) != architecture.name:
        difference: str | None = f"model.arch is {settings.model.arch}, the file holds a {architecture.name}"
    else:
        difference = _difference(packed, architecture, plan)
    if difference is None:
        return
    if given_on_command_line(settings, COMPRESSION):
        raise SettingsError(
            f"{packed.source} says how it was quantized, and the settings contradict it: {difference}. "
            f"Leave --{COMPRESSION} out of the command"
        )
    note(
        f"{packed.source} says how it was quantized; what the settings file says about that is not used ({difference})"
    )


def _difference(packed: PackedFile, architecture: Architecture, plan: Callable[[nn.Module], Plan]) -> str | None:
    """The first difference between the settings' plan and a packed file; None: they mean the same."""
    dense = without_weights(lambda: architecture.build(packed.info.num_classes or architecture.n_classes))
    try:
        wanted = plan(dense).layers
    except PlanError as error:
        return str(error)
    in_file = {name.removesuffix(SUFFIX): layer for name, layer in packed.layers.items()}
    for name in {**in_file, **wanted}:
        mine, theirs = wanted.get(name), in_file.get(name)
        if mine is None or theirs is None:
            there, here = ("quantized" if one else "dense" for one in (theirs, mine))
            return f"layer {name} is {there} in the file, {here} with the settings"
        for what, own, other in (
            ("k", mine.k, theirs.k), ("d", mine.d, theirs.d), ("layout", mine.layout, theirs.layout)
        ):  # fmt: skip
            if own != other:
                return f"layer {name} has {what} = {other} in the file, {own} with the settings"
    return None
