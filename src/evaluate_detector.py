"""Evaluate any compressed detection network: python -m src.evaluate_detector."""

from __future__ import annotations

import sys

from . import evaluate_maskrcnn


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return evaluate_maskrcnn.start(argv, "evaluate_detector", "../config/evaluate_detector.yaml")


if __name__ == "__main__":
    sys.exit(main())
