"""The text of `--help`: every key with its meaning, its values and its default, straight from the schema."""

from __future__ import annotations

import textwrap

from pydantic.fields import FieldInfo

from .checks import is_placeholder
from .keys import Path
from .reach import COMPRESS, keys
from .sizes import size_text
from .values import choices, is_listed, is_size, meaning_of, short_kind

WIDTH = 100
_EXAMPLES = (
    ("use another settings file", "--config {config}"),
    ("override values of the file", "--{key}=64 --seed 1"),
    (
        "a layer's own value (its name may contain dots)",
        "--model.compression_parameters.layer_specs.layer1.0.conv1.k 128",
    ),
)


def help_text(prog: str, default_config: str, purpose: str, job: str | None = None, task: str | None = None) -> str:
    """The help of a command.

    Args:
        prog: how the command is started, such as `python -m src.train_resnet`.
        default_config: settings file that is read without `--config`.
        purpose: what the command does, in a sentence.
        job, task: only the keys that this job on this task reads are listed; None: those of all.
    """
    key = "calibration.count" if job == COMPRESS else "dataloader.batch_size"
    lines = [f"usage: {prog} [--config FILE] [--KEY VALUE | --KEY=VALUE]...", "", *textwrap.wrap(purpose, WIDTH), ""]
    lines += [
        f"  --config FILE   settings file (YAML); default: {default_config}",
        "  -h, --help      show this text and leave",
        "",
    ]
    lines += ["examples:"]
    for meaning, flags in _EXAMPLES:
        lines += [f"  # {meaning}", f"  {prog} {flags.format(config=default_config, key=key)}"]
    lines += [
        "",
        f"Every key below can stand in the settings file, or on the command line with its dotted name (--{key} 64).",
        "Values are read as YAML: True, 1e-6, 1_000, [a, b], null. The default is in brackets.",
    ]
    sections: dict[Path, list[tuple[str, FieldInfo]]] = {}
    for one in keys():
        if one.is_read_by(job, task):
            sections.setdefault(one.path[:-1], []).append((one.path[-1], one.field))
    for section, fields in sections.items():
        lines += ["", f"--{'.'.join((*section, 'KEY'))}", *_table(fields, task)]
    return "\n".join(lines) + "\n"


def _table(fields: list[tuple[str, FieldInfo]], task: str | None) -> list[str]:
    rows = [
        (name, f"{short_kind(field, task)} [{default_of(field, task)}]", meaning_of(field, task))
        for name, field in fields
    ]
    names = max(len(name) for name, _, _ in rows)
    kinds = min(38, max(len(kind) for _, kind, _ in rows))
    indent = " " * (2 + names + 2 + kinds + 2)
    lines = []
    for name, kind, meaning in rows:
        first, *others = textwrap.wrap(meaning, max(30, WIDTH - len(indent)))
        start = f"  {name:<{names}}  {kind:<{kinds}}  "
        if len(start) > len(indent):  # a long list of choices gets a line of its own
            lines += [start.rstrip(), indent + first]
        else:
            lines.append(start + first)
        lines += [indent + other for other in others]
    return lines


def default_of(field: FieldInfo, task: str | None = None) -> str:
    """The default of a key, in words; for a task that has no such entry it is to be set."""
    value = field.get_default(call_default_factory=True)
    if task is not None and is_listed(field) and value not in choices(field, task):
        return "to be set"
    if value is None:
        return "null"
    if is_size(field):
        return size_text(value)
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "empty"
    return "to be set" if is_placeholder(value) else str(value)
