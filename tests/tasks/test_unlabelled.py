"""Images without labels in training batches, and what is learnt from a teacher on them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from src.common.errors import DataError
from src.compression.finetune.distillation import Distillation, DistillationSpec, divergence
from src.tasks.classification import Classification, ImageSpec
from src.tasks.images import read_folder
from src.tasks.loading import NO_LABEL, Batch, LoaderSpec
from src.tasks.unlabelled import Unlabelled, read_unlabelled
from tests.conftest import write_images
from tests.tasks.test_classification import FakeEngine, small_model

LABELLED, MORE = 12, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes of 4 labelled images, and 7 images in folders of other names."""
    root = tmp_path_factory.mktemp("mixed")
    write_images(root / "train", 3, 4, seed=0, side=20)
    write_images(root / "val", 3, 2, seed=1, side=20)
    write_images(root / "more" / "deep", 1, 5, seed=2, side=20)
    write_images(root / "more", 1, 2, seed=3, side=20)
    return root


def make_task(folder: Path, per_batch: int | None, engine: FakeEngine | None = None, **loading) -> Classification:
    more = None if per_batch is None else Unlabelled(read_unlabelled(folder / "more"), per_batch)
    given = {"batch_size": 5, "show_progress": False, **loading}
    splits = [read_folder(folder, split, False) for split in ("train", "val")]
    return Classification(engine or FakeEngine(), *splits, ImageSpec(18, 16), LoaderSpec(**given), unlabelled=more)


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def labelled(batch: Batch) -> Batch:
    return Batch(batch.images[: batch.n_labelled], batch.labels[: batch.n_labelled])


def test_labelled_images_come_as_without_the_others_which_stand_behind_them(folder: Path) -> None:
    mixed, plain = make_task(folder, 3), make_task(folder, None)
    assert (mixed.steps_per_epoch, mixed.smallest_batch) == (plain.steps_per_epoch, plain.smallest_batch + 3)
    for epoch in (1, 2):
        for found, wanted in zip(mixed.training_batches(epoch), plain.training_batches(epoch), strict=True):
            assert same(labelled(found), wanted)
            assert found.labels[found.n_labelled :].tolist() == [NO_LABEL] * 3
            assert len(found) == len(wanted) + 3


def further(task: Classification, epoch: int, start: int = 0) -> list[int]:
    """The numbers of the images without labels in the batches of an epoch."""
    task._train_order.set_epoch(epoch, start * 5)
    sampler = task._train_loader.batch_sampler
    return [number - LABELLED for batch in sampler for _, number in batch if number >= LABELLED]


def test_all_others_come_before_one_comes_again_in_an_order_of_each_epoch(folder: Path) -> None:
    task = make_task(folder, 6)
    found = further(task, 1)
    assert len(found) == 18
    assert sorted(found[:MORE]) == sorted(found[MORE : 2 * MORE]) == list(range(MORE))
    assert found != further(task, 2)
    assert found == further(make_task(folder, 6), 1)


def test_an_epoch_is_entered_at_a_later_batch_as_it_would_have_gone_on(folder: Path) -> None:
    task = make_task(folder, 4, num_workers=2)
    whole = list(task.training_batches(3))
    for start in (1, 2):
        rest = list(make_task(folder, 4).training_batches(3, start))
        assert all(same(found, wanted) for found, wanted in zip(rest, whole[start:], strict=True))


def test_processes_share_what_one_would_draw(folder: Path) -> None:
    shares = [further(make_task(folder, 4, FakeEngine(rank, 2)), 1) for rank in (0, 1)]
    together = [number for pair in zip(*shares, strict=True) for number in pair]
    assert len(together) == 8
    assert together == further(make_task(folder, 6), 1)[:8]


def test_labels_count_only_where_there_are_any_and_the_teacher_everywhere(folder: Path) -> None:
    task, model, teacher = make_task(folder, 3), small_model().eval(), small_model().eval()
    with torch.no_grad():
        teacher[5].weight.mul_(-2)
    batch = next(task.training_batches(1))
    images = task.inputs(batch)
    logits = model(images)
    hits = (logits[:5].argmax(1) == batch.labels[:5]).float().mean() * 100
    alone = task.training_loss(model, batch)
    assert torch.allclose(alone.loss, F.cross_entropy(logits[:5], batch.labels[:5]))
    assert float(alone.scalars["accuracy"]) == float(hits)
    task.distillation = Distillation(copy.deepcopy(teacher), DistillationSpec(weight=2.0, labels=0.5))
    found = task.training_loss(model, batch)
    kl = divergence(logits, teacher(images), 2.0)
    assert torch.allclose(found.loss, 2.0 * kl + 0.5 * F.cross_entropy(logits[:5], batch.labels[:5]), rtol=1e-5)
    assert found.n_images == 8
    assert {"accuracy", "divergence", "cross_entropy"} == found.scalars.keys()


def test_smoothed_labels_are_a_mixture_with_all_classes(folder: Path) -> None:
    splits = [read_folder(folder, split, False) for split in ("train", "val")]
    how = ImageSpec(18, 16), LoaderSpec(batch_size=5, show_progress=False)
    task = Classification(FakeEngine(), *splits, *how, label_smoothing=0.3)
    model, batch = small_model().eval(), next(task.training_batches(1))
    logs = model(task.inputs(batch)).log_softmax(1)
    wanted = 0.7 * F.nll_loss(logs, batch.labels) - 0.3 * logs.mean()
    assert torch.allclose(task.training_loss(model, batch).loss, wanted, rtol=1e-5)
    plain = Classification(FakeEngine(), *splits, *how)
    assert task.validate(model, "") == plain.validate(model, "")  # it is the training's loss alone


def test_a_folder_without_images_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"distillation.images: there are no images below .*; expected some"):
        read_unlabelled(tmp_path)
