"""The classification task: order, batches, shards, loss and metrics."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from src.common.errors import DataError, RunError, SettingsError
from src.common.randomness import stream
from src.compression.finetune.task import Task
from src.tasks.classification import Classification, ImageSpec, check_batch_norms, check_classes, images_per_process
from src.tasks.images import ImageFolderIndex, read_folder
from src.tasks.loading import Batch, LoaderSpec, collate
from tests.support.logs import logged

N_CLASSES, EACH = 3, 7


@dataclass
class FakeEngine:
    """One of several processes, run one after the other; `sum` notes what this one contributes."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.device = torch.device("cpu")
        self.is_main = self.rank == 0
        self.contributed = torch.zeros(0)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.contributed = values.clone()
        return values


@pytest.fixture
def indices(tmp_path) -> tuple[ImageFolderIndex, ImageFolderIndex]:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c in range(N_CLASSES):
            (tmp_path / split / f"class{c}").mkdir(parents=True)
            for i in range(EACH):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / f"class{c}" / f"{i}.png")
    return read_folder(tmp_path, "train", False), read_folder(tmp_path, "val", False)


def make_task(indices, engine=None, **changes) -> Classification:
    given = {"resize": 18, "image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "batch_size": 4, **changes}
    images = ImageSpec(**{name: value for name, value in given.items() if name in ImageSpec.__dataclass_fields__})
    loading = {name: value for name, value in given.items() if name in LoaderSpec.__dataclass_fields__}
    assert len(given) == len(images.__dataclass_fields__.keys() & given.keys()) + len(loading)
    return Classification(engine or FakeEngine(), *indices, images, LoaderSpec(**{"show_progress": False, **loading}))


def small_model(n_outputs: int = N_CLASSES) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, n_outputs),
        ]
        return nn.Sequential(*layers)


def spoil(index: ImageFolderIndex, *numbers: int) -> None:
    for number in numbers:
        Path(index.paths[number]).write_bytes(b"no image")


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


def test_is_a_task(indices):
    task: Task = make_task(indices)
    assert task.metric_name == "accuracy"


def test_a_shuffled_epoch_has_each_image_once_and_epochs_differ(indices):
    task = make_task(indices, horizontal_flip=False, resize=16)
    orders = []
    for epoch in (1, 2):
        task._train_order.set_epoch(epoch)
        orders.append([i for _, i in task._train_order])
    # 21 images in batches of 4 leave one over
    assert [len(set(order)) for order in orders] == [20, 20]
    assert orders[0] != orders[1]
    labels = torch.cat([batch.labels for batch in task.training_batches(1)])
    assert labels.tolist() == [indices[0].labels[i] for i in orders[0]]
    first = next(task.training_batches(1))
    assert len(first.labels.unique()) > 1  # unshuffled, a batch of 4 would hold one class
    plain = torch.cat([batch.labels for batch in make_task(indices, train_shuffle=False).training_batches(1)])
    assert plain.tolist() == indices[0].labels[:20]


def test_same_seed_same_batches_whatever_the_workers_and_the_global_generator(indices):
    alone, with_workers = make_task(indices), make_task(indices, num_workers=2)
    other_seed = make_task(indices, seed=1)
    for epoch in (1, 2, 1):
        expected = list(alone.training_batches(epoch))
        state = torch.get_rng_state()
        assert same(expected, list(with_workers.training_batches(epoch)))
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(epoch)
        assert not same(expected, list(other_seed.training_batches(epoch)))
    next(with_workers.training_batches(3))  # an epoch that is broken off does not disturb the next one
    assert same(list(alone.training_batches(2)), list(with_workers.training_batches(2)))
    assert alone.validate(small_model(), "v") == with_workers.validate(small_model(), "v")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 20, 21, 50])
def test_steps_per_epoch_is_the_number_of_batches(indices, batch_size):
    task = make_task(indices, batch_size=batch_size)
    sizes = [len(batch) for batch in task.training_batches(1)]
    assert len(sizes) == task.steps_per_epoch >= 1
    assert min(sizes) > 1 or batch_size == 1
    assert sum(sizes) in (20, 21)


def test_images_per_process():
    cases = {(1, 8, 1): 1, (9, 8, 1): 8, (8, 8, 1): 8, (10, 8, 1): 10, (5, 1, 1): 5, (19, 8, 2): 8, (7, 8, 3): 2}
    assert {case: images_per_process(*case) for case in cases} == cases
    with pytest.raises(DataError, match="2 training images are too few for 3 processes"):
        images_per_process(2, 8, 3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_partition_the_validation_set(indices, world_size):
    model = small_model()
    whole = make_task(indices).validate(model, "all")
    engines = [FakeEngine(rank, world_size) for rank in range(world_size)]
    for engine in engines:
        make_task(indices, engine, validation_shuffle=True).validate(model, "shard")
    loss, correct, correct_top5, images, skipped = sum(engine.contributed for engine in engines).tolist()
    assert (correct, correct_top5, images, skipped) == (whole["correct"], whole["correct_top5"], 21, 0)
    # float32 logits of batches of other composition: a few units in the last place
    assert math.isclose(loss / 21, whole["loss"], rel_tol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_shards_do_not_overlap_and_make_equal_steps(indices, world_size):
    tasks = [make_task(indices, FakeEngine(rank, world_size)) for rank in range(world_size)]
    assert len({task.steps_per_epoch for task in tasks}) == 1
    orders = [[i for _, i in task._train_order] for task in tasks]
    assert len({i for order in orders for i in order}) == sum(map(len, orders))
    assert all(len(list(task.training_batches(1))) == task.steps_per_epoch for task in tasks)


def test_metrics_equal_those_counted_by_hand(indices):
    task, model = make_task(indices, channels_last=True), small_model(8).eval()
    dataset = task._validation_loader.dataset
    with torch.no_grad():
        logits = model(task.inputs(collate([dataset[(0, i)] for i in range(21)])))
    labels = torch.tensor(indices[1].labels)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    found = task.validate(model, "v")
    assert found["correct"] == int((ranks < 1).sum())
    assert found["correct_top5"] == int((ranks < 5).sum())
    assert found["accuracy"] == 100 * found["correct"] / 21
    assert found["accuracy_top5"] == 100 * found["correct_top5"] / 21
    assert (found["images"], found["skipped"]) == (21, 0)
    # the batches have other sizes here, so float32 sums differ in the last places
    assert math.isclose(found["loss"], float(nn.functional.cross_entropy(logits, labels)), rel_tol=1e-5)


def test_top5_of_three_outputs_is_everything(indices):
    assert make_task(indices).validate(small_model(), "v")["accuracy_top5"] == 100.0


def test_validation_changes_nothing(indices):
    model = small_model().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_task(indices).validate(model, "v")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_training_loss(indices, amp):
    task, model = make_task(indices, amp=amp, channels_last=True), small_model().train()
    batch = next(task.training_batches(1))
    step = task.training_loss(model, batch)
    assert (step.n_images, step.loss.dtype, step.loss.shape) == (4, torch.float32, ())
    assert not step.scalars["accuracy"].requires_grad
    assert 0 <= float(step.scalars["accuracy"]) <= 100
    step.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    if amp == "none":
        assert torch.equal(
            step.loss.detach(),
            nn.functional.cross_entropy(small_model().train()(task.inputs(batch)), batch.labels).detach(),
        )


def test_a_bright_and_a_dark_class_are_learnt(tmp_path):
    for split in ("train", "val"):
        for name, level in (("bright", 200), ("dark", 50)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (20, 20), (level + i,) * 3).save(tmp_path / split / name / f"{i}.png")
    task, model = (
        make_task((read_folder(tmp_path, "train", False), read_folder(tmp_path, "val", False)), batch_size=8),
        small_model(2),
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for epoch in range(1, 11):
        for batch in task.training_batches(epoch):
            optimizer.zero_grad()
            task.training_loss(model.train(), batch).loss.backward()
            optimizer.step()
    assert task.validate(model, "v")["accuracy"] == 100


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_ends_the_run_with_its_name(indices, num_workers):
    spoil(indices[0], 5)
    spoil(indices[1], 6)
    task = make_task(indices, num_workers=num_workers, batch_size=3)  # 21 images: none is left over
    with pytest.raises(DataError, match=r"class0/5\.png \(not an image") as caught:
        list(task.training_batches(1))
    assert "--dataloader.skip_unreadable True" in str(caught.value)
    with pytest.raises(DataError, match=r"class0/6\.png"):
        task.validate(small_model(), "v")


def test_unreadable_images_are_skipped_and_counted(indices):
    spoil(indices[0], 0, 1, 2)
    spoil(indices[1], 6, 8)
    task = make_task(indices, skip_unreadable=True, batch_size=3, train_shuffle=False)
    with logged(r"skipped unreadable image .*class0/0\.png"):
        sizes = [len(batch) for batch in task.training_batches(1)]
    assert sizes == [3] * 6  # the batch of which nothing was left is not among them
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each file is named once
        assert len(list(task.training_batches(2))) == 6
    with logged("class1/1"):
        found = task.validate(small_model(), "v")
    assert (found["images"], found["skipped"]) == (19, 2)
    assert set(task.unreadable) == {indices[0].paths[i] for i in (0, 1, 2)} | {indices[1].paths[i] for i in (6, 8)}


def test_a_lost_batch_among_several_processes_is_an_error(indices):
    spoil(indices[0], 0, 2)
    task = make_task(indices, FakeEngine(0, 2), skip_unreadable=True, batch_size=2, train_shuffle=False)
    with logged("skipped"), pytest.raises(DataError, match="2 unreadable"):
        list(task.training_batches(1))


def test_nothing_readable_is_an_error(indices):
    spoil(indices[1], *range(21))
    with logged("skipped"), pytest.raises(DataError, match="not one validation image"):
        make_task(indices, skip_unreadable=True).validate(small_model(), "v")


def test_classes_and_outputs():
    with pytest.raises(
        DataError, match=r"dataloader.imagenet_path: there are 1,001 class folders, but the model has 1,000 outputs"
    ):
        check_classes(1001, 1000)
    with pytest.raises(DataError, match="sorted list"):
        check_classes(10, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_classes(10, 10)


def test_a_model_with_too_few_outputs_is_refused_before_the_loss(indices):
    task, model = make_task(indices), small_model(2)
    with pytest.raises(DataError, match="3 class folders"):
        task.training_loss(model, next(task.training_batches(1)))
    with pytest.raises(DataError, match="3 class folders"):
        task.validate(model, "v")
    assert model.training


def pooled_before_its_norm() -> nn.Module:
    """Its second norm sees one value per channel and image."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3)
    ).train()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 20, 21, 50])
def test_single_images_are_refused_only_where_a_norm_would_fail(indices, batch_size):
    task = make_task(indices, batch_size=batch_size)
    assert task.smallest_batch == min(len(batch) for batch in task.training_batches(1))
    check_batch_norms(small_model(), task, 16)
    model = pooled_before_its_norm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if batch_size == 1:
        with pytest.raises(SettingsError, match=r"dataloader.batch_size: .* 1 batch norms \(the first is 4\)"):
            check_batch_norms(model, task, 16)
    else:
        check_batch_norms(model, task, 16)
        for batch in task.training_batches(1):
            task.training_loss(model, batch).loss.backward()
        return
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_arguments_that_cannot_be(indices):
    with pytest.raises(SettingsError, match="larger than resize"):
        make_task(indices, image_size=20)
    with pytest.raises(SettingsError, match="none, bf16, fp16"):
        make_task(indices, amp="int8")
    only_validation = make_task((None, indices[1]))
    assert only_validation.steps_per_epoch == 0
    with pytest.raises(DataError, match="without training images"):
        next(only_validation.training_batches(1))


def test_the_order_is_the_documented_stream(indices):
    task = make_task(indices, batch_size=21)
    labels = next(task.training_batches(5)).labels
    expected = torch.randperm(21, generator=stream(0, "order", 5))
    assert labels.tolist() == [indices[0].labels[i] for i in expected.tolist()]


def test_a_loader_process_that_dies_is_reported(indices):
    task = make_task(indices, num_workers=1)
    task._train_loader.dataset.transform = lambda _image, _generator: os._exit(1)
    with pytest.raises(RunError, match=r"(?s)died.*--dataloader\.num_workers"):
        list(task.training_batches(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_batches_are_pinned_and_figures_agree(indices):
    spoil(indices[1], 0)
    engine = FakeEngine()
    engine.device = torch.device("cuda")
    task, model = make_task(indices, engine, num_workers=1, skip_unreadable=True, channels_last=True), small_model()
    with logged("skipped"):
        expected = make_task(indices, skip_unreadable=True).validate(model, "v")
    with logged("skipped"):
        found = task.validate(model.cuda(), "v")
    batch = next(task.training_batches(1))
    assert batch.images.is_pinned()
    assert task.training_loss(model, batch).loss.is_cuda
    # other convolution kernels: float32 rounding, TF32 where the build allows it
    assert math.isclose(found["loss"], expected["loss"], rel_tol=1e-2)
    assert (found["images"], found["skipped"]) == (20, 1)


@pytest.mark.parametrize("start", [0, 2])
def test_running_out_of_memory_names_the_images_in_training_and_in_validation(indices, start, monkeypatch):
    train, validation = indices
    task, model = make_task(indices, batch_size=3), small_model()
    task._train_order.set_epoch(1)
    order = [train.paths[number] for _, number in task._train_order]
    monkeypatch.setattr("src.tasks.images.NAMED_AT_MOST", 99)
    for number, batch in enumerate(task.training_batches(1, start), start):
        words = task.in_words(batch)
        expected = order[3 * number : 3 * number + 3]
        assert all(path in words for path in expected)
        assert sum(path in words for path in train.paths) == len(expected)
        assert "dataloader.batch_size" in words
    monkeypatch.setattr(model, "forward", lambda _: torch.empty(1 << 50, dtype=torch.uint8))
    with pytest.raises(RunError, match="out of memory on a batch of 3 images, ") as caught:
        task.validate(model, "")
    assert all(path in str(caught.value) for path in validation.paths[:3])


@pytest.mark.parametrize("place", ["loading.open_image", "decoding._rgb"])
def test_an_image_that_cannot_be_loaded_for_want_of_memory_is_not_skipped(indices, place, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(f"src.tasks.{place}", no_memory)
    with pytest.raises(RunError, match=r"out of memory on an image, .*png"):
        next(make_task(indices, skip_unreadable=True).training_batches(1))
