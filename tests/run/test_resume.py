"""A run resumes where it was stopped, however it was stopped, and ends as if it had not been; or says why it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from src import train_maskrcnn, train_resnet
from src.architectures import ARCHITECTURES
from src.common.errors import CheckpointError, RunError
from src.compression.finetune.checkpoint import Checkpoint
from src.compression.finetune.hooks import Resumed
from src.compression.finetune.loop import FinetuneSpec, finetune
from src.compression.finetune.optimizers import OptimizerSpec, ScheduleSpec
from src.compression.finetune.outcome import Outcome
from src.engines.launch import Launch
from src.engines.single import SingleProcess
from src.model_files.compression_report import read_settings
from src.model_files.safetensors_file import read_container, write_container
from src.run.checkpoints import StoredCheckpoint
from src.run.fingerprint import PROCESSES, RunFingerprint
from src.run.output_folder import COPYING
from tests.compression.finetune.test_loop import Blobs, Notes
from tests.conftest import ROOT, write_images
from tests.support import small_runs
from tests.support.coco import small_coco
from tests.support.helpers import quantized, spec
from tests.support.killing import digest, found, scalars
from tests.support.patience import PATIENCE
from tests.test_entries import paths, refused
from tests.test_maskrcnn_entries import QUICK as QUICK_DETECTION
from tests.test_maskrcnn_entries import paths as coco_paths

CPU = SingleProcess(Launch(), torch.device("cpu"))
SMALL = [
    *small_runs.training(batch=4, workers=0, sls=20, k_means=1),
    *("--epochs", "2", "--log_every_n_steps", "1", "--dataloader.crop_padding", "2"),
]
ONE_LOADER = ["--dataloader.num_workers", "1", "--checkpoint_every_n_steps"]
STEPS = 6


pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def whole(small_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped: two epochs of six steps."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train_resnet.main([*SMALL, *paths(small_images, output)]) == 0
    return output


def at_step(output: Path, step: int) -> Callable[[], bool]:
    """Whether the log of the run in `output` is at least at a step: TensorBoard's file is written when a checkpoint is
    saved."""
    return lambda: any(position(path) >= step for path in found(output, "resume/checkpoint-*.safetensors"))


def position(state: Path) -> int:
    try:
        return json.loads(read_container(state)[1]["values"])["position"]["step"]
    except Exception:  # removed or written meanwhile
        return -1


def stopped(arguments: list[str], number: signal.Signals, when: Callable[[], bool], main=train_resnet.main) -> int:
    """Run in this process, which sends itself a signal when the time has come; returns the status."""
    with happening(when, lambda: os.kill(os.getpid(), number)):
        return main(arguments)


@contextlib.contextmanager
def happening(when: Callable[[], bool], what: Callable[[], None]) -> Iterator[None]:
    """Something happens, once, when the time has come and a file has been written: so that it is not too late on a slow
    machine."""
    replace, done = os.replace, threading.Event()

    def watched(old: Path, new: Path) -> None:
        replace(old, new)
        if not done.is_set() and when():
            done.set()
            what()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched)
        yield
    assert done.is_set(), "the time never came"


def half_a_run(images: Path, output: Path, *flags: str) -> None:
    """A run that was stopped in its first epoch, after a checkpoint had been saved."""
    arguments = [*SMALL, *paths(images, output), "--checkpoint_every_n_steps", "1", *flags]
    assert stopped(arguments, signal.SIGINT, at_step(output, 2)) == 130
    assert not (output / "results.json").exists()


# --- the law ---


@pytest.mark.parametrize(("seed", "kills"), [(0, 8), pytest.param(1, 60, marks=pytest.mark.slow)])
def test_runs_that_are_killed_at_any_moment_end_as_the_one_that_was_not(seed: int, kills: int, tmp_path: Path) -> None:
    """Kills in the middle of writing a file of each kind, in clustering and in training; with more of them also spread
    over the time between."""
    images = tmp_path / "images"
    write_images(images / "train", 3, 40, seed=0)
    write_images(images / "val", 3, 8, seed=1)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killing", str(tmp_path), str(images), str(seed), str(kills)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert len(report["kills"]) == kills
    kinds = {"group", "layer", "state", "report", "model", "checkpoint"}
    assert {kind for kind, later, _ in report["kills"] if later is None} == kinds, report["kills"]
    phases = [found for *_, found in report["kills"]]
    for wanted in ("clustering", "training or validating", "writing a group or layer", "writing a checkpoint"):
        assert wanted in phases, phases
    for killed in report["killed"]:
        assert killed == report["whole"], [name for name in killed if killed[name] != report["whole"].get(name)]


class Drops(nn.Module):
    """A small network with everything that has a state: norms, dropout (torch's own generator), codebooks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(16, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, 3),
        )
        self.body = quantized(self.body, spec(8, ignored=["6"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Stops(Exception):
    pass


class StopsAt:
    """Keeps checkpoints as a file would, and stops a training at the n-th one."""

    def __init__(self, every: int, at: int | None = None) -> None:
        self.every, self.at = every, at
        self.states: list[Checkpoint] = []

    def keep(self, checkpoint: Checkpoint) -> None:
        values = json.loads(json.dumps(checkpoint.values))
        self.states.append(Checkpoint(dict(checkpoint.tensors), values))
        if len(self.states) == self.at:
            raise Stops


def train(
    keeper: StopsAt, resumed: Resumed | None, optimizer: str, schedule: ScheduleSpec, amp: str = "none", epochs: int = 3
) -> tuple[nn.Module, Outcome, Notes]:
    model, task, notes = Drops(), Blobs(), Notes()
    torch.manual_seed(1 if resumed is None else 99)  # a new process has another state of the generator
    how = FinetuneSpec(
        epochs=epochs,
        optimizer=OptimizerSpec(optimizer, 0.01, 0.9, 1e-3),
        lr_scheduler=schedule,
        amp=amp,
        log_every_n_steps=1,
        checkpoint_every_n_steps=keeper.every,
        show_progress=False,
    )
    outcome = finetune(model, task, how, CPU, notes, keeper=keeper, resumed=resumed)
    return model, outcome, notes


SCHEDULES = {
    "cosine": ScheduleSpec("cosine", 1e-4),
    "plateau": ScheduleSpec("plateau", 1e-5, patience=0, factor=0.5),
    "multistep": ScheduleSpec("multistep", factor=0.3, milestones=(1, 2)),
    "none": ScheduleSpec("none"),
}


@given(
    amp=st.sampled_from(["none", "fp16"]),
    at=st.integers(1, 18),
    every=st.integers(1, 4),
    optimizer=st.sampled_from(["adam", "sgd"]),
    schedule=st.sampled_from(sorted(SCHEDULES)),
)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_checkpoint_leads_to_the_same_end(amp: str, at: int, every: int, optimizer: str, schedule: str) -> None:
    model, outcome, notes = train(StopsAt(every), None, optimizer, SCHEDULES[schedule], amp)
    keeper = StopsAt(every, at)
    with contextlib.suppress(Stops):
        train(keeper, None, optimizer, SCHEDULES[schedule], amp)
    state = keeper.states[-1]
    assert bool(state.values["scaler"]) == (amp == "fp16")
    again, outcome_again, notes_again = train(StopsAt(every), Resumed(state), optimizer, SCHEDULES[schedule], amp)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert {**vars(outcome), "seconds_per_step": 0} == {**vars(outcome_again), "seconds_per_step": 0}
    assert all(notes.rates[step] == rate for step, rate in notes_again.rates.items())
    assert all(notes.figures[step]["loss"] == figures["loss"] for step, figures in notes_again.figures.items())
    assert set(notes_again.rates) == {step for step in notes.rates if step > state.position.step}


def test_a_changed_schedule_is_as_if_it_had_been_so_from_the_start() -> None:
    keeper = StopsAt(1, 9)
    with pytest.raises(Stops):
        train(keeper, None, "adam", SCHEDULES["cosine"], epochs=3)
    state = keeper.states[-1]
    _, _, longer = train(StopsAt(0), Resumed(state, same_schedule=False), "adam", SCHEDULES["cosine"], epochs=5)
    _, _, whole = train(StopsAt(0), None, "adam", SCHEDULES["cosine"], epochs=5)
    assert longer.rates == {step: rate for step, rate in whole.rates.items() if step > state.position.step}
    assert max(longer.rates) == 30


def test_a_checkpoint_of_another_network_or_a_damaged_one_is_refused() -> None:
    keeper = StopsAt(1, 4)
    with pytest.raises(Stops):
        train(keeper, None, "adam", SCHEDULES["cosine"])
    state = keeper.states[-1]
    for name in ("schedule", "outcome", "optimizer", "processes"):
        values = {key: value for key, value in state.values.items() if key != name}
        with pytest.raises(CheckpointError, match="resume: the checkpoint does not fit"):
            train(StopsAt(0), Resumed(Checkpoint(state.tensors, values)), "adam", SCHEDULES["cosine"])
    fewer = {name: tensor for name, tensor in state.tensors.items() if not name.endswith("codebook")}
    with pytest.raises(CheckpointError, match="another network"):
        train(StopsAt(0), Resumed(Checkpoint(fewer, state.values)), "adam", SCHEDULES["cosine"])
    with pytest.raises(CheckpointError, match="does not fit"):
        train(StopsAt(0), Resumed(state), "adam", SCHEDULES["plateau"])


def test_a_network_with_values_that_are_no_numbers_is_not_kept() -> None:
    model = Drops()
    with torch.no_grad():
        model.body[1].running_mean[0] = torch.nan
    keeper, how = StopsAt(1), FinetuneSpec(1, OptimizerSpec("adam", 0.01), SCHEDULES["none"], show_progress=False)
    with pytest.raises(RunError, match=r"body\.1\.running_mean holds values that are no numbers"):
        finetune(model, Blobs(), how, CPU, Notes(), keeper=keeper)
    assert not keeper.states


# --- signals ---


SIGNALLED = """
import sys
from pathlib import Path

from src import train_resnet
from tests.support.killing import Moment, watch

# as a terminal does with Ctrl-C, and a batch system with SIGTERM
watch(Path(sys.argv[1]), Moment("resume/checkpoint-000003.safetensors", 0), number=int(sys.argv[2]))
sys.exit(train_resnet.main(sys.argv[3:]))
"""
"""The third checkpoint is the first of the training."""


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_first_and_leaves_with_the_usual_status(
    number: signal.Signals,
    status: int,
    small_images: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a process of its own with loader processes, all of which get the signal."""
    output = tmp_path / "run"
    arguments = [*SMALL, *paths(small_images, output), *ONE_LOADER, "2"]
    running = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(output), str(int(number)), *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    text = running.stdout
    assert running.returncode == status, text
    assert "Traceback" not in text
    assert "interrupted: the checkpoint is saved (" in text
    assert "the same command resumes from it" in text
    newest = max(found(output, "resume/checkpoint-*"))
    assert newest.name == "checkpoint-000004.safetensors"
    assert 2 <= position(newest) < 4  # of the steps two, four and so on: it was saved for the signal
    assert not list(output.rglob("*.part"))
    assert not (output / ".lock").exists()
    capsys.readouterr()
    assert train_resnet.main(arguments) == 0
    assert "resume: resumes" in capsys.readouterr().out
    assert digest(output) == digest(whole)
    assert not (output / "resume").exists()


def started(arguments: list[str], env: dict[str, str] = ENVIRONMENT) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    command = [sys.executable, "-m", "src.train_resnet", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams)


def wait_for(reached: Callable[[], bool], running: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


def test_a_signal_in_search_or_clustering_keeps_what_is_finished(
    small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = [*SMALL, *paths(small_images, output)]
    assert stopped(arguments, signal.SIGTERM, lambda: len(found(output, "resume/layers/*.safetensors")) >= 5) == 143
    # less what an interrupted write has left, which is removed
    kept = {p: p.stat().st_mtime_ns for p in output.glob("resume/*/*") if not p.name.endswith(".part")}
    assert sum(path.parent.name == "groups" for path in kept) == 12
    assert sum(path.parent.name == "layers" for path in kept) >= 5
    capsys.readouterr()
    half = [*arguments, "--checkpoint_every_n_steps", "1"]
    assert stopped(half, signal.SIGINT, at_step(output, 1)) == 130
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())  # not done again
    assert train_resnet.main(arguments) == 0
    assert digest(output) == digest(whole)


def test_kept_layers_of_other_weights_and_damaged_ones_are_clustered_again(
    small_images: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = [*SMALL, *paths(small_images, output)]
    assert stopped(arguments, signal.SIGINT, lambda: len(found(output, "resume/layers/*.safetensors")) >= 6) == 130
    # an interrupted write may have left a temporary folder between them
    layers = sorted(output.glob("resume/layers/*.safetensors"))
    groups = sorted(output.glob("resume/groups/*.json"))
    layers[0].write_bytes(layers[0].read_bytes()[:-1])
    shutil.copy(layers[2], layers[1])  # a whole file, of another layer
    groups[0].write_text("{")
    groups[1].unlink()
    assert train_resnet.main(arguments) == 0
    assert digest(output) == digest(whole)


@pytest.mark.parametrize(("key", "value", "bits"), [("size", "7KB", 16), ("ratio", "7", 8)])
def test_a_run_of_a_wanted_size_resumes_with_the_plan_that_it_began_with(
    key: str, value: str, bits: int, small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--model.arch", "tests.support.own_network:Net", f"--compression.{key}", value]
    own += ["--model.compression_parameters.layer_specs", "{}", "--model.compression_parameters.ignored_modules", "[]"]
    output = tmp_path / "run"
    assert train_resnet.main([*SMALL, *paths(small_images, tmp_path / "whole"), *own]) == 0
    half_a_run(small_images, output, *own)
    report = json.loads((output / "compression.json").read_text())
    planned = {layer["name"]: (layer["d"], layer["k"], layer["codebook_bits"]) for layer in report["layers"]}
    assert bits in {bits for _, _, bits in planned.values()}  # which the checkpoint, of floats, does not say
    assert read_settings(output / "compression.json") == planned
    assert read_settings(output / "nothing.json") == {}
    arguments = [*SMALL, *paths(small_images, output), *own]
    assert train_resnet.main([*arguments, f"--compression.{key}", "9"]) == 2  # another network
    assert f"compression.{key}" in capsys.readouterr().err
    assert train_resnet.main(arguments) == 0
    assert digest(output) == digest(tmp_path / "whole")


# --- which runs resume ---


def test_auto_resumes_and_leaves_the_same_as_a_run_that_was_not_stopped(
    small_images: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    half_a_run(small_images, output)
    began = json.loads((output / "resume" / "run.json").read_text())["started"]
    assert len(list(output.glob("resume/checkpoint-*"))) == 2
    # another place, number of workers and log interval change nothing of the result
    moved = shutil.copytree(small_images, tmp_path / "moved")
    assert train_resnet.main([*SMALL, *paths(moved, output), "--dataloader.num_workers", "1"]) == 0
    assert digest(output) == digest(whole)
    assert json.loads((output / "results.json").read_text())["start"] == began


def test_none_refuses_overwrite_starts_over_and_a_finished_run_is_not_touched(
    small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    half_a_run(small_images, output)
    capsys.readouterr()
    arguments = [*SMALL, *paths(small_images, output)]
    refused(
        capsys,
        train_resnet.main,
        [*arguments, "--resume", "none"],
        "already holds a run",
        "--resume auto",
        "--overwrite True",
    )
    assert train_resnet.main([*arguments, "--overwrite", "True"]) == 0
    assert "resume: resumes" not in capsys.readouterr().out
    assert digest(output) == digest(whole)
    for resume in ("auto", str(output)):
        refused(
            capsys,
            train_resnet.main,
            [*arguments, "--resume", resume],
            "already holds" if resume == "auto" else "has ended",
        )


def test_another_folder_resumes_from_a_run_or_from_one_of_its_checkpoints(
    small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    half_a_run(small_images, first)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    older, newer = sorted(first.glob("resume/checkpoint-*"))
    for name, resume in (("of a run", first), ("of a state", older), ("of the last", newer)):
        output = tmp_path / name
        capsys.readouterr()
        assert train_resnet.main([*SMALL, *paths(small_images, output), "--resume", str(resume)]) == 0
        assert f"after batch {position(older if resume == older else newer)}" in capsys.readouterr().out
        assert digest(output) == digest(whole)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    # in its own folder from the older state: the newer one goes
    assert train_resnet.main([*SMALL, *paths(small_images, first), "--resume", str(older)]) == 0
    assert digest(first) == digest(whole)


def test_the_same_command_resumes_when_it_resumed_from_another_folder_and_was_stopped_again(
    small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, output = tmp_path / "first", tmp_path / "second"
    half_a_run(small_images, first)
    monkeypatch.chdir(tmp_path)
    arguments = [*SMALL, *paths(small_images, Path("second")), "--resume", "first", "--checkpoint_every_n_steps", "1"]
    reached = max(position(path) for path in first.glob("resume/checkpoint-*"))
    assert stopped(arguments, signal.SIGINT, at_step(output, reached + 1)) == 130
    assert max(position(path) for path in output.glob("resume/checkpoint-*")) > reached
    capsys.readouterr()
    assert train_resnet.main(arguments) == 0
    assert (
        f"after batch {reached}\n" not in capsys.readouterr().out
    )  # with its own state, not with that of the first run again
    assert digest(output) == digest(whole)


DIES_COPYING = """
import os
import signal
import sys

from src import train_resnet

left = int(sys.argv[1])


def die(event, values):
    global left
    if event != "shutil.copyfile":
        return
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(die)
sys.exit(train_resnet.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("n_copied", [1, pytest.param(5, marks=pytest.mark.slow), -1])
def test_a_run_that_is_killed_while_it_copies_another_one_copies_it_again(
    n_copied: int, small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, output = tmp_path / "first", tmp_path / "second"
    half_a_run(small_images, first)
    n_files = sum(path.is_file() for path in first.rglob("*"))
    arguments = [*SMALL, *paths(small_images, output), "--resume", str(first)]
    code = [sys.executable, "-c", DIES_COPYING, str(n_copied % n_files)]
    died = subprocess.run([*code, *arguments], cwd=ROOT, env=ENVIRONMENT, check=False, timeout=PATIENCE)
    assert died.returncode == -signal.SIGKILL
    refused(capsys, train_resnet.main, [*arguments[:-1], str(output)], "holds no unfinished run")
    assert train_resnet.main(arguments) == 0
    assert "resume: resumes in epoch 1" in capsys.readouterr().out
    assert digest(output) == digest(whole)


def test_a_new_run_in_a_folder_with_part_of_another_one_says_that_it_begins_at_the_beginning(
    small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    half_a_run(small_images, output)
    (output / COPYING).touch()
    capsys.readouterr()
    assert train_resnet.main([*SMALL, *paths(small_images, output)]) == 0
    printed = capsys.readouterr().out
    assert "part of a run that was being copied" in printed
    assert "resume: resumes" not in printed
    assert digest(output) == digest(whole)


def test_where_there_is_nothing_to_resume_from(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, *paths(small_images, tmp_path / "run")]
    refused(
        capsys,
        train_resnet.main,
        [*arguments, "--resume", str(tmp_path / "missing")],
        "resume",
        "does not exist",
        "Expected auto",
    )
    (tmp_path / "empty").mkdir()
    refused(capsys, train_resnet.main, [*arguments, "--resume", str(tmp_path / "empty")], "holds no unfinished run")


def test_a_run_that_stopped_before_anything_was_kept_begins_at_the_beginning(
    small_images: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = [*SMALL, *paths(small_images, output)]
    assert stopped(arguments, signal.SIGINT, (output / "resume" / "run.json").exists) == 130
    for path in output.glob("resume/groups/*"):
        path.unlink()
    assert train_resnet.main(arguments) == 0
    assert digest(output) == digest(whole)


# --- what differs ---


def test_settings_that_differ_are_named_and_need_to_be_allowed(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    half_a_run(small_images, output)
    states = sorted(path.name for path in output.glob("resume/checkpoint-*"))
    capsys.readouterr()
    changed = [*SMALL, *paths(small_images, output), "--epochs", "3", "--learning_rate", "5e-4", "--momentum", "0.5"]
    refused(
        capsys,
        train_resnet.main,
        changed,
        "epochs: 2 then, 3 now",
        "learning_rate: 0.001 then, 0.0005 now",
        "--resume_with_changes True",
    )
    other_network = [
        *SMALL,
        *paths(small_images, output),
        "--model.compression_parameters.k",
        "128",
        "--seed",
        "3",
        "--epochs",
        "3",
    ]
    for told in ("False", "True"):
        text = refused(
            capsys,
            train_resnet.main,
            [*other_network, "--resume_with_changes", told],
            "model.compression_parameters.k: 256 then, 128 now",
            "seed: 0 then, 3 now",
            "--overwrite True",
        )
        assert "resume_with_changes" not in text
    assert sorted(path.name for path in output.glob("resume/checkpoint-*")) == states
    assert train_resnet.main([*changed, "--resume_with_changes", "True"]) == 0
    results = json.loads((output / "results.json").read_text())
    assert set(results["history"]) == {"0", "1", "2", "3"}
    assert (output / "trained_models" / "3.pth").exists()


def test_other_images_or_other_starting_weights_are_noticed(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, images = tmp_path / "run", shutil.copytree(small_images, tmp_path / "images")
    weights = tmp_path / "dense.pth"
    torch.manual_seed(5)
    torch.save(ARCHITECTURES["resnet18"].build(3).state_dict(), weights)
    half_a_run(images, output, "--model.weights", str(weights))
    capsys.readouterr()
    arguments = [*SMALL, *paths(images, output), "--model.weights", str(weights)]
    shutil.copy(images / "train" / "class0000" / "0.png", images / "train" / "class0000" / "new.png")
    refused(capsys, train_resnet.main, arguments, "(training and validation images)", "--resume_with_changes True")
    (images / "train" / "class0000" / "new.png").unlink()
    other = tmp_path / "other.pth"
    torch.save(ARCHITECTURES["resnet18"].build(3).state_dict(), other)
    refused(
        capsys, train_resnet.main, [*arguments, "--model.weights", str(other)], "(starting weights)", "--overwrite True"
    )
    same = shutil.copy(weights, tmp_path / "same.pth")  # another name for the same weights is no difference
    assert train_resnet.main([*arguments, "--model.weights", str(same)]) == 0


def test_accepted_changes_hold_when_the_run_stops_again_before_the_next_checkpoint(
    small_images: Path, tmp_path: Path
) -> None:
    """The checkpoints from before the change stay what they are: their schedule and batch size are not taken for the new
    ones."""
    rates, outputs = [], [tmp_path / "once", tmp_path / "twice"]
    half_a_run(small_images, outputs[0])
    shutil.copytree(outputs[0], outputs[1])
    for output in outputs:
        changes = [
            "--epochs",
            "3",
            "--learning_rate",
            "5e-4",
            "--dataloader.batch_size",
            "2",
            "--resume_with_changes",
            "True",
        ]
        arguments = [*SMALL, *paths(small_images, output), *changes, "--checkpoint_every_n_steps", "0"]
        if output == outputs[1]:
            begun = (output / "resume" / "run.json").read_text()
            for path in output.glob("resume/checkpoint-*"):  # stops at once, after the run has been described anew
                path.with_suffix(".aside").write_bytes(path.read_bytes())
            assert (
                stopped(
                    arguments,
                    signal.SIGINT,
                    lambda run=output / "resume" / "run.json", before=begun: run.read_text() != before,
                )
                == 130
            )
            for path in output.glob("resume/checkpoint-*.safetensors"):
                path.unlink()
            for path in output.glob("resume/checkpoint-*.aside"):
                path.rename(path.with_suffix(".safetensors"))
        assert train_resnet.main(arguments) == 0
        rates.append({step: value for step, value in scalars(output)["Train/learning_rate"].items() if step > 12})
    assert rates[0] == rates[1]
    assert digest(outputs[0])["3.pth"] == digest(outputs[1])["3.pth"]


def test_another_batch_size_resumes_at_the_same_images(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    half_a_run(small_images, output)
    batch = max(position(path) for path in output.glob("resume/checkpoint-*"))
    capsys.readouterr()
    arguments = [*SMALL, *paths(small_images, output), "--dataloader.batch_size", "2", "--resume_with_changes", "True"]
    assert train_resnet.main(arguments) == 0
    assert f"batch {2 * batch} with the new batch size" in capsys.readouterr().out


# --- what is damaged ---


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    half_a_run(small_images, output)
    older, newer = sorted(output.glob("resume/checkpoint-*"))
    newer.write_bytes(newer.read_bytes()[: newer.stat().st_size // 2])
    capsys.readouterr()
    copy = shutil.copytree(output, tmp_path / "copy")
    arguments = [*SMALL, *paths(small_images, output)]
    assert train_resnet.main(arguments) == 0
    out = capsys.readouterr().out
    assert f"warning: {newer} cannot be read" in out
    assert "The checkpoint before it is used" in out
    assert digest(output) == digest(whole)
    for state in copy.glob("resume/checkpoint-*"):
        state.write_bytes(b"x" * 100)
    refused(
        capsys,
        train_resnet.main,
        [*SMALL, *paths(small_images, copy)],
        "cannot be read",
        "no other checkpoint",
        "--overwrite True",
    )
    assert older.name in {path.name for path in copy.glob("resume/checkpoint-*")}


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A place for a state, and what stands in a good one."""
    keeper = StopsAt(1, 3)
    with pytest.raises(Stops):
        train(keeper, None, "adam", SCHEDULES["cosine"])
    state = keeper.states[-1]
    path = tmp_path_factory.mktemp("state") / "checkpoint-000001.safetensors"
    StoredCheckpoint(state, RunFingerprint({"dataloader.batch_size": 4}, {PROCESSES: 1}), {"a.png": "cut off"}).write(
        path
    )
    assert isinstance(StoredCheckpoint.read(path), StoredCheckpoint)
    return path, path.read_bytes()


@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(0, 255))
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_checkpoint_with_a_byte_changed_or_cut_off_is_never_taken_for_one(
    checkpoint_file: tuple[Path, bytes], place: float, change: int
) -> None:
    path, whole = checkpoint_file
    at = int(place * len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :] if change else whole[:at])
    assert isinstance(StoredCheckpoint.read(path), CheckpointError)


def tolerant(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@pytest.mark.parametrize(
    "values",
    ["", "[]", "{}", '{"position": {}}', '{"position": {"epoch": -1}}', '{"position": {"epoch": "x"}}', "[" * 9999],
)
def test_a_whole_file_that_is_no_checkpoint(values: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000001.safetensors"
    good = {
        "values": '{"position": {}}',
        "fingerprint": '{"settings": {"dataloader.batch_size": 4}, "inputs": {"(processes)": 1}}',
        "unreadable": "{}",
    }
    for name in good:
        for texts in ({**good, name: values}, {other: text for other, text in good.items() if other != name}):
            write_container(path, {"x": torch.zeros(1)}, {"format": "1", **texts})
            whole = texts == good or (name == "unreadable" and name in texts and isinstance(tolerant(values), dict))
            assert isinstance(StoredCheckpoint.read(path), StoredCheckpoint if whole else CheckpointError), (
                name,
                texts,
            )


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("{", ["run.json is damaged", "--overwrite True"]),
        ("[]", ["is damaged"]),
        ('{"format": 1}', ["is damaged"]),
        ('{"format": 3, "versions": ["9.9", "9"]}', ["later version", "9.9"]),
        ('{"format": 1, "versions": ["0.0", "9"]}', ["earlier version", "0.0", "--overwrite True"]),
        ('{"format": 2, "versions": [], "started": "x", "fingerprint": {}}', ["is damaged"]),
    ],
)
def test_a_damaged_description_of_the_run(
    contents: str, words: list[str], small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "run.json").write_text(contents)
    refused(capsys, train_resnet.main, [*SMALL, *paths(small_images, tmp_path)], "resume", *words)


# --- what happens to disks, processes, files and clocks ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes small disks of their own."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("free", [100, *(pytest.param(one, marks=pytest.mark.slow) for one in (1_500, 2_600)), 3_800])
def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(
    free: int, small_images: Path, whole: Path, disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Filled while models, states, or the log are written, to so many kB: less than a file of every kind in turn. When
    there is room again, the run resumes."""
    place = disk("size=40m")
    output = place / "run"
    half_a_run(small_images, output)
    hog = place / "hog"
    stat = os.statvfs(place)
    hog.write_bytes(b"\0" * max(0, stat.f_bavail * stat.f_frsize - free * 1000))
    capsys.readouterr()
    arguments = [*SMALL, *paths(small_images, output), "--checkpoint_every_n_steps", "1"]
    error = refused(capsys, train_resnet.main, arguments, "cannot write", status=1)
    assert "no space left" in error.lower()
    assert not list(output.rglob("*.part"))
    for state in output.glob("resume/checkpoint-*"):
        read_container(state)
    hog.unlink()
    assert train_resnet.main(arguments) == 0
    assert digest(output) == digest(whole)


def test_a_full_disk_under_the_log_is_one_error(
    small_images: Path, tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    """Only TensorBoard's folder is on the full disk; its own thread meets the error."""
    place = disk("size=64k")
    output = tmp_path / "run"
    output.mkdir()
    # a run in the folder would be replaced: the log's folder is swapped for the full disk as soon as it is there
    code = f"""
import shutil, sys
from pathlib import Path
from src import train_resnet
from src.run import recorder
place = Path({str(place)!r})
class Moved(recorder.SummaryWriter):
    def __init__(self, folder, **more):
        super().__init__(str(place / "log"), **more)
recorder.SummaryWriter = Moved
(place / "hog").write_bytes(b"x" * 60_000)
sys.exit(train_resnet.main({[*SMALL, *paths(small_images, output)]!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot write" in done.stderr
    assert "No space left on device" in done.stderr


def test_a_folder_that_can_only_be_read(
    small_images: Path, disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = disk("size=1m")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for output in (place, place / "run"):
        refused(
            capsys,
            train_resnet.main,
            [*SMALL, *paths(small_images, output)],
            "output_path",
            "cannot be written",
            "Read-only",
        )


def test_a_run_on_a_disk_that_becomes_read_only_resumes_elsewhere(
    small_images: Path, whole: Path, tmp_path: Path, disk: Callable[[str], Path]
) -> None:
    place = disk("size=40m")
    half_a_run(small_images, place / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    output = tmp_path / "elsewhere"
    assert train_resnet.main([*SMALL, *paths(small_images, output), "--resume", str(place / "run")]) == 0
    assert digest(output) == digest(whole)


def test_a_killed_loader_process_ends_the_run_with_its_state_kept(
    small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = [*SMALL, *paths(small_images, output), *ONE_LOADER, "1"]
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("child processes are found through /proc, which this system does not have")
    before = set(children.read_text().split())

    def kill() -> None:
        loaders = set(children.read_text().split()) - before
        assert len(loaders) == 2  # of the validation and of the training
        for number in loaders:
            os.kill(int(number), signal.SIGKILL)

    with happening(at_step(output, 1), kill):
        refused(capsys, train_resnet.main, arguments, "a process that loads images died", "num_workers", status=1)
    assert max(position(path) for path in output.glob("resume/checkpoint-*")) >= 0
    assert train_resnet.main(arguments) == 0
    assert digest(output) == digest(whole)


def test_an_image_that_becomes_unreadable_in_an_epoch_ends_the_run_and_it_resumes_when_it_is_back(
    small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, images = tmp_path / "run", shutil.copytree(small_images, tmp_path / "images")
    arguments = [*SMALL, *paths(images, output), "--checkpoint_every_n_steps", "0"]
    spoilt = images / "train" / "class0002" / "3.png"
    good = spoilt.read_bytes()
    with happening(at_step(output, 0), lambda: spoilt.write_bytes(good[: len(good) // 2])):
        refused(capsys, train_resnet.main, arguments, str(spoilt), status=2)
    spoilt.write_bytes(good)
    reached = max(position(path) for path in output.glob("resume/checkpoint-*"))
    assert train_resnet.main(arguments) == 0
    assert "resume: resumes" in capsys.readouterr().out
    assert 0 <= reached < STEPS
    assert digest(output) == digest(whole)


def test_images_that_were_left_out_before_the_stop_are_counted_too(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(small_images, tmp_path / "images")
    spoilt = images / "train" / "class0001" / "5.png"
    spoilt.write_bytes(spoilt.read_bytes()[:-200])
    outputs = [tmp_path / name for name in ("whole", "stopped")]
    flags = [*SMALL, "--dataloader.skip_unreadable", "True", "--dataloader.verify_images", "none", "--epochs", "1"]
    assert train_resnet.main([*flags, *paths(images, outputs[0])]) == 0
    arguments = [*flags, *paths(images, outputs[1]), "--checkpoint_every_n_steps", "1"]
    assert stopped(arguments, signal.SIGINT, at_step(outputs[1], STEPS - 1)) == 130
    assert train_resnet.main(arguments) == 0
    assert capsys.readouterr().out.count("skipped unreadable image") == 2  # once in each run
    assert digest(outputs[1]) == digest(outputs[0])
    assert json.loads((outputs[1] / "results.json").read_text())["skipped images"] == 1


def test_a_gradient_that_is_no_number_is_named_and_the_last_good_state_stays(
    small_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = [
        *SMALL,
        *paths(small_images, output),
        "--learning_rate",
        "1e30",
        "--optimizer",
        "sgd",
        "--checkpoint_every_n_steps",
        "1",
    ]
    error = refused(
        capsys,
        train_resnet.main,
        arguments,
        "no longer a number at step",
        "The gradient of layer",
        "went first, at step",
        status=1,
    )
    states = sorted(output.glob("resume/checkpoint-*"))
    assert states
    for state in states:
        assert all(
            tensor.isfinite().all() for tensor in read_container(state)[0].values() if tensor.is_floating_point()
        )
    assert "The last checkpoint and model are kept" in error
    calm = [*arguments[:-6], "--learning_rate", "1e-3", "--optimizer", "sgd", "--resume_with_changes", "True"]
    assert train_resnet.main([*calm, "--resume", str(states[0])]) == 0


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
/* the wall clock, a day earlier as soon as a file is there; the monotonic clock goes on */
static long back(void) { struct stat found; return stat(getenv("CLOCK_FILE"), &found) == 0 ? 86400 : 0; }
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, at);
    if (id == CLOCK_REALTIME && !status) at->tv_sec -= back();
    return status;
}
time_t time(time_t *at) { struct timespec now; clock_gettime(CLOCK_REALTIME, &now); if (at) *at = now.tv_sec; return now.tv_sec; }
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec; at->tv_usec = now.tv_nsec / 1000; return 0;
}
"""


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(small_images: Path, whole: Path, tmp_path: Path) -> None:
    """A day back in the middle of the training, which is then stopped; it resumes from the newest checkpoint, not from the
    newest date."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("setting a clock back for one process takes a C compiler")
    (tmp_path / "clock.c").write_text(CLOCK)
    library, mark, output = tmp_path / "clock.so", tmp_path / "back", tmp_path / "run"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "clock.c"), "-ldl"], check=True)
    arguments = [*SMALL, *paths(small_images, output), "--checkpoint_every_n_steps", "1"]
    env = {**ENVIRONMENT, "LD_PRELOAD": str(library), "CLOCK_FILE": str(mark)}
    running = started(arguments, env)
    wait_for(at_step(output, 1), running)
    mark.touch()
    wait_for(at_step(output, 4), running)
    running.kill()
    running.communicate()
    newest = max(output.glob("resume/checkpoint-*"), key=position)
    os.utime(newest, (time.time() - 86400, time.time() - 86400))
    done = subprocess.run(
        [sys.executable, "-m", "src.train_resnet", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert digest(output) == digest(whole)
    results = json.loads((output / "results.json").read_text())
    assert 0 < results["seconds per step"] < 100


def test_two_runs_in_the_same_folder(
    small_images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = [*SMALL, *paths(small_images, output)]
    # the first one has loader processes, which must not hold the folder when it is gone
    first = [*arguments, "--dataloader.num_workers", "1", "--epochs", "500"]
    running = started(first)
    try:
        wait_for(lambda: len(list(output.glob("trained_models/*.pth"))) >= 3, running)
        for flags in ([], ["--overwrite", "True"], ["--resume", "none"]):
            error = refused(
                capsys, train_resnet.main, [*arguments, *flags], "is in use", "a run is going on in it", "output_path"
            )
            assert f"process {running.pid}" in error
        other = [*SMALL, *paths(small_images, tmp_path / "other"), "--resume", str(output)]
        refused(capsys, train_resnet.main, other, "is in use", "resume: wait until it has ended")
        assert running.poll() is None
    finally:
        running.kill()
        running.wait()
    assert train_resnet.main([*arguments, "--overwrite", "True"]) == 0  # at once: the lock ended with the process
    assert digest(output) == digest(whole)


# --- Mask R-CNN ---


@pytest.mark.slow
def test_mask_r_cnn_resumes_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = small_coco(tmp_path / "coco")
    outputs = [tmp_path / name for name in ("whole", "stopped")]
    flags = [*QUICK_DETECTION, "--epochs", "1", "--dataloader.batch_size", "1", "--checkpoint_every_n_steps", "1"]
    assert train_maskrcnn.main([*flags, *coco_paths(coco, outputs[0])]) == 0
    arguments = [*flags, *coco_paths(coco, outputs[1])]
    assert stopped(arguments, signal.SIGTERM, at_step(outputs[1], 1), train_maskrcnn.main) == 143
    capsys.readouterr()
    assert train_maskrcnn.main(arguments) == 0
    assert "resume: resumes in epoch 1, after batch" in capsys.readouterr().out
    assert digest(outputs[1]) == digest(outputs[0])
