"""Compressing a whole network with published settings, end to end: seconds per stage and peak memory.

Reported, without a claim: permutation search (both kinds) and clustering of ResNet-18 and ResNet-50 with small blocks. Random weights: the time of
the swaps and of the clustering does not depend on their values, that of the default search a little.

    python -m benchmarks.compress [--iterations 100] [--archs resnet18 resnet50]

Clustering is timed at `--iterations` and extrapolated to the published number, 1,000, which costs ten times as much.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from src import architectures
from src.compression.permute.permute import permute
from src.compression.quantize.compress import compress
from src.compression.quantize.plan import make_plan

from .cost import published_spec
from .report import machine, print_machine, print_table, write_json

PUBLISHED_ITERATIONS = 1000


def measure(arch: str, iterations: int) -> dict[str, Any]:
    """Seconds of each stage for one network."""
    torch.manual_seed(0)
    architecture = architectures.get(arch, "classification")
    model = architecture.build(1000)
    groups = architecture.groups(model)
    spec = published_spec(arch)
    plan = make_plan(model, type(spec)(**{**vars(spec), "k_means_n_iters": iterations}))
    permute(model, groups[-1:], plan.sizes, how="published", n_tries=10, show_progress=False)  # compiles, or loads what was compiled
    seconds = {}
    for how in ("published", "best"):
        started = time.perf_counter()
        permute(model, groups, plan.sizes, how=how, show_progress=False)
        seconds[how] = time.perf_counter() - started
    started = time.perf_counter()
    compress(model, plan, show_progress=False)
    clustering = time.perf_counter() - started
    return {
        "network": arch,
        "search_published_s": seconds["published"],
        "search_best_s": seconds["best"],
        "iterations": iterations,
        "clustering_s": clustering,
        "clustering_s_extrapolated": clustering * PUBLISHED_ITERATIONS / iterations,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every network, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=100, help="SR-C iterations that are timed")
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"], help="networks")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/compress.json"), help="where the results are written")
    options = parser.parse_args(argv)
    found = machine()
    print_machine(found)
    results = [measure(arch, options.iterations) for arch in options.archs]
    print_table(
        f"small blocks, SR-C: seconds; 1,000 iterations are extrapolated from {options.iterations}",
        ["network", "search published", "search best", f"{options.iterations} iterations", "1,000 iterations", "peak MB so far"],
        [
            [r["network"], f"{r['search_published_s']:.1f}", f"{r['search_best_s']:.1f}", f"{r['clustering_s']:.1f}",
             f"{r['clustering_s_extrapolated']:.0f}", f"{r['peak_mb']:,.0f}"]
            for r in results
        ],
    )  # fmt: skip
    write_json(options.json, {"machine": found, "results": results})


if __name__ == "__main__":
    main()
