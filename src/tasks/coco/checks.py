"""Checks of an annotation file in COCO's form: each says where the file is wrong, with its number and its id."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ...common.errors import DataError
from ..images import some

LISTS = ("images", "annotations", "categories")
BEYOND = 0.05
"""Share of a side by which a polygon may reach beyond the image: labelling tools overshoot; more means another image's
mask."""
FLOAT_MAX = sys.float_info.max
LIMIT = 1 << 63
"""Ids travel in tensors of 64-bit whole numbers."""
MOST_PIXELS = (1 << 31) - 1
"""Of an image: pycocotools counts the pixels of a mask in 32 bits."""


def check_lists(contents: object, source: Path) -> None:
    """Raises DataError if the contents of `source` are not a map with COCO's three lists of maps."""
    expected = "Expected COCO's form: a map with the lists images, annotations and categories"
    if not isinstance(contents, dict):
        raise DataError(f"{source} is not a COCO annotation file: it holds {_kind(contents)}. {expected}")
    for name in LISTS:
        if not isinstance(contents.get(name), list):
            found = f"{name} is {_kind(contents[name])}" if name in contents else f"{name} is missing"
            raise DataError(f"{source} is not a COCO annotation file: {found}. {expected}")
        for number, entry in enumerate(contents[name]):
            if not isinstance(entry, dict):
                raise DataError(
                    f"{source} is not a COCO annotation file: {name}[{number}] is {_kind(entry)}, expected a map"
                )


def _kind(value: object) -> str:
    return {dict: "a map", list: "a list", str: "text", type(None): "null", bool: "True or False"}.get(
        type(value), "a number"
    )


def check_images_and_categories(contents: Mapping[str, Any], source: Path) -> None:
    """Raises DataError for images and categories without what is needed, or that stand there twice."""
    _raise("images", list(_image_problems(contents["images"])), source)
    _raise("categories", list(_category_problems(contents["categories"])), source)
    for name in ("images", "categories"):
        if not contents[name]:
            raise DataError(f"{source}: the list {name} is empty")


def _image_problems(images: list[dict[str, Any]]) -> Iterator[str]:
    seen: set[int] = set()
    for number, image in enumerate(images):
        where = f"images[{number}]"
        if problem := _id_problem(image.get("id")):
            yield f"{where}: {problem}"
            continue
        if image["id"] in seen:
            yield f"{where}: id {image['id']} stands there twice"
        seen.add(image["id"])
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            yield f"{where} (id {image['id']}): file_name is {image.get('file_name')!r}, expected the name of a file"
        for side in ("width", "height"):
            if not is_whole(image.get(side)) or image[side] <= 0:
                yield f"{where} (id {image['id']}): {side} is {image.get(side)!r}, expected a number of pixels"
                break
        else:
            if image["width"] * image["height"] > MOST_PIXELS:
                yield f"{where} (id {image['id']}): {image['width']}x{image['height']} pixels are more than can be read"


def _category_problems(categories: list[dict[str, Any]]) -> Iterator[str]:
    seen: set[int] = set()
    for number, category in enumerate(categories):
        if problem := _id_problem(category.get("id")):
            yield f"categories[{number}]: {problem}"
            continue
        if category["id"] in seen:
            yield f"categories[{number}]: id {category['id']} stands there twice"
        seen.add(category["id"])
        if not isinstance(category.get("name"), str):
            yield f"categories[{number}] (id {category['id']}): name is {category.get('name')!r}, expected text"


def check_annotations(contents: Mapping[str, Any], source: Path) -> None:
    """Raises DataError for annotations of unknown images or categories, and for boxes and masks that cannot be.

    A box without area is not an error: training leaves it out and counts it.
    """
    images = {image["id"]: image for image in contents["images"]}
    categories = {category["id"] for category in contents["categories"]}
    problems = []
    for number, annotation in enumerate(contents["annotations"]):
        problem = _annotation_problem(annotation, images, categories)
        if problem:
            problems.append(f"annotations[{number}] (id {annotation.get('id')!r}): {problem}")
    _raise("annotations", problems, source)


def _annotation_problem(
    annotation: dict[str, Any], images: Mapping[int, dict[str, Any]], categories: set[int]
) -> str | None:
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    if not is_whole(image_id) or image_id not in images:
        return f"image_id {image_id!r} is not among the images"
    if not is_whole(category_id) or category_id not in categories:
        return f"category_id {category_id!r} is not among the categories"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd is {annotation['iscrowd']!r}, expected 0 or 1"
    if "area" in annotation and not is_real(annotation["area"]):
        return f"area is {annotation['area']!r}, expected a number"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_real, box)):
        return f"bbox is {box!r}, expected [x, y, width, height] in pixels"
    image = images[image_id]
    return _mask_problem(annotation.get("segmentation"), image["width"], image["height"])


def _mask_problem(mask: Any, width: int, height: int) -> str | None:
    if not mask:
        return None
    if isinstance(mask, dict):
        if mask.get("size") != [height, width]:
            return (
                f"the mask is for an image of size {mask.get('size')!r}, but its image has [{height}, {width}] "
                "(height, width)"
            )
        return _run_length_problem(mask.get("counts"), width * height)
    if not isinstance(mask, list):
        return "segmentation is neither polygons nor a run-length encoding"
    for polygon in mask:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(is_real, polygon)):
            return "a polygon of the mask is not a list [x1, y1, x2, y2, ...] of at least three points"
        for values, side in ((polygon[0::2], width), (polygon[1::2], height)):
            if min(values) < -BEYOND * side or max(values) > (1 + BEYOND) * side:
                return (
                    f"the mask does not fit the image: a polygon reaches from {min(values):g} to {max(values):g} where "
                    f"the image has {side} pixels"
                )
    return None


def _run_length_problem(counts: Any, n_pixels: int) -> str | None:
    if isinstance(counts, list):
        if not all(is_whole(count) and count >= 0 for count in counts) or sum(counts) != n_pixels:
            return f"the counts of the mask do not add up to the {n_pixels:,} pixels of its image"
        return None
    if not isinstance(counts, str):
        return "the mask's counts are neither numbers nor text"
    try:
        covered = sum(decoded_counts(counts))
    except ValueError:
        return "the mask's counts are not a compressed run-length encoding"
    return (
        None
        if covered == n_pixels
        else f"the counts of the mask cover {covered:,} pixels, but its image has {n_pixels:,}"
    )


def decoded_counts(text: str) -> list[int]:
    """The runs of a compressed run-length encoding, read as COCO defines it: 5 bits a character, differences from the
    third run on.

    pycocotools decodes without looking at bounds, so that a damaged text would write where it should not.

    Raises:
        ValueError: not such a text, or a run is negative.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        piece = ord(character) - 48
        if not 0 <= piece < 64:
            raise ValueError
        value |= (piece & 0x1F) << shift
        shift += 5
        if piece & 0x20:
            continue
        if piece & 0x10:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if value < 0:
            raise ValueError
        counts.append(value)
        value, shift = 0, 0
    if shift:
        raise ValueError
    return counts


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether a value is a number that a float can hold, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -FLOAT_MAX <= value <= FLOAT_MAX


def _id_problem(found: object) -> str | None:
    """Why a value cannot be an id; None: it can."""
    if not is_whole(found):
        return f"id is {found!r}, expected a whole number"
    if not -LIMIT <= found < LIMIT:
        return f"id is {found}, expected a whole number of at most 64 bits ({-LIMIT} to {LIMIT - 1})"
    return None


def _raise(what: str, problems: list[str], source: Path) -> None:
    if problems:
        raise DataError(
            f"{source}: {len(problems):,} of its {what} cannot be used:\n  {some(problems, chr(10) + '  ')}"
        )
