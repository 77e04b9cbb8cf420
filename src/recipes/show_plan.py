"""What a compression would do, without doing it: d and k of every layer, the size, and what is predicted to be lost."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..architectures.architecture import Architecture
from ..common.errors import SettingsError
from ..common.log import log, note
from ..common.paths import write_atomically, write_text
from ..compression.quantize.budget.tradeoff import Prediction
from ..run.compression_specs import budget_of, outlook, tradeoff_of
from ..settings import Settings
from .initial_model import starting_model
from .specs import quantization_spec

COLUMNS = ("bytes", "megabytes", "ratio", "loss", "share lost")


def show_plan(settings: Settings, architecture: Architecture, weights: str | Path) -> int:
    """Log the plan for the network of `weights`, and write the curve where `compression.plan` names a file; returns the
    exit status.

    Raises:
        SettingsError: the network is compressed already, or nothing can draw the curve.
        PlanError: layers cannot be quantized as asked, or the network cannot have the wanted size.
        RunError: the file cannot be written.
    """
    wanted = settings.compression.plan
    file = Path(wanted).expanduser() if isinstance(wanted, str) else None
    figure = _figure() if file is not None and file.suffix.lower() == ".png" else None
    torch.manual_seed(settings.seed)  # random starting weights
    start = starting_model(settings, architecture, weights, architecture.n_classes, True)
    if start.compressed is not None:
        raise SettingsError(f"model.weights: {weights} is a compressed model already; inspect shows what it holds")
    tradeoff = tradeoff_of(start.model.eval(), quantization_spec(settings), settings.seed)
    budget = budget_of(settings.compression, "compression.")
    found = tradeoff.of_settings() if budget is None else tradeoff.plan_for(budget)
    for text in found.plan.notes:
        note(text)
    for line in table(found):
        log.info("%s", line)
    log.info("plan: %s", outlook(found))
    if file is not None:
        curve = tradeoff.curve()
        if figure is not None:
            write_atomically(file, lambda temporary: _draw(figure, curve, found, temporary))
        else:
            write_text(file, csv_text(curve))
        log.info("curve: %d plans from %s to %s in %s", len(curve), outlook(curve[0]), outlook(curve[-1]), file)
    return 0


def table(found: Prediction) -> list[str]:
    """A line for every weight, under a line of titles."""
    width = max([len(layer.name) for layer in found.layers] + [len("layer")])
    lines = [f"{'layer':<{width}} {'d':>4} {'k':>5} {'codebook':>8} {'bits/weight':>11} {'bytes':>10} {'lost':>8}"]
    for layer in found.layers:
        share = layer.distortion / layer.power if layer.power else 0.0
        rate = layer.bits / layer.n_values
        lines.append(
            f"{layer.name:<{width}} {layer.d:>4} {layer.k:>5} {layer.codebook_bits:>3} bits {rate:>11.2f} "
            f"{-(-layer.bits // 8):>10,} {100 * share:>6.2f} %"
        )
    return lines


def csv_text(curve: Sequence[Prediction]) -> str:
    """The curve as CSV: a line of titles, and one for every plan."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for one in curve:
        size = -(-one.bits // 8)
        rows.writerow(
            [size, f"{size / 2**20:.6f}", f"{one.ratio:.4f}", f"{one.loss:.8g}", f"{one.share:.8g}"],
        )
    return text.getvalue()


def _figure() -> Any:
    """matplotlib's figures, which need no screen.

    Raises:
        SettingsError: it is not there.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise SettingsError(
            "compression.plan: a picture needs matplotlib, which is not installed (pip install matplotlib); "
            "a file that ends in .csv needs nothing"
        ) from error
    return figure


def _draw(figure: Any, curve: Sequence[Prediction], found: Prediction, path: Path) -> None:
    """Size against predicted loss, with the plan that was shown."""
    from matplotlib import ticker

    picture = figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = picture.subplots()
    axes.plot([one.bits / 8 / 2**20 for one in curve], [100 * one.share for one in curve], color="tab:blue")
    axes.plot([found.bits / 8 / 2**20], [100 * found.share], "o", color="tab:orange", label=outlook(found))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("size of the network (MB)")
    axes.set_ylabel("predicted loss (% of the weights' energy)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path, format="png", dpi=150)
