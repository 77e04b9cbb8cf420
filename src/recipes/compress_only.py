"""Compressing a network without training it, and without data unless some images are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..architectures.architecture import Architecture
from ..architectures.named import find
from ..common.errors import DataError, SettingsError
from ..common.progress import bar
from ..run.agreement import digest_of, first_here
from ..run.fingerprint import IMAGES, WEIGHTS, weights_digest
from ..run.inputs import calibration_folder, weights_source
from ..run.model_writer import ModelWriter
from ..run.open_run import Job, open_run
from ..settings import Settings
from ..tasks.calibration import CalibrationImages, CalibrationSpec
from .compress import compress_network, plan_compression, report_size
from .data import workers
from .initial_model import starting_model
from .show_plan import show_plan
from .specs import with_current_names

EXAMPLES = 2
"""Images of the batch on which groups are tried: a norm over the batch needs more than one."""


def compress_only(settings: Settings) -> int:
    """Permute and quantize a network and write it, with a report of what was lost; returns the exit status.

    With `calibration.images` it is calibrated with these images, and a wanted size spent on what matters to its outputs
    for them. With `compression.plan` it is only said what would be done.
    """
    architecture = find(settings.model.arch)
    settings = with_current_names(settings, architecture)
    weights = weights_source(settings)
    if settings.compression.plan:
        return show_plan(settings, architecture, weights, lambda job: _shown(job, architecture))
    with open_run(settings) as run:
        torch.manual_seed(settings.seed)  # random starting weights; everything else draws from streams of its own
        with first_here(run.engine):
            start = starting_model(settings, architecture, weights, architecture.n_classes, run.engine.is_main)
        if start.compressed is not None:
            raise SettingsError(f"model.weights: {weights} is a compressed model already; inspect and convert read it")
        model, images = start.model.eval(), _images(run, architecture)
        run.check_inputs({WEIGHTS: weights_digest(model), IMAGES: digest_of([] if images is None else images.paths)})
        plan = plan_compression(settings, architecture, model, example(settings, architecture))
        save = ModelWriter(settings, architecture, run.output)
        run.begin({}, save, "bits")
        model = compress_network(run, plan, model, None if images is None else _read(run, images))
        results: Mapping[str, Any] = report_size(model, run.recorder)
        path = run.output.path / "model.pth"
        if run.engine.is_main:
            save(model.eval(), path, None)
        run.finish(None, results, path if settings.save_format == "pth" else path.with_suffix(".safetensors"))
    return 0


def example(settings: Settings, architecture: Architecture) -> Tensor:
    """Images (B, 3, H, W) to try a network on."""
    side = settings.calibration.image_size or architecture.image_size
    return torch.randn(EXAMPLES, 3, side, side)


def _shown(job: Job, architecture: Architecture) -> list[Tensor] | None:
    """The images that say what matters to the network."""
    images = _images(job, architecture)
    return None if images is None else _read(job, images)


def _images(run: Job, architecture: Architecture) -> CalibrationImages | None:
    folder, given = calibration_folder(run.settings), run.settings.calibration
    if folder is None:
        return None
    side = given.image_size or architecture.image_size
    spec = CalibrationSpec(
        count=given.count,
        batch_size=given.batch_size,
        num_workers=workers(given.num_workers, run.engine),
        image_size=side,
        resize=given.resize or round(side * 8 / 7),
        seed=run.settings.seed,
    )
    if spec.resize < side:
        raise SettingsError(
            f"calibration.image_size {side} is larger than calibration.resize {spec.resize}: the crop would not fit"
        )
    return CalibrationImages(folder, spec, run.engine.is_main)


def _read(run: Job, images: CalibrationImages) -> list[Tensor]:
    """All batches, in memory: they are shown to the network many times."""
    total = -(-len(images) // run.settings.calibration.batch_size)
    batches = list(bar(images, "read images", total, run.engine.is_main, "batch"))
    if not batches:
        raise DataError("calibration.images: none of the images could be read")
    return batches
