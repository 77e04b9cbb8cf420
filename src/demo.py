"""The whole method on scikit-learn's handwritten digits, offline: python -m src.demo.

Trains a dense ResNet-18, compresses it with small blocks, fine-tunes the codebooks, evaluates the saved file with
evaluate_resnet, and ends with a table.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from . import evaluate_resnet, train_resnet
from .errors import RunError

USAGE = """usage: python -m src.demo [--output_path FOLDER] [--dotted.key value ...]

Writes scikit-learn's digits as an image folder, trains a dense ResNet-18 on them, compresses and fine-tunes it, and evaluates
the saved file. FOLDER (output/demo) receives dense/ and compressed/; an earlier demo there is replaced. Other keys go to both
training runs, for example --epochs 1 for a quick look.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; returns the exit status of the first step that fails, or 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(USAGE, end="")
        return 0
    folder = Path("output/demo")
    if "--output_path" in arguments[:-1]:
        at = arguments.index("--output_path")
        folder = Path(arguments[at + 1])
        del arguments[at : at + 2]
    started = time.perf_counter()
    best = folder / "compressed" / "trained_models" / "best.pth"
    common = ["--overwrite", "True", *arguments]
    steps = [
        ("1/3 train a dense ResNet-18 on digits", train_resnet, "train_dense_resnet18", ["--output_path", f"{folder}/dense", *common]),
        (
            "2/3 permute, quantize, fine-tune",
            train_resnet,
            "train_resnet18",
            ["--output_path", f"{folder}/compressed", "--model.weights", f"{folder}/dense/trained_models/best.pth", *common],
        ),
        (
            "3/3 evaluate the saved file",
            evaluate_resnet,
            "evaluate_resnet18",
            ["--model.state_dict_compressed", str(best), "--expected.accuracy", "null"],
        ),
    ]
    for title, entry, config, flags in steps:
        command = f"python -m {entry.__name__} --config ../config/digits/{config}.yaml {' '.join(flags)}"
        print(f"\n== {title}\n   {command}", flush=True)
        status = entry.main(["--config", f"../config/digits/{config}.yaml", *flags])
        if status:
            return status
    print(f"\n{table(folder, best)}\n\n{time.perf_counter() - started:.0f} seconds in all; the compressed network is {best}")
    return 0


def table(folder: Path, best: Path) -> str:
    """Accuracy, size and speed of the steps, from the results the runs left in `folder`.

    Raises:
        RunError: a result is missing.
    """
    try:
        dense = json.loads((folder / "dense" / "results.json").read_text())
        compressed = json.loads((folder / "compressed" / "results.json").read_text())
        dense_mb = (folder / "dense" / "trained_models" / "best.pth").stat().st_size / 2**20
        size, ratio = f"{compressed['megabytes']:.2f} MB", f"{compressed['ratio']:.1f}x"
        rows = [
            ("", "top-1", "size", "ratio", "file", "s/step"),
            (
                "dense",
                _percent(dense["best"]),
                f"{compressed['megabytes'] * compressed['ratio']:.2f} MB",
                "1x",
                f"{dense_mb:.2f} MB",
                _seconds(dense),
            ),
            ("after compression", _percent(compressed["before training"]), size, ratio, "", ""),
            ("after fine-tuning", _percent(compressed["best"]), size, ratio, f"{best.stat().st_size / 2**20:.2f} MB", _seconds(compressed)),
        ]
    except (OSError, KeyError, ValueError) as error:
        raise RunError(f"the demo's results in {folder} are incomplete: {error}") from error
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _seconds(results: dict) -> str:
    value = results["seconds per step"]
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
