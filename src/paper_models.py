"""Download the six models of the paper's authors into compressed_models/ and verify them: make paper-models.

The files are licensed for non-commercial use, so this repository links and verifies them and does not contain them. Each is
checked against its git blob id, the SHA-1 of "blob <size>\\0" and the contents.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

from .common.errors import RunError, UserError
from .common.paths import PACKAGE, write_atomically
from .common.progress import bar

REPOSITORY = "uber-research/permute-quantize-finetune"
BASE_URL = f"https://raw.githubusercontent.com/{REPOSITORY}/main/compressed_models"
BLOB_IDS = {
    "resnet18.pth": "3ec76f41d33b33fec60b220abaa02d6efb57d57f",
    "resnet18_large.pth": "78384842f0592cef30cfc6526b40914c79d10c58",
    "resnet50.pth": "ee2f56ba32299d2ad75043ae21982abd51831e87",
    "resnet50_large.pth": "c2ad2cada3bd9c5cba436a92f357609b5aeeb3d2",
    "resnet50_ssl.pth": "f84d341c694b53dd29b34cc2e1464864e4fb6046",
    "mask_rcnn.pth": "18d2be8c2201cf8e3d7d47c2a5746c6664efd6dc",
}
LICENCE_NOTE = f"""These models belong to the authors of the paper and are licensed for non-commercial use only:
  https://github.com/{REPOSITORY}/blob/main/LICENSE
They are downloaded to your machine and are not part of this repository."""
LARGEST = 64 << 20


def blob_id(contents: bytes) -> str:
    """The id git gives to a file with these contents."""
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents, usedforsecurity=False).hexdigest()


def fetch(name: str, folder: Path, base_url: str = BASE_URL) -> bool:
    """Make `folder`/`name` the published file; returns False if it already was.

    Raises:
        RunError: no network, or the contents are not what was published; an existing file is left as it is.
    """
    target = folder / name
    if target.is_file() and blob_id(target.read_bytes()) == BLOB_IDS[name]:
        return False
    url = f"{base_url}/{name}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            contents = answer.read(LARGEST)
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise RunError(
            f"cannot download {url}: {reason}.\n  Without a network here, fetch it elsewhere, put it at {target}, and run this again: it will be verified."
        ) from error
    found = blob_id(contents)
    if found != BLOB_IDS[name]:
        raise RunError(
            f"{url} is not the published file: its git blob id is {found}, expected {BLOB_IDS[name]}. Nothing was written."
        )

    def write(temporary: Path) -> None:
        temporary.write_bytes(contents)

    write_atomically(target, write)
    return True


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
    print(LICENCE_NOTE)
    try:
        for name in bar(arguments.names or list(BLOB_IDS), "paper models", unit="file"):
            new = fetch(name, arguments.folder, arguments.base_url)
            print(f"{'downloaded' if new else 'already there'}, verified: {arguments.folder / name}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
