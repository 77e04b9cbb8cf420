"""Any model file in: packed, published or dense; what it is is read from the file itself, not from settings.

A file is read, and its checksum and contents checked, once: `read_model_file`. From what was read a network is built,
of the architecture that the file names or that its tensors fit: `open_model_file`, or `build_network` where settings
say more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from .. import architectures
from ..architectures.architecture import Architecture
from ..architectures.named import canonical, find, is_code
from ..architectures.structure import without_weights
from ..common.errors import CheckpointError, SettingsError
from ..compression.quantize.plan import Plan
from .building import build_and_load
from .compression_report import known_of_run
from .packed import ModelInfo, PackedFile, check_layers_of, is_packed, load_packed
from .plan_of_file import plan_of
from .pth import is_compressed, read_tensors, scaled
from .skeleton import skeleton_of_packed, skeleton_of_state
from .wrapping import fitted, is_wrapped

MOST_CLASSES = 1 << 24


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds, read and checked, and not yet a network.

    Attributes:
        path: of the file.
        packed: its contents where it is a packed file; None for others.
        tensors: of a published or dense file, under the names in the file; empty for packed ones.
    """

    path: Path
    packed: PackedFile | None
    tensors: Mapping[str, Tensor]

    @property
    def quantized(self) -> bool:
        """Whether it has quantized layers."""
        return bool(self.packed.layers) if self.packed is not None else is_compressed(self.tensors)

    @property
    def kind(self) -> str:
        """Packed, published or dense."""
        return "packed" if self.packed is not None else "published" if self.quantized else "dense"


@dataclass(frozen=True)
class OpenModelFile:
    """A model file, and the network in it.

    Attributes:
        model: the network, in evaluation mode, on the CPU.
        architecture: what it is.
        info: what else is known about it.
        quantized: whether it has quantized layers.
        kind: packed, published or dense.
        why_unknown: why the network could not be built and the model is only its skeleton; empty: it was.
    """

    model: nn.Module
    architecture: Architecture
    info: ModelInfo
    quantized: bool
    kind: str
    why_unknown: str = ""


def read_model_file(path: Path) -> ModelFile:
    """Read and check any model file.

    Raises:
        CheckpointError: it cannot be read.
    """
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path}: ONNX files are written, not read; name the .pth or .safetensors file it came from"
        )
    if is_packed(path):
        return ModelFile(path=path, packed=load_packed(path), tensors={})
    return ModelFile(path=path, packed=None, tensors=read_tensors(path))


def open_model_file(path: Path, arch: str | None = None, needs_network: bool = True) -> OpenModelFile:
    """Read any model file without settings, and build its network.

    Args:
        path: `.pth` or `.safetensors`.
        arch: name of the architecture; None: that of the file, or the first one that its tensors fit.
        needs_network: False: where the network cannot be built, its skeleton is enough (`skeleton`).

    Raises:
        CheckpointError: it cannot be read, or is no known architecture.
    """
    file = read_model_file(path)
    try:
        architecture, info = _known(file, arch)
    except CheckpointError as error:
        if needs_network or arch is not None:
            raise
        return _without_network(file, str(error))
    return OpenModelFile(
        model=build_network(file, architecture),
        architecture=architecture,
        info=info,
        quantized=file.quantized,
        kind=file.kind,
    )


def _known(file: ModelFile, arch: str | None) -> tuple[Architecture, ModelInfo]:
    """What a file is of, as it says itself or by its tensors."""
    path = file.path
    if file.packed is not None:
        architecture = architecture_of(file.packed, said=arch)
        if arch is not None and canonical(arch) != architecture.name:
            raise CheckpointError(f"{path} holds a {architecture.name}, and --arch says {arch}; leave --arch out")
        return architecture, file.packed.info
    architecture = _identify(file.tensors, str(path), arch)
    state = state_for(architecture, file.tensors, str(path))
    return architecture, replace(known_of_run(path), arch=architecture.name, num_classes=_classes(architecture, state))


def _without_network(file: ModelFile, why: str) -> OpenModelFile:
    """A file whose network cannot be built: what can be said of it all the same."""
    packed, source = file.packed, str(file.path)
    info = known_of_run(file.path) if packed is None else packed.info
    model = skeleton_of_state(file.tensors, source) if packed is None else skeleton_of_packed(packed)
    unknown = Architecture(
        name=info.arch or "a network that is not known here",
        task="",
        build=partial(_not_known, why),
        weights_url="",
        n_classes=info.num_classes or 1,
        head="",
        groups=None,
    )
    return OpenModelFile(
        model=model, architecture=unknown, info=info, quantized=file.quantized, kind=file.kind, why_unknown=why
    )


def _not_known(why: str, _n_classes: int) -> nn.Module:
    raise CheckpointError(why)


def build_network(
    file: ModelFile, architecture: Architecture, plan: Callable[[nn.Module], Plan] | None = None
) -> nn.Module:
    """The network of a file, in evaluation mode, on the CPU; nothing is clustered.

    Args:
        file: from `read_model_file`.
        architecture: of the network.
        plan: dense network -> which of its layers are quantized, and how; None: what the file itself says. Packed files
            always say it.

    Raises:
        CheckpointError: the file does not fit the architecture.
        PlanError: `plan` does not.
    """
    if file.packed is not None:
        return _build_packed(file.packed, architecture)
    source = str(file.path)
    state = state_for(architecture, file.tensors, source)
    own = (lambda dense: scaled(plan(dense), state, source)) if plan else (lambda dense: plan_of(dense, state, source))
    return build_and_load(lambda: architecture.build_for(state), own if file.quantized else None, state, source)


def state_for(architecture: Architecture, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of a published or dense file under the names that the network has for them now.

    Raises:
        CheckpointError: the file holds the network more than once.
    """
    state = architecture.current_state(tensors)
    if not is_wrapped(tensors):
        return state
    model = without_weights(lambda: architecture.build(architecture.n_classes))
    names = [set(model.state_dict())]
    if architecture.backbone:  # the network may start from that of a classifier
        names.append({*model.get_submodule(architecture.backbone).state_dict(), "fc.weight", "fc.bias"})
    found = (fitted(tensors, own, source, architecture.current_state) for own in names)
    return next((renamed for renamed in found if renamed.keys() != state.keys()), state)


def architecture_of(packed: PackedFile, task: str | None = None, said: str | None = None) -> Architecture:
    """The architecture that a packed file names.

    Args:
        packed: the file.
        task: what it is wanted for; None: anything.
        said: the name that the user gave. The code of a `package.module:callable` is run only where it is the same; a
            file that names nothing is taken to be this.

    Raises:
        CheckpointError: it names none, or one that is not known or for another task.
    """
    name = packed.info.arch or said
    if name is None:
        raise CheckpointError(f"{packed.source} does not say which network it is of; name it with --arch")
    if is_code(name) and name != said:
        raise CheckpointError(
            f"{packed.source} is of a network that {name[:200]!r} builds. Code that a file names is not run: say the "
            f"same name yourself (--arch, --model.arch)"
        )
    try:
        return find(name, task)
    except SettingsError as error:
        raise CheckpointError(f"{packed.source} holds the architecture {name[:60]!r}: {error}") from error


def _build_packed(packed: PackedFile, architecture: Architecture) -> nn.Module:
    quantized = packed.layers.get(architecture.head)
    held = architecture.classes_of(packed.tensors) if quantized is None else architecture.classes(quantized.shape[0])
    n_classes = packed.info.num_classes or held  # files from the Python interface do not say it
    if n_classes is None or n_classes > MOST_CLASSES:
        raise CheckpointError(f"{packed.source}: {n_classes} classes; expected a number up to {MOST_CLASSES:,}")
    if held is not None and n_classes > held:  # not every network can be built without memory for its weights
        raise CheckpointError(
            f"{packed.source} does not fit the network: it says that there are {n_classes:,} classes, and "
            f"{architecture.head} has rows for {held:,}"
        )
    # layers first: their shapes bound what the codes unpack to
    check_layers_of(without_weights(lambda: architecture.build(n_classes)), packed)
    return build_and_load(lambda: architecture.build(n_classes), lambda _: packed.plan, packed.state(), packed.source)


def _identify(state: Mapping[str, Tensor], source: str, arch: str | None) -> Architecture:
    """The architecture `arch`, or the first whose layers are those of `state`.

    Raises:
        SettingsError: `arch` is not known.
        CheckpointError: no architecture has these layers.
    """
    known = architectures.ARCHITECTURES
    if arch is not None:
        return find(arch)
    for architecture in known.values():
        found = state_for(architecture, state, source)
        layers = {name.rpartition(".")[0] for name in found}
        model = without_weights(partial(architecture.build, architecture.n_classes))
        own = {name.rpartition(".")[0] for name in model.state_dict()}
        if own == layers and all(_same_shape(name, tensor, model, architecture) for name, tensor in found.items()):
            return architecture
    raise CheckpointError(
        f"{source} is no architecture known here ({', '.join(known)}); with another one's layers, name it with --arch"
    )


def _same_shape(name: str, tensor: Tensor, model: nn.Module, architecture: Architecture) -> bool:
    """Whether a dense weight of the file has the network's shape; quantized weights and the head are checked later."""
    layer, _, leaf = name.rpartition(".")
    if leaf != "weight" or layer == architecture.head:
        return True
    return bool(model.get_parameter(name).shape == tensor.shape)


def _classes(architecture: Architecture, state: Mapping[str, Tensor]) -> int:
    return min(architecture.classes_of(state) or architecture.n_classes, MOST_CLASSES)
