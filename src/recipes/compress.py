"""From settings to a permuted and quantized network: everything is checked first, then done, then reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.architecture import Architecture, n_outputs
from ..common.log import log, note
from ..compression.permute.auto import groups_by_following
from ..compression.permute.binding import AnyGroup, bind
from ..compression.permute.groups import Group, check_function
from ..compression.permute.permute import GroupResult, SearchSpec, permute
from ..compression.quantize.budget.wanted import Budget
from ..compression.quantize.compress import build_quantized, candidate_distortion, check_weights, compress
from ..compression.quantize.plan import Plan, make_plan
from ..compression.quantize.sixteen_bits import WORTH_A_NOTE
from ..model_files.beside import LikelyFile, with_beside, with_room
from ..model_files.compression_report import FILE_NAME, applied, read_settings, report_text
from ..model_files.metadata import ModelInfo
from ..run.calibrated import calibrated
from ..run.calibration_report import report_calibration
from ..run.chosen import chosen_anew, chosen_by_photos
from ..run.compression_specs import Sized, budget_of, sized_for
from ..run.model_writer import PRODUCER, compression_settings
from ..run.open_run import Run
from ..run.summaries import distortion_rows, permutation_summary, quantization_summary
from ..settings import Settings, given_on_command_line
from .compress_distributed import agreed, permute_together, quantize_together
from .specs import quantization_spec, search_spec

EXAMPLES = 2
"""Images of the batch on which groups are tried: a norm over the batch needs more than one."""

KEYS = "compression."
FIGURES = {"classification": 8, "detection": 32}
"""Figures of a validation that a file may hold, by task."""


@dataclass(frozen=True)
class CompressionPlan:
    """What will be done to a network, checked against it.

    Attributes:
        quantization: how each layer will be quantized.
        groups: of layers or channels that share a permutation.
        search: how their permutations are searched.
        seed: of all random choices.
        notes: what a reader should know, besides those of `quantization`.
        sized: where a size is wanted: what is needed to choose for it with photos.
    """

    quantization: Plan
    groups: Sequence[AnyGroup]
    search: SearchSpec
    seed: int
    notes: tuple[str, ...] = ()
    sized: Sized | None = None


def plan_compression(
    settings: Settings,
    architecture: Architecture,
    model: nn.Module,
    example: Tensor,
    *,
    calibrated: bool = False,
    trained: bool = True,
) -> CompressionPlan:
    """Resolve plan and groups and check both on the network, random permutations included.

    Args:
        settings: of the run.
        architecture: gives the groups where the settings do not.
        model: the dense network.
        example: a batch of inputs (B, 3, H, W) to try the groups on.
        calibrated: whether there will be images to calibrate the network with.
        trained: whether the network will be trained, so that its file holds figures of a validation.

    Raises:
        PlanError: a layer cannot be quantized as asked, or the network cannot have the wanted size.
        GroupError: a group does not fit, or would change the network's function.
    """
    spec, search = quantization_spec(settings), search_spec(settings, architecture)
    quantization, sized = make_plan(model, spec), None
    check_weights(model, quantization)
    groups, found_notes = _groups(settings, architecture, model, example)
    bind(model, groups, search.reshapes)
    by_layers = [group for group in groups if isinstance(group, Group)]
    check_function(model, by_layers, example, search.reshapes, settings.seed, architecture.outputs)
    wanted, file = _wanted(settings, architecture, model, quantization, groups, calibrated, trained)
    if wanted is not None:
        quantization, sized = sized_for(model, spec, wanted, settings.seed, file=file)
    return CompressionPlan(
        quantization=quantization,
        groups=groups,
        search=search,
        seed=settings.seed,
        sized=sized,
        notes=tuple(found_notes),
    )


def example_images(settings: Settings, architecture: Architecture) -> Tensor:
    """Images (B, 3, H, W) to try a network on that is not trained."""
    side = settings.calibration.image_size or architecture.image_size
    return torch.randn(EXAMPLES, 3, side, side)


def wanted_size(settings: Settings, architecture: Architecture, model: nn.Module, *, calibrated: bool) -> Budget | None:
    """The size that is asked for of a network that will not be trained, and what of it a file needs for what is not
    counted.

    Args:
        settings: of the job.
        architecture: of the network.
        model: the dense network.
        calibrated: whether there are images to calibrate it with.

    Raises:
        PlanError: a layer cannot be quantized as asked.
        GroupError: a group does not fit.
    """
    if settings.compression.size is None:  # then channels need not be followed
        return budget_of(settings.compression, KEYS)
    plan = make_plan(model, quantization_spec(settings))
    groups, _ = _groups(settings, architecture, model, example_images(settings, architecture))
    return _wanted(settings, architecture, model, plan, groups, calibrated, False)[0]


def _wanted(
    settings: Settings,
    architecture: Architecture,
    model: nn.Module,
    plan: Plan,
    groups: Sequence[AnyGroup],
    calibrated: bool,
    trained: bool,
) -> tuple[Budget | None, LikelyFile | None]:
    """What is wanted, and where that is a size, what a file of it will say."""
    wanted = budget_of(settings.compression, KEYS)
    if wanted is None or wanted.size is None:
        return wanted, None
    known = ModelInfo(
        arch=architecture.name,
        num_classes=n_outputs(architecture, model),
        settings=compression_settings(settings),
        producer=PRODUCER,
    )
    reshapes, n_figures = search_spec(settings, architecture).reshapes, FIGURES[architecture.task] if trained else 0
    file = with_room(known, model, plan, groups, reshapes, calibrated=calibrated, n_figures=n_figures, trained=trained)
    return with_beside(wanted, model, plan, file), file


def _groups(
    settings: Settings, architecture: Architecture, model: nn.Module, example: Tensor
) -> tuple[Sequence[AnyGroup], list[str]]:
    """The groups that the settings ask for, and what was found out about them."""
    given = settings.model
    if not given.use_permutations:
        return [], []
    foreign = False
    if isinstance(given.permutations, tuple):
        groups = [Group(tuple(group.parents), tuple(group.children)) for group in given.permutations]
        foreign = _of_another_network(settings, groups, model)
        if not foreign:
            return groups, []
    notes = [f"the groups in {settings.file} are those of another network: not used here"] if foreign else []
    if architecture.groups is not None and given.permutations != "auto":
        return architecture.groups(model), notes
    found, more = groups_by_following(model, lambda net: architecture.outputs(net, example), settings.seed)
    return found, [*notes, *more]


def _of_another_network(settings: Settings, groups: Sequence[Group], model: nn.Module) -> bool:
    """Whether a settings file lists the groups of the architecture that it was written for, and the command line names
    another: not one of their layers is here."""
    if not given_on_command_line(settings, "model.arch") or given_on_command_line(settings, "model.permutations"):
        return False
    here = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return not any(name in here for group in groups for name in (*group.parents, *group.children))


def compress_network(
    run: Run, plan: CompressionPlan, model: nn.Module, images: Sequence[Any] | None = None
) -> nn.Module:
    """Permute and quantize `model` and report the distortion; returns the quantized network.

    Groups that an earlier process of the run finished are not done again, nor layers that are quantized without images.

    Args:
        run: the run.
        plan: for the network.
        model: the dense network.
        images: batches that the network is calibrated with, and that say what a wanted size is best spent on, the same
            on every process: (B, 3, H, W), or lists of images as detectors take them; None: there are none.
    """
    quantization, sized = agreed(run.engine, plan.quantization), plan.sized
    if sized is not None and images is not None:
        quantization, sized = chosen_by_photos(run, sized, model, images)
    plan = replace(plan, quantization=quantization, sized=sized, search=replace(plan.search, thorough=images is None))
    for text in (*quantization.notes, *plan.notes):
        note(text)
    permuted = _permute(run, plan, model)
    log.info("%s", permutation_summary(permuted))
    plan = _with_room_left(run, plan, model, permuted)
    calibration = None if images is None else calibrated(run, model, plan.quantization, plan.seed, images)
    if calibration is not None:
        report_calibration(run.recorder, calibration)
    quantize = partial(
        compress,
        seed=plan.seed,
        device=run.engine.device,
        show_progress=run.engine.is_main,
        finished=calibration or run.checkpoints.clusterings,
    )
    model, layers = quantize_together(run.engine, model, plan.quantization, quantize)
    if calibration is None:  # which keeps outputs rather than weights, and has said so
        log.info("%s", quantization_summary(layers))
    for layer in layers:
        if layer.codebook_bits == 16 and layer.rounding > WORTH_A_NOTE:
            note(
                f"{layer.name or 'the model'}: {100 * layer.rounding:.2g} % of its energy is lost by 16-bit floats "
                "alone: its values are near the smallest that they can hold"
            )
    run.recorder.table("distortion", ["layer", "share of the weights' energy lost"], distortion_rows(layers))
    lost = None if calibration is None else calibration.lost
    about = (layers, plan.groups, permuted, plan.search.reshapes, plan.quantization.dense, lost)
    run.recorder.file(FILE_NAME, report_text(*about))
    return model


def _with_room_left(
    run: Run, plan: CompressionPlan, model: nn.Module, permuted: Sequence[GroupResult]
) -> CompressionPlan:
    """The plan for what is left of a wanted size, now that it is known which groups were permuted."""
    if plan.sized is None:
        return plan
    permutations = applied(plan.groups, permuted, plan.search.reshapes)
    quantization = chosen_anew(run, plan.sized, model, plan.quantization, permutations)
    for text in quantization.notes:
        note(text)
    return replace(plan, quantization=quantization)


def rebuild_network(run: Run, plan: CompressionPlan, model: nn.Module) -> nn.Module:
    """The quantized network without its values, which a checkpoint holds; d, k and the codebooks' bits are those of the
    run's report, so that what was chosen for a size stays what it was, on another machine too."""
    settings, quantization = read_settings(run.output.path / FILE_NAME), plan.quantization
    layers = {
        name: replace(layer, d=d, k=k, codebook_bits=bits)
        for name, layer in quantization.layers.items()
        for d, k, bits in [settings.get(name, (layer.d, layer.k, layer.codebook_bits))]
    }
    return build_quantized(model, replace(quantization, layers=layers))


def _permute(run: Run, plan: CompressionPlan, model: nn.Module) -> list[GroupResult]:
    """Permute `model` in place, by all processes together."""
    search = partial(
        permute,
        sizes=plan.quantization.sizes,
        spec=plan.search,
        seed=plan.seed,
        measure=candidate_distortion(plan.quantization, plan.seed),
        show_progress=run.engine.is_main,
    )
    return permute_together(
        run.engine,
        model,
        plan.groups,
        plan.search.reshapes,
        lambda part, groups, numbers: search(part, groups, finished=run.checkpoints.searches(numbers)),
    )
