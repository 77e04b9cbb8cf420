"""What a compression would do, without doing it: d and k of every layer, the size, and what is predicted to be lost."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures.architecture import Architecture
from ..common.errors import SettingsError
from ..common.log import log, note
from ..common.paths import write_atomically, write_text
from ..compression.quantize.budget.prediction import Prediction
from ..compression.quantize.budget.tradeoff import Tradeoff
from ..compression.quantize.budget.wanted import Budget
from ..run.chosen import losses_by_photos
from ..run.compression_specs import outlook, tradeoff_of
from ..run.open_run import Job
from ..run.processes import processes
from ..settings import Settings
from ..tasks.calibration import ImagesToShow
from .compress import wanted_size
from .data import images_of_folder
from .initial_model import starting_model
from .specs import quantization_spec

COLUMNS = ("bytes", "megabytes", "ratio", "loss", "share lost")
OF_WEIGHTS = "sum of squares of the weights"


def show_plan(settings: Settings, architecture: Architecture, weights: str | Path) -> int:
    """Log the plan for the network of `weights`, and write the curve where `compression.plan` names a file; returns the
    exit status. With `calibration.images` the loss is that of the network's outputs for them.

    Raises:
        SettingsError: the network is compressed already, or nothing can draw the curve.
        PlanError: layers cannot be quantized as asked, or the network cannot have the wanted size.
        DataError: the photos cannot be read, or nothing can be told from the outputs for them.
        RunError: the file cannot be written.
    """
    wanted = settings.compression.plan
    file = Path(wanted).expanduser() if isinstance(wanted, str) else None
    figure = _figure() if file is not None and file.suffix.lower() == ".png" else None
    with processes(settings) as engine:
        job = Job(settings=settings, engine=engine)
        images = images_of_folder(settings, architecture, engine.is_main)
        torch.manual_seed(settings.seed)  # random starting weights
        start = starting_model(settings, architecture, weights, architecture.n_classes, engine.is_main)
        if start.compressed is not None:
            raise SettingsError(f"model.weights: {weights} is a compressed model already; inspect shows what it holds")
        budget = wanted_size(settings, architecture, start.model.eval(), calibrated=images is not None)
        tradeoff = _tradeoff(job, start.model, budget, images)
        if engine.is_main:
            _show(tradeoff, budget, file, figure)
    return 0


def _tradeoff(job: Job, model: nn.Module, wanted: Budget | None, images: ImagesToShow | None) -> Tradeoff:
    """What each plan would cost, by photos where there are some."""
    settings, engine = job.settings, job.engine
    tradeoff = tradeoff_of(model, quantization_spec(settings), settings.seed, show_progress=engine.is_main)
    if wanted is not None:
        tradeoff.plan_for(wanted)  # what is impossible is told before photos are read
    if images is None:
        return tradeoff
    return tradeoff.with_losses(losses_by_photos(job, tradeoff, model, images.read(engine.is_main)))


def _show(tradeoff: Tradeoff, budget: Budget | None, file: Path | None, figure: Any) -> None:
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


def table(found: Prediction) -> list[str]:
    """A line for every weight, under a line of titles: what it loses of its energy and, where photos say that, what
    that costs the outputs."""
    width = max([len(layer.name) for layer in found.layers] + [len("layer")])
    lines = [f"{'layer':<{width}} {'d':>4} {'k':>5} {'codebook':>8} {'bits/weight':>11} {'bytes':>10} {'lost':>8}"]
    if found.unit:
        lines[0] += f" {found.unit:>{len(found.unit)}}"
    for layer in found.layers:
        share = layer.distortion / layer.power if layer.power else 0.0
        rate = layer.bits / layer.n_values
        lines.append(
            f"{layer.name:<{width}} {layer.d:>4} {layer.k:>5} {layer.codebook_bits:>3} bits {rate:>11.2f} "
            f"{-(-layer.bits // 8):>10,} {100 * share:>6.2f} %"
            + (f" {layer.loss:>{len(found.unit)}.3g}" if found.unit else "")
        )
    return lines


def csv_text(curve: Sequence[Prediction]) -> str:
    """The curve as CSV: a line of titles, and one for every plan."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*COLUMNS, "unit of loss"])
    for one in curve:
        size = -(-one.bits // 8)
        rows.writerow(
            [
                size,
                f"{size / 2**20:.6f}",
                f"{one.ratio:.4f}",
                f"{one.loss:.8g}",
                f"{one.share:.8g}",
                one.unit or OF_WEIGHTS,
            ]
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
    lost = [one.loss if found.unit else 100 * one.share for one in (*curve, found)]
    axes.plot([one.bits / 8 / 2**20 for one in curve], lost[:-1], color="tab:blue")
    axes.plot([found.bits / 8 / 2**20], lost[-1:], "o", color="tab:orange", label=outlook(found))
    if found.unit:
        axes.set_yscale("log")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("size of the network (MB)")
    axes.set_ylabel(f"predicted {found.unit}" if found.unit else "predicted loss (% of the weights' energy)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(path, format="png", dpi=150)
