"""Draws imgs/permutation.png: what reordering channels does to the subvectors of a weight. Command: `python -m
imgs.permutation`.

A small weight whose input channels come in families (channels of a family are proportional to each other, up to noise)
and differ in scale is cut into subvectors of two values, before and after the permutation that our search finds, and
both are clustered by our k-means. Every number in the picture is computed here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from src.compression.permute.group_objective import GroupObjective
from src.compression.permute.objective import child_objective
from src.compression.permute.search import search
from src.compression.quantize.kmeans import cluster
from src.compression.quantize.subvectors import to_subvectors

D, K = 2, 8
ROWS, CHANNELS = 320, 8
SHOWN_ROWS = 6
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#56B4E9", "#8C4C8A", "#F0A860", "#6FCFAF", "#D49BC9"]
"""One per input channel, dark and light of four hues that colour-blind readers can tell apart (after Okabe and Ito)."""
GAP = 0.3
"""Between the subvectors of a row, in cells."""


@dataclass(frozen=True)
class Side:
    """One half of the picture.

    Attributes:
        order: channel at each position.
        vectors: subvectors (n, 2).
        codebook: centroids (k, 2).
        codes: (n,).
        det: determinant of the subvectors' covariance.
        lost: share of the weight's energy that coding loses.
    """

    order: list[int]
    vectors: Tensor
    codebook: Tensor
    codes: Tensor
    det: float
    lost: float


def example_weight() -> Tensor:
    """A weight (rows, channels): four pairs of channels that carry nearly the same values, in mixed order and at two
    scales."""
    generator = torch.Generator().manual_seed(5)
    families = torch.randn(ROWS, CHANNELS // 2, generator=generator).repeat_interleave(2, dim=1)
    noise = torch.randn(ROWS, CHANNELS, generator=generator)
    scale = torch.tensor([1.0, 0.85, 0.95, 0.8, 0.9, 0.75, 1.0, 0.8])
    weight = (0.96 * families + 0.28 * noise) * scale
    return weight[:, torch.tensor([0, 2, 4, 1, 6, 3, 5, 7])]


def measure(weight: Tensor, order: Tensor) -> Side:
    """Cut, cluster and count."""
    vectors = to_subvectors(weight[:, order].contiguous(), D)
    found = cluster("kmeans", vectors, K, 100, torch.Generator().manual_seed(0))
    det = float(torch.linalg.det(torch.cov(vectors.double().T, correction=0)))
    return Side(
        order.tolist(),
        vectors,
        found.codebook,
        found.codes,
        det,
        found.distortion / float(vectors.square().sum(1).mean()),
    )


def compute() -> tuple[Tensor, Side, Side]:
    """The weight, and both sides; the order of the right one is what the search of the project finds."""
    weight = example_weight()
    layer = nn.Linear(CHANNELS, ROWS, bias=False)
    layer.weight.data.copy_(weight)
    found = search(GroupObjective([child_objective(layer, D)], [1.0]), 1, 2000, torch.Generator().manual_seed(0))
    return weight, measure(weight, torch.arange(CHANNELS)), measure(weight, found.permutation)


def check_same_function(weight: Tensor, order: Tensor) -> None:
    """The claim of the lower row: parent rows and child columns reordered alike, the outputs stay."""
    generator = torch.Generator().manual_seed(1)
    parent, inputs = torch.randn(CHANNELS, 5, generator=generator), torch.randn(5, 16, generator=generator)
    torch.testing.assert_close(weight[:, order] @ (parent[order] @ inputs).relu(), weight @ (parent @ inputs).relu())


def left_edge(position: int) -> float:
    """Of the column at `position`, in cells."""
    return position + GAP * (position // D)


def draw_matrix(axes: Axes, weight: Tensor, side: Side, title: str) -> None:
    """The first rows of the child's weight, one colour per input channel, subvectors framed."""
    for position, channel in enumerate(side.order):
        x = left_edge(position)
        axes.text(
            x + 0.5, 0.45, str(channel + 1), ha="center", va="center", fontsize=15, fontweight="bold", color="#111111"
        )
        for row in range(SHOWN_ROWS):
            axes.add_patch(Rectangle((x, -row - 1), 1, 1, facecolor=COLOURS[channel], alpha=0.75, linewidth=0))
            value = f"{round(float(weight[row, channel]), 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")
            axes.text(x + 0.5, -row - 0.5, value, ha="center", va="center", fontsize=10.5)
    for start in range(0, CHANNELS, D):
        for row in range(SHOWN_ROWS):
            axes.add_patch(Rectangle((left_edge(start), -row - 1), D, 1, fill=False, edgecolor="black", linewidth=1.8))
    axes.text(
        left_edge(CHANNELS - 1) / 2 + 0.5,
        -SHOWN_ROWS - 0.45,
        "\N{VERTICAL ELLIPSIS}",
        ha="center",
        va="center",
        fontsize=16,
    )
    axes.set_xlim(-0.1, left_edge(CHANNELS - 1) + 1.1)
    axes.set_ylim(-SHOWN_ROWS - 0.8, 0.9)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, fontsize=12.5, pad=6)


def draw_cloud(axes: Axes, side: Side, limit: float) -> None:
    """The subvectors as points, each tied to its centroid."""
    ties = torch.stack([side.vectors, side.codebook[side.codes]], dim=1).numpy()
    axes.add_collection(LineCollection(list(ties), colors="#A0A0A0", linewidths=0.6, zorder=1))
    axes.scatter(*side.vectors.T.numpy(), s=9, color="#0072B2", alpha=0.6, linewidths=0, zorder=2)
    axes.scatter(
        *side.codebook.T.numpy(), s=150, marker="X", color="#D55E00", edgecolors="white", linewidths=1.3, zorder=3
    )
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("first value", fontsize=12)
    axes.set_ylabel("second value", fontsize=12)
    axes.set_title(
        f"det(Cov) = {side.det:.2f}\nenergy lost by coding: {100 * side.lost:.0f} %",
        fontsize=14,
        fontweight="bold",
        pad=8,
    )


def draw_layers(axes: Axes, order: list[int]) -> None:
    """Parent, whose rows make the channels, and child, whose columns read them."""
    for position, channel in enumerate(order):
        axes.add_patch(
            Rectangle((0, 7 - position), 7, 1, facecolor=COLOURS[channel], alpha=0.75, edgecolor="white", linewidth=1)
        )
        axes.text(7.5, 7.5 - position, str(channel + 1), ha="center", va="center", fontsize=9.5)
        axes.add_patch(
            Rectangle(
                (17 + position, 1.2), 1, 6, facecolor=COLOURS[channel], alpha=0.75, edgecolor="white", linewidth=1
            )
        )
        axes.text(17.5 + position, 7.8, str(channel + 1), ha="center", va="center", fontsize=9.5)
    for start, end in ((-3.6, -0.3), (8.6, 16.6), (25.4, 28.6)):
        axes.add_patch(
            FancyArrowPatch((start, 4), (end, 4), arrowstyle="-|>", mutation_scale=18, color="#333333", linewidth=1.8)
        )
    axes.text(12.5, 4.5, "8 channels", ha="center", va="bottom", fontsize=12)
    axes.text(-3.9, 4, "input", ha="right", va="center", fontsize=12)
    axes.text(28.9, 4, "output", ha="left", va="center", fontsize=12)
    axes.text(3.5, -0.3, "rows of the parent layer", ha="center", va="top", fontsize=12)
    axes.text(21, -0.3, "columns of the child layer", ha="center", va="top", fontsize=12)
    axes.set_xlim(-7.5, 33)
    axes.set_ylim(-1.6, 8.4)
    axes.set_aspect("equal")
    axes.axis("off")


def draw(weight: Tensor, before: Side, after: Side) -> Figure:
    """The whole picture."""
    figure = plt.figure(figsize=(16, 7.6), dpi=100)
    limit = 1.02 * float(weight.abs().max())
    sides = (
        (
            0.01,
            before,
            "BEFORE: original order of the channels",
            "child layer's weight: one column per channel,\nrows cut into subvectors of 2 values",
        ),
        (
            0.53,
            after,
            "AFTER: channels permuted",
            "the same columns in another order: similar\nchannels (one hue) now share a subvector",
        ),
    )
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color="#0072B2", markersize=6, label="subvector"),
        plt.Line2D(
            [],
            [],
            marker="X",
            linestyle="",
            color="#D55E00",
            markeredgecolor="white",
            markersize=13,
            label=f"one of {K} centroids",
        ),
    ]
    for left, side, title, about in sides:
        figure.text(left + 0.23, 0.962, title, ha="center", va="center", fontsize=18, fontweight="bold")
        draw_matrix(figure.add_axes((left, 0.36, 0.24, 0.5)), weight, side, about)
        draw_cloud(figure.add_axes((left + 0.264, 0.405, 0.19, 0.4)), side, limit)
        figure.legend(
            handles=handles,
            loc="center",
            bbox_to_anchor=(left + 0.359, 0.91),
            ncols=2,
            fontsize=12,
            frameon=False,
            handletextpad=0.1,
        )
        draw_layers(figure.add_axes((left, 0.015, 0.455, 0.25)), side.order)
    arrow = {"arrowstyle": "simple,head_width=26,head_length=18,tail_width=11", "color": "#333333"}
    figure.add_artist(FancyArrowPatch((0.476, 0.6), (0.526, 0.6), transform=figure.transFigure, **arrow))
    figure.add_artist(FancyArrowPatch((0.476, 0.15), (0.526, 0.15), transform=figure.transFigure, **arrow))
    figure.text(0.501, 0.65, "search", ha="center", va="bottom", fontsize=14, fontweight="bold")
    figure.text(0.501, 0.19, "same order\nin both", ha="center", va="bottom", fontsize=12, fontweight="bold")
    figure.add_artist(plt.Line2D([0.02, 0.98], [0.345, 0.345], color="#BBBBBB", linewidth=1))
    text = "Rows of the parent and columns of the child move alike: the network computes the same"
    figure.text(0.5, 0.31, text, ha="center", va="center", fontsize=15, fontweight="bold")
    return figure


def main() -> None:
    """Compute, draw and write the picture."""
    parser = argparse.ArgumentParser(prog="python -m imgs.permutation", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_suffix(".png"), help="where the picture is written"
    )
    options = parser.parse_args()
    weight, before, after = compute()
    check_same_function(weight, torch.tensor(after.order))
    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": "#111111"})
    draw(weight, before, after).savefig(options.output, metadata={"Software": None})
    print(f"written: {options.output}")
    print(
        f"det(Cov) {before.det:.3f} -> {after.det:.3f}; energy lost {before.lost:.3f} -> {after.lost:.3f}; order "
        f"{[c + 1 for c in after.order]}"
    )


if __name__ == "__main__":
    main()
