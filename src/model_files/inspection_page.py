"""The inspection of a model file as one HTML page with figures drawn as SVG inside it: no script, no other file, no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from ..compression.quantize.subvectors import bits_per_code
from .inspection import Inspection, Row, about, cells, header, totals

PARTS = (("codes", "codes_bits", "c1"), ("codebooks", "codebook_bits", "c2"), ("other", "other_bits", "c3"))
"""Name, attribute of a row, class of its colour."""
ROW, TOP = 20, 34
"""Height of a row and of the head of the figure, in pixels."""
NAMES, GAP = 190, 26
SMALL_SHARE = 1e-2
"""Layers that are not coded and below this share of the bits are left to the table."""

_STYLE = """
:root { --ink: #1c2733; --soft: #5d6b7a; --line: #dde3ea; --paper: #fff; --card: #f5f7fa; --c1: #2f6fb3; --c2: #e08a2e; --c3: #8b97a5; --c4: #3a9272; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --soft: #9aa8b7; --line: #323c48; --paper: #14191f; --card: #1d242c; --c1: #5b9de0; --c2: #eba352; --c3: #77838f; --c4: #56b893; }
}
body { margin: 0 auto; padding: 28px 24px 60px; max-width: 1180px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 36px 0 6px; }
p { margin: 4px 0; color: var(--soft); } p.note { color: var(--c2); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 8px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; min-width: 120px; }
.card b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; } .card span { color: var(--soft); font-size: 13px; }
figure { margin: 8px 0; overflow-x: auto; } figcaption { color: var(--soft); font-size: 13.5px; max-width: 900px; }
svg text { fill: var(--ink); font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-variant-numeric: tabular-nums; }
svg .soft { fill: var(--soft); } svg .head { font-weight: 600; } svg .rule { stroke: var(--line); } svg .room { fill: var(--card); }
svg .white { fill: #fff; font-weight: 600; }
.c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); } .c4 { fill: var(--c4); }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin: 0 6px 0 16px; }
.key i.c1 { background: var(--c1); } .key i.c2 { background: var(--c2); } .key i.c3 { background: var(--c3); }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 3px 10px; border-bottom: 1px solid var(--line); text-align: right; } th { color: var(--soft); font-weight: 600; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
"""


def page(found: Inspection) -> str:
    """The page as HTML text; every name from the file is escaped."""

    rows = [row for row in found.rows if row.k is not None or row.bits >= SMALL_SHARE * found.size.bits]
    title = escape(f"{found.path.name}: {found.architecture}")
    coded = [row for row in found.rows if row.k is not None]
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(row, found))}</tr>\n" for row in found.rows
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{"".join(f"<p>{escape(line)}</p>" for line in [f"{found.kind} file", *about(found)])}
<div class="cards">{"".join(f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in _cards(found, coded))}</div>
{"".join(f'<p class="note">{escape(note)}</p>' for note in found.notes)}
<h2>Where the bits are</h2>
<figure>{_composition(found)}<figcaption class="key">{"".join(f'<i class="{colour}"></i>{name}' for name, _, colour in PARTS)}</figcaption></figure>
<h2>Layers</h2>
<figure>{_layers(rows, found)}<figcaption>{_caption(found)}</figcaption></figure>
<h2>Table</h2>
<div class="table"><table><thead><tr>{"".join(f"<th>{name}</th>" for name in header(found))}</tr></thead><tbody>
{body}</tbody></table></div>
{"".join(f"<p>{escape(line)}</p>" for line in totals(found))}
</body></html>
"""


def _cards(found: Inspection, coded: Sequence[Row]) -> list[tuple[str, str]]:
    size = found.size
    cards = [("reported size", f"{size.megabytes:.2f} MB"), ("file", f"{found.file_bytes / 2**20:.2f} MB")]
    if coded:
        cards += [("smaller than the dense network", f"{size.ratio:.2f}x"), ("layers coded", str(len(coded)))]
        cards.append(
            ("mean entropy of a code", f"{found.entropy_bits / sum(row.n_codes or 0 for row in coded):.2f} bits")
        )
        blocks = sum(row.used or 0 for row in coded) / sum(row.k or 0 for row in coded)
        cards.append(("blocks of the codebooks used", f"{100 * blocks:.1f} %"))
    finite = [row.sqnr for row in coded if row.sqnr is not None and math.isfinite(row.sqnr)]
    if finite:
        cards.append(("median SQNR", f"{sorted(finite)[len(finite) // 2]:.1f} dB"))
    if found.info.metric and "accuracy" in found.info.metric:
        cards.append(("accuracy in the file", f"{found.info.metric['accuracy']:.2f} %"))
    return cards


def _composition(found: Inspection) -> str:
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
            f'<g><title>{name}: {bits:,} bits, {label}</title><rect class="{colour}" x="{x:.1f}" y="4" width="{share * width:.1f}" height="32"/>{shown}</g>'
        )
        x += share * width
    return _svg(width, height, parts, "codes, codebooks and other bits")


def _layers(rows: Sequence[Row], found: Inspection) -> str:
    """One line per layer, with columns: bits, entropy of the codes, frequencies of the codes, SQNR."""
    wide = not found.against  # the page has room for 1180 pixels
    columns: list[tuple[str, int, Callable[[Row, float, float, float, float], str]]] = [
        ("bits", 370 if wide else 250, _bits_cell)
    ]
    if found.size.codes:
        columns += [
            ("entropy of log2(k)", 190 if wide else 120, _entropy_cell),
            ("frequencies of codes", 170 if wide else 130, _frequency_cell),
        ]
    if found.against:
        columns.append(("SQNR, dB", 140, _sqnr_cell))
    most = max((row.bits for row in rows), default=1)
    loudest = max((row.sqnr for row in rows if row.sqnr is not None and math.isfinite(row.sqnr)), default=1.0)
    height = TOP + ROW * len(rows) + 4
    parts, x = [], NAMES + GAP
    for title, width, draw in columns:
        parts.append(f'<text class="head soft" x="{x}" y="18">{title}</text>')
        for number, row in enumerate(rows):
            parts.append(draw(row, x, TOP + ROW * number, width, most if draw is _bits_cell else loudest))
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
                f'<g><title>{escape(row.name)}, {name}: {bits:,} bits</title><rect class="{colour}" x="{at:.1f}" y="{y + 4}" width="{max(length, 0.5):.1f}" height="{ROW - 8}"/></g>'
            )
        at += length
    return "".join(parts) + f'<text class="soft" x="{at + 6:.1f}" y="{y + 14}">{row.bits:,}</text>'


def _entropy_cell(row: Row, x: float, y: float, width: float, largest: float) -> str:
    if row.k is None or row.entropy is None:
        return ""
    log2k = bits_per_code(row.k)
    return (
        f"<g><title>{escape(row.name)}: {row.entropy:.3f} of {log2k} bits; {row.used} of {row.k} blocks used</title>"
        f'<rect class="room" x="{x}" y="{y + 4}" width="{width}" height="{ROW - 8}"/>'
        f'<rect class="c1" x="{x}" y="{y + 4}" width="{width * row.entropy / log2k:.1f}" height="{ROW - 8}"/></g>'
        f'<text class="soft" x="{x + width + 6}" y="{y + 14}">{row.entropy:.2f} / {log2k}</text>'
    )


def _frequency_cell(row: Row, x: float, y: float, width: float, largest: float) -> str:
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
    title = f"{row.name}: most frequent code {row.frequencies[0]:,} times, median {row.frequencies[n // 2]:,}, rarest {row.frequencies[-1]:,}"
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


def _caption(found: Inspection) -> str:
    parts = ["Bits of each layer; uncoded layers under 1 % of the bits stand in the table only."]
    if found.size.codes:
        parts.append(
            "Entropy: what a code would cost with the best variable-length code; the grey rest of the bar could be saved."
        )
        parts.append("Frequencies: how often each code occurs, the most frequent first, relative to it.")
    if found.against:
        parts.append(
            f"SQNR: power of the weights of {escape(Path(found.against).name)} over power of the difference; above 10 dB less than a tenth is lost."
        )
    return " ".join(parts)


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else "..." + name[3 - most :]


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return f'<svg role="img" aria-label="{label}" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
