"""Photos that are stored turned: a tag (EXIF orientation) tells viewers how to show them.

Labelling tools show what viewers show, and most of them write down the size seen; others are for the pixels as they are
stored. The width and height of the annotations tell which, unless both are the same.
"""

from __future__ import annotations

from PIL import Image

from ..decoding import UPRIGHT, load_rgb, open_image, orientation_of

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Value of the tag -> what brings the stored pixels to what viewers show."""
SIDES_SWAPPED = (5, 6, 7, 8)


def misfit(stored: tuple[int, int], orientation: int, expected: tuple[int, int]) -> str | None:
    """Why an image of the size (width, height) does not fit its annotations; None: it does, turned or as it is."""
    seen = (stored[1], stored[0]) if orientation in SIDES_SWAPPED else stored
    if expected not in (stored, seen):
        return f"the image has {stored[0]}x{stored[1]} pixels, but the annotations say {expected[0]}x{expected[1]}"
    if orientation != UPRIGHT and stored == seen:
        return (
            f"the image is stored turned (EXIF orientation {orientation}), and its size does not say whether the "
            "annotations are for the pixels as stored or as viewers show them: store them as they are annotated, "
            "without the tag (for example with ImageOps.exif_transpose of Pillow)"
        )
    return None


def load_as_annotated(path: str, expected: tuple[int, int]) -> Image.Image:
    """The decoded image as 8-bit RGB, turned where its annotations are for what viewers show.

    Args:
        path: of the image.
        expected: width and height as the annotations say.

    Raises:
        ValueError: it does not fit its annotations; further, whatever the decoder raises.
    """
    picture = load_rgb(path)
    with open_image(path) as image:
        orientation = orientation_of(image)
    problem = misfit(picture.size, orientation, expected)
    if problem is not None:
        raise ValueError(problem)
    return picture if picture.size == expected else picture.transpose(TURNS[orientation])
