"""The page of a model on the Hugging Face hub, README.md: what it is, how small, how it was made, and whose it is.

It is written for people, with a block of YAML on top that the hub reads (library, task, licence).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from .inspected import Inspection, Row

MARK = "<!-- pqf writes this page anew with the model; without this line it stays as it is -->"
UNKNOWN_LICENCE = "unknown: ask whoever made the starting weights"
PIPELINES = {"classification": "image-classification", "detection": "object-detection"}
TAGS = ("pqf", "quantization", "product-quantization", "model-compression", "arxiv:2010.15703")
_LICENCE_OF_HUB = re.compile(r"[a-z0-9][a-z0-9.-]*")
SETTINGS = (
    ("search", "search for permutations"),
    ("k_means_type", "clustering"),
    ("k_means_n_iters", "clustering iterations"),
    ("size", "wanted size"),
    ("ratio", "wanted ratio"),
    ("seed", "seed"),
)
"""What a file says of its settings and the page repeats, in words."""


@dataclass(frozen=True)
class About:
    """What a page says that no model file does.

    Attributes:
        task: what the network is for, `classification` or `detection`; empty: not known.
        licence: of the starting weights; empty: not known.
        base_model: what it was made of, OWNER/NAME on the hub; empty: not known.
        name: of the model on the hub; empty: it has none yet.
    """

    task: str = ""
    licence: str = ""
    base_model: str = ""
    name: str = ""


def card(found: Inspection, about: About) -> str:
    """The page as Markdown.

    Args:
        found: what the network holds.
        about: what else is known.
    """
    name = about.name or f"A compressed {found.architecture}"
    parts = [
        f"---\n{_header(about)}---",
        MARK,
        f"# {name}",
        f"`{found.info.arch or found.architecture}`, made {found.size.ratio:.1f} times smaller by product quantization "
        "of its weights ([Permute, Quantize, and Fine-tune](https://arxiv.org/abs/2010.15703)).",
        _size(found),
        _measured(found.info.metric),
        _use(found, about),
        _made(found),
        _layers(found),
        f"## Licence\n\n{_licence(about)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(about: About) -> str:
    """What the hub reads."""
    entries: dict[str, Any] = {"library_name": "pqf", "tags": list(TAGS)}
    if about.task in PIPELINES:
        entries["pipeline_tag"] = PIPELINES[about.task]
    if not about.licence:
        entries["license"] = "unknown"
    elif _LICENCE_OF_HUB.fullmatch(about.licence):
        entries["license"] = about.licence
    else:
        entries |= {"license": "other", "license_name": "see-below"}
    if about.base_model:
        entries |= {"base_model": about.base_model, "base_model_relation": "quantized"}
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=120)


def _size(found: Inspection) -> str:
    size = found.size
    return _table(
        ("", "MB (2^20 bytes)", "bits"),
        [
            ("this model", f"{size.megabytes:.2f}", f"{size.bits:,}"),
            ("dense, as it was", f"{size.original / 8 / 2**20:.2f}", f"{size.original:,}"),
        ],
    )


def _measured(metric: Mapping[str, float] | None) -> str:
    if not metric:
        return "## Accuracy\n\nNot measured since the network was last changed."
    return "## Accuracy\n\n" + _table(("measured", "value"), [(key, f"{value:.6g}") for key, value in metric.items()])


def _use(found: Inspection, about: About) -> str:
    name, arch = about.name or "OWNER/NAME", found.info.arch
    if arch is None:
        call = f'pqf.PQFModel.from_pretrained("{name}", into=TheNetworkThatItWasMadeOf())'
    elif ":" in arch and not arch.startswith(("torchvision:", "timm:")):
        call = f'pqf.PQFModel.from_pretrained("{name}", arch="{arch}")  # which runs that code: look at it first'
    else:
        call = f'pqf.PQFModel.from_pretrained("{name}")'
    return f"## Use\n\n```python\nimport pqf\n\nmodel = {call}\noutputs = model(images)\n```"


def _made(found: Inspection) -> str:
    info, lines = found.info, []
    given = {**(info.settings or {}), **_parameters(info.settings)}
    lines += [f"- {words}: {given[key]}" for key, words in SETTINGS if given.get(key) is not None]
    if info.permutations is not None:
        lines.append(f"- permutations: {len(info.permutations)} groups of channels reordered")
    if info.outputs_lost:
        lost = sum(info.outputs_lost.values()) / len(info.outputs_lost)
        lines.append(
            f"- calibrated: {len(info.outputs_lost)} weights, {100 * lost:.2f} % of their outputs' energy lost on "
            "average, before any fine-tuning"
        )
    else:
        lines.append("- calibration: none, or not known")
    if info.producer:
        lines.append(f"- written by: {info.producer}")
    return "## How it was made\n\n" + "\n".join(lines)


def _parameters(settings: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found = (settings or {}).get("compression_parameters")
    return found if isinstance(found, Mapping) else {}


def _layers(found: Inspection) -> str:
    """Quantized weights by how they are quantized, and what stays dense."""
    groups: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for row in found.rows:
        if row.d is not None and row.k is not None:
            groups[row.kind, row.d, row.k].append(row)
    total = found.size.bits
    rows: list[tuple[str, ...]] = [
        (kind, str(d), str(k), str(len(members)), f"{100 * sum(row.bits for row in members) / total:.1f} %")
        for (kind, d, k), members in sorted(groups.items())
    ]
    quantized = {id(row) for members in groups.values() for row in members}
    dense = sum(row.bits for row in found.rows if id(row) not in quantized)
    rows.append(("not quantized", "", "", "", f"{100 * dense / total:.1f} %"))
    text = _table(("weights of type", "block length d", "centroids k", "how many", "share of the bits"), rows)
    return f"## Layers\n\n{text}" + "".join(f"\n\n{note}" for note in found.notes)


def _licence(about: About) -> str:
    return (about.licence or UNKNOWN_LICENCE).rstrip(".") + "."


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
