"""All measurements with their default sizes: `python -m benchmarks` (`--small`: minutes become seconds, figures mean
nothing)."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import (
    budget,
    calibrate,
    clustering,
    coco_memory,
    compress,
    cost,
    decode,
    distillation,
    finetune,
    loader,
    maskrcnn_cost,
    networks,
    packed,
    processes,
    resume,
    search,
)

MEASUREMENTS = {
    "cost": (
        cost.main,
        ["--batch", "1", "--size", "64", "--repeats", "1", "--archs", "resnet18", "--plain-iterations", "1"],
    ),
    "decode": (
        decode.main,
        ["--networks", "resnet18", "--ways", "kept", "each_forward", "--size", "64", "--passes", "1", "--repeats", "1"],
    ),
    "distillation": (
        distillation.main,
        ["--batch", "1", "--size", "64", "--repeats", "1", "--archs", "resnet18"],
    ),
    "loader": (loader.main, ["--count", "4", "--repeats", "1"]),
    "finetune": (finetune.main, ["--small", "--ways", "best", "--epochs", "1"]),
    "search": (search.main, ["--small"]),
    "clustering": (clustering.main, ["--small"]),
    "coco_memory": (coco_memory.main, ["--images", "3", "--per-image", "4"]),
    "processes": (
        processes.main,
        ["--batch", "2", "--size", "32", "--steps", "1", "--rounds", "1", "--archs", "resnet18"],
    ),
    "packed": (packed.main, ["--repeats", "1", "--networks", "ResNet-18 small"]),
    "calibrate": (calibrate.main, ["--count", "64", "--iterations", "1"]),
    "compress": (compress.main, ["--iterations", "1", "--archs", "resnet18"]),
    "budget": (budget.main, ["--iterations", "1"]),
    "resume": (resume.main, ["--batch", "2", "--size", "64", "--repeats", "1", "--archs", "resnet18"]),
    "networks": (networks.main, ["--only", "torchvision:squeezenet1_1"]),
    "maskrcnn_cost": (maskrcnn_cost.main, ["--batch", "1", "--size", "64", "--repeats", "1"]),
}
"""Name -> (entry, arguments of a smoke run)."""


def main() -> None:
    """Run the measurements one after the other; each prints tables and writes its JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--small", action="store_true", help="only check that everything runs")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    options = parser.parse_args()
    for name, (entry, small) in MEASUREMENTS.items():
        entry([*(small if options.small else []), "--json", str(options.results / f"{name}.json")])


if __name__ == "__main__":
    main()
