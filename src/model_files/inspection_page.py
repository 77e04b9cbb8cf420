"""The inspection of a model file as one HTML page, from the template beside this file: no script, no other file, no
network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .inspected import Inspection, Row, about, cells, header, totals
from .inspection_figures import PARTS, composition, layer_figure

TEMPLATE = "inspection_page.html.jinja"
SMALL_SHARE = 1e-2
"""Layers that are not quantized and below this share of the bits are left to the table."""


def page(found: Inspection) -> str:
    """The page as HTML text; every name from the file is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    rows = [row for row in found.rows if row.k is not None or row.bits >= SMALL_SHARE * found.size.bits]
    return environment.get_template(TEMPLATE).render(
        title=f"{found.path.name}: {found.architecture}" if found.path else found.architecture,
        lines=[f"{found.kind} file", *about(found)],
        cards=_cards(found, [row for row in found.rows if row.k is not None]),
        notes=found.notes,
        composition=composition(found),
        parts=[(name, colour) for name, _, colour in PARTS],
        layers=layer_figure(rows, found),
        caption=_caption(found),
        header=header(found),
        table=[cells(row, found) for row in found.rows],
        totals=totals(found),
    )


def _cards(found: Inspection, quantized: Sequence[Row]) -> list[tuple[str, str]]:
    size = found.size
    cards = [("reported size", f"{size.megabytes:.2f} MB"), ("file", f"{(found.file_bytes or 0) / 2**20:.2f} MB")]
    if quantized:
        cards += [("smaller than the dense network", f"{size.ratio:.2f}x"), ("layers quantized", str(len(quantized)))]
        cards.append(
            ("mean entropy of a code", f"{found.entropy_bits / sum(row.n_codes or 0 for row in quantized):.2f} bits")
        )
        blocks = sum(row.used or 0 for row in quantized) / sum(row.k or 0 for row in quantized)
        cards.append(("blocks of the codebooks used", f"{100 * blocks:.1f} %"))
    finite = [row.sqnr for row in quantized if row.sqnr is not None and math.isfinite(row.sqnr)]
    if finite:
        cards.append(("median SQNR", f"{sorted(finite)[len(finite) // 2]:.1f} dB"))
    if found.info.metric and "accuracy" in found.info.metric:
        cards.append(("accuracy in the file", f"{found.info.metric['accuracy']:.2f} %"))
    return cards


def _caption(found: Inspection) -> str:
    parts = ["Bits of each layer; layers that are not quantized and under 1 % of the bits stand in the table only."]
    if found.size.codes:
        parts.append(
            "Entropy: what a code would cost with the best variable-length code; the grey rest of the bar could be "
            "saved."
        )
        parts.append("Frequencies: how often each code occurs, the most frequent first, relative to it.")
    if found.against:
        parts.append(
            f"SQNR: power of the weights of {Path(found.against).name} over power of the difference; above 10 dB less "
            "than a tenth is lost."
        )
    return " ".join(parts)
