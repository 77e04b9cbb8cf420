"""Training that quantizes with the network's own training images, or with those of a folder."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import src.inspect as inspect_command
from src import train_classifier, train_detector
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import load_packed
from src.model_files.pth import read_tensors
from src.settings import load
from src.tasks.calibration import CalibrationSpec, training_images
from src.tasks.images import read_folder
from tests.run.test_resume import at_step, stopped
from tests.support.coco import small_coco
from tests.support.launching import launch
from tests.support.own_network import Net
from tests.support.small_runs import training

OWN = "tests.support.own_network:Net"
SMALL = [
    *training(4, 0, 20, 2), "--model.arch", OWN, "--dataloader.resize", "20", "--dataloader.image_size", "16",
    "--model.compression_parameters.layer_specs", "{}", "--model.compression_parameters.ignored_modules", "[]",
    "--model.compression_parameters.k", "16", "--save_format", "both",
]  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with norms that say something."""
    torch.manual_seed(0)
    model = Net(num_classes=3).train()
    for _ in range(8):
        model(torch.randn(8, 3, 16, 16))
    path = tmp_path_factory.mktemp("start") / "own.pth"
    torch.save(model.state_dict(), path)
    return path


def train(start: Path, images: Path, output: Path, *flags: str) -> int:
    places = ["--model.weights", str(start), "--dataloader.imagenet_path", str(images), "--output_path", str(output)]
    return train_classifier.main([*SMALL, *places, *flags])


@pytest.fixture(scope="module")
def run(start: Path, small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run of no epochs."""
    output = tmp_path_factory.mktemp("best") / "run"
    assert train(start, small_images, output, "--recipe", "best", "--epochs", "0") == 0
    return output


def lost(report: Path) -> float:
    """Share of the energy of all weights that is lost."""
    layers = json.loads((report / "compression.json").read_text())["layers"]
    return sum(layer["distortion"] for layer in layers) / sum(layer["power"] for layer in layers)


def test_a_run_without_training_is_validated_once_and_complete(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert list(results["history"]) == ["0"]
    accuracy = results["history"]["0"]["accuracy"]
    assert results["before training"] == results["best"] == results["last"] == accuracy
    assert results["best epoch"] == 0
    names = {f"{name}{suffix}" for name in ("0", "best") for suffix in (".pth", ".safetensors")}
    assert {path.name for path in (run / "trained_models").iterdir()} == names


def test_the_settings_say_what_was_done(run: Path) -> None:
    settings = load(str(run / "config.yaml"))
    assert settings.recipe == "best"
    assert settings.calibration.use
    assert settings.model.search == "best"


def test_every_layer_keeps_its_outputs_and_not_its_weight(
    run: Path, start: Path, small_images: Path, tmp_path: Path
) -> None:
    assert train(start, small_images, tmp_path / "plain", "--calibration.use", "False", "--epochs", "0") == 0
    assert lost(run) > lost(tmp_path / "plain")
    for layer in json.loads((run / "compression.json").read_text())["layers"]:
        steps = list(layer["outputs_lost"].items())
        assert steps[0][0] == "clustering"
        assert steps[-1][1] < steps[0][1]
    plain = json.loads((tmp_path / "plain" / "compression.json").read_text())["layers"]
    assert not any("outputs_lost" in layer for layer in plain)
    dense, calibrated, clustered = (
        open_model_file(file, OWN).model.eval()
        for file in (start, *(path / "trained_models" / "0.pth" for path in (run, tmp_path / "plain")))
    )
    spec = CalibrationSpec(batch_size=24, image_size=16, resize=20)
    (x,) = training_images(read_folder(small_images, "train", False), spec, False, {}).read(False)
    with torch.no_grad():
        wanted = dense(x)
        ours, theirs = (float((model(x) - wanted).norm()) for model in (calibrated, clustered))
    assert ours < 0.7 * theirs


def test_what_was_lost_is_shown_by_inspect_in_tensorboard_and_in_the_log(
    run: Path, start: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = json.loads((run / "compression.json").read_text())["layers"]
    wanted = {layer["name"]: list(layer["outputs_lost"].values())[-1] for layer in layers}
    info = load_packed(run / "trained_models" / "0.safetensors").info
    assert info.outputs_lost == pytest.approx(wanted, rel=5e-3)  # three digits
    for file in ("0.safetensors", "0.pth"):
        assert inspect_command.main([str(run / "trained_models" / file), "--arch", OWN]) == 0
        said = capsys.readouterr().out
        assert "output energy lost" in said
        row = next(line for line in said.splitlines() if line.startswith("body.3 "))
        assert row.rstrip().endswith(f"{100 * wanted['body.3']:.2f} %")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if tag.startswith("Calibration/")}
    assert shown == pytest.approx({f"Calibration/{name}": 100 * share for name, share in wanted.items()}, rel=1e-5)
    assert train(start, small_images, tmp_path / "run", "--recipe", "best", "--epochs", "1") == 0
    said = capsys.readouterr().out
    for words in (
        "calibrated 5 weights with 24 inputs",
        "24 inputs are few",
        "energy of outputs lost after each step, on average: clustering ",
        "accuracy before training: ",
    ):
        assert words in said
    # the same images, the same result; and what training changes is not what was lost then
    first, again = (path / "trained_models" / "0.pth" for path in (run, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(*(read_tensors(f).values() for f in (first, again)), strict=True))
    assert load_packed(tmp_path / "run" / "trained_models" / "1.safetensors").info.outputs_lost == info.outputs_lost


def test_the_published_recipe_is_what_its_keys_say_and_single_keys_win(
    start: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spelled = ["--recipe", "best", "--model.search", "published", "--calibration.use", "False"]
    spelled += ["--distillation.weight", "0", "--codebook_learning_rate", "1"]
    for name, flags in (("recipe", ["--recipe", "published"]), ("spelled", spelled)):
        assert train(start, small_images, tmp_path / name, *flags, "--epochs", "1") == 0
        assert "calibrated" not in capsys.readouterr().out
    files = [tmp_path / name / "trained_models" / "1.pth" for name in ("recipe", "spelled")]
    assert files[0].read_bytes() == files[1].read_bytes()
    config = load(str(tmp_path / "recipe" / "config.yaml"))
    assert (config.model.search, config.calibration.use) == ("published", False)
    assert train(start, small_images, tmp_path / "both", "--recipe", "published", "--calibration.use", "True") == 0
    assert "calibrated 5 weights" in capsys.readouterr().out


def test_the_images_of_a_folder_are_taken_and_unreadable_ones_left_out(
    start: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(small_images / "val", photos)
    (photos / "broken.jpg").write_bytes(b"not an image")
    flags = ["--recipe", "best", "--epochs", "0", "--calibration.images", str(photos)]
    assert train(start, small_images, tmp_path / "run", *flags, "--calibration.count", "100") == 0
    said = capsys.readouterr().out
    assert "calibrated 5 weights with 12 inputs" in said
    assert "calibration.images: left out 1 unreadable images" in said
    assert train(start, small_images, tmp_path / "few", *flags, "--calibration.count", "7") == 0
    assert " inputs" in capsys.readouterr().out


def test_a_compressed_start_and_a_dense_training_are_not_calibrated(
    run: Path, start: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compressed = run / "trained_models" / "0.safetensors"
    assert train(compressed, small_images, tmp_path / "on", "--recipe", "best", "--epochs", "0") == 0
    flags = ["--recipe", "best", "--epochs", "0", "--model.use_compression", "False"]
    assert train(start, small_images, tmp_path / "dense", *flags) == 0
    said = capsys.readouterr().out
    assert "calibrated" not in said
    assert "calibration" not in said
    assert train(start, small_images, tmp_path / "asked", *flags, "--calibration.use", "True") == 0
    assert "calibration.use has no effect: model.use_compression is False" in capsys.readouterr().out


def test_a_training_that_resumes_takes_everything_from_its_checkpoint(
    start: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL, "--model.weights", str(start), "--dataloader.imagenet_path", str(small_images)]
    flags += ["--recipe", "best", "--epochs", "2", "--checkpoint_every_n_steps", "1", "--output_path"]
    assert train_classifier.main([*flags, str(tmp_path / "whole")]) == 0
    half = [*flags, str(tmp_path / "half")]
    assert stopped(half, signal.SIGINT, at_step(tmp_path / "half", 2), train_classifier.main) == 130
    capsys.readouterr()
    changed = ["--calibration.memory", "1GB"]  # which does not change the result
    assert train_classifier.main([*half, *changed]) == 0
    assert "calibrated" not in capsys.readouterr().out
    for name in ("0.pth", "2.pth", "2.safetensors", "best.safetensors"):
        first, second = (tmp_path / run / "trained_models" / name for run in ("whole", "half"))
        assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.slow
def test_two_processes_calibrate_as_one_does(run: Path, start: Path, small_images: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--model.weights", str(start), "--dataloader.imagenet_path", str(small_images)]
    flags += ["--recipe", "best", "--epochs", "0", "--output_path", str(tmp_path / "two")]
    finished = launch("torchrun", ["-m", "src.train_classifier", *flags])
    assert finished.status == 0, finished.text
    assert "calibrated 5 weights with 24 inputs" in finished.text
    one, two = (read_tensors(path / "trained_models" / "0.pth") for path in (run, tmp_path / "two"))
    for name, tensor in one.items():
        assert torch.allclose(tensor.float(), two[name].float(), atol=1e-3), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--calibration.images", "/nowhere"], ["calibration.images", "/nowhere", "does not exist"]),
        (["--calibration.images", __file__], ["calibration.images", "is a file"]),
        (["--calibration.images", "EMPTY"], ["calibration.images", "there are no images below"]),
        (["--calibration.images", "BROKEN"], ["calibration.images", "none of the 2 images drawn from", "can be read"]),
        (["--calibration.count", "0"], ["calibration.count", "at least 1"]),
        (["--calibration.memory", "much"], ["calibration.memory", "a size such as 1.2MB"]),
        (["--calibration.memory", "0"], ["calibration.memory", "a size such as 1.2MB"]),
        (["--calibration.use", "perhaps"], ["calibration.use", "True or False"]),
        (["--recipe", "fastest"], ["recipe", "one of best, published"]),
        (["--calibration.usage", "True"], ["calibration.usage", "did you mean calibration.use?"]),
    ],
)
def test_bad_input_is_one_message_before_anything_is_written(
    flags: list[str],
    words: list[str],
    start: Path,
    small_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("EMPTY", "BROKEN"):
        (tmp_path / name).mkdir()
    for number in range(2):
        (tmp_path / "BROKEN" / f"{number}.jpg").write_bytes(b"not an image")
    given = [str(tmp_path / flag) if flag.isupper() else flag for flag in flags]
    assert train(start, small_images, tmp_path / "run", "--recipe", "best", *given) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_too_little_memory_names_the_least(
    start: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--recipe", "best", "--epochs", "0", "--calibration.memory"]
    assert train(start, small_images, tmp_path / "run", *flags, "1KB") == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    least = re.search(r"the network needs (\d+) MiB .*calibration\.memory.*calibration\.batch_size", error)
    assert least is not None
    assert train(start, small_images, tmp_path / "run", *flags, f"{least[1]}MB") == 0


def test_training_images_that_turn_out_to_be_unreadable_end_the_run_or_are_left_out(
    start: Path, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(small_images, images)
    broken = sorted((images / "train").rglob("*.*"))[3]
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    flags = ["--recipe", "best", "--epochs", "1", "--dataloader.verify_images", "none"]
    assert train(start, images, tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert str(broken) in error
    assert "--dataloader.skip_unreadable True" in error
    assert train(start, images, tmp_path / "skipped", *flags, "--dataloader.skip_unreadable", "True") == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count(str(broken)) == 1
    assert "calibrated 5 weights with 23 inputs" in said.out
    assert json.loads((tmp_path / "skipped" / "results.json").read_text())["skipped images"] == 1


def test_a_detector_is_calibrated_with_images_of_several_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = small_coco(tmp_path / "coco")
    flags = [
        "--config", "../config/train_detector.yaml", "--model.arch", "tests.support.detectors:fcos", "--model.weights",
        "none", "--dataloader.coco_path", str(coco), "--dataloader.num_workers", "0", "--device", "cpu",
        "--model.search", "published", "--model.compression_parameters.k_means_n_iters", "1", "--epochs", "0",
        "--model.compression_parameters.k", "16", "--dataloader.min_size", "64", "--dataloader.max_size", "96",
    ]  # fmt: skip
    assert train_detector.main([*flags, "--output_path", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "calibrated " in said
    layers = json.loads((tmp_path / "run" / "compression.json").read_text())["layers"]
    assert all("outputs_lost" in layer for layer in layers)
    photos = str(coco / "val2017")
    assert train_detector.main([*flags, "--output_path", str(tmp_path / "own"), "--calibration.images", photos]) == 0
    assert "calibrated " in capsys.readouterr().out
