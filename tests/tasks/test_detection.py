"""The detection task: losses by name, AP of what is found, and batches in which there is nothing."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from src.common.errors import DataError, RunError, SettingsError
from src.compression.finetune.loop import FinetuneSpec, finetune
from src.compression.finetune.optimizers import OptimizerSpec
from src.engines.launch import Launch
from src.engines.single import SingleProcess
from src.run.recorder import NoRecorder
from src.tasks.coco.data import CocoSplit, read_coco
from src.tasks.coco.loading import CocoDataset, DetectionBatch, DetectionItem, collate_detection, target_of
from src.tasks.coco.metrics import Detections
from src.tasks.detection import Detection, score
from src.tasks.loading import LoaderSpec
from tests.support.coco import contents, entry, small_coco, write
from tests.support.helpers import quantized, spec
from tests.support.logs import logged

CLASSES = 5
LOSSES = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
CPU = SingleProcess(Launch(), torch.device("cpu"))


class Backbone(nn.Sequential):
    """One map, a sixteenth of the image."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, 4, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> OrderedDict:
        return OrderedDict([("0", super().forward(x))])


def network() -> MaskRCNN:
    """torchvision's Mask R-CNN with everything in it small, from random weights."""
    torch.manual_seed(0)
    return MaskRCNN(
        Backbone(),
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_head=TwoMLPHead(16 * 49, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES),
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        mask_head=MaskRCNNHeads(16, (16,), 1),
        mask_predictor=MaskRCNNPredictor(16, 16, CLASSES),
    )


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_coco(tmp_path_factory.mktemp("coco"))


def task(coco: Path, train: bool = True, **changes) -> Detection:
    own = {
        name: changes.pop(name) for name in ("group_by_aspect_ratio", "horizontal_flip", "backend") if name in changes
    }
    loading = LoaderSpec(**{"batch_size": 2, "show_progress": False, **changes})
    return Detection(CPU, read_coco(coco, "train") if train else None, read_coco(coco, "val"), loading, **own)


def equal(one: DetectionBatch, other: DetectionBatch) -> bool:
    if one.image_ids != other.image_ids:
        return False
    pairs = [*zip(one.images, other.images, strict=True)]
    for a, b in zip(one.targets, other.targets, strict=True):
        pairs += [(a[name], b[name]) for name in a]
    return all(torch.equal(a, b) for a, b in pairs)


# --- training ---


def test_the_loss_is_the_sum_of_the_networks_losses_and_each_is_logged(coco: Path) -> None:
    model, work = network().train(), task(coco)
    batch = next(work.training_batches(1))
    step = work.training_loss(model, batch)
    assert set(step.scalars) == LOSSES | {"loss_total"}
    assert step.n_images == 2
    assert step.loss.item() == pytest.approx(sum(float(step.scalars[name]) for name in LOSSES))
    assert step.scalars["loss_total"] == step.loss.detach()
    step.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    # what was drawn before does not matter, the epoch does
    torch.rand(7)
    assert work.training_loss(copy.deepcopy(model), batch).loss.item() == pytest.approx(step.loss.item(), rel=1e-3)


def test_a_steps_random_boxes_depend_on_seed_epoch_and_images_alone(coco: Path) -> None:
    model, work = network().eval(), task(coco)
    for module in (model, model.rpn, model.roi_heads, model.transform):
        module.training = True  # the losses of a network whose norms stay
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 4
    batch = next(work.training_batches(1))
    first = work.training_loss(model, batch).loss.item()
    torch.rand(7)
    assert work.training_loss(model, batch).loss.item() == first
    next(work.training_batches(2))
    assert work.training_loss(model, batch).loss.item() != first


def test_batches_do_not_depend_on_the_number_of_workers_and_change_with_the_epoch(coco: Path) -> None:
    one, two = task(coco), task(coco, num_workers=2)
    seen = []
    for epoch in (1, 2, 3):
        batches = list(one.training_batches(epoch))
        assert len(batches) == one.steps_per_epoch == 2
        assert all(equal(a, b) for a, b in zip(batches, two.training_batches(epoch), strict=True))
        seen.append([batch.image_ids for batch in batches])
    assert len({str(ids) for ids in seen}) > 1
    assert [
        batch.image_ids for batch in task(coco, train_shuffle=False, group_by_aspect_ratio=False).training_batches(1)
    ] == [
        (1, 2),
        (3, 4),
    ]


class Kept:
    """A recorder that keeps everything in memory."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.metrics: dict[int, dict[str, float]] = {}

    def step(self, step: int, figures: dict[str, float]) -> None:
        self.steps[step] = figures

    def validation(self, epoch: int, step: int, metrics: dict[str, float]) -> None:  # noqa: ARG002 (of a protocol)
        self.metrics[epoch] = metrics

    def model(self, epoch: int, model: nn.Module) -> None: ...

    def best(self, epoch: int, model: nn.Module) -> None: ...


@pytest.mark.parametrize(
    ("compressed", "amp"), [pytest.param(False, "none", marks=pytest.mark.slow), (True, "none"), (True, "bf16")]
)
def test_a_small_network_learns_from_a_few_images(coco: Path, compressed: bool, amp: str) -> None:
    model: nn.Module = network()
    if compressed:
        model = quantized(
            model,
            spec(
                16,
                iterations=5,
                ignored=["rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits"],
            ),
        )
    how = FinetuneSpec(6, OptimizerSpec(learning_rate=5e-3), amp=amp, log_every_n_steps=1, show_progress=False)
    kept = Kept()
    outcome = finetune(model, task(coco, amp=amp), how, CPU, kept)
    totals = [figures["loss_total"] for _, figures in sorted(kept.steps.items())]
    assert sum(totals[-4:]) < 0.92 * sum(totals[:4])
    assert outcome.best is not None
    for metrics in kept.metrics.values():
        assert metrics["BoxAP+MaskAP"] == pytest.approx(metrics["BoxAP"] + metrics["MaskAP"])
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["images"] == 3


# --- nothing there ---


def empty_batch(coco: Path, numbers: tuple[int, ...] = (2, 2)) -> DetectionBatch:
    """Images of the validation split, of which the third has no object, as a training batch."""
    split = read_coco(coco, "val")
    dataset = CocoDataset(split, 0, flip=False)
    return collate_detection([dataset[1, number] for number in numbers])


@pytest.mark.parametrize("proposals", [True, False])
@pytest.mark.parametrize("objects", ["none", "in one image"])
@pytest.mark.parametrize("compressed", [False, True])
def test_training_goes_through_batches_without_objects_or_proposals(
    coco: Path, proposals: bool, objects: str, compressed: bool
) -> None:
    model: nn.Module = network()
    if compressed:
        model = quantized(model, spec(16, iterations=2))
    if not proposals:
        model.rpn.score_thresh = 1.1  # type: ignore[union-attr]
    batch = empty_batch(coco)
    if objects != "none":
        item = CocoDataset(read_coco(coco, "train"), 0, flip=False)[1, 0]
        assert isinstance(item, DetectionItem)
        batch = DetectionBatch((batch.images[0], item.image), (batch.targets[0], item.target), (3, 1))
    step = task(coco).training_loss(model.train(), batch)
    assert all(math.isfinite(float(value)) for value in step.scalars.values())
    step.loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("compressed", [False, True])
def test_evaluation_goes_through_images_in_which_nothing_is_found(coco: Path, compressed: bool) -> None:
    model: nn.Module = network()
    if compressed:
        model = quantized(model, spec(16, iterations=2))
    for threshold in ("score_thresh of the heads", "score_thresh of the proposals"):
        (model.roi_heads if "heads" in threshold else model.rpn).score_thresh = 1.1  # type: ignore[union-attr]
        rows, image_ids = task(coco, train=False).detect(model, "evaluate")
        assert (rows, sorted(image_ids)) == ([], [1, 2, 3])
        metrics = task(coco, train=False).validate(model, "evaluate")
        assert (metrics["BoxAP"], metrics["MaskAP"], metrics["BoxAP+MaskAP"]) == (0, 0, 0)


# --- figures ---


class Oracle(nn.Module):
    """Finds in an image what the annotations of `split` say of it (crowds left out), with masks of probability 1."""

    def __init__(self, split: CocoSplit) -> None:
        super().__init__()
        whole = read_as_training(split)
        dataset = CocoDataset(split, 0, flip=False)
        self.known = [(dataset[0, number].image, target_of(whole, number)) for number in range(len(split))]  # type: ignore[union-attr]

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        found = []
        for image in images:
            (target,) = (
                target for known, target in self.known if known.shape == image.shape and torch.equal(known, image)
            )
            found.append({
                "boxes": target["boxes"], "labels": target["labels"],
                "scores": torch.linspace(1, 0.9, len(target["labels"])),
                "masks": target["masks"][:, None].float(),
            })  # fmt: skip
        return found


def read_as_training(split: CocoSplit) -> CocoSplit:
    """`split` with the annotations a perfect detector finds."""
    objects = tuple(
        tuple(
            annotation
            for annotation in split.api.imgToAnns.get(image_id, [])
            if not annotation["iscrowd"] and min(annotation["bbox"][2:]) > 0
        )
        for image_id in split.image_ids
    )
    return CocoSplit(split.folder, split.source, split.api, split.image_ids, objects)


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_repeats_the_ground_truth_scores_100(tmp_path: Path, shuffle: bool) -> None:
    folder = small_coco(tmp_path)
    what = read_coco(folder, "val").api.dataset
    what["annotations"] = [
        annotation for annotation in what["annotations"] if min(annotation["bbox"][2:]) > 0
    ]  # nothing can find the others
    write(folder, "val", what)
    work = task(folder, train=False, validation_shuffle=shuffle)
    oracle = Oracle(work.validation)
    metrics = work.validate(oracle.train(), "evaluate")
    assert oracle.training
    assert metrics["BoxAP"] == pytest.approx(100)
    assert metrics["MaskAP"] == pytest.approx(100)
    assert metrics["BoxAP+MaskAP"] == pytest.approx(200)


def test_the_ground_truth_scores_100(many_coco: Path) -> None:
    split = read_coco(many_coco, "val")
    found, whole = Detections(), read_as_training(split)
    for number, image_id in enumerate(split.image_ids):
        target = target_of(whole, number)
        n = len(target["labels"])
        found.add(
            image_id,
            {
                "boxes": target["boxes"],
                "labels": target["labels"],
                "scores": torch.ones(n),
                "masks": target["masks"][:, None].float(),
            },
        )
    scores = score(split, found.rows(), split.image_ids, per_category=True)
    assert scores.boxes.stats["AP"] == pytest.approx(100)
    assert scores.masks.stats["AP"] == pytest.approx(100)
    assert all(math.isnan(value) or value == pytest.approx(100) for value in scores.masks.per_category.values())


# --- bad input ---


def test_images_that_break_end_the_run_or_are_left_out(tmp_path: Path) -> None:
    folder = small_coco(tmp_path)
    splits = [task(folder), task(folder, skip_unreadable=True)]
    for split in ("train2017", "val2017"):
        (folder / split / "000001.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"dataloader\.coco_path[\s\S]*000001\.png"):
        list(splits[0].training_batches(1))
    with pytest.raises(DataError, match=r"000001\.png"):
        splits[0].validate(network(), "evaluate")
    with logged(r"000001\.png"):
        assert sorted(n for batch in splits[1].training_batches(1) for n in batch.image_ids) == [2, 3, 4]
    assert sorted(splits[1].detect(network(), "evaluate")[1]) == [2, 3]
    assert len(splits[1].unreadable) == 2


def test_a_task_without_training_images_and_an_unknown_precision_are_refused(coco: Path) -> None:
    with pytest.raises(DataError, match="without training images"):
        next(task(coco, train=False).training_batches(1))
    with pytest.raises(SettingsError, match="amp: 'int8'"):
        task(coco, amp="int8")


def test_a_category_of_another_name_is_refused(tmp_path: Path) -> None:
    folder = small_coco(tmp_path)
    names = [{"id": 1, "name": "cube"}, {"id": 2, "name": "disc"}, {"id": 4, "name": "bar"}]
    objects = [
        annotation for annotation in read_coco(folder, "val").api.dataset["annotations"] if annotation["image_id"] == 1
    ]
    write(folder, "val", contents([entry(1, 96, 64)], objects, names))
    with pytest.raises(DataError, match="'square' and 'cube'"):
        task(folder)


# --- memory ---


def out_of_memory(*_: object, **__: object) -> Tensor:
    """What a network does that needs more than there is."""
    return torch.empty(1 << 50, dtype=torch.uint8)


def test_running_out_of_memory_names_the_images_in_training_and_in_validation(
    coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, model = task(coco), network()
    batch = next(work.training_batches(1))
    words = work.in_words(batch)
    for image_id in batch.image_ids:
        assert f"{image_id:06d}.png (" in words
    assert "2 objects)" in words
    assert "dataloader.batch_size" in words
    monkeypatch.setattr(model, "forward", out_of_memory)
    with pytest.raises(RunError, match=r"out of memory on a batch of 2 images, .*000.*png .96x64 pixels, 2 objects."):
        finetune(
            model, work, FinetuneSpec(epochs=1, skip_initial_validation=True, show_progress=False), CPU, NoRecorder()
        )
    with pytest.raises(RunError, match=r"validation image .*000001\.png .96x64 pixels.*dataloader\.max_size"):
        work.validate(model, "")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_loaded_for_want_of_memory_is_not_skipped(
    coco: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr("src.tasks.coco.loading.target_of", no_memory)
    work = task(coco, skip_unreadable=True, num_workers=num_workers)
    with pytest.raises(RunError, match=r"out of memory on an image, .*png.*pixels with 2 objects"):
        next(work.training_batches(1))
