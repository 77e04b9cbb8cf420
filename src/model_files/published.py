"""The six models that the paper's authors publish: fetched and verified.

The files are licensed for non-commercial use, so this repository links and verifies them and does not contain them.
Each is checked against its git blob id, the SHA-1 of "blob <size>\\0" and the contents.
"""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path
from urllib.error import URLError

from ..common.errors import RunError
from ..common.paths import write_atomically

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
            f"cannot download {url}: {reason}.\n  Without a network here, fetch it elsewhere, put it at {target}, and "
            "run this again: it will be verified."
        ) from error
    found = blob_id(contents)
    if found != BLOB_IDS[name]:
        raise RunError(
            f"{url} is not the published file: its git blob id is {found}, expected {BLOB_IDS[name]}. Nothing was "
            "written."
        )

    def write(temporary: Path) -> None:
        temporary.write_bytes(contents)

    write_atomically(target, write)
    return True
