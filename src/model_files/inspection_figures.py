"""The figures of an inspection page, as SVG: no script, no other file. Every name from the model file is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from markupsafe import Markup, escape

from ..compression.quantize.subvectors import bits_per_code
from .inspected import Inspection, Row

PARTS = (("codes", "codes_bits", "c1"), ("codebooks", "codebook_bits", "c2"), ("other", "other_bits", "c3"))
"""Name, attribute of a row, class of its colour."""
ROW, TOP = 20, 34
"""Height of a row and of the head of the figure, in pixels."""
NAMES, GAP = 190, 26


def composition(found: Inspection) -> Markup:
    """All bits as one bar."""
    width, height, x, parts = 1180, 40, 0.0, []
    for name, attribute, colour in PARTS:
        bits = getattr(
            found.size, {"codes_bits": "codes", "codebook_bits": "codebooks", "other_bits": "other"}[attribute]
        )
        share = bits / found.size.bits
        label = f"{100 * share:.1f} %"
        shown = (
            f'<text class="white" x="{x + share * width / 2:.1f}" y="25" text-anchor="middle">{label}</text>'
            if share > 0.05
            else ""
        )
        parts.append(
            f"<g><title>{name}: {bits:,} bits, {label}</title>"
            f'<rect class="{colour}" x="{x:.1f}" y="4" width="{share * width:.1f}" height="32"/>{shown}</g>'
        )
        x += share * width
    return _svg(width, height, parts, "codes, codebooks and other bits")


def layer_figure(rows: Sequence[Row], found: Inspection) -> Markup:
    """One line per layer, with columns: bits, entropy of the codes, frequencies of the codes, SQNR."""
    most = max((row.bits for row in rows), default=1)
    loudest = max((row.sqnr for row in rows if row.sqnr is not None and math.isfinite(row.sqnr)), default=1.0)
    wide = not found.against  # the page has room for 1180 pixels
    columns: list[tuple[str, int, Callable[[Row, float, float, float], str]]] = [
        ("bits", 370 if wide else 250, partial(_bits_cell, largest=most))
    ]
    if found.size.codes:
        columns += [
            ("entropy of log2(k)", 190 if wide else 120, _entropy_cell),
            ("frequencies of codes", 170 if wide else 130, _frequency_cell),
        ]
    if found.against:
        columns.append(("SQNR, dB", 140, partial(_sqnr_cell, largest=loudest)))
    height = TOP + ROW * len(rows) + 4
    parts, x = [], NAMES + GAP
    for title, width, draw in columns:
        parts.append(f'<text class="head soft" x="{x}" y="18">{title}</text>')
        for number, row in enumerate(rows):
            parts.append(draw(row, x, TOP + ROW * number, width))
        x += width + GAP + (70 if draw is not _frequency_cell else 10)
    for number, row in enumerate(rows):
        y = TOP + ROW * number
        parts.append(f'<line class="rule" x1="0" x2="{x}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{NAMES}" y="{y + 14}" text-anchor="end">{escape(_short(row.name or "(model)"))}</text>')
    return _svg(x, height, parts, "bits, entropy, code frequencies and noise of each layer")


def _bits_cell(row: Row, x: float, y: float, width: float, largest: float) -> str:
    at, parts = x, []
    for name, attribute, colour in PARTS:
        bits = getattr(row, attribute)
        length = width * bits / largest
        if bits:
            parts.append(
                f"<g><title>{escape(row.name)}, {name}: {bits:,} bits</title>"
                f'<rect class="{colour}" x="{at:.1f}" y="{y + 4}" '
                f'width="{max(length, 0.5):.1f}" height="{ROW - 8}"/></g>'
            )
        at += length
    return "".join(parts) + f'<text class="soft" x="{at + 6:.1f}" y="{y + 14}">{row.bits:,}</text>'


def _entropy_cell(row: Row, x: float, y: float, width: float) -> str:
    if row.k is None or row.entropy is None:
        return ""
    log2k = bits_per_code(row.k)
    return (
        f"<g><title>{escape(row.name)}: {row.entropy:.3f} of {log2k} bits; {row.used} of {row.k} blocks used</title>"
        f'<rect class="room" x="{x}" y="{y + 4}" width="{width}" height="{ROW - 8}"/>'
        f'<rect class="c1" x="{x}" y="{y + 4}" width="{width * row.entropy / log2k:.1f}" height="{ROW - 8}"/></g>'
        f'<text class="soft" x="{x + width + 6}" y="{y + 14}">{row.entropy:.2f} / {log2k}</text>'
    )


def _frequency_cell(row: Row, x: float, y: float, width: float) -> str:
    """The frequencies as an area, most frequent code first, averaged over as many columns as are visible."""
    if not row.frequencies or not row.frequencies[0]:
        return ""
    n, high = len(row.frequencies), ROW - 5
    columns = min(n, 75)
    means = [
        sum(row.frequencies[i * n // columns : (i + 1) * n // columns]) / ((i + 1) * n // columns - i * n // columns)
        for i in range(columns)
    ]
    points = [f"{x:.1f},{y + ROW - 2}"]
    for i, mean in enumerate(means):
        level = y + ROW - 2 - high * mean / row.frequencies[0]
        points += [f"{x + width * i / columns:.1f},{level:.1f}", f"{x + width * (i + 1) / columns:.1f},{level:.1f}"]
    points.append(f"{x + width:.1f},{y + ROW - 2}")
    title = (
        f"{row.name}: most frequent code {row.frequencies[0]:,} times, median {row.frequencies[n // 2]:,}, rarest "
        f"{row.frequencies[-1]:,}"
    )
    return f'<g><title>{escape(title)}</title><polygon class="c4" points="{" ".join(points)}"/></g>'


def _sqnr_cell(row: Row, x: float, y: float, width: float, largest: float) -> str:
    if row.sqnr is None:
        return ""
    length = width * min(max(row.sqnr, 0.0) / max(largest, 1e-9), 1.0)
    return (
        f"<g><title>{escape(row.name)}: {row.sqnr:.2f} dB</title>"
        f'<rect class="c2" x="{x}" y="{y + 4}" width="{length:.1f}" height="{ROW - 8}"/></g>'
        f'<text class="soft" x="{x + length + 6:.1f}" y="{y + 14}">{row.sqnr:.1f}</text>'
    )


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else "..." + name[3 - most :]


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> Markup:
    return Markup(
        f'<svg role="img" aria-label="{label}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )  # every text in it was escaped
