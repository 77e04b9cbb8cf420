"""Compressing a network without training it, and without data unless some images are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..architectures.named import find
from ..common.errors import SettingsError
from ..run.agreement import digest_of, first_here
from ..run.fingerprint import IMAGES, WEIGHTS, weights_digest
from ..run.inputs import weights_source
from ..run.model_writer import ModelWriter
from ..run.open_run import open_run
from ..run.summaries import report_size
from ..settings import Settings
from .compress import compress_network, example_images, plan_compression
from .data import images_of_folder
from .initial_model import starting_model
from .show_plan import show_plan
from .specs import with_current_names


def compress_only(settings: Settings) -> int:
    """Permute and quantize a network and write it, with a report of what was lost; returns the exit status.

    With `calibration.images` it is calibrated with these images, and a wanted size spent on what matters to its outputs
    for them. With `compression.plan` it is only said what would be done.
    """
    architecture = find(settings.model.arch)
    settings = with_current_names(settings, architecture)
    if settings.calibration.images is None:
        settings = _without_calibration(settings)
    weights = weights_source(settings)
    if settings.compression.plan:
        return show_plan(settings, architecture, weights)
    with open_run(settings) as run:
        if run.is_over:
            return 0
        torch.manual_seed(settings.seed)  # random starting weights; everything else draws from streams of its own
        with first_here(run.engine):
            start = starting_model(settings, architecture, weights, architecture.n_classes, run.engine.is_main)
        if start.compressed is not None:
            raise SettingsError(f"model.weights: {weights} is a compressed model already; inspect and convert read it")
        model, images = start.model.eval(), images_of_folder(settings, architecture, run.engine.is_main)
        run.check_inputs({WEIGHTS: weights_digest(model), IMAGES: digest_of([] if images is None else images.paths)})
        example, with_images = example_images(settings, architecture), images is not None
        plan = plan_compression(settings, architecture, model, example, calibrated=with_images, trained=False)
        save = ModelWriter(settings, architecture, run.output)
        run.begin({}, save, "bits")
        model = compress_network(run, plan, model, None if images is None else images.read(run.engine.is_main))
        results: Mapping[str, Any] = report_size(model, run.recorder)
        path = run.output.path / "model.pth"
        if run.engine.is_main:
            save(model.eval(), path, None)
        run.finish(None, results, path if settings.save_format == "pth" else path.with_suffix(".safetensors"))
    return 0


def _without_calibration(settings: Settings) -> Settings:
    """What the settings come to where there are no images."""
    return settings.model_copy(update={"calibration": settings.calibration.model_copy(update={"use": False})})
