"""Evaluate a compressed Mask R-CNN: python -m src.evaluate_maskrcnn."""

from __future__ import annotations

import sys

from .run import command
from .settings import Settings


def job(settings: Settings) -> int:
    """The recipe; imported only when the settings are known to be good, since torch takes seconds to load."""
    from . import recipes

    return recipes.evaluate_detection(settings)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return command.run(
        job,
        kind="evaluate",
        task="detection",
        prog=command.program(__package__, "evaluate_maskrcnn"),
        purpose=(
            "Evaluate a compressed Mask R-CNN (or a dense one with --model.use_compression False): size, box AP and "
            "mask AP."
        ),
        default_config="../config/evaluate_maskrcnn.yaml",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
