"""How fast candidate permutations are scored.

Claim: updating the covariance by the few subvectors that a swap touches scores candidates orders of magnitude faster than
the plain formulation, which permutes the whole weight and computes the covariance anew for every swap; both keep the
same swaps.

    python -m benchmarks.permutation

Both get the same weights and the same random pairs of channels, in turn. The plain formulation runs in float64, as ours
does, so that their decisions can be compared; its speed in float32 is given beside it.
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

from src.compression.permute.objective import child_objective
from src.compression.subvectors import Layer, to_subvectors

from .report import machine, print_machine, print_table, write_json

THRESHOLD = 1e-12
"""A swap is kept if the log-determinant falls by more; ChildObjective.try_swap's own."""


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
    """Candidates per second of both, and whether they end at the same permutation after `plain_tries` swaps."""
    layer = case.layer()
    rng = np.random.default_rng(1)
    first = rng.integers(layer.weight.shape[1], size=tries)
    second = (first + rng.integers(1, layer.weight.shape[1], size=tries)) % layer.weight.shape[1]
    pairs = list(zip(first.tolist(), second.tolist(), strict=True))

    started = time.perf_counter()
    objective = child_objective(layer, case.d)
    ready = time.perf_counter()
    for i, j in pairs[:plain_tries]:
        objective.try_swap(i, j, THRESHOLD)
    same_point = objective.permutation.copy()
    for i, j in pairs[plain_tries:]:
        objective.try_swap(i, j, THRESHOLD)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every layer, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.permutation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=10_000, help="swaps of our search; the published number")
    parser.add_argument("--plain-tries", type=int, default=300, help="swaps of the plain search, the first of the same pairs")
    parser.add_argument("--small", action="store_true", help="only check that it runs")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/permutation.json"), help="where the results are written")
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
        f"candidates per second; s: seconds for {tries:,} swaps, set-up included (plain: extrapolated from {plain_tries} swaps, float64)",
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
    write_json(options.json, {"machine": found, "results": results})
    if not all(r["same_permutation"] for r in results):
        raise SystemExit("the two searches kept different swaps")


if __name__ == "__main__":
    main()
