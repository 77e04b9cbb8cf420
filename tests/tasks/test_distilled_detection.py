"""What a detector learns from a teacher: laws of its loss."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from src.compression.finetune.distillation import Distillation, DistillationSpec, divergence
from src.tasks.distilled_detection import DetectionDistillation, why_nothing_is_learnt
from tests.support.coco import small_coco
from tests.support.detectors import fasterrcnn, fcos
from tests.tasks.test_detection import LOSSES, network, task

PARTS = {"divergence_classes", "difference_boxes", "divergence_objectness", "difference_anchors", "divergence_masks"}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_coco(tmp_path_factory.mktemp("coco"))


def learner(model: nn.Module, seed: int | None = None, **spec) -> DetectionDistillation:
    """That learns from a copy of `model`, disturbed where there is a seed."""
    teacher = copy.deepcopy(model)
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter += 0.5 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=draw)
    return DetectionDistillation(Distillation(teacher, DistillationSpec(**spec)))


def test_a_detector_that_is_its_teacher_has_nothing_to_learn(coco: Path) -> None:
    model, work = network().train(), task(coco)
    model.backbone.eval()  # else its norms use the batch's statistics
    work.distillation = learner(model, features=1.0)
    step = work.training_loss(model, next(work.training_batches(1)))
    assert step.scalars.keys() == LOSSES | PARTS | {"feature_difference", "loss_total"}
    for name in (*PARTS, "feature_difference"):
        assert float(step.scalars[name]) == pytest.approx(0, abs=1e-5), name


def test_the_parts_add_up_and_reach_every_parameter_without_any_label(coco: Path) -> None:
    model, work = network().train(), task(coco)
    batch = next(work.training_batches(1))
    own = float(work.training_loss(model, batch).loss.detach())
    weights = {"weight": 0.7, "labels": 0.3, "features": 0.2, "temperature": 3.0}
    work.distillation = learner(model, seed=1, **weights)
    step = work.training_loss(model, batch)
    parts = sum(float(step.scalars[name]) for name in PARTS)
    wanted = 0.7 * parts + 0.3 * own + 0.2 * float(step.scalars["feature_difference"])
    assert float(step.loss.detach()) == pytest.approx(wanted, rel=1e-5)
    assert all(float(step.scalars[name]) > -1e-6 for name in PARTS)
    assert all(float(step.scalars[name]) > 1e-3 for name in PARTS - {"divergence_objectness", "difference_anchors"})
    work.distillation = learner(model, seed=1)
    work.training_loss(model, batch).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not any(p.grad is not None for p in work.distillation.learned.teacher.parameters())


def test_the_teacher_judges_the_same_proposals_on_the_same_images(coco: Path) -> None:
    model, work = network().train(), task(coco)
    batch = next(work.training_batches(1))
    learned = learner(model, seed=1)
    teacher = learned.learned.teacher
    torch.manual_seed(0)
    with learned.watching(model) as seen:
        model(work.inputs(batch), batch.targets)
    assert not model.rpn.head._forward_hooks
    answers = learned.answers(seen)
    with torch.no_grad():
        maps = teacher.backbone(seen.images)
        pooled = teacher.roi_heads.box_roi_pool(maps, seen.proposals[0], seen.proposals[1])
        classes, boxes = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))
    assert torch.equal(answers.classes, classes)
    assert torch.equal(answers.boxes, boxes)
    assert len(classes) == sum(map(len, seen.proposals[0])) == len(seen.classes)
    assert answers.masks is not None
    assert answers.masks.shape == seen.masks.shape
    _, parts = learned.loss(seen, torch.zeros(()))
    assert torch.allclose(parts["divergence_classes"], divergence(seen.classes, classes, 2.0).detach())


def test_images_without_objects_are_learnt_from_too(coco: Path) -> None:
    model, work = network().train(), task(coco)
    batch = next(work.training_batches(1))
    for target in batch.targets:
        for name in ("boxes", "labels", "masks"):
            target[name] = target[name][:0]
    work.distillation = learner(model, seed=1)
    step = work.training_loss(model, batch)
    step.loss.backward()
    assert torch.isfinite(step.loss)
    assert float(step.scalars["divergence_masks"]) == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_steps_bring_a_detector_nearer_to_its_teacher(coco: Path) -> None:
    torch.manual_seed(0)
    model, work = fasterrcnn(5).train(), task(coco)
    model.backbone.eval()
    work.distillation = learner(model, seed=1, features=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        step = work.training_loss(model, next(work.training_batches(1)))
        step.loss.backward()
        optimizer.step()
        losses.append(float(step.loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_one_stage_detectors_say_that_they_do_not_learn_from_a_teacher() -> None:
    assert why_nothing_is_learnt(fasterrcnn(3), "fasterrcnn") == why_nothing_is_learnt(network(), "maskrcnn") == ""
    assert why_nothing_is_learnt(fcos(3), "fcos").startswith("fcos judges all places of its maps at once")
