"""EfficientNet-Lite0 with its ImageNet weights, compressed to a size, offline: python -m src.demo.photos.

Cuts crops out of photos that come with scikit-learn and scikit-image, compresses the network with `compress`, and shows
what it and the dense network answer to photos of which it was shown no crop, and to some of the others.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .. import api
from ..common import output
from ..common.errors import RunError, UserError
from ..common.paths import write_atomically
from ..compress import main as compress
from . import lite0
from .answers import Answers, sheet, table
from .bundled_photos import PACKAGES, TO_CALIBRATE, TO_LOOK_AT, Photo, check_photos, write_crops
from .steps import Step, announce, folder_and_flags, run_steps

USAGE = """usage: python -m src.demo.photos [--output_path FOLDER] [--dotted.key value ...]

Compresses EfficientNet-Lite0, with the ImageNet weights of its package, to 2 MB, calibrated with crops of photos that
come with scikit-learn and scikit-image, and shows what it answers to photos before and after. FOLDER
(output/demo_photos) receives crops/, compressed/ and answers.png; an earlier demo there is replaced. Other keys go to
the compression, for example --compression.size 1.4MB.
"""
CROPS = 112
CALIBRATED = TO_CALIBRATE[:2]
"""Photos of calibration that the table shows, too."""
NAMES = ("model.safetensors", "model.pth")
COMMAND = sys.modules[compress.__module__]  # `from .. import compress` means the function of that name


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration; returns 0, or the exit status of what fails."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        output.out(USAGE)
        return 0
    try:
        return _run(*folder_and_flags(arguments, "output/demo_photos"))
    except UserError as error:
        output.err(f"error: {error}\n")
        return error.status


def _run(folder: Path, flags: Sequence[str]) -> int:
    """Crops, compression, answers.

    Raises:
        SettingsError: a package is missing.
        RunError: something cannot be written.
    """
    started = time.perf_counter()
    lite0.require({**PACKAGES, **lite0.PACKAGES})
    check_photos((*TO_LOOK_AT, *TO_CALIBRATE))
    weights, crops, compressed = lite0.weights_file(), folder / "crops", folder / "compressed"

    announce(f"1/3 cut {CROPS} crops out of {len(TO_CALIBRATE)} photos")
    write_crops(TO_CALIBRATE, crops, CROPS, lite0.SIDE)
    output.out(f"   {', '.join(photo.title for photo in TO_CALIBRATE)}: {crops}\n")

    own = ["--model.arch", f"{__package__}.lite0:network", "--model.weights", str(weights)]
    own += ["--calibration.images", str(crops), "--output_path", str(compressed), "--overwrite", "True"]
    step = Step("choose settings for a size, permute, quantize, calibrate", COMMAND, "demo_photos", [*own, *flags])
    if status := run_steps([step], first=2, of=3):
        return status
    file = next((compressed / name for name in NAMES if (compressed / name).is_file()), None)
    if file is None:  # with --compression.plan True
        return 0

    announce("3/3 what both networks answer\n")
    titles = _titles(compressed / "results.json")
    shown = answers(weights, file, (*TO_LOOK_AT, *CALIBRATED))
    picture = sheet([(photo, one) for photo, one in shown if not one.calibrated], *titles)
    write_atomically(folder / "answers.png", lambda temporary: picture.save(temporary, format="PNG", optimize=True))
    found = [one for _, one in shown]
    output.out(f"{table(found, *titles)}\n\n{_summary(found)}\n")
    output.out(f"{time.perf_counter() - started:.0f} seconds in all; the compressed network is {file},\n")
    output.out(f"the answers to photos it was not calibrated with as a picture {folder / 'answers.png'}\n")
    return 0


def answers(weights: Path, file: Path, photos: Sequence[Photo]) -> list[tuple[Image.Image, Answers]]:
    """What the dense and the compressed network answer to photos, and what they see of these.

    Args:
        weights: of the dense network.
        file: of the compressed one.
        photos: to look at.

    Raises:
        CheckpointError: a file is not of this network.
    """
    dense, compressed = (api.load(path, into=lite0.network()) for path in (weights, file))
    seen = [lite0.seen(photo.open()) for photo in photos]
    return [
        (
            picture,
            Answers(photo.title, photo in TO_CALIBRATE, lite0.top(dense, picture), lite0.top(compressed, picture)),
        )
        for photo, picture in zip(photos, seen, strict=True)
    ]


def _titles(results: Path) -> tuple[str, str]:
    """Of the two networks, with their sizes."""
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        size, ratio = float(found["megabytes"]), float(found["ratio"])
    except (OSError, KeyError, ValueError) as error:
        raise RunError(f"the demo's results in {results} are incomplete: {error}") from error
    return f"dense, {size * ratio:.2f} MB", f"compressed, {size:.2f} MB ({ratio:.1f}x smaller)"


def _summary(found: Sequence[Answers]) -> str:
    """How often the first answers are the same, and which photos were calibrated with."""
    new = [one for one in found if not one.calibrated]
    same, named = sum(one.agree for one in new), sum(one.shared for one in new)
    likeliest = sum(len(one.dense) for one in new)
    starred = " and ".join(one.title for one in found if one.calibrated)
    return (
        f"To {len(new)} photos that it was not calibrated with the compressed network gives {named} of the dense one's "
        f"{likeliest} likeliest\nclasses, and to {same} of them the same first answer.\n"
        f"* crops of {starred} were among those that calibrated it, without a label."
    )


if __name__ == "__main__":
    sys.exit(main())
