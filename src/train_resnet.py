"""Compress and fine-tune a ResNet: python -m src.train_resnet --config ../config/train_resnet50.yaml."""

from __future__ import annotations

import sys

from .run import command
from .settings import Settings


def job(settings: Settings) -> int:
    """The recipe; imported only when the settings are known to be good, since torch takes seconds to load."""
    from . import recipes

    return recipes.train_classification(settings)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return start(argv, "train_resnet", "../config/train_resnet50.yaml")


def start(argv: list[str] | None, entry: str, default_config: str) -> int:
    """Run the command under the name of the module `entry`; returns the exit status."""
    return command.run(
        job,
        kind="train",
        task="classification",
        prog=command.program(__package__, entry),
        purpose=(
            "Permute, quantize and fine-tune a ResNet or another classification network (or train it dense with "
            "--model.use_compression False)."
        ),
        default_config=default_config,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
