"""The commands as a user runs them: outputs of a run, golden figures, and what bad input gets."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import architectures, evaluate_resnet, recipes, train_resnet
from src.common.errors import SettingsError
from src.demo import classification as demo
from src.model_files.pth import read_tensors
from src.settings import load
from src.tasks.images import load_rgb, read_folder
from tests.conftest import ROOT
from tests.support import small_runs
from tests.support.patience import PATIENCE
from tests.support.showing import validation_transform

SMALL = small_runs.training(batch=8, workers=0, sls=50, k_means=2)
EVALUATE_SMALL = small_runs.evaluation()


@pytest.fixture(scope="module")
def run(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run of two epochs."""
    output = tmp_path_factory.mktemp("run")
    assert train_resnet.main([*SMALL, *paths(small_images, output), "--epochs", "2", "--log_every_n_steps", "1"]) == 0
    return output


def paths(images: Path, output: Path) -> list[str]:
    return ["--dataloader.imagenet_path", str(images), "--output_path", str(output)]


def scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def refused(capsys: pytest.CaptureFixture[str], main, arguments: list[str], *words: str, status: int = 2) -> str:
    """Run a command that must fail with one clear error holding all of `words`; returns the error."""
    found = main(arguments)
    error = capsys.readouterr().err
    assert found == status, error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    for word in words:
        assert word in error, f"{word!r} is not in: {error}"
    return error


# --- a run and what it leaves ---


def test_a_run_leaves_what_the_readme_promises(run: Path) -> None:
    assert sorted(p.name for p in (run / "trained_models").iterdir()) == ["0.pth", "1.pth", "2.pth", "best.pth"]
    results = json.loads((run / "results.json").read_text())
    lines = dict(line.split(": ", 1) for line in (run / "results.txt").read_text().splitlines())
    assert {"start", "end", "last", "best", "best epoch"} <= lines.keys()
    for name in ("last", "best", "best epoch", "start"):
        assert lines[name] == str(results[name])
    accuracies = {int(epoch): metrics["accuracy"] for epoch, metrics in results["history"].items()}
    assert sorted(accuracies) == [0, 1, 2]
    assert results["best"] == max(accuracies.values()) == accuracies[results["best epoch"]]
    assert results["last"] == accuracies[2]
    assert load(str(run / "config.yaml")).epochs == 2


def test_tensorboard_holds_the_tags_that_dashboards_know(run: Path) -> None:
    found = scalars(run)
    steps = [step for step, _ in found["Train/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    for tag in ("Train/accuracy", "Train/learning_rate", "Train/images_per_second"):
        assert [step for step, _ in found[tag]] == steps
    assert [step for step, _ in found["Validation/accuracy"]] == [0, 3, 6]
    assert [step for step, _ in found["Validation/loss"]] == [0, 3, 6]
    assert found["Train/learning_rate"][0][1] == pytest.approx(1e-3)
    rates = [value for _, value in found["Train/learning_rate"]]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-3 / 4  # cosine: the last of six steps runs at 7 % of the range
    assert {tag.partition("/")[0] for tag in found} == {"Train", "Validation"}  # the first page holds nothing else
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {f"{name}/text_summary" for name in ("config", "size", "distortion")} <= set(events.Tags()["tensors"])
    (table,) = events.Tensors("distortion/text_summary")
    rows = table.tensor_proto.string_val[0].decode().splitlines()
    assert rows[:2] == ["| layer | share of the weights' energy lost |", "| --- | --- |"]
    assert sum(row.startswith("| layer4.1.conv2 | ") for row in rows) == 1


def test_evaluation_of_the_saved_file_gives_the_accuracy_of_the_run(
    run: Path, small_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((run / "results.json").read_text())
    for name, epoch in (("best", results["best epoch"]), ("0", 0), ("2", 2)):
        flags = [
            "--dataloader.imagenet_path",
            str(small_images),
            "--model.state_dict_compressed",
            str(run / "trained_models" / f"{name}.pth"),
        ]
        assert evaluate_resnet.main([*EVALUATE_SMALL, *flags]) == 0
        printed = capsys.readouterr().out
        metrics = results["history"][str(epoch)]
        assert f"top-1 accuracy: {metrics['accuracy']:.2f} % ({int(metrics['correct'])} of 12)" in printed
        loss = float(re.search(r"cross entropy: ([\d.]+)", printed)[1])  # type: ignore[index]
        assert loss == pytest.approx(metrics["loss"], rel=1e-4, abs=6e-5)  # printed with four decimals


def test_codes_stay_and_codebooks_move(run: Path) -> None:
    before, after = (read_tensors(run / "trained_models" / f"{epoch}.pth") for epoch in (0, 2))
    assert before.keys() == after.keys()
    codes = [name for name in before if name.endswith("codes_matrix")]
    assert len(codes) == 20
    assert all(torch.equal(before[name], after[name]) for name in codes)
    books = [name for name in before if name.endswith("codebook")]
    assert all(not torch.equal(before[name], after[name]) for name in books)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    run: Path, small_images: Path, tmp_path: Path
) -> None:
    for seed, equal in ((0, True), (1, False)):
        output = tmp_path / str(seed)
        assert train_resnet.main([*SMALL, *paths(small_images, output), "--epochs", "2", "--seed", str(seed)]) == 0
        first, second = (read_tensors(folder / "trained_models" / "2.pth") for folder in (run, output))
        assert all(torch.equal(first[name], second[name]) for name in first) == equal


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp", "bf16"],
        ["--channels_last", "True"],
        ["--optimizer", "sgd", "--lr_scheduler.type", "plateau", "--weight_decay", "1e-4"],
        ["--model.search", "best", "--model.search_seconds", "1"],
        ["--lr_scheduler.type", "multistep", "--lr_scheduler.milestones", "[1]"],
        ["--model.use_permutations", "False", "--lr_scheduler.type", "none", "--skip_initial_validation", "True"],
        [
            "--model.compression_parameters.k_means_type",
            "kmeans",
            "--model.compression_parameters.large_subvectors",
            "True",
        ],
    ],
    ids=lambda flags: flags[0].lstrip("-") + "=" + flags[1],
)
def test_every_way_to_run_runs(flags: list[str], small_images: Path, tmp_path: Path) -> None:
    assert train_resnet.main([*SMALL, *paths(small_images, tmp_path), "--epochs", "1", *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["before training"] is None) == ("--skip_initial_validation" in flags)
    assert np.isfinite(results["history"]["1"]["loss"])


def test_a_dense_network_is_trained_saved_evaluated_and_compressed(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, compressed = tmp_path / "dense", tmp_path / "compressed"
    flags = [
        "--config",
        "../config/digits/train_dense_resnet18.yaml",
        "--dataloader.source",
        "folder",
        "--dataloader.num_classes",
        "3",
        *EVALUATE_SMALL,
    ]
    assert train_resnet.main([*flags, *paths(small_images, dense), "--epochs", "1"]) == 0
    best = dense / "trained_models" / "best.pth"
    assert "bn1.running_mean" in read_tensors(best)  # an ordinary state dict that any torchvision ResNet-18 loads
    capsys.readouterr()
    flags = [
        "--dataloader.imagenet_path",
        str(small_images),
        *EVALUATE_SMALL,
        "--model.use_compression",
        "False",
        "--model.weights",
        str(best),
    ]
    assert evaluate_resnet.main(flags) == 0
    accuracy = json.loads((dense / "results.json").read_text())["best"]
    assert f"top-1 accuracy: {accuracy:.2f} %" in capsys.readouterr().out
    assert (
        train_resnet.main([*SMALL, *paths(small_images, compressed), "--epochs", "0", "--model.weights", str(best)])
        == 0
    )
    assert (compressed / "trained_models" / "0.pth").stat().st_size < best.stat().st_size / 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_run_on_a_gpu_is_evaluated_alike_on_the_cpu(
    amp: str, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cuda", "--amp", amp, "--channels_last", "True", "--dataloader.num_workers", "2"]
    assert train_resnet.main([*SMALL, *paths(small_images, tmp_path), "--epochs", "2", *flags]) == 0
    metrics = json.loads((tmp_path / "results.json").read_text())["history"]["2"]
    capsys.readouterr()
    flags = [
        "--dataloader.imagenet_path",
        str(small_images),
        "--model.state_dict_compressed",
        str(tmp_path / "trained_models" / "2.pth"),
    ]
    assert evaluate_resnet.main([*EVALUATE_SMALL, *flags]) == 0
    loss = float(re.search(r"cross entropy: ([\d.]+)", capsys.readouterr().out)[1])  # type: ignore[index]
    assert loss == pytest.approx(metrics["loss"], rel=1e-2)  # TF32 convolutions keep about three digits


# --- golden figures ---


@pytest.mark.parametrize(
    ("arch", "flags", "figures"),
    [
        (
            "resnet18",
            [],
            "12,927,232 bits (codes 11,516,928; codebooks 770,048; other 640,256) = 1.54 MB, 28.94x smaller than "
            "374,064,384",
        ),
        (
            "resnet18",
            ["large"],
            "8,634,624 bits (codes 6,634,496; codebooks 1,359,872; other 640,256) = 1.03 MB, 43.32x smaller than "
            "374,064,384",
        ),
        (
            "resnet50",
            [],
            "42,714,368 bits (codes 39,436,288; codebooks 1,245,184; other 2,032,896) = 5.09 MB, 19.15x smaller than "
            "817,825,024",
        ),
        (
            "resnet50",
            ["large"],
            "26,718,976 bits (codes 22,277,632; codebooks 2,408,448; other 2,032,896) = 3.19 MB, 30.61x smaller than "
            "817,825,024",
        ),
    ],
    ids=["resnet18 small", "resnet18 large", "resnet50 small", "resnet50 large"],
)
def test_training_prints_the_golden_sizes(
    arch: str,
    flags: list[str],
    figures: str,
    thousand_classes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "--config", f"../config/train_{arch}.yaml", "--model.weights", "none", *paths(thousand_classes, tmp_path),
        "--epochs", "0",
        "--skip_initial_validation", "True", "--recipe", "published", "--model.sls_iterations", "1",
        "--model.compression_parameters.k_means_n_iters", "0",
        "--dataloader.resize", "32", "--dataloader.image_size", "32", "--dataloader.num_workers", "0", "--device",
        "cpu",
    ]  # fmt: skip
    if flags:
        arguments += ["--model.compression_parameters.large_subvectors", "True"]
        arguments += ["--model.compression_parameters.pw_subvector_size", "8"] if arch == "resnet50" else []
    assert train_resnet.main(arguments) == 0
    assert f"size: {figures}" in capsys.readouterr().out


@pytest.mark.published
def test_the_published_resnet18_gives_its_published_logits(published: Path) -> None:
    settings = load(
        "../config/evaluate_resnet.yaml", ["--dataloader.imagenet_path", str(published / "imagenet_samples")]
    )
    expected = np.load(published / "published" / "resnet18_expected.npz")
    architecture = architectures.get("resnet18", "classification")
    model = recipes.load_compressed(
        published / "published" / "resnet18.pth", architecture, recipes.quantization_spec(settings)
    )
    index = read_folder(published / "imagenet_samples", "val")
    transform = validation_transform(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    chosen = list(range(0, len(expected["index"]), 8))
    images = torch.stack(
        [transform(load_rgb(index.paths[int(expected["index"][i])]), torch.Generator()) for i in chosen]
    )
    with torch.no_grad():
        logits = model(images).numpy()
    assert np.abs(logits - expected["logits"][chosen]).max() < 1e-3


@pytest.mark.published
def test_the_published_resnet18_is_evaluated_as_published(published: Path) -> None:
    command = [
        sys.executable, "-m", "src.evaluate_resnet", "--model.state_dict_compressed",
        str(published / "published" / "resnet18.pth"),
        "--dataloader.imagenet_path", str(published / "imagenet_samples"), "--dataloader.num_workers", "2", "--device",
        "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "size: 12,927,232 bits" in done.stdout
    assert "= 1.54 MB, 28.94x smaller" in done.stdout
    top1, top5 = (int(re.search(rf"top-{n} accuracy: .* \((\d+) of 1,000\)", done.stdout)[1]) for n in (1, 5))  # type: ignore[index]
    assert abs(top1 - 760) <= 2
    assert abs(top5 - 918) <= 2


@pytest.mark.slow
def test_the_committed_digits_model_has_its_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--config",
        "../config/digits/evaluate_resnet18.yaml",
        "--dataloader.imagenet_path",
        str(tmp_path / "digits"),
        "--device",
        "cpu",
    ]
    assert evaluate_resnet.main(flags) == 0
    assert "as expected" in capsys.readouterr().out
    assert evaluate_resnet.main([*flags, "--expected.accuracy", "50"]) == 1
    assert "NOT AS EXPECTED" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        demo.main(
            ["--output_path", str(tmp_path), "--epochs", "1", "--dataloader.imagenet_path", str(tmp_path / "digits")]
        )
        == 0
    )
    assert "after fine-tuning" in capsys.readouterr().out


# --- files written for the original ---


def test_a_file_written_for_the_original_loads_unchanged(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""
epochs: 1
learning_rate: 1.e-3
momentum: 0.9
weight_decay: 0
optimizer: adam
lr_scheduler:
    type: cosine
    min_lr: 1e-6
    last_epoch: -1
skip_initial_validation: False
output_path: {tmp_path / "out"}
dataloader:
    imagenet_path: {small_images}
    num_workers: 0
    batch_size: 8
    train_shuffle: True
    validation_shuffle: False
model:
    arch: resnet18
    compression_parameters:
        k: 256
        k_means_type: src
        k_means_n_iters: 1_0
        fc_subvector_size: 4
        pw_subvector_size: 4
        large_subvectors: False
        ignored_modules: [conv1, backbone.body.conv1, module.old_name]
        layer_specs:
            fc: {{k: 2048}}
            rpn.head.conv: {{k: 128}}
    use_permutations: True
    sls_iterations: 1_00
    permutations:
        - [
            {{parents: [layer1.0.conv1, layer1.0.bn1]}},
            {{children: [layer1.0.conv2]}},
          ]
"""
    file = tmp_path / "original.yaml"
    file.write_text(text)
    small = ["--model.weights", "none", "--dataloader.resize", "32", "--dataloader.image_size", "32", "--device", "cpu"]
    assert train_resnet.main(["--config", str(file), *small, "--recipe", "published"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("backbone.body.conv1, module.old_name") == 1
    assert printed.count("take no effect: rpn.head.conv") == 1
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]["sls_iterations"] == 100


# --- bad input: one clear error, status 2, nothing written ---


def test_placeholder_or_missing_data_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = [
        "--config",
        "../config/train_resnet18.yaml",
        "--model.weights",
        "none",
        "--output_path",
        str(tmp_path / "out"),
    ]
    refused(capsys, train_resnet.main, base, "dataloader.imagenet_path", "placeholder", "train_resnet18.yaml")
    missing = tmp_path / "nowhere"
    refused(
        capsys,
        train_resnet.main,
        [*base, "--dataloader.imagenet_path", str(missing)],
        "dataloader.imagenet_path",
        str(missing),
    )
    relative = refused(
        capsys, train_resnet.main, [*base, "--dataloader.imagenet_path", "no/such"], "dataloader.imagenet_path"
    )
    assert str(Path.cwd() / "no/such") in relative
    assert str(ROOT / "src/no/such") in relative
    (missing / "train").mkdir(parents=True)
    refused(capsys, train_resnet.main, [*base, "--dataloader.imagenet_path", str(missing)], str(missing / "train"))
    assert not (tmp_path / "out" / "trained_models").exists()


def test_output_path_placeholder_unwritable_or_in_use(
    capsys: pytest.CaptureFixture[str], run: Path, small_images: Path, tmp_path: Path
) -> None:
    base = [*SMALL, "--dataloader.imagenet_path", str(small_images)]
    refused(capsys, train_resnet.main, base, "output_path", "placeholder")
    (tmp_path / "file").write_text("x")
    refused(
        capsys,
        train_resnet.main,
        [*base, "--output_path", str(tmp_path / "file" / "out")],
        "output_path",
        "cannot be written",
    )
    before = (run / "trained_models" / "best.pth").read_bytes()
    refused(capsys, train_resnet.main, [*base, "--output_path", str(run)], "already holds a run", "--overwrite True")
    assert (run / "trained_models" / "best.pth").read_bytes() == before


def test_overwrite_replaces_a_run_and_nothing_else(small_images: Path, tmp_path: Path) -> None:
    (tmp_path / "trained_models").mkdir()
    (tmp_path / "trained_models" / "7.pth").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    assert train_resnet.main([*SMALL, *paths(small_images, tmp_path), "--epochs", "0", "--overwrite", "True"]) == 0
    assert not (tmp_path / "trained_models" / "7.pth").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_error_before_the_work_leaves_the_old_run_alone(
    capsys: pytest.CaptureFixture[str], small_images: Path, tmp_path: Path
) -> None:
    (tmp_path / "trained_models").mkdir()
    (tmp_path / "trained_models" / "7.pth").write_text("old")
    flags = ["--overwrite", "True", "--model.compression_parameters.layer_specs.fc.subvector_size", "7"]
    refused(
        capsys, train_resnet.main, [*SMALL, *paths(small_images, tmp_path), *flags], "'fc'", "does not divide", "512"
    )
    assert (tmp_path / "trained_models" / "7.pth").read_text() == "old"


def test_empty_class_folder(capsys: pytest.CaptureFixture[str], small_images: Path, tmp_path: Path) -> None:
    images = shutil.copytree(small_images, tmp_path / "images")
    (images / "val" / "class0001" / "0.png").rename(tmp_path / "moved.png")
    for number in (1, 2, 3):
        (images / "val" / "class0001" / f"{number}.png").unlink()
    refused(capsys, train_resnet.main, [*SMALL, *paths(images, tmp_path / "out")], "class0001", str(images / "val"))


def test_an_unreadable_image_is_named_before_training_or_skipped_with_a_count(
    capsys: pytest.CaptureFixture[str], small_images: Path, tmp_path: Path
) -> None:
    images = shutil.copytree(small_images, tmp_path / "images")
    broken = images / "train" / "class0002" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = [*SMALL, *paths(images, tmp_path / "out"), "--epochs", "1"]
    refused(capsys, train_resnet.main, arguments, str(broken), "skip_unreadable")
    assert not (tmp_path / "out" / "trained_models").exists()
    assert train_resnet.main([*arguments, "--dataloader.skip_unreadable", "True"]) == 0
    assert "skipped 1 unreadable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--model.compression_parameters.kk", "256"],
            ["model.compression_parameters.kk", "model.compression_parameters.k"],
        ),
        (["--dataloader.batchsize", "8"], ["dataloader.batchsize", "dataloader.batch_size"]),
        (["--epochs", "many"], ["epochs", "many"]),
        (["--model.compression_parameters.k", "100"], ["model.compression_parameters.k", "100", "64", "128"]),
        (["--model.compression_parameters.layer_specs.fc.k", "100"], ["layer_specs.fc.k", "100"]),
        (["--model.compression_parameters.layer_specs.fc.subvector_size", "5"], ["fc", "does not divide", "512"]),
        (["--model.arch", "resnet19"], ["model.arch", "resnet19", "resnet18"]),
        (["--dataloader.num_classes", "4"], ["dataloader.num_classes", "4", "3"]),
        (["--device", "cuda:97"], ["device"]),
        (
            ["--model.permutations", "[[{parents: [layer1.0.conv1]}, {children: [layer1.0.conf2]}]]"],
            ["permutations[0]", "layer1.0.conf2", "layer1.0.conv2"],
        ),
        (
            ["--model.permutations", "[[{parents: [layer1.0.conv1]}, {children: [layer3.0.conv2]}]]"],
            ["permutations[0]", "64", "256"],
        ),
        (
            ["--model.permutations", "[[{parents: [layer1.0.conv1]}, {children: [layer1.0.conv2]}]]"],
            ["permutations[0]", "changes the network's output"],
        ),
    ],
    ids=lambda value: (
        value[0].split(".")[-1] + "=" + value[1][:12] if isinstance(value, list) and value[0].startswith("--") else ""
    ),
)
def test_bad_settings(
    flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str], small_images: Path, tmp_path: Path
) -> None:
    refused(capsys, train_resnet.main, [*SMALL, *paths(small_images, tmp_path / "out"), *flags], *words)
    assert not (tmp_path / "out" / "trained_models").exists()


@pytest.fixture
def evaluate(small_images: Path) -> list[str]:
    return ["--dataloader.imagenet_path", str(small_images), *EVALUATE_SMALL, "--model.state_dict_compressed"]


def test_a_missing_model_file_says_how_to_get_it(capsys: pytest.CaptureFixture[str], evaluate: list[str]) -> None:
    refused(
        capsys,
        evaluate_resnet.main,
        [*evaluate, "../compressed_models/resnet34_nope.pth"],
        "make paper-models",
        str(ROOT / "compressed_models" / "resnet34_nope.pth"),
    )


def test_a_truncated_or_foreign_checkpoint(
    capsys: pytest.CaptureFixture[str], evaluate: list[str], run: Path, tmp_path: Path
) -> None:
    whole = (run / "trained_models" / "best.pth").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        refused(capsys, evaluate_resnet.main, [*evaluate, str(tmp_path / "cut.pth")], "cut.pth")
    torch.save({"encoder.weight": torch.zeros(3), "decoder.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    refused(
        capsys,
        evaluate_resnet.main,
        [*evaluate, str(tmp_path / "foreign.pth")],
        "encoder.weight",
        "decoder.weight",
        "layer1.0.conv1.weight",
    )


def test_a_checkpoint_of_another_architecture_or_other_k(
    capsys: pytest.CaptureFixture[str], evaluate: list[str], run: Path
) -> None:
    best = str(run / "trained_models" / "best.pth")
    refused(
        capsys,
        evaluate_resnet.main,
        [*evaluate, best, "--model.arch", "resnet50"],
        "does not fit",
        "layer1.0.conv3.codes_matrix",
    )
    other = [*evaluate, best, "--model.compression_parameters.layer_specs.layer2.0.conv1.k", "64"]
    refused(
        capsys, evaluate_resnet.main, other, "layer2.0.conv1.codebook", "k = 256", "layer_specs.layer2.0.conv1.k 256"
    )
    refused(
        capsys,
        evaluate_resnet.main,
        [*evaluate, best, "--model.compression_parameters.large_subvectors", "True"],
        "large_subvectors",
    )


def test_weights_for_other_classes(capsys: pytest.CaptureFixture[str], small_images: Path, tmp_path: Path) -> None:
    torch.save(architectures.get("resnet18", "classification").build(5).state_dict(), tmp_path / "five.pth")
    flags = [*SMALL, *paths(small_images, tmp_path / "out"), "--model.weights", str(tmp_path / "five.pth")]
    refused(capsys, train_resnet.main, flags, "3 class folders", "5 outputs")


def test_no_network_when_weights_must_be_downloaded(
    capsys: pytest.CaptureFixture[str], small_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    flags = [*SMALL, *paths(small_images, tmp_path / "out"), "--model.weights", "pretrained"]
    refused(
        capsys,
        train_resnet.main,
        flags,
        "cannot download",
        "resnet18-f37072fd.pth",
        str(tmp_path / "cache"),
        "--model.weights PATH",
    )


def test_a_damaged_download_is_refused(tmp_path: Path) -> None:
    architecture = architectures.get("resnet18", "classification")
    torch.save(architecture.build(3).state_dict(), tmp_path / "resnet18-f37072fd.pth")
    changed = type(architecture)(**{**vars(architecture), "weights_url": (tmp_path / "resnet18-f37072fd.pth").as_uri()})
    with pytest.raises(SettingsError, match="damaged or not what was published"):
        changed.published_weights(progress=False)


def test_a_download_whose_checksum_fits_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    architecture = architectures.get("resnet50ssl", "classification")
    state = {f"module.{name}": tensor for name, tensor in architecture.build(3).state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    source = (tmp_path / "weights.pth").rename(tmp_path / f"semi_supervised-{digest}.pth")
    changed = type(architecture)(**{**vars(architecture), "weights_url": source.as_uri()})
    loaded = changed.published_weights(progress=False)
    assert all(torch.equal(loaded[name.removeprefix("module.")], tensor) for name, tensor in state.items())
