"""Detection without masks: every kind of network learns the classes that it is shown, from boxes alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.common.errors import DataError, SettingsError
from src.compression.finetune.loop import FinetuneSpec, finetune
from src.compression.finetune.optimizers import OptimizerSpec
from src.engines.launch import Launch
from src.engines.single import SingleProcess
from src.run.recorder import NoRecorder
from src.tasks.batch_norms import check_lone_values
from src.tasks.coco.classes import with_outputs
from src.tasks.coco.data import CocoSplit, read_coco, require_masks
from src.tasks.coco.loading import CocoDataset
from src.tasks.coco.metrics import Detections
from src.tasks.detection import Detection, score
from src.tasks.loading import LoaderSpec
from tests.support.coco import small_coco
from tests.support.detectors import WITHOUT_MASKS
from tests.support.helpers import quantized, spec

CPU = SingleProcess(Launch(), torch.device("cpu"))
OUTPUTS = {1: 1, 2: 2, 4: 4}
CLASSES = 5
EPOCHS = {"retinanet": 60, "fcos": 20, "ssd": 20, "fasterrcnn": 14}
LEARNING = ["fcos", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("retinanet", "ssd", "fasterrcnn"))]
RATES = {"retinanet": 1e-3, "fasterrcnn": 3e-3}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks are left out: annotations of boxes are all that these networks need."""
    root = small_coco(tmp_path_factory.mktemp("coco"))
    for source in (root / "annotations").iterdir():
        what = json.loads(source.read_text())
        for annotation in what["annotations"]:
            del annotation["segmentation"]
        source.write_text(json.dumps(what))
    return root


def split(coco: Path, name: str) -> CocoSplit:
    return with_outputs(read_coco(coco, name, masks=False), OUTPUTS, CLASSES)


def task(coco: Path, **more: object) -> Detection:
    loading = LoaderSpec(batch_size=2, show_progress=False)
    return Detection(CPU, split(coco, "train"), split(coco, "val"), loading, horizontal_flip=False, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", LEARNING)
def test_a_network_learns_the_categories_of_the_boxes(kind: str, coco: Path) -> None:
    torch.manual_seed(0)
    how = FinetuneSpec(EPOCHS[kind], OptimizerSpec(learning_rate=RATES.get(kind, 2e-3)), show_progress=False)
    work = task(coco)
    outcome = finetune(WITHOUT_MASKS[kind](CLASSES), work, how, CPU, NoRecorder())
    assert work.metric_name == "BoxAP"
    best = outcome.history[outcome.best_epoch]
    assert best["BoxAP"] == outcome.best
    assert outcome.best is not None
    assert outcome.best > 20  # 0 where labels are other outputs in training than in evaluation
    assert not [name for name in best if name.startswith("Mask")]


@pytest.mark.parametrize("kind", WITHOUT_MASKS)
def test_the_loss_is_the_sum_of_the_losses_by_their_names(kind: str, coco: Path) -> None:
    torch.manual_seed(0)
    model, work = quantized(WITHOUT_MASKS[kind](CLASSES), spec(16, iterations=1)), task(coco)
    step = work.training_loss(model.train(), next(work.training_batches(1)))
    names = {name for name in step.scalars if name != "loss_total"}
    assert len(names) >= 2
    assert float(step.loss.detach()) == pytest.approx(sum(float(step.scalars[name]) for name in names), rel=1e-5)
    step.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_objects_without_masks_are_trained_on_and_have_none_in_their_targets(coco: Path) -> None:
    found = split(coco, "train")
    assert (len(found), found.dropped.without_mask) == (4, 0)
    item = CocoDataset(found, 0, flip=True)[1, 0]
    assert set(item.target) == {"boxes", "labels", "image_id"}  # type: ignore[union-attr]
    assert len(item.target["boxes"]) == 2  # type: ignore[union-attr]


def test_detections_of_outputs_without_a_category_are_not_kept() -> None:
    """Output 0 of a network without a background, where 0 is the id of a category too."""
    kept = Detections({0: 1, 7: 2})
    boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(4, 1)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    kept.add(3, {"boxes": boxes, "labels": torch.tensor([0, 1, 2, 3]), "scores": scores, "keypoints": boxes})
    assert [(row["category_id"], row["score"]) for row in kept.rows()] == [
        (0, pytest.approx(0.8)),
        (7, pytest.approx(0.7)),
    ]


def test_masks_are_scored_only_where_they_are_looked_for(coco: Path, tmp_path: Path) -> None:
    found = split(coco, "val")
    scores = score(found, [], found.image_ids)
    assert scores.masks is None
    assert [figures.kind for figures in scores.figures()] == ["bbox"]
    assert scores.metrics()["BoxAP"] == 0
    with pytest.raises(DataError, match=r"6 objects in .*val2017.json have no mask .*: id 10, id 11,.* boxes alone"):
        require_masks(found)
    with_masks = read_coco(small_coco(tmp_path), "val")
    require_masks(with_masks)
    assert score(with_masks, [], with_masks.image_ids).metrics()["BoxAP+MaskAP"] == 0


@pytest.mark.parametrize(
    ("settings", "words"), [([], "dataloader.batch_size, or cut"), (["a.b"], "dataloader.batch_size or a.b, or cut")]
)
def test_memory_advice_names_only_settings_that_the_network_has(settings: list[str], words: str, coco: Path) -> None:
    work = task(coco, memory_settings=settings)
    assert words in work.in_words(next(work.training_batches(1)))


class OnePlace(nn.Module):
    """A norm that sees one place, and another one that sees many."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.one, self.pool = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.one(self.pool(self.many(images)))


def test_a_norm_that_sees_one_value_is_named_and_the_network_left_as_it_was() -> None:
    model = OnePlace().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SettingsError, match=r"1 batch norms .the first is one.*no variance. Use more"):
        check_lone_values(model, lambda network: network(torch.randn(1, 3, 4, 4)), "Use more")
    check_lone_values(model, lambda network: network(torch.randn(2, 3, 4, 4)), "Use more")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.one._forward_pre_hooks
