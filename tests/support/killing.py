"""Kills a training run with SIGKILL again and again and lets it resume: python -m tests.support.killing FOLDER IMAGES
SEED LIVES.

Prints JSON: what was going on at each kill, and a digest of everything that runs left, of the run that was never killed
and of those that were. The runs are forked from this process, which has loaded torch but computed nothing, so that a
life costs no import.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import train_resnet
from src.recipes import train_classification  # noqa: F401 (so that forked runs have it loaded)
from tests.support import small_runs

SMALL = [
    *small_runs.training(batch=8, workers=1, sls=300, k_means=20),
    *("--epochs", "2", "--checkpoint_every_n_steps", "2", "--dataloader.crop_padding", "2"),
    *("--lr_scheduler.type", "cosine", "--log_every_n_steps", "1"),
]
MOST_LIVES = 200


def start(arguments: list[str], log: Path) -> int:
    """A run in a process of its own; returns its number."""
    number = os.fork()
    if number:
        return number
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    status = 99
    with contextlib.suppress(BaseException):
        status = train_resnet.main(arguments)
    os._exit(status)


def found(folder: Path, pattern: str) -> list[Path]:
    """Like glob; nothing where a run that ends removes the folder meanwhile."""
    try:
        return list(folder.glob(pattern))
    except FileNotFoundError:
        return []


def count(folder: Path, pattern: str) -> int:
    return len(found(folder, pattern))


def moments(draw: random.Random) -> Iterator[tuple[str, Callable[[Path], bool]]]:
    """What to wait for before a kill, phase by phase, and then over again."""
    while True:
        groups, layers, state = draw.randint(1, 11), draw.randint(1, 19), draw.randint(1, 4)
        yield "searching", lambda run, n=groups: count(run, "resume/groups/*.json") >= n
        yield "clustering", lambda run, n=layers: count(run, "resume/layers/*.safetensors") >= n
        yield "writing a layer", lambda run: count(run, "resume/layers/.*.part") > 0
        yield "writing a checkpoint", lambda run: count(run, "resume/.*.part") > 0
        yield "training", lambda run, n=state: newest(run) >= n
        yield "validating", lambda run: (run / "trained_models" / "1.pth").exists()
        yield "writing a model", lambda run: count(run, "trained_models/.*.part") > 0
        yield "anywhere", lambda _run: False


def newest(run: Path) -> int:
    return max((int(path.stem.rpartition("-")[2]) for path in found(run, "resume/checkpoint-*.safetensors")), default=0)


def one_life(arguments: list[str], run: Path, awaited: Callable[[Path], bool], draw: random.Random) -> int | None:
    """Run until the moment (and up to 60 ms more), then kill with all children; returns the status of a run that ended
    before.

    No life is cut short before it has won something, however slow the machine is: so every chain of lives ends.
    """
    born = newest(run)
    before = {path.name for path in found(run, "resume/*/*")}
    number = start(arguments, run.parent / f"{run.name}.log")
    patience, won_at = draw.uniform(0.5, 3.0), None
    while won_at is None or time.monotonic() < won_at + patience:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        news = newest(run) > born or {path.name for path in found(run, "resume/*/*")} - before
        if news and won_at is None:
            won_at = time.monotonic()
        if news and awaited(run):
            if draw.random() < 0.5:
                time.sleep(draw.uniform(0, 0.06))
            break
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    if status == -signal.SIGKILL and not (run / "results.json").exists():
        return None
    return 0 if status == -signal.SIGKILL else status  # killed after the last thing that it had to write


def phase(run: Path) -> str:
    """What a killed run was doing, from what it left."""
    if count(run, "resume/.*.part"):
        return "writing a checkpoint"
    if count(run, "trained_models/.*.part"):
        return "writing a model"
    if count(run, "resume/*/.*.part"):
        return "writing a group or layer"
    if newest(run) == 0:
        return (
            "clustering"
            if count(run, "resume/layers/*")
            else "searching"
            if count(run, "resume/groups/*")
            else "starting"
        )
    return "training or validating"


def digest(run: Path) -> dict[str, str]:
    """Of every model, of the table of the compression, and of the metrics."""
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((run / "trained_models").iterdir())
    }
    digests["compression.json"] = hashlib.sha256((run / "compression.json").read_bytes()).hexdigest()
    results = json.loads((run / "results.json").read_text())
    for name in ("start", "end", "seconds per step"):
        results.pop(name)
    digests["scalars"] = hashlib.sha256(json.dumps(scalars(run), sort_keys=True).encode()).hexdigest()
    return {
        **digests,
        "results": json.dumps(results, sort_keys=True),
        "folder": " ".join(sorted({path.name for path in run.iterdir()} - {".lock", "resume"})),
    }


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows, by tag and step; speed left out."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "Train/images_per_second"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def main() -> None:
    folder, images, seed, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    common = [*SMALL, "--dataloader.imagenet_path", images]
    whole = folder / "whole"
    status = os.waitstatus_to_exitcode(
        os.waitpid(start([*common, "--output_path", str(whole)], folder / "whole.log"), 0)[1]
    )
    assert status == 0, (folder / "whole.log").read_text()
    report: dict = {"whole": digest(whole), "killed": [], "phases": []}
    draw = random.Random(seed)
    wanted = moments(draw)
    for chain in range(MOST_LIVES):
        if len(report["phases"]) >= kills:
            break
        run = folder / f"run{chain}"
        arguments = [*common, "--output_path", str(run)]
        status, lives = None, 0
        while status is None and lives < MOST_LIVES:
            lives += 1
            awaited, reached = next(wanted)
            status = one_life(arguments, run, reached, draw)
            if status is None:
                report["phases"].append([awaited, phase(run)])
        log = (folder / f"run{chain}.log").read_text(errors="replace")
        assert status == 0, f"status {status} after {lives} lives:\n{log}"
        report["killed"].append(digest(run))
        shutil.rmtree(run)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
