"""From settings to a permuted and quantized network: everything is checked first, then done, then reported."""

from __future__ import annotations

import math
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
from ..compression.quantize.compress import LayerResult, build_quantized, candidate_distortion, check_weights, compress
from ..compression.quantize.plan import Plan, make_plan
from ..compression.quantize.sixteen_bits import WORTH_A_NOTE
from ..model_files.beside import with_beside
from ..model_files.compression_report import FILE_NAME, read_settings, report_text
from ..model_files.metadata import ModelInfo
from ..model_files.size import model_size
from ..run.calibrated import calibrated
from ..run.calibration_report import report_calibration
from ..run.chosen import chosen_by_photos
from ..run.compression_specs import Sized, budget_of, sized_for
from ..run.model_writer import PRODUCER, compression_settings
from ..run.open_run import Run
from ..run.recorder import AnyRecorder
from ..settings import Settings, given_on_command_line
from .compress_distributed import agreed, permute_together, quantize_together
from .specs import quantization_spec, search_spec

EXAMPLES = 2
"""Images of the batch on which groups are tried: a norm over the batch needs more than one."""


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
    settings: Settings, architecture: Architecture, model: nn.Module, example: Tensor
) -> CompressionPlan:
    """Resolve plan and groups and check both on the network, random permutations included.

    Args:
        settings: of the run.
        architecture: gives the groups where the settings do not.
        model: the dense network.
        example: a batch of inputs (B, 3, H, W) to try the groups on.

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
    wanted = _with_beside(settings, architecture, model, quantization, groups)
    if wanted is not None:
        quantization, sized = sized_for(model, spec, wanted, settings.seed)
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


def wanted_size(settings: Settings, architecture: Architecture, model: nn.Module) -> Budget | None:
    """The size that is asked for, and what of it a file needs for what is not counted.

    Args:
        settings: of the job.
        architecture: of the network.
        model: the dense network, which is not trained.

    Raises:
        PlanError: a layer cannot be quantized as asked.
        GroupError: a group does not fit.
    """
    wanted = budget_of(settings.compression, "compression.")
    if wanted is None or wanted.size is None:  # channels need not be followed for it
        return wanted
    plan = make_plan(model, quantization_spec(settings))
    groups, _ = _groups(settings, architecture, model, example_images(settings, architecture))
    return _with_beside(settings, architecture, model, plan, groups)


def _with_beside(
    settings: Settings, architecture: Architecture, model: nn.Module, plan: Plan, groups: Sequence[AnyGroup]
) -> Budget | None:
    wanted = budget_of(settings.compression, "compression.")
    if wanted is None or wanted.size is None:
        return wanted
    info = ModelInfo(
        arch=architecture.name,
        num_classes=n_outputs(architecture, model),
        settings=compression_settings(settings),
        producer=PRODUCER,
    )
    return with_beside(wanted, model, plan, groups, search_spec(settings, architecture).reshapes, info)


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
    if plan.sized is not None and images is not None:
        quantization = chosen_by_photos(run, plan.sized, model, images)
    else:
        quantization = agreed(run.engine, plan.quantization)
    plan = replace(plan, quantization=quantization, search=replace(plan.search, thorough=images is None))
    for text in (*quantization.notes, *plan.notes):
        note(text)
    permuted = _permute(run, plan, model)
    log.info("%s", _permutation_summary(permuted))
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
        log.info("%s", _quantization_summary(layers))
    for layer in layers:
        if layer.codebook_bits == 16 and layer.rounding > WORTH_A_NOTE:
            note(
                f"{layer.name or 'the model'}: {100 * layer.rounding:.2g} % of its energy is lost by 16-bit floats "
                "alone: its values are near the smallest that they can hold"
            )
    run.recorder.table("distortion", ["layer", "share of the weights' energy lost"], _distortion_rows(layers))
    lost = None if calibration is None else calibration.lost
    about = (layers, plan.groups, permuted, plan.search.reshapes, plan.quantization.dense, lost)
    run.recorder.file(FILE_NAME, report_text(*about))
    return model


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


def report_size(model: nn.Module, recorder: AnyRecorder) -> dict[str, float]:
    """Log and record the size of a quantized network; returns its figures."""
    counted = model_size(model)
    log.info("size: %s", counted.summary())
    recorder.table(
        "size",
        ["", "bits", "MB"],
        [
            [name, f"{bits:,}", f"{bits / 8 / 2**20:.2f}"]
            for name, bits in (
                ("codes", counted.codes),
                ("codebooks", counted.codebooks),
                ("other", counted.other),
                ("all", counted.bits),
                (f"dense network, {counted.ratio:.2f} times as large", counted.original),
            )
        ],
    )
    return {"bits": counted.bits, "megabytes": round(counted.megabytes, 4), "ratio": round(counted.ratio, 4)}


def _permutation_summary(results: Sequence[GroupResult]) -> str:
    if not results:
        return "permute: no groups"
    improved = [r for r in results if r.children and r.after < r.before]
    fixed = sum(not r.children for r in results)
    mean = sum(r.after - r.before for r in improved) / len(improved) if improved else 0.0
    text = f"permute: {len(improved)} of {len(results)} groups permuted, log det(Cov) changed by {mean:.3f} on average"
    return text + (f"; {fixed} do not depend on a permutation" if fixed else "")


def _quantization_summary(layers: Sequence[LayerResult]) -> str:
    if not layers:
        return "quantize: no layer was quantized"
    lost = sum(layer.distortion for layer in layers) / (sum(layer.power for layer in layers) or math.nan)
    worst = max(layers, key=lambda layer: layer.relative_error)
    most = f"most in {worst.name or 'the model'}: {100 * worst.relative_error:.2f} %"
    return f"quantize: {len(layers)} layers quantized, {100 * lost:.2f} % of the weights' energy lost ({most})"


def _distortion_rows(layers: Sequence[LayerResult]) -> list[list[str]]:
    """The layers that lost most first."""
    falling = sorted(layers, key=lambda layer: -layer.relative_error)
    return [[layer.name or "(model)", f"{100 * layer.relative_error:.3f} %"] for layer in falling]
