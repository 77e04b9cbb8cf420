"""Download the six models of the paper's authors into compressed_models/ and verify them: make paper-models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .common.log import log
from .common.paths import PACKAGE
from .common.progress import bar
from .model_files.published import BASE_URL, BLOB_IDS, LICENCE_NOTE, fetch
from .run import command


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch and verify all models, or those named; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="paper_models", description="Download and verify the compressed models of the paper's authors."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"files to fetch (default: all of {', '.join(BLOB_IDS)})"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=PACKAGE.parent / "compressed_models",
        help="where to put them (default: compressed_models/)",
    )
    parser.add_argument("--base_url", default=BASE_URL, help="where to fetch them")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in BLOB_IDS]
    if unknown:
        parser.error(f"not published: {', '.join(unknown)}; there are {', '.join(BLOB_IDS)}")

    def job() -> int:
        log.info("%s", LICENCE_NOTE)
        for name in bar(arguments.names or list(BLOB_IDS), "paper models", unit="file"):
            new = fetch(name, arguments.folder, arguments.base_url)
            log.info("%s, verified: %s", "downloaded" if new else "already there", arguments.folder / name)
        return 0

    return command.guarded(job)


if __name__ == "__main__":
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
