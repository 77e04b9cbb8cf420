"""Writes docs/settings.md from the schema of the settings: python -m tools.settings_reference [--check]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from src.settings.help import default_of
from src.settings.reach import JOBS, TASKS, Key, keys
from src.settings.values import meaning_of, short_kind

TARGET = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEAD = """# Settings

A settings file is YAML. `--config FILE` names it; any value is overridden on the command line by its dotted name,
`--dotted.key value` or `--dotted.key=value`, and values are read as YAML (`True`, `1e-6`, `1_000`, `[a, b]`, `null`).
Names of layers may contain dots:

```bash
python -m src.train_resnet --config ../config/train_resnet18.yaml --epochs 3 --learning_rate=5e-4 \\
    --model.compression_parameters.layer_specs.layer1.0.conv1.k 128
```

Unknown keys are errors that name the nearest known key; files written for the original code load unchanged. What a
command does not read may stand in its file. Of the settings of a layer, the more special one wins:

1. `ignored_modules`: the layer stays as it is;
2. `layer_specs.<layer>`: `k`, `k_means_type`, `k_means_n_iters`, `subvector_size` (linear and 1x1), `large_subvectors`,
   `codebook_bits`;
3. the general key. At last k is clamped to the largest power of two with four subvectors per centroid.

The tables are made from the program itself (`make docs`). "Read by" says which commands read a key, where not all do: T
training, E evaluation; C classification (`*_classifier`, `*_resnet`), D detection (`*_detector`, `*_maskrcnn`).
"""


def read_by(key: Key) -> str:
    """`T C` for a key that only training a classifier reads; empty where all commands do."""
    jobs = "" if len(key.jobs) == len(JOBS) else key.jobs[0][0].upper()
    tasks = "" if len(key.tasks) == len(TASKS) else key.tasks[0][0].upper()
    return f"{jobs} {tasks}".strip()


def reference() -> str:
    """The whole page."""
    lines, section = [HEAD], None
    for key in keys():
        if key.path[:-1] != section:
            section = key.path[:-1]
            title = ".".join(section) or "At the top"
            lines += [f"\n## {title}\n", "| key | values | default | read by | |", "|---|---|---|---|---|"]
        kind, default = (text.replace("|", "\\|") for text in (short_kind(key.field), default_of(key.field)))
        meaning = meaning_of(key.field).replace("|", "\\|")
        lines.append(f"| `{key.path[-1]}` | {kind} | {default} | {read_by(key)} | {meaning} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the page, or with --check say whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m tools.settings_reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is out of date")
    options = parser.parse_args(argv)
    text = reference()
    if options.check:
        return int(not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text)
    TARGET.write_text(text, encoding="utf-8")
    print(f"{TARGET}: {text.count(chr(10))} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
