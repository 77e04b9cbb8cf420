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
    return start(argv, "evaluate_maskrcnn", "../config/evaluate_maskrcnn.yaml")


def start(argv: list[str] | None, entry: str, default_config: str) -> int:
    """Run the command under the name of the module `entry`; returns the exit status."""
    return command.run(
        job,
        kind="evaluate",
        task="detection",
        prog=command.program(__package__, entry),
        purpose=(
            "Evaluate a compressed Mask R-CNN or another detection network (or a dense one with "
            "--model.use_compression False): size, box AP and, where the network finds masks, mask AP."
        ),
        default_config=default_config,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
