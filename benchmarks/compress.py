"""Compressing a whole network with published settings, end to end: seconds per stage, what is lost, peak memory.

Claims, on two cores: ResNet-50 with 10,000 swaps per group and 1,000 SR-C iterations takes less than 5 minutes; with
early stopping (`k_means_tolerance`) less than 30 seconds, at a distortion at most 0.5 % above; Mask R-CNN (1,000 swaps)
less than 10 minutes; less than 4 GB of memory.

    python -m benchmarks.compress [--archs resnet50 maskrcnn] [--weights resnet50=dense.pth]

Every run is a process of its own, and everything is run, nothing extrapolated. Without `--weights` the network has
random weights: the times do not depend on their values, the distortion does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src import architectures
from src.architectures.architecture import Architecture
from src.compression.permute.permute import PermutationSpec, SearchSpec, permute
from src.compression.quantize.compress import candidate_distortion, compress
from src.compression.quantize.plan import LayerSpec, QuantizationSpec, make_plan
from src.model_files.pth import read_tensors

from .cost import published_spec
from .report import largest_resident_set, machine, print_machine, print_table, write_json

SWAPS = {"maskrcnn": 1000}
"""Per group, in the published settings; 10,000 elsewhere."""

RUNS = [("published", 0.0), ("published", 0.005), ("best", 0.005)]
"""Search, tolerance of the clustering."""


def spec_of(arch: str) -> QuantizationSpec:
    """The published settings."""
    if arch != "maskrcnn":
        return published_spec(arch)
    dense = (
        "backbone.body.conv1",
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    )
    layers = {"backbone.body.layer1.0.conv1": LayerSpec(k=128), "roi_heads.box_head.fc6": LayerSpec(subvector_size=16)}
    return QuantizationSpec(ignored_modules=dense, layer_specs=layers)


def network(arch: str, weights: str | None) -> tuple[Architecture, nn.Module]:
    """The dense network: random, or from a state dict."""
    torch.manual_seed(0)
    architecture = architectures.get(arch, "detection" if arch == "maskrcnn" else "classification")
    if weights is None:
        return architecture, architecture.build(architecture.n_classes)
    state = read_tensors(Path(weights))
    model = architecture.build(architecture.classes_of(state) or architecture.n_classes)
    model.load_state_dict(state)
    return architecture, model


def search_settings(architecture: Architecture, search: str) -> SearchSpec:
    """What the published settings say about the search of this network."""
    specs = {name: PermutationSpec(shape, ("STOCHASTIC",)) for name, shape in architecture.reshapes.items()}
    return SearchSpec(search, SWAPS.get(architecture.name, 10_000), permutation_specs=specs)


def run(arch: str, weights: str | None, how: str, iterations: int, tolerance: float) -> dict[str, Any]:
    """One compression in this process."""
    architecture, model = network(arch, weights)
    groups = architecture.groups(model)
    plan = make_plan(model, replace(spec_of(arch), k_means_n_iters=iterations, k_means_tolerance=tolerance))
    warm_up = [group for group in groups if plan.sizes.get(group.children[0])][-1:]
    # compiles, or loads what was compiled
    published = replace(search_settings(architecture, "published"), sls_iterations=10)
    permute(model, warm_up, plan.sizes, published, show_progress=False)
    started, busy = time.perf_counter(), time.process_time()
    spec = search_settings(architecture, how)
    permute(model, groups, plan.sizes, spec, measure=candidate_distortion(plan, 0), show_progress=False)
    searched = time.perf_counter()
    _, layers = compress(model, plan, show_progress=False)
    done = time.perf_counter()
    peak = largest_resident_set() / 2**20
    return {
        "network": arch,
        "weights": "random" if weights is None else Path(weights).name,
        "search": how,
        "tolerance": tolerance,
        "iterations": iterations,
        "iterations_made": sum(layer.iterations * layer.n_subvectors for layer in layers)
        / sum(layer.n_subvectors for layer in layers),
        "search_s": searched - started,
        "clustering_s": done - searched,
        "total_s": done - started,
        "processor_s": time.process_time() - busy,
        "distortion": sum(layer.distortion for layer in layers),
        "energy_lost": sum(layer.distortion for layer in layers) / sum(layer.power for layer in layers),
        "peak_mb": peak,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every network, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=1000, help="SR-C iterations at most; the published number")
    parser.add_argument("--archs", nargs="+", default=["resnet50", "maskrcnn"], help="networks")
    parser.add_argument("--weights", nargs="*", default=[], metavar="ARCH=PATH", help="state dicts of dense networks")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/compress.json"), help="where the results are written"
    )
    options = parser.parse_args(argv)
    weights = dict(item.split("=", 1) for item in options.weights)
    found = machine()
    print_machine(found)
    results = []
    for arch in options.archs:
        for how, tolerance in RUNS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # the peak of memory is that of the process
                results.append(pool.apply(run, (arch, weights.get(arch), how, options.iterations, tolerance)))
            print(f"{arch}, {how}, tolerance {tolerance:g}: {results[-1]['total_s']:.1f} s", flush=True)
    first = {r["network"]: r["distortion"] for r in reversed(results)}
    print_table(
        f"small blocks, at most {options.iterations:,} SR-C iterations; s: wall clock; processor s: over all cores",
        ["network", "search", "tolerance", "iterations", "search s", "clustering s", "total s", "processor s", "energy lost", "distortion", "peak MB"],
        [
            [r["network"], r["search"], f"{r['tolerance']:g}", f"{r['iterations_made']:.0f}", f"{r['search_s']:.1f}", f"{r['clustering_s']:.1f}",
             f"{r['total_s']:.1f}", f"{r['processor_s']:.0f}", f"{100 * r['energy_lost']:.3f} %",
             f"{100 * (r['distortion'] / first[r['network']] - 1):+.2f} %", f"{r['peak_mb']:,.0f}"]
            for r in results
        ],
    )  # fmt: skip
    write_json(options.json, {"machine": found, "results": results})


if __name__ == "__main__":
    main()
