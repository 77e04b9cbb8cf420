"""The whole method on Mask R-CNN and scenes of handwritten digits, offline: python -m src.demo.maskrcnn.

Trains a ResNet-50 to tell digits apart, a dense Mask R-CNN from it, compresses and fine-tunes that one, evaluates the
saved file with evaluate_maskrcnn, draws what it finds, and ends with a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .. import evaluate_maskrcnn, train_maskrcnn, train_resnet
from ..common import output
from .steps import Row, Step, data_flags, demonstrate, file_size, folder_and_flags, percent, results, seconds

USAGE = """usage: python -m src.demo.maskrcnn [--output_path FOLDER] [--dotted.key value ...]

Composes scenes of scikit-learn's digits in COCO's layout, trains a dense Mask R-CNN on them, compresses and fine-tunes
it, and evaluates the saved file. FOLDER (output/demo_maskrcnn) receives backbone/, dense/, compressed/ and pictures/;
an earlier demo there is replaced. Other keys go to all training runs, for example --epochs 1 for a quick look.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; returns the exit status of the first step that fails, or 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        output.out(USAGE)
        return 0
    folder, flags = folder_and_flags(arguments, "output/demo_maskrcnn")
    backbone, dense, compressed = (folder / name for name in ("backbone", "dense", "compressed"))
    best = {run: str(run / "trained_models" / "best.pth") for run in (backbone, dense, compressed)}
    common = ["--overwrite", "True", *flags]
    expect_nothing = ["--expected.box_ap", "null", "--expected.mask_ap", "null"]
    pictures = ["--visualize", str(folder / "pictures"), "--model.weights", best[dense]]
    steps = [
        Step(
            "train a ResNet-50 on digits",
            train_resnet,
            "digits/train_dense_resnet50",
            ["--output_path", str(backbone), *common],
        ),
        Step(
            "train a dense Mask R-CNN on scenes of digits",
            train_maskrcnn,
            "digits/train_dense_maskrcnn",
            ["--output_path", str(dense), "--model.weights", best[backbone], *common],
        ),
        Step(
            "permute, quantize, fine-tune",
            train_maskrcnn,
            "digits/train_maskrcnn",
            ["--output_path", str(compressed), "--model.weights", best[dense], *common],
        ),
        Step(
            "evaluate the saved file",
            evaluate_maskrcnn,
            "digits/evaluate_maskrcnn",
            ["--model.state_dict_compressed", best[compressed], *expect_nothing, *pictures, *data_flags(flags)],
        ),
    ]
    return demonstrate(steps, folder, lambda: rows(dense, compressed), best[compressed])


def rows(dense: Path, compressed: Path) -> list[Row]:
    """Average precision, size and speed of the steps, from the results that the runs left in their folders."""
    before, after = results(dense), results(compressed)
    size, ratio = f"{after['megabytes']:.2f} MB", f"{after['ratio']:.1f}x"
    whole = f"{after['megabytes'] * after['ratio']:.2f} MB"
    files = [file_size(run / "trained_models" / "best.pth") for run in (dense, compressed)]
    trained, quantized, tuned = (
        [percent(run["history"][epoch].get(name)) for name in ("BoxAP", "MaskAP")]
        for run, epoch in ((before, str(before["best epoch"])), (after, "0"), (after, str(after["best epoch"])))
    )
    return [
        ("", "box AP", "mask AP", "size", "ratio", "file", "s/step"),
        ("dense", *trained, whole, "1x", files[0], seconds(before["seconds per step"])),
        ("after compression", *quantized, size, ratio, "", ""),
        ("after fine-tuning", *tuned, size, ratio, files[1], seconds(after["seconds per step"])),
    ]


if __name__ == "__main__":
    sys.exit(main())
