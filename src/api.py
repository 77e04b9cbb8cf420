"""The Python interface: compress a network of one's own, save and load it, and see what it holds.

Settings are keyword arguments with the names that they have in settings files: those of `model.compression_parameters`
(`k`, `large_subvectors`, `ignored_modules`, `layer_specs`, ...), of the search for permutations (`search`,
`permutations`, `use_permutations`, ...) and the wanted size (`size="1.2MB"` or `ratio=25`), which chooses k and d.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .common.errors import CheckpointError, SettingsError
from .common.hub import fetched, on_hub
from .compression.permute.auto import groups_by_following
from .compression.permute.binding import AnyGroup, bind
from .compression.permute.channels import ChannelGroup
from .compression.permute.groups import Group, check_function
from .compression.permute.permute import permute
from .compression.quantize.calibrate.calibrate import Calibration, calibrate
from .compression.quantize.calibrate.inputs import batches_of, count, few_inputs
from .compression.quantize.compress import candidate_distortion, check_weights
from .compression.quantize.compress import compress as quantize
from .compression.quantize.dequantize import dense_again
from .compression.quantize.layers import QuantizedLayer
from .compression.quantize.plan import Plan, make_plan
from .compression.quantize.replaced import mark_replaced
from .model_files.beside import LikelyFile, with_beside, with_room
from .model_files.building import fill
from .model_files.compression_report import applied
from .model_files.decoding import Decode, check_decode, set_decode
from .model_files.inspected import Inspection
from .model_files.inspection import examine, examine_model
from .model_files.kept_info import info_of, keep_info
from .model_files.metadata import ModelInfo
from .model_files.open_model_file import read_model_file
from .model_files.packed import check_layers_of, save_packed
from .model_files.plan_of_file import plan_of
from .model_files.pth import save_compressed
from .model_files.report import Report
from .model_files.size import model_size
from .run.compression_specs import budget_of, quantization_of, search_of, sized_by_inputs
from .settings import BudgetSettings, ModelSettings
from .settings.keywords import budget_settings, model_settings

LIKELY_NAME, FIGURES = "package.module:callable", 2
"""What a file may be given when it is saved, for which a wanted size leaves room: a name that long, so many figures."""

Path_ = str | PathLike[str]
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a network is called with: a tensor, a tuple of arguments, or a dict of keyword arguments."""


def compress(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    calibration: Tensor | Iterable[Any] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    show_progress: bool = True,
    **settings: Any,
) -> tuple[nn.Module, Report]:
    """Permute and quantize a network, in place (paper sections 3.2 and 3.3).

    Modules keep classes, forwards, hooks and attributes; a quantized weight is computed from a codebook, which is
    trained like any parameter, and codes, which stay. An optimizer that was made before refuses to step.

    Args:
        model: the dense network, on any device.
        example_inputs: what it is called with, once, to find the channels that may be permuted. None: it is only
            quantized, unless `permutations` lists groups.
        calibration: inputs of the kind that the network will see, without labels, a thousand if possible: what the
            weights make of these is kept, and batch norms adjusted; a wanted size is spent on what matters most to
            the outputs for them. A tensor, a loader or any iterable of batches; of pairs (inputs, labels) the first
            item is taken. All are held in memory.
        seed: of all random choices.
        device: where to cluster; None: where the weights are.
        show_progress: show progress bars where there is a terminal.
        settings: as the module's docstring says.

    Returns:
        The same network, in the mode that it was in, and what was done.

    Raises:
        SettingsError: a setting is unknown or wrong.
        PlanError: layers cannot be quantized as asked (names all of them), or the network cannot have such a size.
        GroupError: groups do not fit the network.
        DataError: calibration holds no inputs, or a layer's are not finite.
    """
    given, wanted = model_settings(settings), budget_settings(settings)
    _check_dense(model)
    batches = None if calibration is None else batches_of(calibration)
    spec, known = quantization_of(given), ModelInfo(settings=_known(given, wanted, seed))
    search = replace(search_of(given), thorough=batches is None)
    check_weights(model, plan := make_plan(model, spec))
    found, notes = _groups(model, example_inputs, given, search.reshapes, seed)
    file = _likely_file(known, model, plan, found, search.reshapes, batches is not None)
    how: dict[str, Any] = {"seed": seed, "device": device, "show_progress": show_progress}
    plan, sized = sized_by_inputs(model, spec, with_beside(budget_of(wanted), model, plan, file), file, batches, **how)
    notes = [*plan.notes, *notes]
    measure = candidate_distortion(plan, seed)
    permuted = permute(model, found, plan.sizes, search, seed=seed, measure=measure, show_progress=show_progress)
    known = replace(known, permutations=applied(found, permuted, search.reshapes))
    if sized is not None:
        plan = sized.plan_anew(model, plan, known.permutations)
        notes += plan.notes
    replaced = {id(p): (name, p) for name, p in model.named_parameters()}
    finished, outputs_lost, more = _calibrated(model, plan, batches, seed, device, show_progress)
    model, layers = quantize(model, plan, finished=finished, **how)
    mark_replaced(replaced, model)
    keep_info(model, replace(known, outputs_lost=_outputs_lost(finished)))
    return model, Report(tuple(layers), plan.dense, tuple(permuted), model_size(model), (*notes, *more), outputs_lost)


def groups(model: nn.Module, example_inputs: Inputs, *, seed: int = 0) -> list[ChannelGroup]:
    """The groups of channels of a network that may be exchanged: found by following them through one forward pass, and
    tried (paper section 3.2.1). The network comes back as it was.

    Raises:
        GroupError: nothing can be compared, see `compression.permute.verification`.
    """
    return groups_by_following(model, lambda net: call(net, example_inputs), seed)[0]


def save(model: nn.Module, file: Path_, *, arch: str | None = None, metric: Mapping[str, float] | None = None) -> None:
    """Write a compressed network: `.safetensors` packed, of the size that is reported; `.pth` as published.

    Args:
        model: from `compress` or `load`.
        file: where to.
        arch: the name by which the commands build the network (`timm:NAME`, `package.module:callable`).
        metric: what was measured on it, by name, for the packed file.

    Raises:
        SettingsError: the file has another ending.
        RunError: it cannot be written; an existing one is unchanged.
        CheckpointError: a tensor cannot be stored.
    """
    path = Path(file).expanduser()
    if path.suffix == ".pth":
        save_compressed(model, path)
    elif path.suffix == ".safetensors":
        info = info_of(model)
        producer = f"pqf {__version__}"
        info = replace(info, arch=arch or info.arch, metric=metric or info.metric, producer=producer)
        save_packed(model, path, info)
    else:
        raise SettingsError(f"{path} ends in {path.suffix!r}; expected .safetensors (packed) or .pth (as published)")


def load(file: Path_, into: nn.Module, *, decode: Decode = "kept") -> nn.Module:
    """Put a compressed or dense file into a network, in place.

    Args:
        file: packed, published or dense; or `hf:OWNER/NAME`, on the Hugging Face hub.
        into: the dense network that it was made of, of any values.
        decode: when weights are decoded in evaluation: `kept`, once; `each_forward`, at every use, so that the weight
            of one module is in memory at a time; `compiled`, in the graph that torch.compile makes.

    Returns: it, in evaluation mode, its weights quantized where those of the file are.

    Raises:
        CheckpointError: the file cannot be read or does not fit; the network is as it was.
        SettingsError: `decode` is none of these, or it cannot be fetched.
    """
    check_decode(decode, next((one.device for one in into.parameters()), "cpu"))
    found = read_model_file(_path(file))
    source = str(found.path)
    if any(isinstance(module, QuantizedLayer) for module in into.modules()):
        raise CheckpointError(f"{source}: the network to load into is compressed already; give the dense one")
    if found.packed is not None:
        check_layers_of(into, found.packed)
        plan, state = found.packed.plan, found.packed.state()
    else:
        state = dict(found.tensors)
        plan = plan_of(into, state, source) if found.quantized else Plan(layers={}, notes=())
    replaced = {id(p): (name, p) for name, p in into.named_parameters()}
    model = fill(into, plan, state, source)
    mark_replaced(replaced, model)
    if found.packed is not None:
        keep_info(model, found.packed.info)
    return set_decode(model, decode)


def dequantize(model: nn.Module) -> nn.Module:
    """A dense copy of a compressed network, which computes what it computes in evaluation; the network stays."""
    return dense_again(copy.deepcopy(model))


def inspect(model_or_file: nn.Module | Path_, *, against: Path_ | None = None, arch: str | None = None) -> Inspection:
    """What a network or a model file holds; `print` shows it as a table.

    Args:
        model_or_file: a network, or a file of any form.
        against: the dense network (a file) that the file came from.
        arch: name of the architecture, where a file does not tell.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if isinstance(model_or_file, nn.Module):
        return examine_model(model_or_file, info_of(model_or_file))
    return examine(_path(model_or_file), None if against is None else _path(against), arch)


def _path(file: Path_) -> Path:
    """A file; one on the hub is fetched."""
    return fetched(str(file), "pqf") if on_hub(str(file)) else Path(file).expanduser()


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The output of a network for `inputs`."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _groups(
    model: nn.Module,
    example: Inputs | None,
    given: ModelSettings,
    reshapes: Mapping[str, tuple[int, ...]],
    seed: int,
) -> tuple[Sequence[AnyGroup], list[str]]:
    """The groups that may be permuted, seen to fit, and what was found out about them."""
    found, notes = _wanted_groups(model, example, given.use_permutations, given.permutations, seed)
    bind(model, found, reshapes)
    by_layers = [group for group in found if isinstance(group, Group)]  # which somebody wrote: they are tried
    if example is not None:
        check_function(model, by_layers, torch.empty(0), reshapes, seed, lambda net, _: call(net, example))
    return found, notes


def _wanted_groups(
    model: nn.Module, example: Inputs | None, wanted: bool, given: Any, seed: int
) -> tuple[Sequence[AnyGroup], list[str]]:
    if not wanted:
        return [], []
    if isinstance(given, tuple):
        return [Group(tuple(group.parents), tuple(group.children)) for group in given], []
    if example is None:
        return [], ["channels were not permuted: without example_inputs it is not known which may be"]
    return groups_by_following(model, lambda net: call(net, example), seed)


def _check_dense(model: nn.Module) -> None:
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise SettingsError("the network is compressed already; pqf.dequantize(model) gives a dense one")


def _known(given: ModelSettings, wanted: BudgetSettings, seed: int) -> dict[str, Any]:
    """The settings that files name."""
    asked = {name: value for name, value in (("size", wanted.size), ("ratio", wanted.ratio)) if value is not None}
    return {"compression_parameters": given.compression_parameters.model_dump(mode="json"), "seed": seed, **asked}


def _likely_file(
    known: ModelInfo,
    model: nn.Module,
    plan: Plan,
    found: Sequence[AnyGroup],
    reshapes: Mapping[str, tuple[int, ...]],
    calibrated: bool,
) -> LikelyFile:
    """About what a file of the network will say."""
    likely = replace(known, arch=LIKELY_NAME)
    return with_room(likely, model, plan, found, reshapes, calibrated=calibrated, n_figures=FIGURES, trained=False)


def _outputs_lost(found: Calibration | None) -> dict[str, float] | None:
    return None if found is None else {name: steps[-1][1] for name, steps in found.lost.items()}


def _calibrated(
    model: nn.Module, plan: Plan, batches: Sequence[Any] | None, seed: int, device: Any, show_progress: bool
) -> tuple[Calibration | None, float | None, list[str]]:
    """Codebooks and codes of the plan's weights, the share of the outputs' energy that they lose, and what to say of
    them; batch norms of the network are put right."""
    if batches is None:
        return None, None, []
    found = calibrate(model, plan, batches, seed=seed, device=device, show_progress=show_progress)
    found.put_norms(model)
    lost, n = next(reversed(found.lost_after().values()), None), count(batches)
    return found, lost, [found.summary(n), *filter(None, [few_inputs(n)]), *found.notes()]


__all__ = ["Inspection", "Report", "call", "compress", "dequantize", "groups", "inspect", "load", "save"]
