"""What an inspection found, and in words: what stands above, in and below its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .metadata import ModelInfo
from .size import ModelSize


@dataclass(frozen=True)
class Row:
    """One layer of a network; figures of quantized layers are None in others.

    Attributes:
        name: of the layer.
        kind: its type.
        shape: of its weight, or of what else it holds.
        codes_bits: of its codes.
        codebook_bits: of its codebook.
        other_bits: of everything else in it.
        d: subvector length.
        k: centroids.
        value_bits: of each value of the codebook.
        n_codes: subvectors.
        used: distinct blocks that occur in the weight.
        entropy: of the codes, in bits per code.
        frequencies: how often each code occurs, falling.
        sqnr: power of the dense weight over power of the difference, in dB; None where there is nothing to compare
            with.
        outputs_lost: share of the energy of the layer's outputs that was lost when it was quantized with calibration.
        layout: along what its subvectors run, "input" or "output".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    codes_bits: int = 0
    codebook_bits: int = 0
    other_bits: int = 0
    d: int | None = None
    k: int | None = None
    value_bits: int | None = None
    n_codes: int | None = None
    used: int | None = None
    entropy: float | None = None
    frequencies: tuple[int, ...] = ()
    sqnr: float | None = None
    outputs_lost: float | None = None
    layout: str = "input"

    @property
    def bits(self) -> int:
        """All bits of the layer."""
        return self.codes_bits + self.codebook_bits + self.other_bits


@dataclass(frozen=True)
class Inspection:
    """A whole file or network: its layers in the network's order, totals, and what is known about the model; `str`
    shows it as a table. A network that is in no file has no path."""

    path: Path | None
    file_bytes: int | None
    kind: str
    architecture: str
    info: ModelInfo
    rows: tuple[Row, ...]
    size: ModelSize
    against: str | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(lines(self))

    @property
    def mixed(self) -> bool:
        """Whether a codebook holds values of other than 16 bits."""
        return any(row.value_bits not in (None, 16) for row in self.rows)

    @property
    def entropy_bits(self) -> float:
        """What all codes would take at their entropies, without tables."""
        return sum((row.entropy or 0.0) * (row.n_codes or 0) for row in self.rows)


LOST = "output energy lost"


def header(found: Inspection) -> list[str]:
    """What stands above the columns of `cells`."""
    names = ["layer", "type", "shape", "d", "k", "codes", "bits", "share", "blocks used", "entropy"]
    bits = ["codebook bits"] if found.mixed else []
    lost = [LOST] if _calibrated(found) else []
    return [*names, *bits, *lost, *(["SQNR dB"] if found.against else [])]


def _calibrated(found: Inspection) -> bool:
    return any(row.outputs_lost is not None for row in found.rows)


def about(found: Inspection) -> list[str]:
    """What the file says about the model, a line each."""
    info = found.info
    lines = [f"classes: {info.num_classes:,}"] if info.num_classes is not None else []
    if info.producer:
        lines.append(f"written by: {info.producer}")
    if info.metric:
        lines.append("measured: " + ", ".join(f"{name} {value:.6g}" for name, value in info.metric.items()))
    if info.settings:
        lines.append("settings: " + _flat(info.settings))
    if info.permutations is not None:
        lines.append(f"permutations: {len(info.permutations)} groups of channels reordered")
    elif found.size.codes:
        lines.append("permutations: not known")
    return lines


def totals(found: Inspection) -> list[str]:
    """The totals, a line each."""
    lines = [
        f"size: {found.size.summary()}",
    ]
    if found.file_bytes is not None:
        share = 8 * found.file_bytes / found.size.bits
        lines.append(f"file: {found.file_bytes:,} bytes, {share:.4f} of the reported bits / 8")
    if found.size.codes:
        saved = 100 * (1 - found.entropy_bits / found.size.codes)
        lines.append(f"entropy of all codes: {found.entropy_bits:,.0f} bits, {saved:.2f} % below log2(k) bits per code")
    return lines


def _flat(tree: Mapping[str, object]) -> str:
    parts = [
        f"{key} {_flat(value) if isinstance(value, Mapping) else value}"
        for key, value in tree.items()
        if value not in ({}, [], None)
    ]
    return ", ".join(parts)[:1000]


def cells(row: Row, found: Inspection) -> list[str]:
    """A line of the table."""

    def shown(value: float | None, form: str = ",") -> str:
        return "" if value is None else format(value, form)

    line = [
        row.name or "(model)",
        row.kind,
        "x".join(map(str, row.shape)),
        shown(row.d) + (" out" if row.layout == "output" else ""),
        shown(row.k),
        shown(row.n_codes),
        f"{row.bits:,}",
        f"{100 * row.bits / found.size.bits:.2f} %",
        shown(row.used),
        shown(row.entropy, ".3f"),
    ]
    line += [shown(row.value_bits)] if found.mixed else []
    line += [shown(row.outputs_lost, ".2%").replace("%", " %")] if _calibrated(found) else []
    return [*line, shown(row.sqnr, ".2f")] if found.against else line


def lines(found: Inspection) -> list[str]:
    """The whole inspection as lines for a terminal."""
    file = "" if found.path is None else f"{found.path}: "
    size = "" if found.file_bytes is None else f", {found.file_bytes:,} bytes"
    shown = [f"{file}{found.kind}, {found.architecture}{size}", *about(found), ""]
    table = [header(found), *(cells(row, found) for row in found.rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for number, row in enumerate(table):
        padded = [
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        shown.append("  ".join(padded).rstrip())
        if number == 0:
            shown.append("-" * (sum(widths) + 2 * len(widths) - 2))
    return [*shown, "", *totals(found), *(f"note: {note}" for note in found.notes)]
