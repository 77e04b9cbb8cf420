"""Compress and fine-tune any detection network: python -m src.train_detector --model.arch retinanet_resnet50_fpn."""

from __future__ import annotations

import sys

from . import train_maskrcnn


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return train_maskrcnn.start(argv, "train_detector", "../config/train_detector.yaml")


if __name__ == "__main__":
    sys.exit(main())
