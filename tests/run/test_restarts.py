"""torchrun starts the processes of a run again when one is lost, or when machines leave or come, and they go on with the
run: nobody has to say so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from src import train_resnet
from src.common.errors import SettingsError
from src.engines.launch import restarts
from tests.conftest import ROOT, write_images
from tests.run.test_resume import SMALL, half_a_run
from tests.run.test_resume_processes import arguments
from tests.support.coco import small_coco
from tests.support.killing import count, digest, newest
from tests.support.launching import agent, environment, free_port, launch, need
from tests.support.patience import PATIENCE
from tests.test_entries import paths, refused
from tests.test_maskrcnn_entries import QUICK
from tests.test_maskrcnn_entries import paths as coco_paths

pytestmark = [pytest.mark.timeout(2 * PATIENCE), pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    ("seed", "kills", "images"), [(0, 2, 8), pytest.param(1, 20, 40, marks=pytest.mark.slow)], ids=["2", "20"]
)
def test_a_run_that_loses_processes_ends_as_the_one_that_lost_none(
    seed: int, kills: int, images: int, tmp_path: Path
) -> None:
    """One of two processes is killed, drawn at random, at moments spread over search, clustering, training and end."""
    need("torchrun")
    write_images(tmp_path / "images" / "train", 3, images, seed=0)
    write_images(tmp_path / "images" / "val", 3, 4, seed=1)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.losing", *map(str, (tmp_path, tmp_path / "images", seed, kills))],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert len(report["kills"]) >= kills
    if kills >= 20:
        assert {rank for rank, _ in report["kills"]} == {0, 1}
        assert {was for _, was in report["kills"]} >= {"clustering", "training or validating"}, report["kills"]
    for lost in report["lost"]:
        assert lost == report["whole"], [name for name in lost if lost[name] != report["whole"].get(name)]


def started_by_torchrun(monkeypatch: pytest.MonkeyPatch, logs: Path, restart: int) -> None:
    """As torchrun's agent, which keeps its logs in `logs`, starts a process; of one, so that no launcher is needed."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(logs / f"attempt_{restart}" / "0" / "error.json"))


def test_what_flags_say_of_earlier_runs_counts_at_the_first_start_only(
    small_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that torchrun starts again goes on; one that another torchrun starts does what the flags say."""
    output, logs, others = tmp_path / "run", tmp_path / "run_a1", tmp_path / "run_b2"
    started_by_torchrun(monkeypatch, logs, 0)
    half_a_run(small_images, output, "--epochs", "1")
    half = shutil.copytree(output, tmp_path / "half")
    wanted = {}
    for number, flags in enumerate(
        (
            ["--overwrite", "True"],
            ["--resume", str(output / "resume" / "checkpoint-000001.safetensors")],
        )
    ):
        arguments = [*SMALL, *paths(small_images, output), "--checkpoint_every_n_steps", "1", "--epochs", "1", *flags]
        started_by_torchrun(monkeypatch, logs, 1)
        capsys.readouterr()
        assert train_resnet.main(arguments) == 0
        said = capsys.readouterr().out
        assert f"(restart 1 of 3): they go on with the run in {output}" in said
        assert "resume: resumes in epoch 1, after batch" in said
        wanted = wanted or digest(output)
        assert digest(output) == wanted
        shutil.rmtree(output)
        shutil.copytree(half, output)
        if number < 1:
            continue
        started_by_torchrun(monkeypatch, others, 0)
        refused(capsys, train_resnet.main, arguments, "checkpoint-000001.safetensors", "does not exist")
        refused(capsys, train_resnet.main, [*arguments[:-2], "--resume", "none"], "already holds a run")
        assert train_resnet.main([*arguments[:-2], "--overwrite", "True"]) == 0
        assert "resume: resumes" not in capsys.readouterr().out
        assert digest(output) == wanted


def test_a_run_that_had_ended_when_a_process_was_lost_is_left_as_it_is(
    small_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, logs = tmp_path / "run", tmp_path / "run_a1"
    started_by_torchrun(monkeypatch, logs, 0)
    arguments = [*SMALL, *paths(small_images, output), "--epochs", "1", "--overwrite", "True"]
    assert train_resnet.main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    (output / "resume").mkdir()  # as where it was being removed
    started_by_torchrun(monkeypatch, logs, 1)
    capsys.readouterr()
    assert train_resnet.main(arguments) == 0
    assert f"the run in {output} has ended; nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    assert not (output / "resume").exists()
    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name)
    refused(capsys, train_resnet.main, arguments[:-2], "already holds a run", "--overwrite True")
    assert train_resnet.main(arguments) == 0
    assert not (output / ".launch").exists()  # it is not torchrun's run any more


def test_an_error_that_restarts_do_not_cure_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "run_a1"
    logs.mkdir()
    wrong = [*SMALL, *paths(tmp_path / "nowhere", tmp_path / "run")]
    for restart, words in ((0, "nowhere"), (1, "the same again after restart 1 of 3"), (2, "restart 2 of 3")):
        started_by_torchrun(monkeypatch, logs, restart)
        error = refused(capsys, train_resnet.main, wrong, words)
        assert ("nowhere" in error) == (restart == 0)
    error = refused(capsys, train_resnet.main, [*wrong, "--epochs", "many"], "epochs")  # another one
    assert "the same" not in error
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "some")
    refused(capsys, train_resnet.main, wrong, "nowhere")


@pytest.mark.parametrize(
    ("file", "agent"),
    [
        ("/tmp/torchelastic_x/run_a/attempt_2/1/error.json", f"{socket.gethostname()} /tmp/torchelastic_x/run_a"),
        ("", ""),
        ("/logs/error.json", ""),
    ],
)
def test_what_torchruns_agent_says(file: str, agent: str) -> None:
    variables = {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_ERROR_FILE": file}
    found = restarts(variables)
    assert (found.agent, found.done, found.most) == (agent, 2, 3)
    assert restarts({}).agent == ""
    with pytest.raises(SettingsError, match="TORCHELASTIC_RESTART_COUNT is 'some'"):
        restarts({**variables, "TORCHELASTIC_RESTART_COUNT": "some"})


@pytest.mark.slow
def test_machines_that_leave_and_come(small_images: Path, tmp_path: Path) -> None:
    """Two agents with a process each; one is lost with its process, the other goes on alone, and a new one joins."""
    need("torchrun")
    output = tmp_path / "run"
    # or else an agent that comes later waits for an address that the others told each other once (torch 2.6 to 2.14)
    unshared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    endpoint = f"127.0.0.1:{free_port()}"

    def machine(hosts: int) -> list[str]:
        return [
            *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "run"),
            *("--rdzv-conf", f"is_host={hosts},last_call_timeout=5,keep_alive_interval=1"),
            *("-m", "src.train_resnet", *arguments(small_images, output, "--epochs", "100000")),
        ]

    def said(text: str) -> int:
        return sum(path.read_text(errors="replace").count(text) for path in tmp_path.glob("*.log"))

    with ExitStack() as stack:
        first = stack.enter_context(agent(machine(1), tmp_path / "first.log", unshared))
        second = stack.enter_context(agent(machine(0), tmp_path / "second.log", unshared))
        first.wait_for(lambda: said("2 processes: learning_rate 0.0002") > 0)
        reached = newest(output)
        first.wait_for(lambda: newest(output) > reached + 2)
        second.vanish()
        first.wait_for(lambda: said("the run goes on with 1 process instead of 2") == 1)
        reached, grown = newest(output), said("the run goes on with 2 processes instead of 1")
        first.wait_for(lambda: newest(output) > reached + 2)
        third = stack.enter_context(agent(machine(0), tmp_path / "third.log", unshared))
        first.wait_for(lambda: said("the run goes on with 2 processes instead of 1") > grown)
        reached = newest(output)
        first.wait_for(lambda: newest(output) > reached + 2)
        first.process.send_signal(signal.SIGTERM)
        third.process.send_signal(signal.SIGTERM)
        first.process.wait()
        text = first.text
    assert "a batch of all together has 2 images instead of 4, learning_rate is 0.0001 instead of 0.0002" in text
    assert "a batch of all together has 4 images instead of 2, learning_rate is 0.0002 instead of 0.0001" in text
    assert "--resume_with_changes" not in text, text
    epochs = max(int(path.stem) for path in (output / "trained_models").glob("[0-9]*.pth")) + 1
    alone = arguments(small_images, output, "--epochs", str(epochs), "--resume_with_changes", "True")
    assert train_resnet.main(alone) == 0
    history = json.loads((output / "results.json").read_text())["history"]
    assert sorted(map(int, history)) == list(range(epochs + 1))


@pytest.mark.slow
@pytest.mark.parametrize("job", ["calibration", "detection"])
def test_a_calibration_and_a_detector_go_on_too(job: str, small_images: Path, tmp_path: Path) -> None:
    """The first process is killed while the network is calibrated, or a Mask R-CNN trained."""
    need("torchrun")
    outputs = [tmp_path / name for name in ("whole", "lost")]
    if job == "detection":
        coco = small_coco(tmp_path / "coco")
        given = ["-m", "src.train_maskrcnn", *QUICK, "--epochs", "1", "--dataloader.batch_size", "1"]
        each = [[*given, "--checkpoint_every_n_steps", "1", *coco_paths(coco, output)] for output in outputs]
        pattern, enough = "resume/checkpoint-*.safetensors", 2
    else:
        calibrated = ["--calibration.use", "True", "--calibration.count", "16", "--epochs", "1"]
        each = [["-m", "src.train_resnet", *arguments(small_images, output, *calibrated)] for output in outputs]
        pattern, enough = "resume/calibration/*.safetensors", 5
    finished = launch("torchrun", each[0])
    assert finished.status == 0, finished.text
    start = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "--max-restarts", "3"]
    with agent([*start, *each[1]], tmp_path / "lost.log") as lost:
        lost.wait_for(lambda: count(outputs[1], pattern) >= enough)
        os.kill(lost.ranks[0], signal.SIGKILL)
        assert lost.process.wait() == 0, lost.text
        assert "(restart 1 of 3): they go on with the run" in lost.text
    digests = [digest(output) for output in outputs]
    assert digests[0] == digests[1]
