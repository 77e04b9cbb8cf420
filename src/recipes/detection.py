"""The two jobs on Mask R-CNN: compress and fine-tune it, and evaluate it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures.architecture import Architecture, n_outputs
from ..architectures.maskrcnn import set_box_numbers, set_image_size
from ..common.log import log
from ..common.paths import write_text
from ..compression.quantize.layers import set_memory_format
from ..model_files.size import model_size
from ..run.agreement import first_here, once
from ..run.expected import verdict
from ..run.inputs import compressed_file, detections_file, weights_source
from ..run.open_run import Evaluation, Run, open_evaluation
from ..run.output_folder import EVALUATION_FILES, OutputFolder
from ..settings import Settings
from ..tasks.coco.classes import (
    FILE_NAME,
    category_ids,
    outputs_of,
    outputs_text,
    outputs_to_make,
    read_outputs,
    with_outputs,
)
from ..tasks.coco.data import CocoSplit
from ..tasks.coco.metrics import read_results, write_results
from ..tasks.detection import Scores, score
from .coco_data import detection_task, read_splits, splits_fingerprint
from .initial_model import NEW_HEAD_ADVICE, model_to_evaluate, starting_model
from .pictures import Pictures
from .train import Prepared, train

EXAMPLE_SIDE = 64
"""Pixels of the images that permutations are tried on: the smallest of which the pyramid's levels all have something
left."""


def train_detection(settings: Settings) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a Mask R-CNN; returns the exit status."""
    return train(settings, "detection", _prepare)


def _prepare(run: Run, architecture: Architecture, weights: str | Path) -> Prepared:
    settings, engine = run.settings, run.engine
    train_split, validation = read_splits(run, ("train", "val"))
    n_objects = sum(map(len, train_split.annotations))
    log.info(
        "training: %s images with %s objects; left out: %s",
        f"{len(train_split):,}",
        f"{n_objects:,}",
        train_split.dropped,
    )
    splits = (train_split, validation)
    n_classes = settings.dataloader.num_classes or outputs_to_make(category_ids(splits), architecture.n_classes)
    with first_here(engine):
        start = starting_model(settings, architecture, weights, n_classes, engine.is_main)
    model = start.model
    n_classes = n_outputs(architecture, model)
    outputs = _outputs(splits, n_classes, "none" if settings.model.new_head else weights)
    train_split, validation = (with_outputs(split, outputs, n_classes, NEW_HEAD_ADVICE) for split in splits)
    _configure(model, settings)
    return Prepared(
        model=model,
        task=detection_task(run, train_split, validation),
        example=torch.randn(1, 3, EXAMPLE_SIDE, EXAMPLE_SIDE),
        results={"training images": len(train_split), "left out of training": str(train_split.dropped)},
        images_digest=splits_fingerprint(train_split, validation),
        compressed=start.compressed,
        files={FILE_NAME: outputs_text(splits, outputs)},
    )


def _outputs(splits: Sequence[CocoSplit], n_classes: int, weights: str | Path) -> dict[int, int]:
    """Category id -> output of the head: as the run left it that wrote `weights`, where that was a run for the same
    categories."""
    ids = category_ids(splits)
    left = read_outputs(weights) if isinstance(weights, Path) else None
    if left is not None and set(ids) <= set(left) and max(left.values()) < n_classes:
        return left
    return outputs_of(ids, n_classes)


def evaluate_detection(settings: Settings) -> int:
    """Evaluate a compressed (or dense) Mask R-CNN, or a file of detections; returns status 1 if `expected` is missed.

    With an `output_path` the detections and the figures are kept there; with `visualize` pictures are drawn.
    """
    with open_evaluation(settings, EVALUATION_FILES) as run:
        found = _detect(run) if settings.evaluation.detections is None else _read_detections(run)
        return int(once(run.engine, lambda: _report(run, found)))


@dataclass(frozen=True)
class Detected:
    """Detections of a whole split.

    Attributes:
        split: the images and what is really in them.
        rows: the detections in COCO's result form.
        image_ids: the images that were searched.
        about: what is known of the network, for the results.
    """

    split: CocoSplit
    rows: list[dict[str, Any]]
    image_ids: list[int]
    about: Mapping[str, Any]


def _report(run: Evaluation, found: Detected) -> int:
    """Score detections, keep and log the figures; returns the exit status."""
    evaluation, output = run.settings.evaluation, run.output
    scores = score(found.split, found.rows, found.image_ids, evaluation.backend, evaluation.per_category)
    if output is not None:
        _keep(output, found, scores)
    log.info("images: %s, detections: %s", f"{len(found.image_ids):,}", f"{len(found.rows):,}")
    for line in (*scores.boxes.lines(), *scores.masks.lines()):
        log.info("%s", line)
    if output is not None:
        log.info("detections in %s; figures in %s", output.path / "detections.json", output.path / "results.json")
    metrics, expected = scores.metrics(), run.settings.expected
    figures = {"box AP": metrics.get("BoxAP", 0.0), "mask AP": metrics.get("MaskAP", 0.0)}
    return verdict(figures, {"box AP": expected.box_ap, "mask AP": expected.mask_ap}, expected.tolerance)


def _read_detections(run: Evaluation) -> Detected:
    """The detections of the result file that the settings name."""
    path = detections_file(run.settings)
    (split,) = read_splits(run, ("val",), check_images=False)
    rows = list(read_results(path, split.api))
    log.info("detections: %s", path)
    return Detected(split=split, rows=rows, image_ids=list(split.image_ids), about={"detections": str(path)})


def _detect(run: Evaluation) -> Detected:
    """What the network that the settings name detects."""
    data, engine = run.settings.dataloader, run.engine
    found = model_to_evaluate(run, "detection")
    (validation,) = read_splits(run, ("val",))
    file = compressed_file(run.settings) if run.settings.model.use_compression else weights_source(run.settings)
    left = read_outputs(file) if isinstance(file, Path) else None
    outputs = outputs_of(validation.names, found.n_outputs) if left is None else left
    validation = with_outputs(validation, outputs, found.n_outputs)
    pictures = Pictures.of(run, found.architecture, found.n_outputs)
    log.info("model: %s", found.source)
    size = model_size(found.model)
    log.info("size: %s", size.summary())
    task = detection_task(run, None, validation)
    model = _ready(found.model, run)
    rows, image_ids = task.detect(model, "evaluate")
    skipped = set(engine.gather(sorted(task.unreadable)))
    if skipped:
        log.info("skipped: %s unreadable images", f"{len(skipped):,}")
    if pictures is not None:
        dense = None if pictures.dense is None else _ready(pictures.dense, run)
        n_drawn = pictures.draw(validation, model, dense, engine)
        log.info("%s pictures in %s", f"{n_drawn:,}", pictures.folder)
    set_up = {"min_size": data.min_size, "max_size": data.max_size}
    about = {"model": found.source, "bits": size.bits, "ratio": round(size.ratio, 4), **set_up}
    return Detected(split=validation, rows=rows, image_ids=image_ids, about=about)


def _configure(model: nn.Module, settings: Settings) -> None:
    """Set what belongs to the network but is not in its weights."""
    set_image_size(model, settings.dataloader.min_size, settings.dataloader.max_size)
    set_box_numbers(model, settings.model.boxes_per_image, settings.model.proposals)


def _ready(model: nn.Module, run: Evaluation) -> nn.Module:
    _configure(model, run.settings)
    return set_memory_format(model.to(run.engine.device), run.settings.channels_last)


def _keep(output: OutputFolder, found: Detected, scores: Scores) -> None:
    """Write detections.json and results.json."""
    output.begin()
    write_results(output.path / "detections.json", found.rows)
    results = {**found.about, "images": len(found.image_ids), **scores.metrics()}
    for name, figures in (("box AP per category", scores.boxes), ("mask AP per category", scores.masks)):
        if figures.per_category:
            results[name] = {
                category: None if value != value else value for category, value in figures.per_category.items()
            }
    write_text(output.path / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
