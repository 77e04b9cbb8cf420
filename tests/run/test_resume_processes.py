"""Several processes: a run that was stopped under one engine resumes under another, with another number of processes,
or under the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from src import train_resnet
from src.model_files.pth import read_tensors
from tests.conftest import ROOT
from tests.run.test_resume import SMALL, at_step
from tests.support.launching import MARK, command, environment, kill, launch, marked, need
from tests.support.patience import PATIENCE
from tests.test_entries import paths, refused

FLAGS = [
    "--dataloader.batch_size",
    "2",
    "--learning_rate",
    "1e-4",
    "--lr_scheduler.min_lr",
    "1e-5",
    "--checkpoint_every_n_steps",
    "1",
]


def arguments(images: Path, output: Path, *more: str) -> list[str]:
    return [*SMALL, *FLAGS, *paths(images, output), *more]


def stopped(
    engine: str, images: Path, output: Path, when: Callable[[], bool], number: signal.Signals, *more: str
) -> tuple[int, str]:
    """Two processes under an engine; when the time has come the launcher (SIGTERM) or all of them (SIGKILL) get a
    signal."""
    need(engine)
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile() as text:
        launcher = subprocess.Popen(
            command(engine, ["-m", "src.train_resnet", *arguments(images, output, *more)]),
            cwd=ROOT, env=environment({MARK: mark}), stdin=subprocess.DEVNULL, stdout=text, stderr=text,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE
            while not when() and launcher.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            assert when(), "it ended or took too long"
            if number == signal.SIGTERM:
                os.kill(launcher.pid, number)
                launcher.wait(PATIENCE)
        finally:
            kill(marked(mark))
            launcher.wait()
            while marked(mark):  # until the system has cleared them away, with their hold on the folder
                time.sleep(0.01)
        text.seek(0)
        return launcher.returncode, text.read().decode(errors="replace")


@pytest.fixture(scope="module")
def whole(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes under torchrun that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    finished = launch("torchrun", ["-m", "src.train_resnet", *arguments(small_images, output)])
    assert finished.status == 0, finished.text
    return output


def check_like(output: Path, whole: Path, exactly: bool) -> None:
    for name in ("0.pth", "1.pth", "2.pth"):
        found, wanted = (read_tensors(run / "trained_models" / name) for run in (output, whole))
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            if exactly or key.endswith("codes_matrix"):
                assert torch.equal(found[key], tensor), (name, key)
            else:
                assert torch.allclose(found[key].float(), tensor.float(), rtol=1e-3, atol=1e-4), (name, key)
    histories = [json.loads((run / "results.json").read_text())["history"] for run in (output, whole)]
    if exactly:
        assert histories[0] == histories[1]
    assert [sorted(history) for history in histories] == [["0", "1", "2"]] * 2


def test_a_launched_run_that_is_asked_to_stop_saves_and_resumes_exactly(
    small_images: Path, whole: Path, tmp_path: Path
) -> None:
    """Each process gets its own running statistics and random states back."""
    output = tmp_path / "run"
    _, text = stopped("torchrun", small_images, output, at_step(output, 2), signal.SIGTERM)
    assert "interrupted: the checkpoint is saved (" in text, text
    assert not (output / "results.json").exists()
    finished = launch("torchrun", ["-m", "src.train_resnet", *arguments(small_images, output)])
    assert finished.status == 0, finished.text
    assert finished.out.count("resume: resumes") == 1
    check_like(output, whole, exactly=True)


@pytest.mark.slow
def test_a_launched_run_with_a_teacher_and_all_tools_resumes_exactly(small_images: Path, tmp_path: Path) -> None:
    """Each process gets its own moving averages of running statistics back too."""
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=3).state_dict(), tmp_path / "teacher.pth")
    more = [
        *("--distillation.weight", "1", "--distillation.labels", "1", "--distillation.teacher"),
        *(str(tmp_path / "teacher.pth"), "--distillation.images", str(small_images / "val")),
        *("--ema", "0.9", "--accumulate", "2", "--clip_gradients", "1", "--lr_scheduler.warmup", "1.5"),
        *("--codebook_learning_rate", "0.5", "--dataloader.augmentation", "[trivialaugment]"),
    ]
    whole, output = tmp_path / "whole", tmp_path / "run"
    finished = launch("torchrun", ["-m", "src.train_resnet", *arguments(small_images, whole, *more)])
    assert finished.status == 0, finished.text
    stopped("torchrun", small_images, output, at_step(output, 2), signal.SIGTERM, *more)
    assert not (output / "results.json").exists()
    finished = launch("torchrun", ["-m", "src.train_resnet", *arguments(small_images, output, *more)])
    assert finished.status == 0, finished.text
    assert finished.out.count("resume: resumes") == 1
    check_like(output, whole, exactly=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("torchrun", "horovod", marks=pytest.mark.slow),
        pytest.param("horovod", "torchrun", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_in_one_engine_resumes_in_another(
    first: str, second: str, small_images: Path, whole: Path, tmp_path: Path
) -> None:
    need(second)
    output = tmp_path / "run"
    stopped(first, small_images, output, at_step(output, 2), signal.SIGKILL)
    finished = launch(second, ["-m", "src.train_resnet", *arguments(small_images, output)])
    assert finished.status == 0, finished.text
    assert finished.out.count("resume: resumes") == 1
    assert finished.left == 0
    check_like(output, whole, exactly=False)


def test_another_number_of_processes_is_named_and_needs_to_be_allowed(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    stopped("torchrun", small_images, output, at_step(output, 2), signal.SIGKILL)
    alone = arguments(small_images, output)
    refused(capsys, train_resnet.main, alone, "(processes): 2 then, 1 now", "--resume_with_changes True")
    assert train_resnet.main([*alone, "--resume_with_changes", "True"]) == 0
    assert "with the new batch size" in capsys.readouterr().out
