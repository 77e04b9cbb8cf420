"""Robs runs of torchrun of a process again and again: python -m tests.support.losing FOLDER IMAGES SEED KILLS.

Prints JSON like `tests.support.killing`: what was going on at each kill, which rank was killed, and a digest of
everything that runs left, of the run that lost nothing and of those that did.

The agents are torchrun's own, and fork their processes from this one, which has loaded torch but computed nothing: a
start costs no import.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from src import train_resnet
from src.recipes import train_classification  # noqa: F401 (so that forked processes have it loaded)
from tests.support import small_runs
from tests.support.killing import count, digest, forked, newest, phase
from tests.support.patience import PATIENCE

SMALL = [
    *small_runs.training(batch=4, workers=1, sls=100, k_means=5),
    *("--epochs", "2", "--checkpoint_every_n_steps", "1", "--dataloader.crop_padding", "2"),
    *("--lr_scheduler.type", "cosine", "--log_every_n_steps", "1"),
]
PROCESSES = 2
MOST_RUNS = 100
GROUPS, LAYERS = 12, 20
"""Of ResNet-18: what is finished before the first checkpoint."""


def process(folder: str, arguments: Sequence[str]) -> int:
    """What the agent starts: a command, after leaving its number."""
    (Path(folder) / f"{os.environ['RANK']}-{os.getpid()}").touch()
    status = train_resnet.main(list(arguments))
    if status:
        sys.exit(status)
    return status


def start(arguments: Sequence[str], processes: Path, log: Path, restarts: int) -> int:
    """An agent in a process of its own; returns its number."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=PROCESSES, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=restarts, start_method="fork",
    )  # fmt: skip

    def launched() -> int:
        elastic_launch(config, process)(str(processes), arguments)
        return 0

    return forked(log, launched)


class LostRun:
    """A run that loses processes."""

    def __init__(self, folder: Path, name: str, arguments: Sequence[str], restarts: int) -> None:
        self.path, self.log, self._processes = folder / name, folder / f"{name}.log", folder / f"{name}.processes"
        self._processes.mkdir()
        self._gone: set[str] = set()
        self._status: int | None = None
        self._agent = start([*arguments, "--output_path", str(self.path)], self._processes, self.log, restarts)

    @property
    def progress(self) -> int:
        """How far it has come: finished groups, finished layers, checkpoints, as files tell."""
        if (self.path / "results.json").exists():
            return sys.maxsize
        finished = count(self.path, "resume/groups/*.json") + count(self.path, "resume/layers/*.safetensors")
        return finished + newest(self.path)

    def _new(self) -> dict[int, int]:
        """Numbers by rank of the processes that started since the last kill."""
        names = [path.name for path in self._processes.iterdir() if path.name not in self._gone]
        return {int(rank): int(number) for rank, _, number in (name.partition("-") for name in names)}

    def _until(self, when: Callable[[], bool]) -> bool:
        """Wait; whether it came true before the run ended."""
        deadline = time.monotonic() + PATIENCE
        while self._status is None and not when():
            done, status = os.waitpid(self._agent, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if done else None
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")
            time.sleep(0.001)
        return self._status is None

    def lose_one(self, moment: int, draw: random.Random) -> tuple[int, str] | None:
        """Kill a process drawn at random when the progress is at `moment`, and the processes have won something since
        they were started: so every run ends, however slow the machine is. Returns its rank, and what was going on."""
        if not self._until(lambda: len(self._new()) == PROCESSES):
            return None
        born, ranks = self.progress, self._new()
        if not self._until(lambda: self.progress >= moment and self.progress > born):
            return None
        time.sleep(draw.choice([0, draw.uniform(0, 0.06)]))
        rank, was = draw.choice(sorted(ranks)), "ended" if (self.path / "results.json").exists() else phase(self.path)
        self._gone |= {f"{one}-{number}" for one, number in ranks.items()}
        try:
            os.kill(ranks[rank], signal.SIGKILL)
        except ProcessLookupError:
            return None
        return rank, was

    def furthest(self) -> int:
        """The progress that files showed before the run ended."""
        seen = [0]

        def ended() -> bool:
            seen.append(self.progress)
            return seen[-1] == sys.maxsize

        self._until(ended)
        return max(found for found in seen if found < sys.maxsize)

    def wait(self) -> int:
        self._until(lambda: False)
        assert self._status is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._agent, signal.SIGKILL)
        return self._status


def moments(draw: random.Random, most: int) -> list[int]:
    """Spread over a run that comes as far as `most`: of search, of clustering, of training, and its end."""
    searching = draw.sample(range(1, GROUPS), 3)
    clustering = draw.sample(range(GROUPS + 1, GROUPS + LAYERS), 6)
    training = draw.sample(range(GROUPS + LAYERS + 1, most), min(10, most - GROUPS - LAYERS - 1))
    return [*sorted(searching + clustering + training), sys.maxsize]


def main() -> None:
    folder, images, seed, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    arguments, draw = [*SMALL, "--dataloader.imagenet_path", images], random.Random(seed)
    whole = LostRun(folder, "whole", arguments, 0)
    most = whole.furthest()
    assert whole.wait() == 0, whole.log.read_text()
    report: dict = {"whole": digest(whole.path), "lost": [], "kills": []}
    for number in range(MOST_RUNS):
        if len(report["kills"]) >= kills:
            break
        run = LostRun(folder, f"run{number}", arguments, 2 * kills)
        every = moments(draw, most)
        for moment in sorted(draw.sample(every, min(len(every), kills))):
            killed = run.lose_one(moment, draw)
            if killed is not None:
                report["kills"].append(killed)
        status, text = run.wait(), run.log.read_text(errors="replace")
        assert status == 0, text
        assert ": they go on with the run in" in text
        report["lost"].append(digest(run.path))
        shutil.rmtree(run.path)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
