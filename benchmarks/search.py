"""The permutation search: candidates per second, whole networks, and what the longer search gains.

Claims: (a) a candidate swap is scored orders of magnitude faster by updating the covariance than by the plain
formulation, which permutes the whole weight and computes the covariance anew; both keep the same swaps. (b) The
published search of a whole network (10,000 swaps per group, set-up included) is at least 1,000 times faster for
ResNet-50 with small blocks, 200 times for ResNet-18 with large blocks, and 500 times for Mask R-CNN with fc6. (c) The
default search, which scores all children of a group, leaves less distortion after clustering than the published one on
every network tried, and takes less than 60 s.

    python -m benchmarks.search [--networks resnet18=dense.pth resnet18=compressed.pth resnet50=dense.pth]

The plain formulation runs in float64 in (a), as ours does, so that decisions can be compared, with float32 beside it;
in (b) in float32, its fastest form, extrapolated from `--plain-tries` swaps per group. (c) needs trained networks,
`--networks`; of a compressed file the dequantized weights are taken, and the channels of every group shuffled, so that
the order in which it was quantized is lost. The curves of the figure (`python -m imgs.search`): one group searched with
more and more swaps.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import timeit
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src import architectures
from src.architectures.architecture import Architecture
from src.compression.permute.binding import bind
from src.compression.permute.group_objective import GroupObjective
from src.compression.permute.groups import random_permutation
from src.compression.permute.objective import child_objective
from src.compression.permute.permute import SearchSpec, permute
from src.compression.permute.search import search, search_best
from src.compression.quantize.compress import candidate_distortion, compress
from src.compression.quantize.plan import make_plan
from src.compression.quantize.subvector_size import BlockRule
from src.compression.quantize.subvectors import Layer, to_subvectors
from src.model_files.pth import is_compressed, read_tensors
from src.recipes import load_compressed

from .compress import network, search_settings, spec_of
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
        layer = (
            nn.Conv2d(c_in, c_out, (kernel[0], kernel[1]), bias=False) if kernel else nn.Linear(c_in, c_out, bias=False)
        )
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
    """The plain formulation: for every swap the covariance of all subvectors of the permuted weight. Returns p
    (C_in,)."""

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

    GroupObjective([child_objective(SMALL_CASES[0].layer(), SMALL_CASES[0].d)], [1.0]).run(
        first[:9] % 64, (first[:9] + 1) % 64
    )  # compiles
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


def plain_group(weight: Tensor, d: int, tries: int, rng: np.random.Generator) -> float:
    """Seconds that the plain formulation takes for `tries` swaps of one child, weight (R, C, ...)."""
    first = rng.integers(weight.shape[1], size=tries)
    second = (first + 1 + rng.integers(weight.shape[1] - 1, size=tries)) % weight.shape[1]
    began = time.perf_counter()
    plain_search(weight, d, list(zip(first.tolist(), second.tolist(), strict=True)))
    return time.perf_counter() - began


def whole_network(arch: str, large: bool, tries: int, plain_tries: int, repeats: int = 3) -> dict[str, Any]:
    """(b) Seconds of the published search over all groups (median), against the plain formulation extrapolated group by
    group."""
    architecture, model = network(arch, None)
    groups = architecture.groups(model)
    plan = make_plan(model, replace(spec_of(arch), rule=BlockRule(4, 4, large)))
    spec = replace(search_settings(architecture, "published"), sls_iterations=tries)
    # compiles, or loads what was compiled
    permute(copy.deepcopy(model), groups, plan.sizes, replace(spec, sls_iterations=10), show_progress=False)
    times = []
    for _ in range(repeats):
        trial = copy.deepcopy(model)
        started = time.perf_counter()
        results = permute(trial, groups, plan.sizes, spec, show_progress=False)
        times.append(time.perf_counter() - started)
    ours = statistics.median(times)
    rng = np.random.default_rng(1)
    deciding = [result.children[0] for result in results if result.children]
    plain, floor = 0.0, 0
    for name in deciding:
        weight = model.get_submodule(name).weight.detach()
        weight = weight.view(architecture.reshapes.get(name, weight.shape))
        plain += plain_group(weight, plan.sizes[name], plain_tries, rng) * tries / plain_tries
        floor += weight.shape[0] * weight[0].numel() ** 2  # operations of half a Gram matrix: it is symmetric
    return {
        "network": f"{arch} {'large' if large else 'small'} blocks",
        "groups": len(deciding),
        "tries": tries,
        "ours_s": ours,
        "plain_s_extrapolated": plain,
        "ratio": plain / ours,
        "whole_gram_operations": floor,
        "gram_s_at_measured_peak": floor / product_rate(),
    }


@cache
def product_rate() -> float:
    """Operations per second of a matrix with its own transpose in float64 (half of the products of two matrices), all
    cores."""
    matrix = np.random.default_rng(0).standard_normal((1024, 4096))
    best = min(timeit.repeat(lambda: matrix.T @ matrix, number=1, repeat=3))
    return float(matrix.shape[0] * matrix.shape[1] ** 2 / best)


def trained(arch: str, path: Path) -> tuple[Architecture, nn.Module]:
    """A dense state dict; or a compressed file decoded, the channels of its groups shuffled."""
    architecture = architectures.get(arch, "classification")
    state = read_tensors(path)
    model = architecture.build(architecture.classes_of(state) or architecture.n_classes)
    if not is_compressed(state):
        model.load_state_dict(state)
        return architecture, model
    quantized = dict(load_compressed(path, architecture, spec_of(arch)).named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            for attribute in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, attribute, None)
                if value is not None:
                    value.copy_(getattr(quantized[name], attribute))
    generator = torch.Generator().manual_seed(0)
    for group in bind(model, architecture.groups(model)):
        group.apply(random_permutation(group.width, group.n_blocks, generator))
    return architecture, model


def distortion_left(arch: str, path: Path, large: bool, iterations: int) -> dict[str, Any]:
    """(c) What is left after clustering (SR-C), total distortion over the weights' energy: as given, published search,
    default search."""
    architecture, dense = trained(arch, path)
    plan = make_plan(dense, replace(spec_of(arch), rule=BlockRule(4, 4, large), k_means_n_iters=iterations))
    lost: dict[str, float] = {}
    spent: dict[str, float] = {}
    for how in ("none", "published", "best"):
        model = copy.deepcopy(dense)
        began = time.perf_counter()
        if how != "none":
            permute(
                model,
                architecture.groups(model),
                plan.sizes,
                SearchSpec(search=how),
                measure=candidate_distortion(plan, 0),
                show_progress=False,
            )
        spent[how] = time.perf_counter() - began
        _, layers = compress(model, plan, show_progress=False)
        lost[how] = sum(layer.distortion for layer in layers) / sum(layer.power for layer in layers)
    print(f"{arch}, {path.name}, {'large' if large else 'small'} blocks: lost {lost}, seconds {spent}", flush=True)
    return {
        "network": arch,
        "file": path.name,
        "blocks": "large" if large else "small",
        "iterations": iterations,
        "energy_lost": lost,
        "seconds": spent,
    }


def curves(
    layer: Layer, d: int, budgets: Sequence[int], plain_budgets: Sequence[int]
) -> dict[str, list[dict[str, float]]]:
    """Score (log det, change against the order as given) and seconds of each search of one layer's input, with more and
    more swaps."""
    generator = torch.Generator()
    found: dict[str, list[dict[str, float]]] = {"plain": [], "published": [], "best": []}
    weight = layer.weight.detach().double()
    start = GroupObjective([child_objective(layer, d)], [1.0])
    identity = start.value

    def note(name: str, began: float, tries: int, permutation: Any) -> None:
        found[name].append(
            {
                "s": time.perf_counter() - began,
                "tries": tries,
                "score": start.evaluate(np.asarray(permutation)) - identity,
            }
        )

    for tries in plain_budgets:
        rng = np.random.default_rng(1)
        first = rng.integers(weight.shape[1], size=tries)
        second = (first + 1 + rng.integers(weight.shape[1] - 1, size=tries)) % weight.shape[1]
        began = time.perf_counter()
        note("plain", began, tries, plain_search(weight, d, list(zip(first.tolist(), second.tolist(), strict=True))))
    for tries in budgets:
        began = time.perf_counter()
        objective = GroupObjective([child_objective(layer, d)], [1.0])
        note("published", began, tries, search(objective, 1, tries, generator.manual_seed(0)).permutation)
    began = time.perf_counter()
    objective = GroupObjective([child_objective(layer, d)], [1.0])
    note("best", began, budgets[-1], search_best(objective, 1, 10_000, generator.manual_seed(0)).permutation)
    return found


def compare_networks(networks: Sequence[str], small: bool) -> list[dict[str, Any]]:
    """(c) for every ARCH=PATH, with both kinds of blocks; prints the table."""
    files = [(arch, Path(path)) for arch, path in (item.split("=", 1) for item in networks)]
    left = [distortion_left(arch, path, large, 3 if small else 50) for arch, path in files for large in (False, True)]
    if left:
        print_table(
            f"(c) share of the weights' energy lost after {left[0]['iterations']} SR-C iterations; s: seconds of the "
            "search",
            ["network", "blocks", "as given", "published", "default", "published s", "default s", "lower"],
            [
                [f"{c['network']} {c['file']}", c["blocks"], *(f"{100 * c['energy_lost'][how]:.3f} %" for how in ("none", "published", "best")),
                 f"{c['seconds']['published']:.1f}", f"{c['seconds']['best']:.1f}",
                 "yes" if c["energy_lost"]["best"] < c["energy_lost"]["published"] else "NO"]
                for c in left
            ],
        )  # fmt: skip
    return left


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every layer, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=10_000, help="swaps of our search; the published number")
    parser.add_argument(
        "--plain-tries", type=int, default=300, help="swaps of the plain search, the first of the same pairs"
    )
    parser.add_argument(
        "--networks", nargs="*", default=[], metavar="ARCH=PATH", help="trained networks, dense or compressed, for (c)"
    )
    parser.add_argument(
        "--only-networks", action="store_true", help="only (c), kept beside what the JSON file already holds"
    )
    parser.add_argument("--small", action="store_true", help="only check that it runs")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/search.json"), help="where the results are written"
    )
    options = parser.parse_args(argv)
    tries, plain_tries = (200, 100) if options.small else (options.tries, min(options.plain_tries, options.tries))
    found = machine()
    print_machine(found)
    if options.only_networks:
        kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        write_json(
            options.json,
            {**kept, "machine_of_distortion": found, "distortion": compare_networks(options.networks, options.small)},
        )
        return
    results = [measure(case, tries, plain_tries) for case in (SMALL_CASES if options.small else CASES)]
    rows = [
        [r["layer"], "x".join(map(str, r["shape"])), str(r["d"]), f"{r['ours_per_s']:,.0f}", f"{r['plain_float64_per_s']:,.1f}",
         f"{r['plain_float32_per_s']:,.1f}", f"{r['ratio_float64']:,.0f}x", f"{r['ratio_float32']:,.0f}x",
         f"{r['setup_s']:.2f}",
         f"{r['ours_s']:.1f}", f"{r['plain_s_extrapolated']:,.0f}", "yes" if r["same_permutation"] else "NO"]
        for r in results
    ]  # fmt: skip
    print_table(
        f"(a) candidates per second; s: seconds for {tries:,} swaps, set-up included (plain: extrapolated from "
        f"{plain_tries} swaps, float64)",
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
    networks = (
        [("resnet18", False)] if options.small else [("resnet50", False), ("resnet18", True), ("maskrcnn", False)]
    )
    whole = [
        whole_network(arch, large, tries, min(plain_tries, 50), 1 if options.small else 3) for arch, large in networks
    ]
    print_table(
        f"(b) published search of a whole network, {tries:,} swaps per group, set-up included (plain: extrapolated, "
        "float32); "
        "Gram s: whole Gram matrices of the deciding layers at the measured peak",
        ["network", "groups", "ours s", "plain s", "ratio", "Gram s"],
        [
            [w["network"], str(w["groups"]), f"{w['ours_s']:.2f}", f"{w['plain_s_extrapolated']:,.0f}", f"{w['ratio']:,.0f}x",
             f"{w['gram_s_at_measured_peak']:.2f}"]
            for w in whole
        ],
    )  # fmt: skip
    left = compare_networks(options.networks, options.small)
    case, budgets = (
        (SMALL_CASES[0], [10, 100]) if options.small else (CASES[1], [10, 100, 1000, 10_000, 100_000, 1_000_000])
    )
    drawn = {
        "layer": case.name,
        "shape": list(case.shape),
        "d": case.d,
        "searches": curves(case.layer(), case.d, budgets, budgets[:2] if options.small else [10, 30, 100, 300, 1000]),
    }
    write_json(
        options.json,
        {"machine": found, "results": results, "whole_networks": whole, "distortion": left, "curves": drawn},
    )
    if not all(r["same_permutation"] for r in results):
        raise SystemExit("the two searches kept different swaps")


if __name__ == "__main__":
    main()
