"""Compress and fine-tune any classification network: python -m src.train_classifier --model.arch mobilenet_v2."""

from __future__ import annotations

import sys

from . import train_resnet


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return train_resnet.start(argv, "train_classifier", "../config/train_classifier.yaml")


if __name__ == "__main__":
    sys.exit(main())
