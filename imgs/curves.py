"""Draws imgs/search.png, imgs/clustering.png and imgs/calibrate.png from what the benchmarks measured. Command:
`python -m imgs.curves`.

Score over time for each permutation search, distortion over time for each clustering, accuracy over size for each way
to quantize; the figures come from benchmarks/results/search.json, clustering.json and calibrate.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SEARCHES = {
    "plain": ("plain formulation, 10 to 1,000 swaps", "#777777", "s", "--"),
    "published": ("search: published, greedy start and 10 to 1,000,000 swaps", "#0072B2", "o", "-"),
    "best": ("search: best", "#D55E00", "*", ""),
}
CLUSTERINGS = {
    "plain": ("plain k-means (n x k distances, one-hot update)", "#777777", "s", "--"),
    "scikit-learn": ("scikit-learn KMeans", "#009E73", "v", "--"),
    "faiss": ("faiss.Kmeans", "#56B4E9", "^", "--"),
    "kmeans (ours)": ("kmeans", "#8C4C8A", "D", "-"),
    "src (ours)": ("src (SR-C)", "#0072B2", "o", "-"),
    "src, tolerance 0.005 (ours)": ("src, k_means_tolerance 0.005", "#D55E00", "*", "-"),
}
WAYS = {
    "norms retaken": ("settings as published, batch norms retaken", "#777777", "s", "--"),
    "budget, norms retaken": ("settings chosen for the size, batch norms retaken", "#56B4E9", "^", "--"),
    "calibrated": ("settings as published, calibrated", "#0072B2", "o", "-"),
    "budget, calibrated": ("settings chosen for the size, calibrated", "#D55E00", "*", "-"),
}
"""Name in the JSON -> legend, colour (after Okabe and Ito), marker, line."""


def draw(
    axes: Axes,
    series: dict[str, list[dict[str, float]]],
    styles: dict[str, tuple[str, str, str, str]],
    value: str,
    factor: float,
) -> None:
    """One line per method, time on a logarithmic axis."""
    for name, (label, colour, marker, line) in styles.items():
        points = series.get(name, [])
        axes.plot(
            [point["s"] for point in points], [factor * point[value] for point in points], marker=marker,
            linestyle=line or "none", color=colour,
            label=label, markersize=15 if marker == "*" else 7, linewidth=2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("seconds, set-up included")
    axes.grid(visible=True, which="major", color="#DDDDDD")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.get_figure(root=True).legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def search_figure(results: dict[str, Any]) -> Figure:
    """log det(Cov) against the order as given."""
    found = results["curves"]
    figure, axes = plt.subplots(figsize=(9, 5), dpi=110, layout="constrained")
    draw(axes, found["searches"], SEARCHES, "score", 1.0)
    axes.set_ylabel("change of log det(Cov), lower is better")
    shape = " x ".join(str(n) for n in found["shape"] if n > 1)
    axes.set_title(f"Order of the input channels of {found['layer']} ({shape}, d = {found['d']})", loc="left")
    return figure


def clustering_figure(results: dict[str, Any]) -> Figure:
    """Distortion above the lowest that any method reached; each point is a clustering with a number of iterations of
    its own."""
    found = results["curves"]
    lowest = min(point["distortion"] for points in found["methods"].values() for point in points)
    series = {
        name: [{"s": point["s"], "above": point["distortion"] / lowest - 1} for point in points]
        for name, points in found["methods"].items()
    }
    figure, axes = plt.subplots(figsize=(9, 5), dpi=110, layout="constrained")
    draw(axes, series, CLUSTERINGS, "above", 100.0)
    axes.set_ylabel("distortion above the lowest found, percent")
    axes.set_ylim(-0.4, 12)
    axes.set_title(
        f"Clustering n = {found['n']:,} subvectors, d = {found['d']}, k = {found['k']}; a point is a whole clustering",
        loc="left",
    )
    return figure


def calibrate_figure(results: dict[str, Any]) -> Figure:
    """Top-1 over the size of the quantized weights, a panel for each network."""
    figure, panels = plt.subplots(1, len(results), figsize=(5.5 * len(results), 5), dpi=110, layout="constrained")
    for axes, (title, found) in zip([panels] if len(results) == 1 else panels, results.items(), strict=True):
        dense = next(row["top-1"] for row in found["rows"] if row["way"] == "dense")
        axes.axhline(dense, color="#111111", linewidth=1, label="dense network")
        for way, (label, colour, marker, line) in WAYS.items():
            points = sorted((row["bytes"] / 2**20, row["top-1"]) for row in found["rows"] if row["way"] == way)
            axes.plot(
                [size for size, _ in points], [value for _, value in points], marker=marker, linestyle=line,
                color=colour, label=label, markersize=15 if marker == "*" else 7, linewidth=2,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 4, 6, 8), numticks=20))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel("MB of the quantized weights, codebooks included")
        axes.set_ylabel("top-1, percent")
        axes.set_title(title.partition(", permuted")[0].partition(", not permuted")[0], loc="left", fontsize=11)
        axes.grid(visible=True, which="major", color="#DDDDDD")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


FIGURES = {"search": search_figure, "clustering": clustering_figure, "calibrate": calibrate_figure}


def main() -> None:
    """Draw and write the pictures."""
    parser = argparse.ArgumentParser(prog="python -m imgs.curves", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the measurements")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the pictures")
    options = parser.parse_args()
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11, "text.color": "#111111"})
    for name, make in FIGURES.items():
        measured = options.results / f"{name}.json"
        if not measured.exists():
            print(f"left out: {measured} does not exist; it is written by: python -m benchmarks.{name}")
            continue
        results = json.loads(measured.read_text(encoding="utf-8"))
        path = options.output / f"{name}.png"
        make(results).savefig(path, metadata={"Software": None})
        print(f"written: {path}")


if __name__ == "__main__":
    main()
