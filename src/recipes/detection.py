"""The two jobs on a detection network: compress and fine-tune it, and evaluate it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.architecture import Architecture, n_outputs
from ..architectures.detectors import finds_keypoints, finds_masks, image_sizes, set_box_numbers, set_image_size
from ..architectures.structure import without_weights
from ..common.errors import SettingsError
from ..common.log import log, note
from ..common.paths import write_text
from ..compression.quantize.layers import set_memory_format
from ..model_files.size import model_size
from ..run.agreement import first_here, once
from ..run.expected import verdict
from ..run.inputs import compressed_file, detections_file, weights_source
from ..run.open_run import Evaluation, Run, open_evaluation
from ..run.output_folder import EVALUATION_FILES, OutputFolder
from ..settings import Settings
from ..tasks.batch_norms import check_lone_values
from ..tasks.coco.classes import (
    FILE_NAME,
    category_ids,
    outputs_of,
    outputs_text,
    outputs_to_make,
    read_outputs,
    with_outputs,
)
from ..tasks.coco.data import CocoSplit, require_masks
from ..tasks.coco.metrics import WORDS, read_results, write_results
from ..tasks.detection import Detection, Scores, score
from ..tasks.distilled_detection import DetectionDistillation, why_nothing_is_learnt
from .data import detection_task, images_to_calibrate, read_splits, splits_fingerprint
from .initial_model import NEW_HEAD_ADVICE, model_to_evaluate, starting_model
from .pictures import Pictures
from .train import Prepared, learn_from_teacher, train

EXAMPLE_SIDE = 64
"""Pixels of the images that permutations are tried on: the smallest of which a pyramid's levels all have something
left."""
LARGEST_TRIED = 64
"""Pixels of images on which batch norms are tried. The maps of larger ones have more than one place, as networks make
them 32 times smaller, but for those that bring all images to one size."""


def train_detection(settings: Settings) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a detection network; returns the exit status."""
    return train(settings, "detection", _prepare)


def _prepare(run: Run, architecture: Architecture, weights: str | Path) -> Prepared:
    settings, engine = run.settings, run.engine
    shapes = without_weights(lambda: architecture.build(architecture.n_classes))
    if finds_keypoints(shapes) and settings.epochs:
        raise SettingsError(
            f"model.arch: {architecture.name} learns from keypoints, which COCO's instances_*.json do not hold; it "
            "cannot be trained here. It can be compressed with --epochs 0, and its boxes can be evaluated"
        )
    _tell_unused(_configure(shapes, settings))
    train_split, validation = read_splits(run, ("train", "val"), shapes)
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
    task = detection_task(run, model, train_split, validation)
    why_not = why_nothing_is_learnt(model, architecture.name)
    learned = learn_from_teacher(run, architecture, start, weights, None, why_not)
    task.distillation = None if learned is None else DetectionDistillation(learned)
    joined = settings.sync_batch_norm and engine.world_size > 1  # its norms see the images of all processes
    if settings.epochs and not joined:
        _check_batch_norms(model, task, train_split)
    return Prepared(
        model=model,
        task=task,
        example=_example(model),
        results={"training images": len(train_split), "left out of training": str(train_split.dropped)},
        images_digest=splits_fingerprint(train_split, validation),
        compressed=start.compressed,
        calibration=images_to_calibrate(run, train_split, task.unreadable) if start.compressed is None else None,
        files={FILE_NAME: outputs_text(splits, outputs)},
        distillation=learned,
    )


def _example(model: nn.Module) -> Tensor:
    """Images (B, 3, H, W) to try permutations on, of the one size that the network takes, if it does."""
    sizes = image_sizes(model)
    height, width = (sizes.fixed if sizes is not None else None) or (EXAMPLE_SIDE, EXAMPLE_SIDE)
    return torch.randn(1, 3, height, width)


def _check_batch_norms(model: nn.Module, task: Detection, split: CocoSplit) -> None:
    """Raises SettingsError where a training step on one image leaves a batch norm with one value per channel: those of
    SSDlite's smallest map, and all where images are tiny."""
    sizes = image_sizes(model)
    if sizes is None or task.smallest_batch > 1:
        return
    height, width = min((sizes.of(*split.size(image_id)) for image_id in split.image_ids), key=max)
    if sizes.fixed is None and max(height, width) > LARGEST_TRIED:
        return
    image = torch.zeros(3, height, width)
    advice = "Use a batch_size of at least 2 that leaves no single image over at the end of an epoch"
    check_lone_values(model, lambda network: network([image]), advice)


def _outputs(splits: Sequence[CocoSplit], n_classes: int, weights: str | Path) -> dict[int, int]:
    """Category id -> output of the head: as the run left it that wrote `weights`, where that was a run for the same
    categories."""
    ids = category_ids(splits)
    left = read_outputs(weights) if isinstance(weights, Path) else None
    if left is not None and set(ids) <= set(left) and max(left.values()) < n_classes:
        return left
    return outputs_of(ids, n_classes)


def evaluate_detection(settings: Settings) -> int:
    """Evaluate a compressed (or dense) detection network, or a file of detections.

    With an `output_path` the detections and the figures are kept there; with `visualize` pictures are drawn.

    Returns:
        The exit status: 1 if `expected` is missed.
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
    for figures in scores.figures():
        for line in figures.lines():
            log.info("%s", line)
    if output is not None:
        log.info("detections in %s; figures in %s", output.path / "detections.json", output.path / "results.json")
    metrics, expected = scores.metrics(), run.settings.expected
    found_ap = {"box AP": metrics.get("BoxAP", 0.0), "mask AP": metrics.get("MaskAP", 0.0)}
    return verdict(found_ap, {"box AP": expected.box_ap, "mask AP": expected.mask_ap}, expected.tolerance)


def _read_detections(run: Evaluation) -> Detected:
    """The detections of the result file that the settings name."""
    path = detections_file(run.settings)
    (split,) = read_splits(run, ("val",), None)
    rows = list(read_results(path, split.api))
    log.info("detections: %s", path)
    if not rows or "segmentation" in rows[0]:  # all have masks or none
        split = replace(split, masks=True)
        require_masks(split)
    else:
        _refuse_expected_masks(run.settings, f"{path} holds boxes without masks")
    return Detected(split=split, rows=rows, image_ids=list(split.image_ids), about={"detections": str(path)})


def _detect(run: Evaluation) -> Detected:
    """What the network that the settings name detects."""
    engine = run.engine
    found = model_to_evaluate(run, "detection")
    if not finds_masks(found.model):
        _refuse_expected_masks(run.settings, f"{found.architecture.name} finds boxes without masks")
    _tell_unused(_configure(found.model, run.settings))
    (validation,) = read_splits(run, ("val",), found.model)
    file = compressed_file(run.settings) if run.settings.model.use_compression else weights_source(run.settings)
    left = read_outputs(file) if isinstance(file, Path) else None
    outputs = outputs_of(validation.names, found.n_outputs) if left is None else left
    validation = with_outputs(validation, outputs, found.n_outputs)
    pictures = Pictures.of(run, found.architecture, found.n_outputs)
    log.info("model: %s", found.source)
    size = model_size(found.model)
    log.info("size: %s", size.summary())
    task = detection_task(run, found.model, None, validation)
    model = _ready(found.model, run)
    rows, image_ids = task.detect(model, "evaluate")
    skipped = set(engine.gather(sorted(task.unreadable)))
    if skipped:
        log.info("skipped: %s unreadable images", f"{len(skipped):,}")
    if pictures is not None:
        dense = None if pictures.dense is None else _ready(pictures.dense, run)
        n_drawn = pictures.draw(validation, model, dense, engine)
        log.info("%s pictures in %s", f"{n_drawn:,}", pictures.folder)
    sizes = image_sizes(model)
    about = {"model": found.source, "bits": size.bits, "ratio": round(size.ratio, 4)}
    if sizes is not None:
        about |= {"min_size": sizes.min_size, "max_size": sizes.max_size}
    return Detected(split=validation, rows=rows, image_ids=image_ids, about=about)


def _refuse_expected_masks(settings: Settings, why: str) -> None:
    if settings.expected.mask_ap is not None:
        raise SettingsError(
            f"expected.mask_ap: {why}, so there is no mask AP to compare with {settings.expected.mask_ap:g}. Leave it "
            "out: --expected.mask_ap null"
        )


def _configure(model: nn.Module, settings: Settings) -> list[str]:
    """Set what belongs to the network but is not in its weights; returns the settings without effect on it."""
    data, given = settings.dataloader, settings.model
    unused = set_image_size(model, data.min_size, data.max_size)
    return unused + set_box_numbers(model, given.boxes_per_image, given.proposals)


def _tell_unused(keys: Sequence[str]) -> None:
    if keys:
        note(f"{', '.join(keys)}: no effect on this network, which has nothing to set there")


def _ready(model: nn.Module, run: Evaluation) -> nn.Module:
    _configure(model, run.settings)
    return set_memory_format(model.to(run.engine.device), run.settings.channels_last)


def _keep(output: OutputFolder, found: Detected, scores: Scores) -> None:
    """Write detections.json and results.json."""
    output.begin()
    write_results(output.path / "detections.json", found.rows)
    results = {**found.about, "images": len(found.image_ids), **scores.metrics()}
    for figures in scores.figures():
        if figures.per_category:
            results[f"{WORDS[figures.kind]} AP per category"] = {
                category: None if value != value else value for category, value in figures.per_category.items()
            }
    write_text(output.path / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
