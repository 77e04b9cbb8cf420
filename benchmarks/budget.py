"""A size instead of settings: what is predicted, what is lost, and how long it takes to choose.

Claims: at the sizes of the published settings the chosen plan loses less of the weights' energy than these settings;
what is lost is within 3 % of what is predicted, where the clustering comes to its end.

    python -m benchmarks.budget [--arch resnet18] [--weights dense.pth]

Without `--weights` the network has random weights, for which it pays little to treat layers differently.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from src.compression.quantize.budget.prediction import Prediction
from src.compression.quantize.budget.tradeoff import measure
from src.compression.quantize.budget.wanted import Budget
from src.compression.quantize.compress import compress
from src.compression.quantize.subvector_size import BlockRule
from src.model_files.size import model_size

from .compress import network
from .cost import published_spec
from .report import machine, print_machine, print_table, write_json


def run(model: nn.Module, found: Prediction, blocks: str, how: str, choosing_s: float) -> dict[str, Any]:
    """Quantize a copy of `model` as a plan says, and compare."""
    started = time.perf_counter()
    coded, layers = compress(copy.deepcopy(model), found.plan, show_progress=False)
    quantizing_s = time.perf_counter() - started
    size = model_size(coded)
    assert size.bits == found.bits
    return {
        "blocks": blocks,
        "plan": how,
        "megabytes": size.megabytes,
        "predicted": found.share,
        "lost": sum(layer.distortion for layer in layers) / sum(layer.power for layer in layers),
        "choosing_s": choosing_s,
        "quantizing_s": quantizing_s,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both block sizes, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18", help="network")
    parser.add_argument("--weights", help="state dict of the dense network")
    parser.add_argument("--iterations", type=int, default=1000, help="SR-C iterations at most")
    parser.add_argument("--tolerance", type=float, default=0.005, help="k_means_tolerance")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/budget.json"), help="results")
    options = parser.parse_args(argv)
    found = machine()
    print_machine(found)
    _, model = network(options.arch, options.weights)
    spec = replace(
        published_spec(options.arch), k_means_n_iters=options.iterations, k_means_tolerance=options.tolerance
    )
    results = []
    for large in (True, False):
        blocks = "large" if large else "small"
        started = time.perf_counter()
        tradeoff = measure(
            model, replace(spec, rule=BlockRule(4, 4, large)), model_size(model).bits, show_progress=False
        )
        settings = tradeoff.of_settings()
        chosen = tradeoff.plan_for(Budget(size=-(-settings.bits // 8)))
        seconds = time.perf_counter() - started
        results += [run(model, settings, blocks, "settings", 0.0), run(model, chosen, blocks, "chosen", seconds)]
    print_table(
        f"{options.arch}, {'random weights' if options.weights is None else Path(options.weights).name}",
        ["blocks", "plan", "MB", "predicted", "lost", "choosing s", "quantizing s"],
        [
            [
                one["blocks"], one["plan"], f"{one['megabytes']:.3f}", f"{100 * one['predicted']:.2f} %",
                f"{100 * one['lost']:.2f} %", f"{one['choosing_s']:.1f}", f"{one['quantizing_s']:.1f}",
            ]
            for one in results
        ],
    )  # fmt: skip
    write_json(options.json, {"machine": found, "arch": options.arch, "results": results})


if __name__ == "__main__":
    main()
