"""How fast a layer is clustered, and how well.

Measured: time per iteration and final distortion of `kmeans` and `src` beside the plain formulation (n x k distance matrix,
one-hot update), faiss and scikit-learn on the same machine.

    python -m benchmarks.clustering
    python -m benchmarks.clustering --weights resnet18.pth     # subvectors of a trained dense ResNet-18

Everything starts from the same centroids and makes the same number of iterations on all vectors. The time is that of the
iterations and the final codes, divided by the iterations. The distortion (squared error per vector) is that of the nearest
centroid after rounding every codebook to 16-bit floats, relative to the vectors' mean square. `src` draws noise, so that
its figures need the published 10 to 1,000 iterations to mean something.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from src.compression.files import read_tensors
from src.compression.quantize.kmeans import assign, kmeans, src
from src.compression.subvectors import to_subvectors

from .report import machine, pick_device, print_machine, print_table, seconds, write_json

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
        return (0.02 * scale * torch.randn(rows, -(-self.n // rows), self.d, generator=generator)).reshape(-1, self.d)[: self.n]


CASES = [Case(589_824, 4, 256, "layer4.1.conv2"), Case(262_144, 9, 256, "layer4.1.conv2"), Case(512_000, 4, 2048, "fc")]
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

    model = KMeans(start.shape[0], init=start.numpy(), n_init=1, max_iter=iterations, tol=0.0, algorithm="lloyd").fit(vectors.numpy())
    return torch.from_numpy(model.cluster_centers_), torch.from_numpy(model.labels_)


def memory_of_plain(case: Case) -> int:
    """Bytes that the plain formulation holds at once: distances, one-hot codes as integers and as floats."""
    return case.n * case.k * (4 + 8 + 4)


def measure(case: Case, state: dict[str, Tensor] | None, iterations: int, device: torch.device) -> list[dict[str, Any]]:
    """Every method on one set of vectors."""
    vectors = case.vectors(state).to(device)
    case = Case(vectors.shape[0], case.d, case.k, case.layer)
    power = float(vectors.double().square().sum(1).mean())
    start = kmeans(vectors, case.k, 0, torch.Generator().manual_seed(SEED)).codebook  # the start that `kmeans` draws from this seed
    methods: dict[str, Callable[[], Tensor]] = {
        "kmeans (ours)": lambda: kmeans(vectors, case.k, iterations, torch.Generator().manual_seed(SEED)).codebook,
        "src (ours)": lambda: src(vectors, case.k, iterations, torch.Generator().manual_seed(SEED)).codebook,
        "plain": lambda: plain_kmeans(vectors, start, iterations)[0],
    }
    if device.type == "cpu":
        methods["faiss"] = lambda: faiss_kmeans(vectors, start, iterations)[0]
        methods["scikit-learn"] = lambda: sklearn_kmeans(vectors, start, iterations)[0]
        if memory_of_plain(case) > 0.7 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            print(f"plain is left out for n = {case.n}, k = {case.k}: it needs {memory_of_plain(case) / 2**30:.0f} GB", flush=True)
            del methods["plain"]
    found = []
    for name, method in methods.items():
        result: list[Tensor] = []
        elapsed = seconds(lambda method=method, result=result: result.append(method()), device)  # type: ignore[misc]
        codebook = result[0].to(device, vectors.dtype).half().to(vectors.dtype)
        distortion = float(assign(vectors, codebook)[1].double().mean())
        found.append(
            {
                "method": name,
                "n": case.n,
                "d": case.d,
                "k": case.k,
                "iterations": iterations,
                "s_per_iteration": elapsed / iterations,
                "distortion": distortion,
                "relative_distortion": distortion / power,
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every shape, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clustering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="state dict of a dense ResNet-18; left out: random weights")
    parser.add_argument("--iterations", type=int, default=20, help="mean updates")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda; faiss and scikit-learn only on the CPU")
    parser.add_argument("--small", action="store_true", help="only check that it runs")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/clustering.json"), help="where the results are written")
    options = parser.parse_args(argv)
    device = pick_device(options.device)
    iterations = 3 if options.small else options.iterations
    state = read_tensors(options.weights) if options.weights else None
    found = machine(device)
    print_machine(found)
    results = []
    for case in SMALL_CASES if options.small else CASES:
        measured = measure(case, state, iterations, device)
        results += measured
        rows = [
            [r["method"], f"{1e3 * r['s_per_iteration']:.1f}", f"{r['s_per_iteration'] / measured[0]['s_per_iteration']:.2f}",
             f"{100 * r['relative_distortion']:.3f} %"]
            for r in measured
        ]  # fmt: skip
        title = f"n = {measured[0]['n']:,}, d = {case.d}, k = {case.k}, {iterations} iterations" + (f", {case.layer}" if state else "")
        print_table(title, ["method", "ms per iteration", "time / kmeans (ours)", "energy lost"], rows)
    source = "trained ResNet-18" if state else "random, heavy-tailed"
    write_json(options.json, {"machine": found, "weights": source, "results": results})


if __name__ == "__main__":
    main()
