"""Evaluate a compressed ResNet: python -m src.evaluate_resnet."""

from __future__ import annotations

import sys

from .run import command
from .settings import Settings


def job(settings: Settings) -> int:
    """The recipe; imported only when the settings are known to be good, since torch takes seconds to load."""
    from . import recipes

    return recipes.evaluate_classification(settings)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return start(argv, "evaluate_resnet", "../config/evaluate_resnet.yaml")


def start(argv: list[str] | None, entry: str, default_config: str) -> int:
    """Run the command under the name of the module `entry`; returns the exit status."""
    return command.run(
        job,
        kind="evaluate",
        task="classification",
        prog=command.program(__package__, entry),
        purpose=(
            "Evaluate a compressed ResNet or another classification network (or a dense one with "
            "--model.use_compression False): size, top-1 and top-5 accuracy."
        ),
        default_config=default_config,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
