"""Whether the images of a COCO split are there, can be read, and have the sizes that the annotations say."""

from __future__ import annotations

import os

from ...common.errors import DataError
from ..decoding import looks
from ..images import BadFiles, some, unreadable_error
from ..shapes import too_narrow
from .data import KEY, MISSING, CocoSplit
from .orientation import misfit


def require_images(
    split: CocoSplit, how: str = "quick", skip_unreadable: bool = False, show: bool = True
) -> tuple[CocoSplit, BadFiles]:
    """The split with its readable images, and what was left out of it (always empty unless `skip_unreadable`).

    An image whose size is not what the annotations say is as bad as an unreadable one: its boxes and masks would not
    fit.

    Args:
        split: of which every image is checked.
        how: `quick`, `full` (decodes everything) or `none` (only that the files exist).
        skip_unreadable: continue without bad images.
        show: show a progress bar.

    Raises:
        DataError: there are bad images and `skip_unreadable` is False, or nothing is left.
    """
    return without(split, unusable_images(split, how, show), skip_unreadable)


def unusable_images(split: CocoSplit, how: str = "quick", show: bool = True, part: str = "all") -> BadFiles:
    """(path, reason) of every image that is missing, cannot be read or has another size than the annotations say;
    arguments as `require_images`, and the name of this process's part of the images."""
    bad = [(path, MISSING) for path in split.paths if not os.path.isfile(path)]
    gone = {path for path, _ in bad}
    sizes = {
        path: split.size(image_id)
        for path, image_id in zip(split.paths, split.image_ids, strict=True)
        if path not in gone
    }
    for path, look in looks(list(sizes), how, show, split.folder, part):
        why = look.problem or misfit(look.size, look.orientation, sizes[path])
        if why is not None:
            bad.append((path, why))
    return bad


def without(split: CocoSplit, bad: BadFiles, skip_unreadable: bool) -> tuple[CocoSplit, BadFiles]:
    """The split without the images `bad`, and these; raises as `require_images`."""
    if not bad:
        return split, []
    missing = [path for path, why in bad if why == MISSING]
    if missing and not skip_unreadable:
        raise DataError(
            f"{KEY}: {len(missing):,} of the {len(split):,} images that {split.source} names are missing: "
            f"{some(missing)}. "
            "Add them, or continue without them: --dataloader.skip_unreadable True"
        )
    if not skip_unreadable:
        raise unreadable_error(bad, KEY)
    left_out = {path for path, _ in bad}
    kept = split.keeping([image_id for image_id in split.image_ids if split.path(image_id) not in left_out])
    if not len(kept):
        raise DataError(f"{KEY}: not one image of {split.folder} can be used. For example {bad[0][0]}: {bad[0][1]}")
    return kept, bad


def too_narrow_images(split: CocoSplit, min_size: int, max_size: int) -> BadFiles:
    """(path, reason) of every image of which nothing is left at the size that the network sees."""
    return [
        (split.path(image_id), why)
        for image_id in split.image_ids
        if (why := too_narrow(split.size(image_id), min_size, max_size)) is not None
    ]
