"""Runs that learn from a teacher: whole ones, interrupted ones, and what bad input gets."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from src import train_classifier, train_detector
from src.api import save
from src.architectures import ARCHITECTURES
from src.architectures.architecture import Architecture
from src.common.registry import Entry
from src.model_files.pth import read_tensors
from src.settings import load
from src.tasks.images import load_rgb, read_folder
from tests.conftest import write_images
from tests.run.test_resume import at_step, stopped
from tests.support import small_runs
from tests.support.coco import small_coco
from tests.support.detectors import fasterrcnn
from tests.support.helpers import lively, quantized
from tests.support.own_network import Net
from tests.support.showing import validation_transform
from tests.test_entries import paths, refused, scalars
from tests.test_maskrcnn_entries import QUICK as QUICK_DETECTION

FLAGS = [
    *small_runs.training(batch=6, workers=0, sls=20, k_means=4),
    *("--model.arch", "tests.support.own_network:Net", "--epochs", "1", "--log_every_n_steps", "1"),
]
STAGES = ["--distillation.features", "0.5", "--distillation.stages", "[body.2, body.5]"]


@pytest.fixture(scope="module")
def dense(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense network for three classes, whose norms know the images."""
    path = saved(tmp_path_factory.mktemp("dense") / "dense.pth", 3)
    model = Net(num_classes=3)
    model.load_state_dict(read_tensors(path))
    index = read_folder(small_images, "train", False)
    show = validation_transform(32, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch = torch.stack([show(load_rgb(one), torch.Generator()) for one in index.paths])
    for norm in (model.body[1], model.body[4]):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(batch)
    torch.save(model.state_dict(), path)
    return path


def saved(path: Path, n_classes: int, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = lively(Net(num_classes=n_classes), seed)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images without labels."""
    folder = tmp_path_factory.mktemp("more")
    write_images(folder / "somewhere", 1, 5, seed=7)
    return folder


def flags(images: Path, output: Path, dense: Path, *given: str) -> list[str]:
    return [*FLAGS, *paths(images, output), "--model.weights", str(dense), *given]


def train(images: Path, output: Path, dense: Path, *given: str) -> int:
    return train_classifier.main(flags(images, output, dense, *given))


def last(output: Path) -> dict[str, torch.Tensor]:
    return read_tensors(output / "trained_models" / "1.pth")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_without_a_weight_the_run_is_that_of_before_whatever_else_is_set(
    small_images: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_images, tmp_path / "plain", dense) == 0
    assert train(small_images, tmp_path / "other", dense, "--distillation.temperature", "9") == 0
    assert "distillation.temperature has no effect: distillation.weight is 0" in capsys.readouterr().out
    assert same(last(tmp_path / "plain"), last(tmp_path / "other"))
    assert train(small_images, tmp_path / "taught", dense, "--distillation.weight", "1") == 0
    assert not same(last(tmp_path / "plain"), last(tmp_path / "taught"))
    for name, tensor in last(tmp_path / "plain").items():
        if name.endswith("codes_matrix"):
            assert torch.equal(tensor, last(tmp_path / "taught")[name])


@pytest.mark.slow
def test_labels_do_not_matter_without_a_weight_of_their_own(small_images: Path, dense: Path, tmp_path: Path) -> None:
    """The same images, sorted into the wrong classes."""
    wrong = tmp_path / "wrong"
    shutil.copytree(small_images, wrong)
    names = [wrong / "train" / f"class{n:04d}" for n in range(3)]
    names[0].rename(wrong / "kept")
    names[1].rename(names[0])
    (wrong / "kept").rename(names[1])
    orders = ["--dataloader.batch_size", "24", "--distillation.weight", "1", "--optimizer", "sgd"]
    found = []
    for number, images in enumerate((small_images, wrong)):
        output = tmp_path / str(number)
        assert train(images, output, dense, *orders) == 0
        found.append(scalars(output)["Train/divergence"][0][1])
    assert found[0] == pytest.approx(found[1], rel=0.3)  # other crops, as images have other numbers


def test_the_teacher_is_permuted_like_the_network_where_stages_are_compared(
    small_images: Path, dense: Path, tmp_path: Path
) -> None:
    """With many centroids the network is nearly the dense one, and so are its stages, if their channels are matched."""
    coded = "--model.compression_parameters"
    many = [f"{coded}.k", "256", f"{coded}.pw_subvector_size", "1", f"{coded}.ignored_modules", "[body.0]"]
    given = ["--distillation.weight", "1", *STAGES, *many, "--learning_rate", "1e-9", "--dataloader.batch_size", "24"]
    assert train(small_images, tmp_path / "run", dense, *given) == 0
    groups = json.loads((tmp_path / "run" / "compression.json").read_text())["groups"]
    assert any(group["permutation"] is not None for group in groups)
    found = scalars(tmp_path / "run")
    # the network is in training mode, where norms use the batch's own statistics: that is what is left
    assert found["Train/feature_difference"][0][1] < 0.2
    assert {"Train/divergence", "Train/accuracy", "Train/loss"} <= found.keys()
    assert "Train/cross_entropy" in found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["labels and stages", "images", "file"])
def test_an_interrupted_run_ends_as_one_that_was_not(
    kind: str, small_images: Path, dense: Path, more: Path, tmp_path: Path
) -> None:
    given = {
        "labels and stages": ["--distillation.labels", "0.5", *STAGES, "--ema", "0.9", "--accumulate", "2"],
        "images": ["--distillation.images", str(more), "--distillation.images_per_batch", "3"],
        "file": ["--distillation.teacher", str(saved(tmp_path / "teacher.pth", 3, seed=3)), "--clip_gradients", "0.5"],
    }[kind]
    given = ["--distillation.weight", "1", "--dataloader.batch_size", "4", *given]
    assert train(small_images, tmp_path / "whole", dense, *given) == 0
    output = tmp_path / "run"
    arguments = [*flags(small_images, output, dense, *given), "--checkpoint_every_n_steps", "1"]
    assert stopped(arguments, signal.SIGINT, at_step(output, 2), train_classifier.main) == 130
    assert not (output / "results.json").exists()
    assert train_classifier.main(arguments) == 0
    assert same(last(output), last(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_teacher(
    small_images: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, teacher = tmp_path / "run", tmp_path / "teacher.pth"
    saved(teacher, 3, seed=3)
    given = ["--distillation.weight", "1", "--distillation.teacher", str(teacher), "--checkpoint_every_n_steps", "1"]
    arguments = flags(small_images, output, dense, *given)
    assert stopped(arguments, signal.SIGINT, at_step(output, 2), train_classifier.main) == 130
    capsys.readouterr()
    saved(teacher, 3, seed=4)
    refused(capsys, train_classifier.main, arguments, "(teacher's weights)")


@pytest.mark.slow
def test_a_compressed_network_is_trained_on_with_a_teacher_that_is_named(
    small_images: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_images, tmp_path / "first", dense, "--save_format", "safetensors") == 0
    start = tmp_path / "first" / "trained_models" / "1.safetensors"
    on = flags(small_images, tmp_path / "second", start, "--distillation.weight", "1")
    capsys.readouterr()
    words = (
        "name a teacher with --distillation.teacher",
        "is a compressed model, which does not hold the dense network",
        "weight 0",
    )
    refused(capsys, train_classifier.main, on, *words)
    assert train_classifier.main([*on, *STAGES, "--distillation.teacher", str(dense)]) == 0
    assert not (tmp_path / "second" / "resume").exists()


# --- bad input ---


def test_teachers_that_are_none_are_one_error_each_before_anything_is_written(
    small_images: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = quantized(Net(num_classes=3))
    torch.save(net.state_dict(), tmp_path / "compressed.pth")
    save(net, tmp_path / "packed.safetensors")
    saved(tmp_path / "four.pth", 4)
    (tmp_path / "damaged.pth").write_bytes(b"no network")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    timms = ["--dataloader.mean", "[0.5, 0.5, 0.5]", "--distillation.teacher", "torchvision:resnet18"]
    cases: list[tuple[list[str], tuple[str, ...]]] = [
        (["--distillation.teacher", str(tmp_path / "four.pth")], ("tells 4 classes apart", "3", "the same classes")),
        (["--distillation.teacher", str(tmp_path / "compressed.pth")], ("is a compressed model", "a dense one")),
        (["--distillation.teacher", str(tmp_path / "packed.safetensors")], ("is a compressed model", "a dense one")),
        (["--distillation.teacher", str(tmp_path / "damaged.pth")], ("damaged.pth",)),
        (["--distillation.teacher", str(tmp_path / "other.pth")], ("other.pth",)),
        (["--distillation.teacher", str(tmp_path / "absent.pth")], ("there is no file", "absent.pth", "expected")),
        (["--distillation.teacher", "resnet81"], ("there is no file resnet81", "resnet18")),
        (["--distillation.teacher", "maskrcnn"], ("there is no file maskrcnn", "classification")),
        (
            ["--dataloader.std", "[0.5, 0.5, 0.5]", "--distillation.teacher", "resnet18"],
            ("0.229, 0.224, 0.225", "dataloader.std", "the same preprocessing"),
        ),
        (timms, ("0.485, 0.456, 0.406 and 0.229, 0.224, 0.225", "dataloader.mean", "the same preprocessing")),
        (["--model.weights", "none"], ("model.weights is none", "nothing to teach", "--distillation.weight 0")),
        (["--model.new_head", "True"], ("model.new_head", "nothing to teach")),
        (["--model.use_compression", "False"], ("model.use_compression is False", "its own teacher")),
        (["--distillation.features", "1", "--distillation.stages", "[tail]"], ("no module 'tail'", "body")),
    ]
    for given, words in cases:
        arguments = flags(small_images, tmp_path / "run", dense, "--distillation.weight", "1", *given)
        refused(capsys, train_classifier.main, arguments, "distillation.", *words)
        assert not (tmp_path / "run" / "config.yaml").exists()


class OfOneSize(nn.Module):
    """A teacher that takes images of 32 pixels only, as a vision transformer takes those of its table of positions."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


OF_ONE_SIZE = Architecture(
    name="of_one_size",
    task="classification",
    build=OfOneSize,
    weights_url="",
    n_classes=3,
    head="head",
    groups=None,
    image_size=48,
    download=lambda _: OfOneSize(3).state_dict(),
)


def test_a_teacher_that_was_made_for_images_of_another_size_says_so_or_is_refused(
    small_images: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--distillation.weight", "1", "--distillation.teacher", "of_one_size"]
    made_for = "of_one_size was made for images of 48 pixels and is shown 32 here"
    entry = Entry(f"{__name__}:OF_ONE_SIZE", "an addition", {"task": "classification"})
    with ARCHITECTURES.added("of_one_size", entry):
        assert train(small_images, tmp_path / "run", dense, *named) == 0
        assert made_for in capsys.readouterr().out
        smaller = flags(small_images, tmp_path / "other", dense, *named, "--dataloader.image_size", "24")
        words = ("distillation.teacher: of_one_size cannot be shown images of 24 pixels", "dataloader.image_size", "48")
        refused(capsys, train_classifier.main, smaller, *words)
    assert not (tmp_path / "other" / "config.yaml").exists()


def test_images_without_labels_that_are_none_are_one_error_each(
    small_images: Path, dense: Path, more: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(more, tmp_path / "spoilt")
    next((tmp_path / "spoilt").rglob("*.png")).write_bytes(b"no image")
    for folder, words in (
        (tmp_path / "absent", ("does not exist",)),
        (dense, ("is a file",)),
        (tmp_path / "empty", ("there are no images below",)),
        (tmp_path / "spoilt", ("1 unreadable image", "--dataloader.skip_unreadable True")),
    ):
        given = ["--distillation.weight", "1", "--distillation.images", str(folder)]
        arguments = flags(small_images, tmp_path / "run", dense, *given)
        refused(capsys, train_classifier.main, arguments, "distillation.images", *words)
    given = ["--distillation.weight", "1", "--distillation.images", str(tmp_path / "spoilt")]
    assert train(small_images, tmp_path / "run", dense, *given, "--dataloader.skip_unreadable", "True") == 0
    assert "skipped 1 unreadable images" in capsys.readouterr().out


def test_training_images_without_labels_say_that_class_folders_are_missing(
    dense: Path, more: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        shutil.copytree(more / "somewhere" / "class0000", tmp_path / "images" / split)
    given = ["--distillation.weight", "1", "--distillation.labels", "1"]
    arguments = flags(tmp_path / "images", tmp_path / "run", dense, *given)
    refused(capsys, train_classifier.main, arguments, "has no class folders", "sort them into one folder per class")


def test_steps_that_an_epoch_cannot_be_divided_into(
    small_images: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 images in batches of 6."""
    arguments = flags(small_images, tmp_path / "run", dense, "--accumulate", "5")
    refused(capsys, train_classifier.main, arguments, "accumulate: a step of 5 batches", "which has 4", "at most 4")
    long = flags(small_images, tmp_path / "run", dense, "--lr_scheduler.warmup", "2")
    refused(capsys, train_classifier.main, long, "lr_scheduler.warmup: 2 epochs", "epochs: 1")
    assert train(small_images, tmp_path / "run", dense, "--accumulate", "3") == 0
    said = capsys.readouterr().out
    assert "accumulate: the last step of each epoch is made of 1 instead of 3 batches, as it has 4" in said
    assert load(str(tmp_path / "run" / "config.yaml")).accumulate == 3


# --- detection ---


def test_a_detector_learns_from_the_dense_one_and_says_where_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = small_coco(tmp_path / "coco")
    torch.manual_seed(0)
    torch.save(fasterrcnn(5).state_dict(), tmp_path / "dense.pth")
    places = ["--dataloader.coco_path", str(coco), "--output_path", str(tmp_path / "run"), "--epochs", "1"]
    given = [*QUICK_DETECTION, *places, "--config", "../config/train_maskrcnn.yaml", "--distillation.weight", "1"]
    ours = ["--model.arch", "tests.support.detectors:fasterrcnn", "--model.weights", str(tmp_path / "dense.pth")]
    assert train_detector.main([*given, *ours, "--distillation.features", "0.1"]) == 0
    found = scalars(tmp_path / "run")
    assert {"Train/divergence_classes", "Train/difference_boxes", "Train/feature_difference"} <= found.keys()
    capsys.readouterr()
    other = ["--output_path", str(tmp_path / "other")]
    fcos = ["--model.arch", "tests.support.detectors:fcos", "--model.weights", "none"]
    refused(capsys, train_detector.main, [*given, *fcos, *other], "distillation.weight", "fcos judges all places")
    alien = ["--distillation.teacher", "maskrcnn"]
    refused(
        capsys, train_detector.main, [*given, *ours, *alien, *other], "distillation.teacher", "another architecture"
    )
