"""train_detector and evaluate_detector with networks of many kinds: box AP alone, files of every form, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from src import evaluate_detector, evaluate_maskrcnn, train_classifier, train_detector
from src.convert import main as convert
from src.inspect import main as inspect
from src.model_files.open_model_file import open_model_file
from src.model_files.packed import load_packed
from tests.support.coco import small_coco
from tests.test_entries import refused

SSDLITE, FASTER = "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"
OWN = "tests.support.detectors:fcos"
SMALL = ["--dataloader.num_workers", "0", "--device", "cpu"]
SIZES = ["--dataloader.min_size", "64", "--dataloader.max_size", "96"]
QUICK = [
    *SMALL, "--model.weights", "none", "--recipe", "published", "--model.sls_iterations", "5",
    "--model.compression_parameters.k_means_n_iters", "1", "--log_every_n_steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_coco(tmp_path_factory.mktemp("coco"))


def paths(images: Path, output: Path) -> list[str]:
    return ["--dataloader.coco_path", str(images), "--output_path", str(output)]


def trained(name: str, coco: Path, output: Path, *flags: str) -> dict:
    arguments = [*QUICK, *paths(coco, output), "--model.arch", name, "--save_format", "both", *flags]
    assert train_detector.main(arguments) == 0
    return json.loads((output / "results.json").read_text())


def evaluated(model: Path, coco: Path, output: Path, *flags: str) -> dict:
    file = ["--model.state_dict_compressed", str(model)]
    assert evaluate_detector.main([*SMALL, *paths(coco, output), *file, *flags]) == 0
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def own(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a user's own small network, which learns what is in the images."""
    output = tmp_path_factory.mktemp("own")
    trained(OWN, coco, output, "--epochs", "12", "--learning_rate", "3e-3", "--dataloader.horizontal_flip", "False")
    return output


def test_box_ap_alone_is_the_metric_and_an_evaluation_finds_it_again(own: Path, coco: Path, tmp_path: Path) -> None:
    results = json.loads((own / "results.json").read_text())
    assert results["metric"] == "BoxAP"
    assert results["best"] > 10
    best = results["history"][str(results["best epoch"])]
    assert not [name for name in best if "Mask" in name]
    for suffix in ("pth", "safetensors"):
        pictures = ["--visualize", str(tmp_path / "pictures"), "--model.weights", "none"]
        names = ["--model.arch", OWN, "--evaluation.per_category", "True"]
        found = evaluated(own / "trained_models" / f"best.{suffix}", coco, tmp_path / suffix, *names, *pictures)
        assert found["BoxAP"] == pytest.approx(results["best"], abs=0.5)
        assert not [name for name in found if "mask" in name.lower()]
        assert set(found["box AP per category"]) == {"square", "disc", "bar"}
        assert (found["min_size"], found["max_size"]) == (64, 96)  # the network's own
    assert len(list((tmp_path / "pictures").iterdir())) == 3


def test_kept_detections_give_the_same_figures_without_the_network(
    own: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(own / "trained_models" / "best.safetensors", coco, tmp_path / "a", "--model.arch", OWN)
    kept = ["--evaluation.detections", str(tmp_path / "a" / "detections.json")]
    assert evaluate_detector.main([*SMALL, *paths(coco, tmp_path / "b"), *kept]) == 0
    again = json.loads((tmp_path / "b" / "results.json").read_text())
    assert [again[name] for name in ("BoxAP", "BoxAR100")] == [found[name] for name in ("BoxAP", "BoxAR100")]
    out = capsys.readouterr().out
    assert "box AP" in out
    assert "mask A" not in out
    expected = ["--expected.mask_ap", "30"]
    refused(
        capsys,
        evaluate_detector.main,
        [*SMALL, "--dataloader.coco_path", str(coco), *kept, *expected],
        "expected.mask_ap",
        "boxes without masks",
        "--expected.mask_ap null",
    )
    model = ["--model.state_dict_compressed", str(own / "trained_models" / "best.safetensors"), "--model.arch", OWN]
    refused(
        capsys,
        evaluate_detector.main,
        [*SMALL, "--dataloader.coco_path", str(coco), *model, *expected],
        "expected.mask_ap",
        f"{OWN} finds boxes without masks",
        "--expected.mask_ap null",
    )


@pytest.fixture(scope="module")
def ssdlite(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SSDlite of one epoch."""
    output = tmp_path_factory.mktemp("ssdlite")
    trained(SSDLITE, coco, output, "--epochs", "1", "--skip_initial_validation", "True")
    return output


@pytest.mark.parametrize(("run", "name"), [("own", OWN), pytest.param("ssdlite", SSDLITE, marks=pytest.mark.slow)])
def test_files_name_their_network_and_are_converted_to_each_other(
    run: str, name: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arch = request.getfixturevalue(run) / "trained_models", name if ":" in name else f"torchvision:{name}"
    packed, published = folder / "1.safetensors", folder / "1.pth"
    assert (load_packed(packed).info.arch, load_packed(packed).info.num_classes) == (arch, 5)
    for source, target, flags in ((published, "b.safetensors", []), (packed, "dense.pth", ["--dense"])):
        assert convert([str(source), str(tmp_path / target), "--arch", name, *flags]) == 0
    capsys.readouterr()
    assert inspect([str(tmp_path / "b.safetensors"), "--arch", name]) == 0
    said = capsys.readouterr().out
    assert f"packed, {arch}" in said
    assert "head.classification_head" in said
    image = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0))]
    files = [published, packed, tmp_path / "b.safetensors", tmp_path / "dense.pth"]
    found = [outputs(open_model_file(file, name).model, image) for file in files]
    for one in found[1:]:  # norms are folded into 32-bit floats
        assert float((one - found[0]).norm() / found[0].norm()) < 1e-5


@torch.no_grad()
def outputs(model: torch.nn.Module, images: list[torch.Tensor]) -> torch.Tensor:
    """What the heads give, of which the detections are made."""
    batch, _ = model.transform(images)
    found = model.head(list(model.backbone(batch.tensors).values()))
    return torch.cat([one.flatten() for one in found.values()])


def test_a_compressed_file_is_trained_on_and_evaluates_to_the_runs_figure(
    ssdlite: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Norms that come from a file are written back to the last bit, so that nothing differs."""
    start = str(ssdlite / "trained_models" / "1.safetensors")
    assert load_packed(ssdlite / "trained_models" / "1.safetensors").info.arch == f"torchvision:{SSDLITE}"
    results = trained(SSDLITE, coco, tmp_path / "on", "--model.weights", start, "--epochs", "0", *SIZES)
    said = capsys.readouterr().out
    note = "dataloader.min_size, dataloader.max_size: no effect on this network"
    assert said.count(note) == 1
    figures = results["history"]["0"]
    found = evaluated(tmp_path / "on" / "trained_models" / "0.safetensors", coco, tmp_path / "found")
    assert {name: found[name] for name in figures} == figures


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [FASTER, "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssd300_vgg16", "maskrcnn_resnet50_fpn_v2"]
)
def test_a_torchvision_network_is_compressed_trained_and_evaluated(name: str, coco: Path, tmp_path: Path) -> None:
    sizes = [] if name == "ssd300_vgg16" else SIZES
    results = trained(name, coco, tmp_path / "run", "--epochs", "1", *sizes)
    assert results["metric"] == ("BoxAP+MaskAP" if "mask" in name else "BoxAP")
    assert results["ratio"] > 10
    start = str(tmp_path / "run" / "trained_models" / "1.pth")
    again = trained(name, coco, tmp_path / "on", "--model.weights", start, "--epochs", "0", *sizes)
    for suffix in ("pth", "safetensors"):
        model, out = tmp_path / "on" / "trained_models" / f"0.{suffix}", tmp_path / suffix
        found = evaluated(model, coco, out, "--model.arch", name, *sizes)
        assert {key: found[key] for key in again["history"]["0"]} == again["history"]["0"]


@pytest.mark.slow
def test_keypoint_rcnn_is_compressed_and_its_boxes_evaluated(coco: Path, tmp_path: Path) -> None:
    name = "keypointrcnn_resnet50_fpn"
    results = trained(name, coco, tmp_path / "run", "--epochs", "0", "--dataloader.num_classes", "5", *SIZES)
    assert results["metric"] == "BoxAP"
    model = tmp_path / "run" / "trained_models" / "0.safetensors"
    pictures = ["--visualize", str(tmp_path / "pictures"), "--model.weights", "none"]
    assert "BoxAP" in evaluated(model, coco, tmp_path / "out", *SIZES, *pictures)


# --- bad input ---


def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [*QUICK, *paths(coco, tmp_path / "out")]
    for flags, words in (
        (["--model.arch", "tests.support.detectors:keypointrcnn"], "learns from keypoints"),
        (["--model.arch", "torchvision:keypointrcnn_resnet50_fpn"], "--epochs 0"),
        (["--model.arch", "mobilenet_v2"], "'mobilenet_v2' is a network for classification"),
        (["--model.arch", "fasterrcnn_resnet50"], "did you mean"),
        (["--model.arch", OWN, "--dataloader.min_size", "100"], "dataloader.max_size is not set"),
        (["--model.arch", SSDLITE, "--dataloader.batch_size", "3"], "leaves no single image over"),
        (["--model.arch", OWN, "--dataloader.num_classes", "3"], "category ids that the network's head does not have"),
    ):
        refused(capsys, train_detector.main, [*train, *flags], words)
    assert not list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True


def test_the_commands_for_any_network_are_those_with_a_networks_name(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for entry in (evaluate_detector, evaluate_maskrcnn, train_classifier):
        assert entry.main(["--help"]) == 0
        # started as `python -m pytest` the name has hyphens
        texts[entry.__name__] = capsys.readouterr().out.replace("evaluate-", "evaluate_")
    assert "evaluate_detector" in texts["src.evaluate_detector"].splitlines()[0]
    assert "config/evaluate_detector.yaml" in texts["src.evaluate_detector"]
    same = texts["src.evaluate_maskrcnn"].replace("evaluate_maskrcnn", "evaluate_detector")
    assert same == texts["src.evaluate_detector"]
    assert "another classification network" in texts["src.train_classifier"]
