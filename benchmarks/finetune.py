"""What fine-tuning keeps, by the settings of it, on two sets of photos; each row is a run of `train_resnet`.

Claims, for a ResNet-18 trained on CIFAR-10, 10,000 photos to train on and 2,000 others to score: after two epochs
`--recipe best` has lost at most 45 % of what `--recipe published` has lost of the dense network's accuracy, at the same
size, with large blocks and with small ones; and it reaches what `published` has after four epochs in at most a third of
its CPU seconds, all of the run counted (start, permutations, calibration, clustering, training, validation).

    python -m benchmarks.finetune cifar10 --weights dense.pth --photos cifar10 --blocks large small \\
        --ways published best --epochs 2 --seeds 0 1 2 --runs runs
    python -m benchmarks.finetune digits --runs runs

`--photos` of CIFAR-10 has train/ and val/ with one folder per class. The digits are scikit-learn's, of which 20 of each
class are trained on; their dense network is trained first, on all. Runs that `--runs` holds are not done again. All rows but `published` and `best` begin at one calibrated network of the same seed,
whose CPU seconds they count too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from src import architectures
from src.api import load
from src.model_files.pth import read_tensors
from src.tasks.demo_data.digits import write_digits

from .photos import SIDE, Subject, answers, photos_of, scores
from .report import machine, print_machine, print_table, verdict, write_json

ROOT = Path(__file__).parent.parent
KL = ("--distillation.weight", "1")
MIX = ("--distillation.weight", "0.5", "--distillation.labels", "0.5")
WAYS: Mapping[str, Sequence[str]] = {
    "published": ("--recipe", "published"),
    "best": (),
    "published, KL": ("--recipe", "published", *KL),
    "calibrated": ("--distillation.weight", "0"),
    "labels": ("--distillation.weight", "0"),
    "KL, T = 1": (*KL, "--distillation.temperature", "1"),
    "KL, T = 2": (*KL, "--distillation.temperature", "2"),
    "KL, T = 4": (*KL, "--distillation.temperature", "4"),
    "KL, T = 8": (*KL, "--distillation.temperature", "8"),
    "KL and labels": MIX,
    "KL and some labels": (*KL, "--distillation.labels", "0.1"),
    "KL and stages": (*KL, "--distillation.features", "1"),
    "KL and stages, 5": (*KL, "--distillation.features", "5"),
    "KL, rate 2e-4": (*KL, "--learning_rate", "2e-4"),
    "KL, rate 5e-4": (*KL, "--learning_rate", "5e-4"),
    "KL, T = 4, rate 5e-4": (*KL, "--distillation.temperature", "4", "--learning_rate", "5e-4"),
    "KL and stages, T = 4, rate 5e-4": (
        *KL,
        "--distillation.temperature",
        "4",
        "--learning_rate",
        "5e-4",
        "--distillation.features",
        "1",
    ),
    "KL and labels, T = 4, rate 5e-4": (
        *KL,
        "--distillation.temperature",
        "4",
        "--learning_rate",
        "5e-4",
        "--distillation.labels",
        "1",
    ),
    "KL, T = 4, rate 2e-4": (*KL, "--distillation.temperature", "4", "--learning_rate", "2e-4"),
    "labels, rate 5e-4": ("--distillation.weight", "0", "--learning_rate", "5e-4"),
    "KL, rate 2e-3": (*KL, "--learning_rate", "2e-3"),
    "KL and labels, codebooks' rate 0.5": (
        *MIX,
        "--codebook_learning_rate",
        "0.5",
    ),
    "KL, codebooks' rate 0.5": (*KL, "--codebook_learning_rate", "0.5"),
    "KL, T = 4, codebooks' rate 0.5": (*KL, "--distillation.temperature", "4", "--codebook_learning_rate", "0.5"),
    "KL, T = 4, codebooks' rate 0.2": (*KL, "--distillation.temperature", "4", "--codebook_learning_rate", "0.2"),
    "KL, average": (*KL, "--ema", "0.99"),
    "KL, warm-up": (*KL, "--lr_scheduler.warmup", "20"),
}
"""Flags of `train_resnet` by the name of a row; `best` is what it does without any."""
WHOLE = ("published", "best", "published, KL", "calibrated")
"""Ways that are one run; all others go on from what `calibrated` has after no epoch, which is done once."""
LOSS_LIMIT = 0.45
"""Of what `published` loses in as many epochs."""
SECONDS_LIMIT = 1 / 3
"""Of what `published` takes for four epochs."""
DIGITS_PER_CLASS = 20
SMALL_DENSE = ("--epochs", "1")
SMALL = ("--calibration.count", "32", "--model.compression_parameters.k_means_n_iters", "1")


@dataclass(frozen=True)
class Case:
    """One run: blocks `large` or `small`, a way of `WAYS`, epochs, seed."""

    blocks: str
    way: str
    epochs: int
    seed: int

    @property
    def folder(self) -> str:
        """A name for its files."""
        way = "".join(letter if letter.isalnum() else "_" for letter in self.way)
        return f"{self.blocks}-{way}-{self.epochs}-{self.seed}"


@dataclass(frozen=True)
class Set:
    """Photos and a dense network trained on their kind.

    Attributes:
        name: of both.
        photos: folder with train/ and val/.
        weights: file of the dense network.
        flags: of `train_resnet`, for all runs.
        subject: the dense network, and the photos of val/.
    """

    name: str
    photos: Path
    weights: Path
    flags: Sequence[str]
    subject: Subject


def cifar10(weights: Path, photos: Path) -> Set:
    """Ten classes of CIFAR-10."""
    return Set("ResNet-18, CIFAR-10", photos, weights, (), _subject("ResNet-18, CIFAR-10", weights, photos))


def digits(folder: Path, small: bool = False) -> Set:
    """The dense network of the demonstration, trained with all digits; a folder with 20 of each class to train on.

    Args:
        folder: for both.
        small: train for one epoch, and calibrate and cluster next to nothing: only to see that everything runs.
    """
    everything, few, dense = folder / "digits", folder / "few_digits", folder / "dense"
    if not (dense / "results.json").exists():
        config = str(ROOT / "config/digits/train_dense_resnet18.yaml")
        train(folder / "dense.log", "--config", config, *_paths(everything, dense), *(SMALL_DENSE if small else ()))
    write_digits(everything)
    if not few.exists():
        shutil.copytree(everything / "val", few / "val")
        for kind in sorted((everything / "train").iterdir()):
            (few / "train" / kind.name).mkdir(parents=True)
            for path in sorted(kind.iterdir())[:DIGITS_PER_CLASS]:
                shutil.copy(path, few / "train" / kind.name)
    flags = ("--dataloader.batch_size", "32", "--dataloader.horizontal_flip", "False", *(SMALL if small else ()))
    weights, name = dense / "trained_models" / "best.pth", f"ResNet-18, {DIGITS_PER_CLASS} digits per class"
    return Set(name, few, weights, flags, _subject(name, weights, few))


def _subject(name: str, weights: Path, photos: Path) -> Subject:
    model = architectures.get("resnet18", "classification").build(10).eval()
    model.load_state_dict(read_tensors(weights))
    scored, labels = photos_of(photos / "val", SIDE)
    return Subject(name, model, (), scored.split(64), labels, {})


def _paths(photos: Path, output: Path) -> tuple[str, ...]:
    return "--dataloader.imagenet_path", str(photos), "--output_path", str(output)


def train(log: Path, *flags: str) -> float:
    """Run `train_resnet` in a process of its own, with one thread; its CPU seconds.

    Raises:
        RuntimeError: it failed; what it printed is in `log`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "src.train_resnet", "--dataloader.num_workers", "0", *flags]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: see {log}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(of: Set, case: Case, runs: Path) -> dict[str, Any]:
    """What one run ended with; kept in `runs`, from where it is read where it is there already."""
    output = runs / of.subject.name.replace(", ", "-").replace(" ", "_") / case.folder
    kept = output.with_suffix(".json")
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    shutil.rmtree(output, ignore_errors=True)
    config = str(ROOT / f"config/cifar10/train_resnet18_{case.blocks}.yaml")
    flags = ["--epochs", str(case.epochs), "--seed", str(case.seed)]
    if case.way in WHOLE:
        before, started = 0.0, of.weights
    else:
        start = Case(case.blocks, "calibrated", 0, case.seed)
        before, started = run(of, start, runs)["CPU seconds"], output.with_name(f"{start.folder}.pth")
        flags += ["--distillation.teacher", str(of.weights)] if "KL" in case.way else []
    flags += ["--model.weights", str(started)]
    paths = _paths(of.photos, output)
    seconds = train(output.with_suffix(".log"), "--config", config, *paths, *flags, *of.flags, *WAYS[case.way])
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    last = output / "trained_models" / f"{case.epochs}.pth"
    model = load(last, _dense_copy(of.subject.model)).eval()
    found = {
        "start": results["before training"],
        "epochs": {epoch: metrics["accuracy"] for epoch, metrics in results["history"].items()},
        "ratio": results["ratio"],
        "CPU seconds": before + seconds,
        **scores(answers(model, of.subject), answers(of.subject.model, of.subject), of.subject.labels),
    }
    kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not case.epochs:
        shutil.move(last, output.with_suffix(".pth"))
    shutil.rmtree(output)
    return found


def _dense_copy(model: nn.Module) -> nn.Module:
    copy = architectures.get("resnet18", "classification").build(10)
    copy.load_state_dict(model.state_dict())
    return copy


def rows_of(found: Mapping[Case, Mapping[str, Any]], dense: float) -> Iterator[dict[str, Any]]:
    """One row of the table for all seeds of a case."""
    for blocks, way, epochs in dict.fromkeys((case.blocks, case.way, case.epochs) for case in found):
        of = [one for case, one in found.items() if (case.blocks, case.way, case.epochs) == (blocks, way, epochs)]

        def mean(name: str, of: Sequence[Mapping[str, Any]] = of) -> float:
            return statistics.fmean(one[name] for one in of)

        yield {
            "blocks": blocks,
            "way": way,
            "epochs": epochs,
            "seeds": len(of),
            "ratio": mean("ratio"),
            "start": mean("start"),
            "top-1": mean("top-1"),
            "from": min(one["top-1"] for one in of),
            "to": max(one["top-1"] for one in of),
            "lost": dense - mean("top-1"),
            "same answer": mean("same answer"),
            "KL": mean("KL"),
            "CPU seconds": mean("CPU seconds"),
        }


def claims(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the rows that are there: what `best` loses as a share of what `published` loses in as many epochs, and its
    CPU seconds as a share of those of four epochs of `published`, whose accuracy it has at least."""
    by = {(row["blocks"], row["way"], row["epochs"]): row for row in rows}
    found = {}
    for (blocks, way, epochs), row in by.items():
        published, four = by.get((blocks, "published", epochs)), by.get((blocks, "published", 4))
        if way == "best" and published is not None and published["lost"] > 0:
            found[f"{blocks} blocks, {epochs} epochs: lost"] = row["lost"] / published["lost"]
        if way == "best" and four is not None and row["top-1"] >= four["top-1"]:
            name = f"{blocks} blocks: CPU seconds to four epochs' accuracy"
            found[name] = min(row["CPU seconds"] / four["CPU seconds"], found.get(name, float("inf")))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was not yet run; print and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", nargs="?", choices=("cifar10", "digits"), default="digits")
    parser.add_argument("--weights", type=Path, help="state dict of the dense ResNet-18 for CIFAR-10")
    parser.add_argument("--photos", type=Path, help="folder of CIFAR-10's photos")
    parser.add_argument("--blocks", nargs="+", choices=("large", "small"), default=["large"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["published", "best"])
    parser.add_argument("--epochs", nargs="+", type=int, default=[2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, help="folder that keeps what was measured; none: a temporary one")
    parser.add_argument("--small", action="store_true", help="digits: only see that everything runs")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/finetune.json"))
    options = parser.parse_args(arguments)
    about = machine()
    print_machine(about)
    with tempfile.TemporaryDirectory() as temporary:
        runs = (options.runs or Path(temporary)).resolve()
        if options.set == "digits":
            of = digits(runs, options.small)
        else:
            of = cifar10(options.weights.resolve(), options.photos.resolve())
        found: dict[Case, dict[str, Any]] = {}
        for seed in options.seeds:
            for blocks in options.blocks:
                for way in options.ways:
                    for epochs in options.epochs:
                        case = Case(blocks, way, epochs, seed)
                        found[case] = run(of, case, runs)
                        print(case, found[case], flush=True)
    own = answers(of.subject.model, of.subject)
    dense = scores(own, own, of.subject.labels)["top-1"]
    rows = list(rows_of(found, dense))
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    new = {_key(row) for row in rows}
    rows = [row for row in known.get(of.name, {}).get("rows", []) if _key(row) not in new] + rows
    head = list(rows[0])
    print_table(f"{of.name}, dense {dense:.2f}", head, [[_text(row[key]) for key in head] for row in rows])
    held = claims(rows)
    for name, value in held.items():
        print(f"{name}: {value:.2f} of published's, {verdict(value, LOSS_LIMIT if 'lost' in name else SECONDS_LIMIT)}")
    write_json(options.json, {**known, of.name: {"machine": about, "dense": dense, "rows": rows, "claims": held}})


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["blocks"], row["way"], row["epochs"]


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
