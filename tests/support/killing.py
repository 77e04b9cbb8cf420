"""Kills a training run with SIGKILL again and again and lets it resume: python -m tests.support.killing FOLDER IMAGES
SEED KILLS.

Prints JSON: the moment of each kill and what was going on, and a digest of everything that runs left, of the run that
was never killed and of those that were. The runs are forked from this process, which has loaded torch but computed nothing, so that a life
costs no import. A run kills itself, in the middle of writing a file or soon after it: so every moment comes, on a slow
machine as on a fast one.
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
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import train_resnet
from src.recipes import train_classification  # noqa: F401 (so that forked runs have it loaded)
from tests.support import small_runs

SMALL = [
    *small_runs.training(batch=8, workers=1, sls=300, k_means=20),
    *("--epochs", "2", "--checkpoint_every_n_steps", "2", "--dataloader.crop_padding", "2"),
    *("--lr_scheduler.type", "cosine", "--log_every_n_steps", "1"),
]
MOST_CHAINS = 100
A_CHAIN = 10
"""Most kills of one run."""
LATEST = 2.0
"""Seconds after a file has its name that a run is killed at the latest."""


@dataclass(frozen=True)
class Moment:
    """When a run gives `file` its name: between writing it and renaming it, with what it does next (`later` is 0), or
    `later` seconds after that."""

    file: str
    later: float | None = None

    @property
    def kind(self) -> str:
        """What is being written then: a group, a layer, a checkpoint, a model, or what stands beside them."""
        folder, name = os.path.split(self.file)
        if folder == "resume":
            return "checkpoint" if name.startswith("checkpoint-") else "state"
        return {"resume/groups": "group", "resume/layers": "layer", "trained_models": "model"}.get(folder, "report")


def forked(log: Path, run: Callable[[], int]) -> int:
    """Run in a process and process group of its own, forked from this one, which ends with the status that it returns;
    what it says goes into `log`. Returns its number."""
    number = os.fork()
    if number:
        return number
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    status = 99
    with contextlib.suppress(BaseException):
        status = run()
    os._exit(status)


def watch(run: Path, moment: Moment | None, names: Path | None = None, number: int = signal.SIGKILL) -> None:
    """From now on this process and its group get a signal at a moment of the run in the folder `run`, and the names of
    all files that it writes are added to `names`."""
    given = False

    def watched(event: str, values: Sequence[Any]) -> None:
        nonlocal given
        if given:
            given = False  # sending a signal is an event too
            os.killpg(0, number)
        if event != "os.rename":
            return
        file = os.path.relpath(os.fspath(values[1]), run)
        if names is not None and not os.path.basename(file).startswith(".") and not file.startswith(".."):
            with open(names, "a") as written:
                written.write(f"{file}\n")
        if moment is not None and file == moment.file:
            if moment.later is None:
                os.killpg(0, number)
            elif moment.later == 0:
                given = True
            else:
                threading.Timer(moment.later, os.killpg, (0, number)).start()

    sys.addaudithook(watched)


def start(arguments: list[str], run: Path, moment: Moment | None = None, names: Path | None = None) -> int:
    """A run in a process of its own, which is killed at a moment, or adds the names of all files that it writes to
    `names`; returns its number."""

    def watched() -> int:
        watch(run, moment, names)
        return train_resnet.main([*arguments, "--output_path", str(run)])

    return forked(run.parent / f"{run.name}.log", watched)


def ended(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def needed(files: Sequence[str], draw: random.Random) -> list[Moment]:
    """One of each kind, in the middle of writing a file; just after a layer and a checkpoint."""
    of_kind = by_kind(files)
    return [
        *(Moment(draw.choice(found)) for found in of_kind.values()),
        *(Moment(draw.choice(of_kind[kind]), 0) for kind in ("layer", "checkpoint")),
    ]


def any_moment(files: Sequence[str], draw: random.Random) -> Moment:
    """Of all kinds, most of them some time after a file."""
    later = draw.choice([None, draw.uniform(0, 0.06), draw.uniform(0, LATEST)])
    return Moment(draw.choice(draw.choice(list(by_kind(files).values()))), later)


def by_kind(files: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(Moment(file).kind, []).append(file)
    return found


def found(folder: Path, pattern: str) -> list[Path]:
    """Like glob; nothing where a run that ends removes the folder meanwhile."""
    try:
        return list(folder.glob(pattern))
    except FileNotFoundError:
        return []


def count(folder: Path, pattern: str) -> int:
    return len(found(folder, pattern))


def newest(run: Path) -> int:
    return max((int(path.stem.rpartition("-")[2]) for path in found(run, "resume/checkpoint-*.safetensors")), default=0)


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
    arguments = [*SMALL, "--dataloader.imagenet_path", images]
    whole, names = folder / "whole", folder / "names"
    assert ended(start(arguments, whole, names=names)) == 0, (folder / "whole.log").read_text()
    report: dict = {"whole": digest(whole), "killed": [], "kills": []}
    order = {file: number for number, file in enumerate(dict.fromkeys(names.read_text().splitlines()))}
    draw, files = random.Random(seed), sorted(order)
    missing = needed(files, draw)
    for chain in range(MOST_CHAINS):
        left = min(kills - len(report["kills"]), A_CHAIN)
        if not left:
            break
        run, status = folder / f"run{chain}", 0
        moments = [*missing, *(any_moment(files, draw) for _ in range(left - len(missing)))][:left]
        # groups and layers end in another order in every run: one that was ready too early has its moment in a later run
        for moment in sorted(moments, key=lambda moment: (order[moment.file], moment.later or 0)):
            status = ended(start(arguments, run, moment))
            if status != -signal.SIGKILL:
                break
            report["kills"].append([moment.kind, moment.later, phase(run)])
            if moment in missing:
                missing.remove(moment)
            if (run / "results.json").exists():  # the last thing that it had to write
                status = 0
                break
        if status == -signal.SIGKILL:
            status = ended(start(arguments, run))
        assert status == 0, f"status {status}:\n{(folder / f'run{chain}.log').read_text(errors='replace')}"
        report["killed"].append(digest(run))
        shutil.rmtree(run)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
