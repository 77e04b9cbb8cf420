"""Compress and fine-tune Mask R-CNN: python -m src.train_maskrcnn --config ../config/train_maskrcnn.yaml."""

from __future__ import annotations

import sys

from .run import command
from .settings import Settings


def job(settings: Settings) -> int:
    """The recipe; imported only when the settings are known to be good, since torch takes seconds to load."""
    from . import recipes

    return recipes.train_detection(settings)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return command.run(
        job,
        kind="train",
        task="detection",
        prog=command.program(__package__, "train_maskrcnn"),
        purpose="Permute, quantize and fine-tune Mask R-CNN (or train it dense with --model.use_compression False).",
        default_config="../config/train_maskrcnn.yaml",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
