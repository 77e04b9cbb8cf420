"""The two jobs on Mask R-CNN: compress and fine-tune it, and evaluate it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures.architecture import Architecture, n_outputs
from ..architectures.maskrcnn import set_box_numbers, set_image_size
from ..common.paths import find, write_text
from ..compression.quantize.layers import set_memory_format
from ..engines.engine import Engine
from ..model_files.size import model_size
from ..run.output_folder import EVALUATION_LEAVINGS, OutputFolder
from ..run.processes import Say, first_here, once, open_output, printer, processes
from ..settings import Settings, is_placeholder
from ..tasks.coco.data import CocoSplit, check_categories
from ..tasks.coco.metrics import read_results, write_results
from ..tasks.detection import Scores, score
from .coco_data import detection_task, read_splits, splits_fingerprint
from .initial_model import architecture_to_evaluate, dense_model, model_to_evaluate
from .pictures import Pictures
from .specs import with_current_names
from .train import Prepared, train, verdict

EXAMPLE_SIDE = 64
"""Pixels of the images that permutations are tried on: the smallest of which the pyramid's levels all have something left."""


def train_detection(settings: Settings) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a Mask R-CNN; returns the exit status."""
    return train(settings, "detection", _prepare)


def _prepare(settings: Settings, architecture: Architecture, weights: str | Path, engine: Engine) -> Prepared:
    data = settings.dataloader
    train_split, validation = read_splits(settings, ("train", "val"), engine)
    say = printer(engine)
    say(
        f"training: {len(train_split):,} images with {sum(map(len, train_split.annotations)):,} objects; left out: {train_split.dropped}"
    )
    with first_here(engine):
        model = dense_model(architecture, weights, data.num_classes or _classes(train_split), engine.is_main)
    for split in (train_split, validation):
        check_categories(split, n_outputs(architecture, model))
    set_image_size(model, data.min_size, data.max_size)
    set_box_numbers(model, settings.model.boxes_per_image, settings.model.proposals)
    task = detection_task(settings, engine, train_split, validation)
    example = torch.randn(1, 3, EXAMPLE_SIDE, EXAMPLE_SIDE)
    more = {"training images": len(train_split), "left out of training": str(train_split.dropped)}
    return Prepared(model, task, example, more, splits_fingerprint(train_split, validation))


def _classes(split: CocoSplit) -> int:
    """Outputs of a head for all categories of `split` and the background."""
    return max(split.names) + 1


def evaluate_detection(settings: Settings) -> int:
    """Evaluate a compressed (or dense) Mask R-CNN, or a file of detections; returns status 1 if `expected` is missed.

    With an `output_path` the detections and the figures are kept there; with `visualize` pictures are drawn.
    """
    with processes(settings) as engine:
        say = printer(engine)
        architecture = architecture_to_evaluate(settings, "detection")
        settings = with_current_names(settings, architecture)
        output = None if is_placeholder(settings.output_path) else open_output(settings, engine, EVALUATION_LEAVINGS)
        try:
            if settings.evaluation.detections is None:
                rows, image_ids, split, about = _detect(settings, architecture, engine)
            else:
                path = find(
                    settings.evaluation.detections, "evaluation.detections", "Expected a COCO result file (JSON)"
                )
                (split,) = read_splits(settings, ("val",), engine, look_at_images=False)
                rows, image_ids, about = (
                    list(read_results(path, split.api)),
                    list(split.image_ids),
                    {"detections": str(path)},
                )
                say(f"detections: {path}")
            return int(once(engine, lambda: _report(settings, output, split, rows, image_ids, about, say)))
        finally:
            if output is not None:
                output.close()


def _report(
    settings: Settings,
    output: OutputFolder | None,
    split: CocoSplit,
    rows: list[dict[str, Any]],
    image_ids: list[int],
    about: Mapping[str, Any],
    say: Say,
) -> int:
    """Score the detections `rows` in the images `image_ids`, say and keep what was found; returns the exit status."""
    scores = score(split, rows, image_ids, settings.evaluation.backend, settings.evaluation.per_category)
    say(f"images: {len(image_ids):,}, detections: {len(rows):,}")
    for line in (*scores.boxes.lines(), *scores.masks.lines()):
        say(line)
    if output is not None:
        _keep(output, rows, {**about, "images": len(image_ids)}, scores)
        say(f"detections in {output.path / 'detections.json'}; figures in {output.path / 'results.json'}")
    metrics, expected = scores.metrics(), settings.expected
    found = {"box AP": metrics.get("BoxAP", 0.0), "mask AP": metrics.get("MaskAP", 0.0)}
    return verdict(found, {"box AP": expected.box_ap, "mask AP": expected.mask_ap}, expected.tolerance, say)


def _detect(
    settings: Settings, architecture: Architecture, engine: Engine
) -> tuple[list[dict[str, Any]], list[int], CocoSplit, dict[str, Any]]:
    """Rows of all detections, the images looked at, the data, and what is known of the model."""
    say = printer(engine)
    data = settings.dataloader
    with first_here(engine):
        model, source = model_to_evaluate(settings, architecture, engine.is_main)
    (validation,) = read_splits(settings, ("val",), engine)
    check_categories(validation, n_outputs(architecture, model))
    pictures = Pictures.of(settings, architecture, n_outputs(architecture, model), engine)
    say(f"model: {source}")
    size = model_size(model)
    say(f"size: {size.summary()}")
    task = detection_task(settings, engine, None, validation)
    model = _ready(model, settings, engine)
    rows, image_ids = task.detect(model, "evaluate")
    skipped = set(engine.gather(sorted(task.unreadable)))
    if skipped:
        say(f"skipped: {len(skipped):,} unreadable images")
    if pictures is not None:
        dense = None if pictures.dense is None else _ready(pictures.dense, settings, engine)
        n_drawn = pictures.draw(validation, model, dense, engine)
        say(f"{n_drawn:,} pictures in {pictures.folder}")
    set_up = {"min_size": data.min_size, "max_size": data.max_size}
    return rows, image_ids, validation, {"model": source, "bits": size.bits, "ratio": round(size.ratio, 4), **set_up}


def _ready(model: nn.Module, settings: Settings, engine: Engine) -> nn.Module:
    set_image_size(model, settings.dataloader.min_size, settings.dataloader.max_size)
    set_box_numbers(model, settings.model.boxes_per_image, settings.model.proposals)
    return set_memory_format(model.to(engine.device), settings.channels_last)


def _keep(output: OutputFolder, rows: list[dict[str, Any]], about: Mapping[str, Any], scores: Scores) -> None:
    """Write detections.json and results.json."""
    output.begin()
    write_results(output.path / "detections.json", rows)
    results = {**about, **scores.metrics()}
    for name, figures in (("box AP per category", scores.boxes), ("mask AP per category", scores.masks)):
        if figures.per_category:
            results[name] = {
                category: None if value != value else value for category, value in figures.per_category.items()
            }
    write_text(output.path / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
