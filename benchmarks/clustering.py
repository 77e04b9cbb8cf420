"""How fast a layer is clustered, and how well.

Claims: one iteration of `src` is at least 30 times faster than the plain formulation (n x k distance matrix, one-hot
update) and takes at most 1.1 times one of faiss.Kmeans; after the same number of iterations the distortion is at most
0.5 % above that of faiss.Kmeans and scikit-learn's KMeans, and below both where there are fewer than 64 vectors per
centroid (median of three seeds).

    python -m benchmarks.clustering                                   # random, heavy-tailed vectors
    python -m benchmarks.clustering --weights cifar10_resnet18_dense.pth     # besides, the layers of a trained dense ResNet-18

All use the same number of threads and all vectors (faiss by default takes 256 per centroid), start from training
vectors drawn with the same seed, and never stop early. Time: of the iterations and the final codes, divided by the
iterations; ours, plain and faiss in turn, median of three. Memory: growth of the largest resident set of a fresh
process. Distortion: squared error per vector of the nearest centroid, codebooks rounded to 16-bit floats. The curves of
the figure (`python -m imgs.clustering`): the same layer clustered with more and more iterations.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from src.compression.quantize.kmeans import assign, kmeans, src
from src.compression.quantize.subvectors import to_subvectors
from src.model_files.pth import read_tensors

from .report import largest_resident_set, machine, pick_device, print_machine, print_table, seconds, write_json

SEED = 0


@dataclass(frozen=True)
class Case:
    """n subvectors of length d and k centroids; with trained weights the subvectors of `layer`."""

    n: int
    d: int
    k: int
    layer: str

    def vectors(self, state: dict[str, Tensor] | None) -> Tensor:
        """(n, d): of the trained layer, or normal values whose scale differs from row to row, hence heavy-tailed."""
        if state is not None:
            return to_subvectors(state[f"{self.layer}.weight"].float(), self.d)
        generator = torch.Generator().manual_seed(SEED)
        rows = 512
        scale = torch.randn(rows, 1, 1, generator=generator).mul(0.7).exp()
        return (0.02 * scale * torch.randn(rows, -(-self.n // rows), self.d, generator=generator)).reshape(-1, self.d)[
            : self.n
        ]


CASES = [Case(589_824, 4, 256, "layer4.1.conv2"), Case(262_144, 9, 256, "layer4.1.conv2"), Case(512_000, 4, 2048, "fc")]
LAYERS = [
    Case(262_144, 9, 256, "layer4.1.conv2"),
    Case(65_536, 9, 256, "layer3.1.conv1"),
    Case(32_768, 4, 256, "layer4.0.downsample.0"),
    Case(16_384, 9, 256, "layer2.1.conv1"),
    Case(8_192, 4, 256, "layer3.0.downsample.0"),
    Case(4_096, 9, 256, "layer1.0.conv1"),
    Case(2_048, 4, 256, "layer2.0.downsample.0"),
]
SMALL_CASES = [Case(4096, 4, 64, "layer4.1.conv2"), Case(2048, 9, 32, "layer4.1.conv2")]


def plain_kmeans(vectors: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The plain formulation: the whole distance matrix, and means by a product with one-hot codes (n, k)."""
    codebook = start
    for _ in range(iterations):
        members = F.one_hot(torch.cdist(vectors, codebook).argmin(1), codebook.shape[0]).to(vectors.dtype)
        codebook = (members.T @ vectors) / members.sum(0).clamp_min(1).unsqueeze(1)
    return codebook, torch.cdist(vectors, codebook).argmin(1)


def faiss_kmeans(vectors: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """faiss, with all vectors (by default it takes 256 per centroid)."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    array = vectors.numpy()
    model = faiss.Kmeans(
        array.shape[1],
        start.shape[0],
        niter=iterations,
        nredo=1,
        seed=SEED,
        min_points_per_centroid=1,
        max_points_per_centroid=array.shape[0],
    )
    model.train(array, init_centroids=start.numpy())
    return torch.from_numpy(model.centroids.copy()), torch.from_numpy(model.index.search(array, 1)[1][:, 0])


def sklearn_kmeans(vectors: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """scikit-learn, Lloyd's algorithm, without stopping early."""
    from sklearn.cluster import KMeans

    model = KMeans(start.shape[0], init=start.numpy(), n_init=1, max_iter=iterations, tol=0.0, algorithm="lloyd").fit(
        vectors.numpy()
    )
    return torch.from_numpy(model.cluster_centers_), torch.from_numpy(model.labels_)


def memory_of_plain(case: Case) -> int:
    """Bytes that the plain formulation holds at once: distances, one-hot codes as integers and as floats."""
    return case.n * case.k * (4 + 8 + 4)


def share_for_plain(case: Case, device: torch.device) -> int:
    """1 where the plain formulation fits into 5 GB (or runs on a GPU), else of how many vectors it gets one: its time
    is proportional to n."""
    return 1 if device.type != "cpu" else math.ceil(memory_of_plain(case) / (5 << 30))


METHODS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "src (ours)": lambda x, k, t, seed: src(x, k, t, torch.Generator().manual_seed(seed)).codebook,
    "kmeans (ours)": lambda x, k, t, seed: kmeans(x, k, t, torch.Generator().manual_seed(seed)).codebook,
    "src, tolerance 0.005 (ours)": lambda x, k, t, seed: (
        src(x, k, t, torch.Generator().manual_seed(seed), 0.005).codebook
    ),
    "faiss": lambda x, k, t, seed: faiss_kmeans(x, start_of(x, k, seed), t)[0],
    "scikit-learn": lambda x, k, t, seed: sklearn_kmeans(x, start_of(x, k, seed), t)[0],
    "plain": lambda x, k, t, seed: plain_kmeans(x, start_of(x, k, seed), t)[0],
}
"""Name -> (vectors, k, iterations, seed) -> codebook."""


def start_of(vectors: Tensor, k: int, seed: int) -> Tensor:
    """The start that `kmeans` and `src` draw from this seed."""
    return kmeans(vectors, k, 0, torch.Generator().manual_seed(seed)).codebook


def distortion(vectors: Tensor, codebook: Tensor) -> float:
    """Squared error per vector of the nearest centroid, the codebook in 16 bits."""
    return float(
        assign(vectors, codebook.to(vectors.device, vectors.dtype).half().to(vectors.dtype))[1].double().mean()
    )


def timed(name: str, vectors: Tensor, k: int, iterations: int) -> float:
    """Seconds per iteration, the last assignment included."""
    return seconds(lambda: METHODS[name](vectors, k, iterations, SEED), vectors.device) / iterations


def speed(case: Case, device: torch.device, repeats: int, plain_iterations: int, iterations: int) -> dict[str, Any]:
    """One shape: seconds per iteration of all methods, in turn."""
    vectors = case.vectors(None).to(device)
    names = ["src (ours)", "plain"] + (["faiss", "scikit-learn"] if device.type == "cpu" else [])
    share = share_for_plain(case, device)
    if share > 1:
        needed = f"it needs {memory_of_plain(case) / 2**30:.0f} GB"
        print(
            f"plain gets one vector of {share} for n = {case.n}, k = {case.k}, and its time is multiplied: {needed}",
            flush=True,
        )
    METHODS["src (ours)"](vectors[: 64 * case.k], case.k, 1, SEED)  # compiles, or loads what was compiled
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            if name in ("plain", "scikit-learn") and repeat >= 2:
                continue
            if name == "plain":
                times[name].append(share * timed(name, vectors[::share].contiguous(), case.k, plain_iterations))
            else:
                times[name].append(timed(name, vectors, case.k, iterations))
    median = {name: statistics.median(values) for name, values in times.items()}
    ours = median["src (ours)"]
    return {"n": case.n, "d": case.d, "k": case.k, "iterations": iterations, "plain_iterations": plain_iterations,
            "plain_vectors": case.n // share, "s_per_iteration": median,
            "plain_over_ours": median.get("plain", math.nan) / ours, "ours_over_faiss": ours / median.get("faiss", math.nan)}  # fmt: skip


def memory(name: str, case: Case) -> float:
    """Megabytes that a fresh process grows by while it makes two iterations."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (name, case))


def _growth(name: str, case: Case) -> float:
    vectors = case.vectors(None)
    METHODS[name](vectors[: 64 * case.k], case.k, 1, SEED)
    before = largest_resident_set()
    METHODS[name](vectors, case.k, 2, SEED)
    return (largest_resident_set() - before) / 2**20


def quality(label: str, vectors: Tensor, k: int, iterations: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Median distortion over seeds of `src`, faiss and scikit-learn after the same number of iterations."""
    names = ["src (ours)", "kmeans (ours)", "faiss", "scikit-learn"]
    left = {
        name: statistics.median(distortion(vectors, METHODS[name](vectors, k, iterations, seed)) for seed in seeds)
        for name in names
    }
    return {
        "layer": label,
        "n": vectors.shape[0],
        "d": vectors.shape[1],
        "k": k,
        "iterations": iterations,
        "distortion": left,
    }


def curves(vectors: Tensor, k: int, budgets: Sequence[int], slow: Sequence[int]) -> dict[str, Any]:
    """Distortion and seconds after more and more iterations, every method."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, method in METHODS.items():
        for iterations in slow if name in ("plain", "scikit-learn") else budgets:
            result: list[Tensor] = []
            elapsed = seconds(
                lambda result=result, method=method, t=iterations: result.append(method(vectors, k, t, SEED))
            )
            found.setdefault(name, []).append(
                {"iterations": iterations, "s": elapsed, "distortion": distortion(vectors, result[0])}
            )
    return {"n": vectors.shape[0], "d": vectors.shape[1], "k": k, "methods": found}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every shape, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clustering",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--weights", type=Path, help="state dict of a trained dense ResNet-18; left out: random vectors"
    )
    parser.add_argument("--iterations", type=int, default=10, help="mean updates that are timed")
    parser.add_argument(
        "--quality-iterations", type=int, default=100, help="mean updates after which distortions are compared"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda; faiss and scikit-learn only on the CPU")
    parser.add_argument("--small", action="store_true", help="only check that it runs")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/clustering.json"), help="where the results are written"
    )
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    state = read_tensors(options.weights) if options.weights else None
    cases, layers = (SMALL_CASES, LAYERS[-1:]) if options.small else (CASES, LAYERS)
    budgets = [1, 2, 3] if options.small else [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    iterations, quality_iterations = (2, 3) if options.small else (options.iterations, options.quality_iterations)
    found = machine(device)
    print_machine(found)

    speeds = [speed(case, device, 1 if options.small else 3, 1 if options.small else 2, iterations) for case in cases]
    if device.type == "cpu":
        for case, measured in zip(cases, speeds, strict=True):
            measured["memory_mb"] = {
                name: memory(name, case)
                for name in ("src (ours)", "faiss", *(["plain"] if share_for_plain(case, device) == 1 else []))
            }
    print_table(
        "milliseconds per iteration; MB: growth of the resident set",
        ["n x d, k", "ours (src)", "plain", "faiss", "scikit-learn", "plain/ours", "ours/faiss", "ours MB", "plain MB", "faiss MB"],
        [
            [f"{m['n']:,} x {m['d']}, {m['k']}",
             *(f"{1e3 * m['s_per_iteration'].get(name, math.nan):.1f}" for name in ("src (ours)", "plain", "faiss", "scikit-learn")),
             f"{m['plain_over_ours']:.1f}", f"{m['ours_over_faiss']:.2f}",
             *(f"{m.get('memory_mb', {}).get(name, math.nan):,.0f}" for name in ("src (ours)", "plain", "faiss"))]
            for m in speeds
        ],
    )  # fmt: skip

    qualities, drawn = [], None
    if device.type == "cpu":
        seeds = (0, 1, 2)
        for layer in layers:
            vectors = layer.vectors(state)
            qualities.append(quality(layer.layer if state else "random", vectors, layer.k, quality_iterations, seeds))
        middle = layers[len(layers) // 2]
        drawn = curves(middle.vectors(state), middle.k, budgets, budgets[:6])
        print_table(
            f"distortion after {quality_iterations} iterations, relative to faiss.Kmeans, median of {len(seeds)} seeds",
            ["layer", "n x d, k", "n/k", "src (ours)", "kmeans (ours)", "scikit-learn"],
            [
                [q["layer"], f"{q['n']:,} x {q['d']}, {q['k']}", f"{q['n'] / q['k']:.0f}",
                 *(f"{100 * (q['distortion'][name] / q['distortion']['faiss'] - 1):+.2f} %" for name in ("src (ours)", "kmeans (ours)", "scikit-learn"))]
                for q in qualities
            ],
        )  # fmt: skip
    source = options.weights.name if state else "random, heavy-tailed"
    write_json(
        options.json, {"machine": found, "weights": source, "speed": speeds, "quality": qualities, "curves": drawn}
    )


if __name__ == "__main__":
    main()
