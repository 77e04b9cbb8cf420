"""Evaluate any compressed classification network: python -m src.evaluate_classifier."""

from __future__ import annotations

import sys

from . import evaluate_resnet


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return evaluate_resnet.start(argv, "evaluate_classifier", "../config/evaluate_classifier.yaml")


if __name__ == "__main__":
    sys.exit(main())
