"""Compress any network, without data: python -m src.compress --model.arch mobilenet_v2 --output_path out/."""

from __future__ import annotations

import sys

from .common.callable_module import make_callable
from .run import command
from .settings import Settings

make_callable(__name__)


def job(settings: Settings) -> int:
    """The recipe; imported only when the settings are known to be good, since torch takes seconds to load."""
    from . import recipes

    return recipes.compress_only(settings)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return command.run(
        job,
        kind="compress",
        prog=command.program(__package__, "compress"),
        purpose=(
            "Permute and quantize a network of any architecture and write it, without training and without data; with "
            "--calibration.images its batch norms are retaken from images that need no labels."
        ),
        default_config="../config/compress.yaml",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
