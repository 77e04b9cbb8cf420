"""train_maskrcnn and evaluate_maskrcnn in two real processes: what they leave and find is what one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from src import evaluate_maskrcnn, train_maskrcnn
from src.model_files.pth import read_tensors
from tests.support.coco import contents, entry, rectangle, small_coco, write
from tests.support.launching import ENGINES, launch
from tests.support.patience import PATIENCE
from tests.test_maskrcnn_entries import QUICK, SMALL, paths

pytestmark = [pytest.mark.timeout(1800), pytest.mark.usefixtures("one_thread")]

SECONDS = PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_training_and_evaluation_are_those_of_one_process(engine: str, tmp_path: Path) -> None:
    coco = small_coco(tmp_path / "coco")
    alone, together = tmp_path / "alone", tmp_path / "together"
    rate = [
        "--learning_rate",
        "5e-5",
        "--dataloader.batch_size",
        "1",
        "--scale_learning_rate",
        "False",
        "--epochs",
        "1",
    ]
    finished = launch(engine, ["-m", "src.train_maskrcnn", *QUICK, *paths(coco, together), *rate], seconds=SECONDS)
    assert (finished.status, finished.left) == (0, 0), finished.text
    for line in (
        "training: 4 images",
        "2 processes: learning_rate 5e-05",
        "permute: ",
        "quantize: ",
        "epoch 1: ",
        "results in ",
    ):
        assert finished.out.count(line) == 1, finished.text
    assert train_maskrcnn.main([*QUICK, *paths(coco, alone), *rate, "--epochs", "0"]) == 0

    # permutations, codes and codebooks, and what the compressed network finds
    assert (together / "compression.json").read_text() == (alone / "compression.json").read_text()
    first, second = (read_tensors(place / "trained_models" / "0.pth") for place in (together, alone))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    history = json.loads((together / "results.json").read_text())["history"]
    assert history["0"] == json.loads((alone / "results.json").read_text())["history"]["0"]
    assert history["0"]["images"] == history["1"]["images"] == 3

    # the evaluation of the trained network, in two processes and in one
    flags = [
        *SMALL,
        "--dataloader.coco_path",
        str(coco),
        "--model.state_dict_compressed",
        str(together / "trained_models" / "1.pth"),
    ]
    places = [tmp_path / "evaluated together", tmp_path / "evaluated alone"]
    finished = launch(engine, ["-m", "src.evaluate_maskrcnn", *flags, "--output_path", str(places[0])], seconds=SECONDS)
    assert (finished.status, finished.left) == (0, 0), finished.text
    assert evaluate_maskrcnn.main([*flags, "--output_path", str(places[1])]) == 0
    rows, wanted = (json.loads((place / "detections.json").read_text()) for place in places)
    assert rows == wanted
    assert {row["image_id"] for row in rows} == {1, 2, 3}
    results, single = (json.loads((place / "results.json").read_text()) for place in places)
    assert results == single
    assert results["images"] == 3


@pytest.mark.slow
def test_too_few_images_and_a_missed_expectation_end_both_processes(tmp_path: Path) -> None:
    objects = [rectangle(1, 1, 1, [8, 8, 24, 20])]
    for split in ("train", "val"):
        write(tmp_path / "coco", split, contents([entry(1, 64, 64)], objects))
    finished = launch(
        "torchrun", ["-m", "src.train_maskrcnn", *QUICK, *paths(tmp_path / "coco", tmp_path / "out"), "--epochs", "1"]
    )
    assert finished.status != 0
    assert finished.text.count("error: process 0 of 2: ") == 1, finished.text
    assert "1 training images are too few for 2 processes" in finished.text
    assert "/src/" not in finished.text  # no traceback of ours; torchrun prints one of its own
    assert finished.left == 0

    found = tmp_path / "found.json"
    found.write_text(json.dumps([{"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [8, 8, 24, 20]}]))
    flags = [*SMALL, "--dataloader.coco_path", str(tmp_path / "coco"), "--evaluation.detections", str(found)]
    finished = launch("torchrun", ["-m", "src.evaluate_maskrcnn", *flags, "--expected.box_ap", "50"])
    assert finished.status == 1
    assert finished.out.count("NOT AS EXPECTED") == 1, finished.text
    assert finished.out.count("images: 1, detections: 1") == 1
    assert finished.left == 0
