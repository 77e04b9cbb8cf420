"""train_maskrcnn and evaluate_maskrcnn as a user runs them: outputs of a run, AP lines, and what bad input gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import evaluate_maskrcnn, train_maskrcnn
from src.architectures import ARCHITECTURES
from src.architectures.maskrcnn import FC6
from src.model_files.beside import likely_figures
from src.model_files.packed import load_packed
from src.model_files.pth import read_tensors, save_dense
from src.recipes.compress import FIGURES
from src.tasks.coco.data import read_coco
from src.tasks.coco.metrics import write_results
from tests.conftest import DATA
from tests.support.coco import contents, entry, rectangle, small_coco, write
from tests.test_entries import refused

SMALL = [
    "--dataloader.min_size",
    "64",
    "--dataloader.max_size",
    "96",
    "--dataloader.num_workers",
    "0",
    "--device",
    "cpu",
]
QUICK = [
    *SMALL, "--model.weights", "none", "--recipe", "published", "--model.sls_iterations", "5",
    "--model.compression_parameters.k_means_n_iters", "1", "--log_every_n_steps", "1",
]  # fmt: skip
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def run(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run of one epoch on four images, which writes its models in both formats."""
    output = tmp_path_factory.mktemp("run")
    assert train_maskrcnn.main([*QUICK, *paths(coco, output), "--epochs", "1", "--save_format", "both"]) == 0
    return output


def paths(images: Path, output: Path) -> list[str]:
    return ["--dataloader.coco_path", str(images), "--output_path", str(output)]


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    found = evaluate_maskrcnn.main([*SMALL, *arguments])
    captured = capsys.readouterr()
    assert found == status, captured.err
    return captured.out


def repeats(split_file: Path, root: Path, target: Path) -> Path:
    """A result file that repeats the ground truth of a validation split."""
    api = read_coco(root, "val").api
    rows = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.9,
            "segmentation": rle(api, a),
        }
        for a in api.anns.values()
        if not a["iscrowd"] and min(a["bbox"][2:]) > 0
    ]
    assert split_file.is_file()
    write_results(target, rows)
    return target


def rle(api, annotation) -> dict:
    encoded = api.annToRLE(annotation)
    counts = encoded["counts"]
    return {
        "size": [int(side) for side in encoded["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


# --- training ---


def test_a_run_leaves_what_the_readme_promises(run: Path) -> None:
    names = sorted(p.name for p in (run / "trained_models").iterdir())
    assert names == sorted(f"{stem}.{suffix}" for stem in ("0", "1", "best") for suffix in ("pth", "safetensors"))
    results = json.loads((run / "results.json").read_text())
    assert results["metric"] == "BoxAP+MaskAP"
    assert (results["bits"], results["training images"]) == (results["bits"], 4)
    assert results["left out of training"].startswith("1 crowds, 1 degenerate boxes")
    for metrics in results["history"].values():
        assert metrics["BoxAP+MaskAP"] == pytest.approx(metrics["BoxAP"] + metrics["MaskAP"])
        assert metrics["images"] == 3
    lines = dict(line.split(": ", 1) for line in (run / "results.txt").read_text().splitlines())
    assert {"start", "end", "last", "best", "best epoch"} <= lines.keys()


def test_tensorboard_holds_the_tags_that_dashboards_know(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("loss_total", "learning_rate", *LOSSES):
        assert [step for step, _ in found[f"Train/{tag}"]] == [1, 2]
    for step in (0, 1):
        total = sum(found[f"Train/{name}"][step][1] for name in LOSSES)
        assert found["Train/loss_total"][step][1] == pytest.approx(total, rel=1e-5)
    assert found["Train/learning_rate"][0][1] == pytest.approx(5e-5)
    for tag in ("Validation/BoxAP", "Validation/MaskAP"):
        assert [step for step, _ in found[tag]] == [0, 2]


def test_codes_stay_and_every_codebook_moves(run: Path) -> None:
    before, after = (read_tensors(run / "trained_models" / f"{epoch}.pth") for epoch in (0, 1))
    assert before.keys() == after.keys()
    codes = [name for name in before if name.endswith("codes_matrix")]
    assert len(codes) == 70
    assert all(torch.equal(before[name], after[name]) for name in codes)
    books = [name for name in before if name.endswith("codebook")]
    # Adam moves a value by up to the learning rate of 5e-5 per step, which 16-bit floats of small weights show
    assert [name for name in books if torch.equal(before[name], after[name])] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (DATA / "tiny_coco").is_dir(), reason="the small part of COCO is not there (set PQF_TEST_DATA)")
def test_the_small_part_of_coco_is_trained_on_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        *paths(DATA / "tiny_coco", tmp_path / "run"),
        "--epochs",
        "1",
        "--dataloader.batch_size",
        "8",
        "--skip_initial_validation",
        "True",
    ]
    assert train_maskrcnn.main([*QUICK, *flags, "--model.boxes_per_image", "64", "--model.proposals", "100"]) == 0
    printed = capsys.readouterr().out
    assert "training: 49 images with 465 objects; left out: 5 crowds" in printed
    assert "55,743,008 bits" in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["history"]) == ["1"]
    flags = [
        "--dataloader.coco_path",
        str(DATA / "tiny_coco"),
        "--model.state_dict_compressed",
        str(tmp_path / "run" / "trained_models" / "best.pth"),
    ]
    printed = evaluated(capsys, *flags, "--model.proposals", "100")
    assert f"box AP {results['history']['1']['BoxAP']:.1f} " in printed


# --- evaluation ---


def test_evaluation_of_the_saved_file_keeps_detections_and_figures_and_draws(
    run: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(run / "trained_models" / "1.pth")
    flags = [
        *paths(coco, tmp_path / "out"),
        "--model.state_dict_compressed",
        model,
        "--evaluation.per_category",
        "True",
    ]
    pictures = [
        "--visualize",
        str(tmp_path / "pictures"),
        "--model.weights",
        "none",
        "--evaluation.visualized_images",
        "2",
    ]
    printed = evaluated(capsys, *flags, *pictures)
    metrics = json.loads((run / "results.json").read_text())["history"]["1"]
    assert f"box AP {metrics['BoxAP']:.1f} " in printed
    assert f"mask AP {metrics['MaskAP']:.1f} " in printed
    assert "images: 3" in printed
    assert re.search(r"size: [\d,]+ bits", printed)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["BoxAP50"] == pytest.approx(metrics["BoxAP50"])
    assert set(results["box AP per category"]) == {"square", "disc", "bar"}
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert isinstance(rows, list)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["000001.png", "000002.png"]
    with Image.open(tmp_path / "pictures" / "000001.png") as picture:
        assert np.asarray(picture).std() > 0
    # the kept detections give the same figures without a network
    again = ["--dataloader.coco_path", str(coco), "--evaluation.detections", str(tmp_path / "out" / "detections.json")]
    assert f"box AP {metrics['BoxAP']:.1f} " in evaluated(capsys, *again)
    refused(capsys, evaluate_maskrcnn.main, [*SMALL, *flags], "already holds", "detections.json", "--overwrite True")


def test_a_packed_file_says_what_the_run_did_and_is_evaluated_without_settings_of_the_coding(
    run: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "trained_models" / "best.safetensors"
    results = json.loads((run / "results.json").read_text())
    packed = load_packed(path)
    assert path.stat().st_size <= results["bits"] / 8 * 1.01 + 8 * 1024
    assert packed.info.arch == "maskrcnn"
    assert packed.info.metric is not None
    assert packed.info.metric["BoxAP+MaskAP"] == results["best"]
    assert len(json.dumps(packed.info.metric)) <= len(json.dumps(likely_figures(FIGURES["detection"])))
    groups = [g for g in json.loads((run / "compression.json").read_text())["groups"] if g["permutation"] is not None]
    assert packed.info.permutations is not None
    assert [p.permutation.tolist() for p in packed.info.permutations] == [g["permutation"] for g in groups]
    assert any(FC6 in p.reshapes for p in packed.info.permutations)
    (tmp_path / "other.yaml").write_text("model: {arch: maskrcnn, compression_parameters: {k: 64}}\n")
    flags = ["--config", str(tmp_path / "other.yaml"), "--dataloader.coco_path", str(coco)]
    assert evaluate_maskrcnn.main([*SMALL, *flags, "--model.state_dict_compressed", str(path)]) == 0
    printed = capsys.readouterr()
    metrics = results["history"][str(results["best epoch"])]
    assert f"model: maskrcnn, {path}" in printed.out
    assert "what the settings file says about that is not used" in printed.out
    assert f"box AP {metrics['BoxAP']:.1f} " in printed.out
    assert f"mask AP {metrics['MaskAP']:.1f} " in printed.out
    command = [*SMALL, *flags, "--model.state_dict_compressed", str(path), "--model.arch", "resnet18"]
    refused(capsys, evaluate_maskrcnn.main, command, "holds a maskrcnn", "--model.arch resnet18")


def test_a_file_that_repeats_the_ground_truth_scores_100_and_is_checked_against_what_is_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = [rectangle(1, 1, 1, [2, 2, 10, 10]), rectangle(2, 2, 4, [5, 5, 20, 12])]
    source = write(tmp_path, "val", contents([entry(1, 40, 30), entry(2, 40, 30)], objects))
    file = repeats(source, tmp_path, tmp_path / "detections.json")
    flags = ["--dataloader.coco_path", str(tmp_path), "--evaluation.detections", str(file)]
    printed = evaluated(capsys, *flags)
    assert "box AP 100.0 " in printed
    assert "mask AP 100.0 " in printed
    assert "as expected: box AP: 100.00 %" in evaluated(
        capsys, *flags, "--expected.box_ap", "100", "--expected.tolerance", "0.1"
    )
    printed = evaluated(capsys, *flags, "--expected.box_ap", "100", "--expected.mask_ap", "36", status=1)
    assert "as expected: box AP" in printed
    assert "NOT AS EXPECTED: mask AP: 36.00 % +- 0.5 was expected, +64.00 off" in printed


def test_the_ground_truth_scores_100_by_the_command(
    many_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = many_coco
    file = repeats(root / "annotations" / "instances_val2017.json", root, tmp_path / "detections.json")
    printed = evaluated(capsys, "--dataloader.coco_path", str(root), "--evaluation.detections", str(file))
    n_images = len(json.loads((root / "annotations" / "instances_val2017.json").read_text())["images"])
    assert f"images: {n_images}" in printed
    assert "box AP 100.0 " in printed
    assert "mask AP 100.0 " in printed


def test_a_dense_network_is_evaluated_too(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_dense(ARCHITECTURES["maskrcnn"].build(5), tmp_path / "dense.pth")
    flags = [
        "--model.use_compression",
        "False",
        "--model.weights",
        str(tmp_path / "dense.pth"),
        "--dataloader.coco_path",
        str(coco),
    ]
    assert "model: dense maskrcnn" in evaluated(capsys, *flags)


# --- bad input ---


def test_bad_data_is_named_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    train = [*QUICK, *paths(tmp_path / "data", output)]
    refused(capsys, train_maskrcnn.main, train, "dataloader.coco_path", "does not exist", "tried")
    root = small_coco(tmp_path / "data")
    (root / "train2017" / "000003.png").unlink()
    refused(capsys, train_maskrcnn.main, train, "000003.png", "missing")
    source = small_coco(root) / "annotations" / "instances_train2017.json"
    kept = source.read_text()
    source.write_text(kept.replace('"category_id": 4', '"category_id": 7'))
    refused(capsys, train_maskrcnn.main, train, "category_id 7 is not among the categories")
    source.write_text(kept)
    refused(capsys, train_maskrcnn.main, [*train, "--dataloader.num_classes", "3"], "4 (bar)", "3 classes")
    for flags, words in (
        (["--dataloader.coco_path", "<your_coco_path_here>"], "is still the placeholder"),
        (["--model.arch", "resnet50"], "'resnet50' is not known for detection; known: maskrcnn"),
        (
            ["--model.compression_parameters.layer_specs.roi_heads.box_head.fc6.subvector_size", "5"],
            "roi_heads.box_head.fc6",
        ),
        (["--model.permutation_specs.roi_heads.box_head.fc6.reshape", "[1024, 128, 14, 7]"], "roi_heads.box_head.fc6"),
        (["--dataloader.source", "circles"], "'circles' is not known"),
    ):
        refused(capsys, train_maskrcnn.main, [*train, *flags], words)
    assert not list(output.iterdir()) if output.exists() else True


def test_bad_evaluations_are_refused(run: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--dataloader.coco_path", str(coco)]
    model = ["--model.state_dict_compressed", str(run / "trained_models" / "0.pth")]
    refused(capsys, evaluate_maskrcnn.main, [*SMALL, *data], "mask_rcnn.pth does not exist", "make paper-models")
    refused(
        capsys,
        evaluate_maskrcnn.main,
        [*SMALL, *data, *model, "--model.compression_parameters.k", "128"],
        "k = 256",
        "does not fit the network",
    )
    refused(
        capsys,
        evaluate_maskrcnn.main,
        [*SMALL, *data, *model, "--evaluation.backend", "abacus"],
        "'abacus'",
        "pycocotools",
    )
    refused(
        capsys,
        evaluate_maskrcnn.main,
        [*SMALL, *data, "--evaluation.detections", str(tmp_path / "none.json")],
        "evaluation.detections",
        "tried",
    )
    other = small_coco(tmp_path / "other")
    objects = [rectangle(1, 77, 1, [2, 2, 10, 10])]
    write(other, "val", contents([entry(77, 40, 30)], objects))
    file = repeats(other / "annotations" / "instances_val2017.json", other, tmp_path / "others.json")
    refused(capsys, evaluate_maskrcnn.main, [*SMALL, *data, "--evaluation.detections", str(file)], "77")
    beyond = [rectangle(1, 77, 9, [2, 2, 10, 10])]
    write(other, "val", contents([entry(77, 40, 30)], beyond, [{"id": 9, "name": "star"}]))
    refused(
        capsys,
        evaluate_maskrcnn.main,
        [*SMALL, "--dataloader.coco_path", str(other), *model],
        "9 (star)",
        "the network's head",
    )


# --- categories ---


def test_ids_of_a_database_are_trained_on_and_come_back_in_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = small_coco(tmp_path / "data")
    ids = {1: 74_673_216, 2: 0, 4: 5_000}
    for source in (root / "annotations").iterdir():
        what = json.loads(source.read_text())
        for row in what["categories"]:
            row["id"] = ids[row["id"]]
        for row in what["annotations"]:
            row["category_id"] = ids[row["category_id"]]
        source.write_text(json.dumps(what))
    train = [*QUICK, *paths(root, tmp_path / "run"), "--epochs", "1", "--model.use_compression", "False"]
    fewer = ["--model.boxes_per_image", "16", "--model.proposals", "50", "--skip_initial_validation", "True"]
    assert train_maskrcnn.main([*train, *fewer]) == 0
    model = tmp_path / "run" / "trained_models" / "best.pth"
    tensors = read_tensors(model)
    assert tensors["roi_heads.box_predictor.cls_score.bias"].shape == (4,)
    left = json.loads((tmp_path / "run" / "categories.json").read_text())
    assert [(row["output"], row["id"], row["name"]) for row in left] == [
        (1, 0, "disc"), (2, 5_000, "bar"), (3, 74_673_216, "square"),
    ]  # fmt: skip
    # one more detection of everything, so that there are some
    tensors["roi_heads.box_predictor.cls_score.bias"] = torch.tensor([0.0, 0.0, 3.0, 3.0])
    torch.save(tensors, model)
    capsys.readouterr()
    flags = ["--model.use_compression", "False", "--model.weights", str(model), "--model.proposals", "50"]
    evaluated(capsys, *paths(root, tmp_path / "out"), *flags)
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {row["category_id"] for row in rows} <= {5_000, 74_673_216}
    assert rows
