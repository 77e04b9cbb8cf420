"""Figures of a run that also go to Weights & Biases: its own package keeps them in the run's folder, from where they are
read back here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from src import train_resnet
from src.common.errors import SettingsError
from src.run.wandb_sink import check_wandb
from tests.conftest import ROOT
from tests.support import small_runs
from tests.support.launching import environment
from tests.support.patience import PATIENCE

BLOCK = 32768
HEADER = 7


def records(file: Path) -> list[Any]:
    """What the package wrote into a run's file: after a header, blocks of records (4 bytes checksum, 2 length, 1 kind)
    that may go on in the next block."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole, found = file.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a whole record, or its last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


def history(output: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Figures by file, tag and step, of all processes of a run."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for file in sorted(output.glob("wandb/*run-*/run-*.wandb")):
        tags = found.setdefault(f"{file.parent.name}/{file.stem}", {})
        for record in records(file):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for tag, value in row.items():
                if tag[0].isupper():
                    tags.setdefault(tag, {})[row["step"]] = value
    return found


LOGGED = """
import sys
from pathlib import Path
from src.run.output_folder import OutputFolder
from src.run.recorder import RunRecorder
from src.run.wandb_sink import WandbSink
output, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
folder = OutputFolder(output, overwrite=True)
sink = WandbSink(output, "me/digits", {"model": {"arch": "resnet18"}})
recorder = RunRecorder(folder, lambda *_: None, "accuracy", after_step=first - 1 if first else None, sinks=[sink])
for step in range(first, last):
    recorder.step(step, {"loss": 1 / (step + 1)})
recorder.validation(1, last, {"loss": 0.25, "accuracy": 50.0, "images": 8.0})
recorder.table("size", ["part", "bits"], [["codes", "100"]])
recorder.finish(None, {"megabytes": 1.5}) if len(sys.argv) > 4 else recorder.close()
"""


def logging(output: Path, first: int, last: int, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOGGED, str(output), str(first), str(last), *more],
        cwd=ROOT,
        env=environment({"WANDB_MODE": "offline", **variables}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_figures_are_kept_and_a_later_process_goes_on_with_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    for done in (logging(tmp_path, 0, 3), logging(tmp_path, 2, 5, "finish")):
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip() == ""
    number = (tmp_path / "wandb" / "run_id.txt").read_text()
    first, second = history(tmp_path).items()
    assert first[0].endswith(f"run-{number}")
    assert second[0].endswith(f"run-{number}")
    assert first[1]["Train/loss"] == {0: 1.0, 1: 1 / 2, 2: 1 / 3}
    assert second[1]["Train/loss"] == {2: 1 / 3, 3: 1 / 4, 4: 1 / 5}
    assert second[1]["Validation/accuracy"] == {5: 50.0}
    assert "Validation/images" not in second[1]
    (file,) = tmp_path.glob(f"wandb/{second[0]}.wandb")
    runs = [record.run for record in records(file) if record.HasField("run")]
    assert (runs[0].run_id, runs[0].project, runs[0].entity) == (number, "digits", "me")
    assert json.loads(next(one.value_json for one in runs[0].config.update if one.key == "model")) == {
        "arch": "resnet18"
    }
    sums = {item.key: item.value_json for record in records(file) for item in record.summary.update}
    assert json.loads(sums["megabytes"]) == 1.5
    assert any(tmp_path.glob("wandb/*/files/media/table/size_*.json"))


def test_without_the_service_or_a_login_a_note_says_where_figures_are(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    nobody = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    script = LOGGED.replace("import sys\n", "import sys, logging; logging.basicConfig(level=20)\n", 1)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), "0", "2", "finish"],
        cwd=ROOT,
        env=environment(nobody),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb_project: ") == 1, done.stderr
    assert f"figures are kept in {tmp_path / 'run' / 'wandb'}, and sent by: wandb sync" in done.stderr
    ((_, tags),) = history(tmp_path / "run").items()
    assert tags["Train/loss"] == {0: 1.0, 1: 0.5}


def test_a_missing_package_or_a_wrong_name_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--model.weights", "none", "--output_path", str(tmp_path / "run"), "--wandb_project"]
    for name in ("a/b/c", "/a", "a/"):
        assert train_resnet.main([*given, name]) == 2
        assert capsys.readouterr().err.startswith(f"error: wandb_project: {name!r} is no project's name")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert train_resnet.main([*given, "digits"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs the package wandb, which is not installed: pip install 'pqf[wandb]'" in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingsError, match="not installed"):
        check_wandb("digits")
    check_wandb(None)


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_with_the_same_run(small_images: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    command = [sys.executable, "-m", "src.train_resnet", *small_runs.training(batch=4, workers=0, sls=5, k_means=1)]
    command += ["--dataloader.imagenet_path", str(small_images), "--output_path", str(tmp_path), "--epochs", "4"]
    command += ["--wandb_project", "digits", "--log_every_n_steps", "1"]
    variables = environment({"WANDB_MODE": "offline"})
    run = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "trained_models" / "1.pth").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    error = run.communicate(timeout=PATIENCE)[1]
    assert run.returncode == 143, error
    done = subprocess.run(
        command, cwd=ROOT, env=variables, check=False, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    found = history(tmp_path)
    assert len(found) == 2
    assert len({name.rpartition("-")[2] for name in found}) == 1
    steps = {step for tags in found.values() for step in tags.get("Train/loss", {})}
    assert steps == set(range(1, 25))
    assert {step for tags in found.values() for step in tags["Validation/accuracy"]} == {0, 6, 12, 18, 24}
