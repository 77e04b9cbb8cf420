"""The permutation search: candidates per second, whole networks, and what the longer search gains.

Claims: (a) a candidate swap is scored orders of magnitude faster by updating the covariance than by the plain formulation,
which permutes the whole weight and computes the covariance anew; both keep the same swaps. (b) The published search of a whole
network (10,000 swaps per group, set-up included) is at least 1,000 times faster for ResNet-50 with small blocks and 200 times for
ResNet-18 with large blocks. (c) The default search, which scores all children of a group, leaves less distortion after
clustering than the published one.

    python -m benchmarks.search [--weights resnet18.pth]

The plain formulation runs in float64 in (a), as ours does, so that decisions can be compared, with float32 beside it; in (b) in float32, its
fastest form, extrapolated from `--plain-tries` swaps per group. (c) needs a trained dense ResNet-18, `--weights`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src import architectures
from src.compression.files import read_tensors
from src.compression.permute.group_objective import GroupObjective
from src.compression.permute.objective import child_objective
from src.compression.permute.permute import permute
from src.compression.quantize.compress import compress
from src.compression.quantize.plan import CodingSpec, make_plan
from src.compression.subvectors import BlockRule, Layer, to_subvectors

from .report import machine, print_machine, print_table, write_json

THRESHOLD = 1e-12
"""A swap is kept if the log-determinant falls by more; as in the search itself."""


@dataclass(frozen=True)
class Case:
    """A layer whose input channels are permuted."""

    name: str
    shape: tuple[int, ...]
    d: int

    def layer(self) -> Layer:
        """The layer with a random weight whose input channels differ in scale."""
        c_out, c_in, *kernel = self.shape
        generator = torch.Generator().manual_seed(0)
        scale = torch.randn(c_in, generator=generator).mul(0.5).exp()
        layer = nn.Conv2d(c_in, c_out, tuple(kernel), bias=False) if kernel else nn.Linear(c_in, c_out, bias=False)
        weight = torch.randn(self.shape, generator=generator) * scale.view(1, -1, *(1 for _ in kernel))
        layer.weight.data.copy_(0.02 * weight)
        return layer


CASES = [
    Case("resnet50 layer4.1.conv1", (512, 2048, 1, 1), 4),
    Case("resnet50 layer3.1.conv1", (256, 1024, 1, 1), 4),
    Case("resnet50 fc", (1000, 2048), 4),
    Case("resnet18 layer4.1.conv2", (512, 512, 3, 3), 18),
]
SMALL_CASES = [Case("1x1 convolution", (32, 64, 1, 1), 4), Case("3x3 convolution", (32, 32, 3, 3), 18)]


def plain_search(weight: Tensor, d: int, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """The plain formulation: for every swap the covariance of all subvectors of the permuted weight. Returns p (C_in,)."""

    def score(p: Tensor) -> float:
        return float(torch.linalg.slogdet(torch.cov(to_subvectors(weight[:, p], d).T, correction=0)).logabsdet)

    permutation = torch.arange(weight.shape[1])
    value = score(permutation)
    for i, j in pairs:
        candidate = permutation.clone()
        candidate[i], candidate[j] = permutation[j], permutation[i]
        new = score(candidate)
        if new < value - THRESHOLD:
            permutation, value = candidate, new
    return permutation


def measure(case: Case, tries: int, plain_tries: int) -> dict[str, Any]:
    """(a) Candidates per second of both, and whether they end at the same permutation after `plain_tries` swaps."""
    layer = case.layer()
    rng = np.random.default_rng(1)
    first = rng.integers(layer.weight.shape[1], size=tries)
    second = (first + rng.integers(1, layer.weight.shape[1], size=tries)) % layer.weight.shape[1]
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))

    started = time.perf_counter()
    objective = GroupObjective([child_objective(layer, case.d)], [1.0])
    ready = time.perf_counter()
    objective.run(first[:plain_tries], second[:plain_tries])
    same_point = objective.permutation.copy()
    objective.run(first[plain_tries:], second[plain_tries:])
    done = time.perf_counter()

    rates, permutations = {}, {}
    for dtype in (torch.float64, torch.float32):
        weight = layer.weight.detach().to(dtype)
        began = time.perf_counter()
        permutations[dtype] = plain_search(weight, case.d, pairs[:plain_tries])
        rates[dtype] = plain_tries / (time.perf_counter() - began)
    ours = tries / (done - ready)
    return {
        "layer": case.name,
        "shape": list(case.shape),
        "d": case.d,
        "setup_s": ready - started,
        "ours_per_s": ours,
        "plain_float64_per_s": rates[torch.float64],
        "plain_float32_per_s": rates[torch.float32],
        "ratio_float64": ours / rates[torch.float64],
        "ratio_float32": ours / rates[torch.float32],
        "tries": tries,
        "ours_s": done - started,
        "plain_s_extrapolated": tries / rates[torch.float64],
        "compared_tries": plain_tries,
        "kept_any": bool((same_point != np.arange(same_point.size)).any()),
        "same_permutation": bool(np.array_equal(same_point, permutations[torch.float64].numpy())),
    }


def coding(large: bool, iterations: int = 0) -> CodingSpec:
    """The published block rule with everything but the stem coded."""
    return CodingSpec(rule=BlockRule(4, 4, large), ignored_modules=("conv1",), k_means_type="kmeans", k_means_n_iters=iterations)


def whole_network(arch: str, large: bool, tries: int, plain_tries: int) -> dict[str, Any]:
    """(b) Seconds of the published search over all groups, against the plain formulation extrapolated group by group."""
    torch.manual_seed(0)
    architecture = architectures.get(arch, "classification")
    model = architecture.build(1000)
    groups, plan = architecture.groups(model), make_plan(model, coding(large))
    permute(model, groups[-1:], plan.sizes, how="published", n_tries=10, show_progress=False)  # compiles, or loads what was compiled
    started = time.perf_counter()
    results = permute(model, groups, plan.sizes, how="published", n_tries=tries, show_progress=False)
    ours = time.perf_counter() - started
    plain = 0.0
    rng = np.random.default_rng(1)
    deciding = [result.children[0] for result in results if result.children]
    for name in deciding:
        weight = model.get_submodule(name).weight.detach()
        first = rng.integers(weight.shape[1], size=plain_tries)
        second = (first + 1 + rng.integers(weight.shape[1] - 1, size=plain_tries)) % weight.shape[1]
        began = time.perf_counter()
        plain_search(weight, plan.sizes[name], list(zip(first.tolist(), second.tolist(), strict=True)))
        plain += (time.perf_counter() - began) * tries / plain_tries
    return {
        "network": f"{arch} {'large' if large else 'small'} blocks",
        "groups": len(deciding),
        "tries": tries,
        "ours_s": ours,
        "plain_s_extrapolated": plain,
        "ratio": plain / ours,
    }


def distortion_left(weights: Path, large: bool, iterations: int) -> dict[str, Any]:
    """(c) Share of the weights' energy lost after clustering: channels as trained, published search, default search."""
    state = read_tensors(weights)
    architecture = architectures.get("resnet18", "classification")
    lost: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for how in ("none", "published", "best"):
        model = architecture.build(architecture.classes_of(state) or 1000)
        model.load_state_dict(state)
        plan = make_plan(model, coding(large, iterations))
        began = time.perf_counter()
        if how != "none":
            permute(model, architecture.groups(model), plan.sizes, how=how, show_progress=False)
        seconds[how] = time.perf_counter() - began
        _, layers = compress(model, plan, show_progress=False)
        lost[how] = sum(layer.distortion for layer in layers) / sum(layer.power for layer in layers)
    return {"blocks": "large" if large else "small", "iterations": iterations, "energy_lost": lost, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every layer, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=10_000, help="swaps of our search; the published number")
    parser.add_argument("--plain-tries", type=int, default=300, help="swaps of the plain search, the first of the same pairs")
    parser.add_argument("--weights", type=Path, help="state dict of a trained dense ResNet-18, for (c)")
    parser.add_argument("--small", action="store_true", help="only check that it runs")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/search.json"), help="where the results are written")
    options = parser.parse_args(argv)
    tries, plain_tries = (200, 100) if options.small else (options.tries, min(options.plain_tries, options.tries))
    found = machine()
    print_machine(found)
    results = [measure(case, tries, plain_tries) for case in (SMALL_CASES if options.small else CASES)]
    rows = [
        [r["layer"], "x".join(map(str, r["shape"])), str(r["d"]), f"{r['ours_per_s']:,.0f}", f"{r['plain_float64_per_s']:,.1f}",
         f"{r['plain_float32_per_s']:,.1f}", f"{r['ratio_float64']:,.0f}x", f"{r['ratio_float32']:,.0f}x", f"{r['setup_s']:.2f}",
         f"{r['ours_s']:.1f}", f"{r['plain_s_extrapolated']:,.0f}", "yes" if r["same_permutation"] else "NO"]
        for r in results
    ]  # fmt: skip
    print_table(
        f"(a) candidates per second; s: seconds for {tries:,} swaps, set-up included (plain: extrapolated from {plain_tries} swaps, float64)",
        [
            "layer",
            "weight",
            "d",
            "ours",
            "plain f64",
            "plain f32",
            "ratio f64",
            "ratio f32",
            "set-up s",
            "ours s",
            "plain s",
            "same result",
        ],
        rows,
    )
    networks = [("resnet18", False)] if options.small else [("resnet50", False), ("resnet18", True)]
    whole = [whole_network(arch, large, tries, min(plain_tries, 50)) for arch, large in networks]
    print_table(
        f"(b) published search of a whole network, {tries:,} swaps per group, set-up included (plain: extrapolated, float32)",
        ["network", "groups", "ours s", "plain s", "ratio"],
        [[w["network"], str(w["groups"]), f"{w['ours_s']:.2f}", f"{w['plain_s_extrapolated']:,.0f}", f"{w['ratio']:,.0f}x"] for w in whole],
    )
    left = [distortion_left(options.weights, large, 5 if options.small else 30) for large in (False, True)] if options.weights else []
    if left:
        print_table(
            f"(c) share of the weights' energy lost after k-means, {options.weights.name}; s: seconds of the search",
            ["blocks", "as trained", "published", "default", "published s", "default s"],
            [
                [c["blocks"], *(f"{100 * c['energy_lost'][how]:.3f} %" for how in ("none", "published", "best")),
                 f"{c['seconds']['published']:.1f}", f"{c['seconds']['best']:.1f}"]
                for c in left
            ],
        )  # fmt: skip
    write_json(options.json, {"machine": found, "results": results, "whole_networks": whole, "distortion": left})
    if not all(r["same_permutation"] for r in results):
        raise SystemExit("the two searches kept different swaps")


if __name__ == "__main__":
    main()
