"""What it costs that a run can resume after a crash.

Claim: taking and writing the checkpoints that a run resumes from costs less than 2 % of the training time at the default
interval (`checkpoint_every_n_steps`). Measured besides: the watch over gradients that are no numbers, and reading a
state back.

    python -m benchmarks.resume

For each network a training step (batch of 32 images of 224x224, Adam) and the saving of a state (gathering it, flushing
the log, writing, syncing to the disk, removing the oldest) are timed in one process. `share` is the seconds of one
state divided by those of the default number of steps; `least step` is the duration of a step below which the claim
would not hold on this disk. The share of a whole epoch counts the two states around its validation too, for
`--epoch-steps` steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from src.compression.finetune.checkpoint import Checkpoint, Position, Training, restore, take
from src.compression.finetune.gradients import GradientWatch
from src.compression.finetune.optimizers import OptimizerSpec, Schedule, ScheduleSpec, make_optimizer
from src.engines.launch import Launch
from src.engines.single import SingleProcess
from src.run.checkpoints import CheckpointFolder, StoredCheckpoint
from src.run.fingerprint import PROCESSES, RunFingerprint
from src.run.output_folder import OutputFolder
from src.settings import Settings

from .cost import batch, dense_model, quantized_model, training_step
from .report import machine, pick_device, print_machine, print_table, seconds, verdict, write_json

LIMIT = 0.02
EPOCH_STEPS = 10_009
"""Steps of an epoch of ImageNet with 128 images each."""


def measure(
    arch: str, quantized: bool, options: argparse.Namespace, folder: Path, device: torch.device
) -> dict[str, Any]:
    model = (quantized_model(arch) if quantized else dense_model(arch)).to(device)
    images, labels = batch(options.batch, options.size, device)
    step = training_step(model, images, labels)
    step()
    steps = [seconds(step, device) for _ in range(options.repeats)]
    optimizer = make_optimizer(model, OptimizerSpec())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # so that there is a state to keep
    schedule = Schedule(optimizer, ScheduleSpec(), 9, EPOCH_STEPS)
    training = Training(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        position=Position(1, 500, True, 10_509),
    )
    engine = SingleProcess(Launch(), device)
    output = OutputFolder(folder / f"{arch}{'' if quantized else '-dense'}", overwrite=False)
    output.begin()
    output.continue_run()
    kept = CheckpointFolder(output.resume, engine, RunFingerprint.of(Settings(), {PROCESSES: 1}))
    states = [seconds(lambda: kept.keep(take(training, engine)), device) for _ in range(options.repeats + 2)]
    newest = max(output.resume.glob("checkpoint-*"))
    watch = GradientWatch(model)
    watched = [seconds(lambda: bool(watch.check(1)), device) for _ in range(options.repeats)]
    reading = seconds(lambda: restore(_read(newest), training, training.position), device)
    output.close()
    one_step, one_state, every = (
        statistics.median(steps),
        statistics.median(states),
        Settings().checkpoint_every_n_steps,
    )
    whole = EPOCH_STEPS // every + 2
    return {
        "arch": arch,
        "quantized": quantized,
        "state_bytes": newest.stat().st_size,
        "step_s": one_step,
        "state_s": one_state,
        "every": every,
        "share": one_state / (every * one_step),
        "share_of_epoch": whole * one_state / (EPOCH_STEPS * one_step),
        "least_step_s": one_state / (every * LIMIT),
        "watch_s": statistics.median(watched),
        "watch_share": statistics.median(watched) / one_step,
        "read_s": reading,
    }


def _read(path: Path) -> Checkpoint:
    found = StoredCheckpoint.read(path)
    assert isinstance(found, StoredCheckpoint), found
    return found.checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every network in `--archs`, quantized and dense, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resume", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batch", type=int, default=32, help="images per training step")
    parser.add_argument("--size", type=int, default=224, help="pixels of their sides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where states are written; default: a temporary folder")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/resume.json"))
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    about = machine(device)
    print_machine(about)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [
            measure(arch, quantized, options, Path(folder), device)
            for arch in options.archs
            for quantized in (True, False)
        ]
    header = [
        "network",
        "state",
        "step",
        "one state",
        "share",
        "of an epoch",
        "claim",
        "least step",
        "watch",
        "reading",
    ]
    table = [
        [
            f"{row['arch']} {'quantized' if row['quantized'] else 'dense'}",
            f"{row['state_bytes'] / 1e6:.1f} MB",
            f"{row['step_s']:.3f} s",
            f"{1000 * row['state_s']:.0f} ms",
            f"{100 * row['share']:.3f} %",
            f"{100 * row['share_of_epoch']:.3f} %",
            verdict(row["share_of_epoch"], LIMIT),
            f"{1000 * row['least_step_s']:.1f} ms",
            f"{100 * row['watch_share']:.2f} %",
            f"{1000 * row['read_s']:.0f} ms",
        ]
        for row in rows
    ]
    sizes = (
        f"{options.batch} images of {options.size}x{options.size}, a state every {Settings().checkpoint_every_n_steps} "
        "steps"
    )
    print_table(f"checkpoints: {sizes}", header, table)
    write_json(options.json, {"machine": about, "limit": LIMIT, "epoch_steps": EPOCH_STEPS, "results": rows})


if __name__ == "__main__":
    main()
