"""The demonstration of Mask R-CNN: its commands, its table; and the committed model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from src import evaluate_maskrcnn
from src.common.errors import RunError
from src.demo import maskrcnn as demo_maskrcnn
from src.demo.steps import data_flags, folder_and_flags, table
from src.tasks.demo_data import digit_scenes
from tests.conftest import ROOT


def test_flags_are_told_apart():
    flags = ["--epochs", "1", "--output_path", "here", "--dataloader.coco_path", "scenes", "--dataloader.num_workers=0"]
    folder, rest = folder_and_flags(flags, "output/demo")
    assert folder == Path("here")
    assert rest == ["--epochs", "1", "--dataloader.coco_path", "scenes", "--dataloader.num_workers=0"]
    assert data_flags(rest) == ["--dataloader.coco_path", "scenes", "--dataloader.num_workers=0"]
    assert folder_and_flags([], "output/demo") == (Path("output/demo"), [])
    assert data_flags([]) == []
    assert data_flags(["--epochs", "1"]) == []


def test_help_starts_nothing(capsys):
    assert demo_maskrcnn.main(["--help"]) == 0
    assert "usage: python -m src.demo.maskrcnn" in capsys.readouterr().out


def test_the_table_reads_what_the_runs_left(tmp_path):
    for name, history in {
        "dense": {"best epoch": 1, "seconds per step": 1.25, "history": {"1": {"BoxAP": 71.234, "MaskAP": 70.5}}},
        "compressed": {
            "best epoch": 2,
            "seconds per step": 1.5,
            "megabytes": 6.5,
            "ratio": 25.0,
            "history": {"0": {"BoxAP": 10.0}, "2": {"BoxAP": 70.0, "MaskAP": 69.9}},
        },
    }.items():
        (tmp_path / name / "trained_models").mkdir(parents=True)
        (tmp_path / name / "trained_models" / "best.pth").write_bytes(bytes(1 << 20))
        (tmp_path / name / "results.json").write_text(json.dumps(history))
    text = table(tmp_path, lambda: demo_maskrcnn.rows(tmp_path / "dense", tmp_path / "compressed"))
    lines = [line.split() for line in text.splitlines()]
    assert lines[2] == ["dense", "71.23", "%", "70.50", "%", "162.50", "MB", "1x", "1.00", "MB", "1.250"]
    assert lines[3] == ["after", "compression", "10.00", "%", "-", "6.50", "MB", "25.0x"]
    assert lines[4] == [
        "after",
        "fine-tuning",
        "70.00",
        "%",
        "69.90",
        "%",
        "6.50",
        "MB",
        "25.0x",
        "1.00",
        "MB",
        "1.500",
    ]
    shutil.rmtree(tmp_path / "dense")
    with pytest.raises(RunError, match=r"results in .* are incomplete"):
        table(tmp_path, lambda: demo_maskrcnn.rows(tmp_path / "dense", tmp_path / "compressed"))


@pytest.mark.slow
def test_the_demo_runs(tmp_path, capsys, monkeypatch):
    """With a handful of scenes, which teach nothing."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.setattr(digit_scenes, "N_SCENES", {"train": 16, "val": 16})
    flags = ["--output_path", str(tmp_path / "out"), "--epochs", "1", "--dataloader.num_workers", "0"]
    flags += ["--dataloader.imagenet_path", str(tmp_path / "crops"), "--dataloader.coco_path", str(tmp_path / "scenes")]
    flags += [
        "--model.compression_parameters.k_means_n_iters=1",
        "--model.search",
        "published",
        "--model.sls_iterations",
        "10",
    ]
    assert demo_maskrcnn.main(flags) == 0
    printed = capsys.readouterr().out
    assert "after fine-tuning" in printed
    assert "box AP" in printed
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 16


COMMITTED = ROOT / "compressed_models" / "digits_maskrcnn.pth"


@pytest.mark.slow
@pytest.mark.skipif(not COMMITTED.exists(), reason="no trained model of the digit scenes is in compressed_models/")
def test_the_committed_model_has_the_expected_precision(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    flags = [
        "--config",
        str(ROOT / "config" / "digits" / "evaluate_maskrcnn.yaml"),
        "--dataloader.coco_path",
        str(tmp_path / "scenes"),
    ]
    flags += ["--dataloader.num_workers", "0", "--device", "cpu", "--output_path", str(tmp_path / "out")]
    flags += ["--model.state_dict_compressed", str(COMMITTED)]
    assert evaluate_maskrcnn.main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("as expected: ") == 2
    assert "NOT AS EXPECTED" not in printed
    # the same detections, from their file
    again = [*flags, "--overwrite", "True", "--evaluation.detections", str(tmp_path / "out" / "detections.json")]
    again[again.index("--output_path") + 1] = str(tmp_path / "again")
    assert evaluate_maskrcnn.main(again) == 0
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "again"))
    assert one["BoxAP"] == pytest.approx(other["BoxAP"], abs=1e-6)
    assert one["MaskAP"] == pytest.approx(other["MaskAP"], abs=1e-6)
    assert evaluate_maskrcnn.main([*again, "--expected.box_ap", "10"]) == 1
