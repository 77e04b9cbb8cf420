"""The whole method on scikit-learn's handwritten digits, offline: python -m src.demo.

Trains a dense ResNet-18, compresses it with small blocks, fine-tunes the codebooks, evaluates the saved file with
evaluate_resnet, and ends with a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .. import evaluate_resnet, train_resnet
from ..common import output
from .steps import Row, Step, demonstrate, file_size, folder_and_flags, percent, results, seconds

USAGE = """usage: python -m src.demo [--output_path FOLDER] [--dotted.key value ...]

Writes scikit-learn's digits as an image folder, trains a dense ResNet-18 on them, compresses and fine-tunes it, and
evaluates the saved file. FOLDER (output/demo) receives dense/ and compressed/; an earlier demo there is replaced. Other
keys go to both training runs, for example --epochs 1 for a quick look.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; returns the exit status of the first step that fails, or 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        output.out(USAGE)
        return 0
    folder, flags = folder_and_flags(arguments, "output/demo")
    dense, compressed = folder / "dense", folder / "compressed"
    best = compressed / "trained_models" / "best.pth"
    common = ["--overwrite", "True", *flags]
    from_dense = ["--output_path", str(compressed), "--model.weights", str(dense / "trained_models" / "best.pth")]
    steps = [
        Step(
            "train a dense ResNet-18 on digits",
            train_resnet,
            "digits/train_dense_resnet18",
            ["--output_path", str(dense), *common],
        ),
        Step("permute, quantize, fine-tune", train_resnet, "digits/train_resnet18", [*from_dense, *common]),
        Step(
            "evaluate the saved file",
            evaluate_resnet,
            "digits/evaluate_resnet18",
            ["--model.state_dict_compressed", str(best), "--expected.accuracy", "null"],
        ),
    ]
    return demonstrate(steps, folder, lambda: rows(dense, compressed), best)


def rows(dense: Path, compressed: Path) -> list[Row]:
    """Accuracy, size and speed of the steps, from the results that the runs left in their folders."""
    before, after = results(dense), results(compressed)
    size, ratio = f"{after['megabytes']:.2f} MB", f"{after['ratio']:.1f}x"
    whole = f"{after['megabytes'] * after['ratio']:.2f} MB"
    files = [file_size(run / "trained_models" / "best.pth") for run in (dense, compressed)]
    return [
        ("", "top-1", "size", "ratio", "file", "s/step"),
        ("dense", percent(before["best"]), whole, "1x", files[0], seconds(before["seconds per step"])),
        ("after compression", percent(after["before training"]), size, ratio, "", ""),
        ("after fine-tuning", percent(after["best"]), size, ratio, files[1], seconds(after["seconds per step"])),
    ]
