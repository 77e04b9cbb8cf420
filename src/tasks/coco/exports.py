"""What labelling tools export in other forms than COCO's own, brought to COCO's where it can mean one thing only.

Numbers that passed through a table come as floats, flags as null or True, file names with the separator of another
system, a mask's one polygon without the list around it, a box only as its polygons. Whatever else is wrong is for
`checks` to tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from .checks import is_real

WHOLE = {
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
    "categories": ("id",),
}
"""Keys of each list's entries that COCO gives as whole numbers."""
NULL = ("iscrowd", "area")
"""Keys of annotations for which null is as good as nothing."""


def bring_to_cocos_form(contents: dict[str, Any]) -> None:
    """Change contents, whose lists were checked, in place."""
    for name, keys in WHOLE.items():
        for entry in contents[name]:
            for key in keys:
                if type(entry.get(key)) is float:
                    entry[key] = _whole(entry[key])
    for annotation in contents["annotations"]:
        for key in NULL:
            if annotation.get(key, "") is None:
                del annotation[key]
        if type(annotation.get("iscrowd")) is bool:
            annotation["iscrowd"] = int(annotation["iscrowd"])
        mask = annotation.get("segmentation")
        if isinstance(mask, dict):
            for key in ("size", "counts"):
                if isinstance(mask.get(key), list):
                    mask[key] = [_whole(value) if type(value) is float else value for value in mask[key]]
        elif isinstance(mask, list) and mask and all(map(is_real, mask)):
            annotation["segmentation"] = [mask]


def _whole(value: float) -> float:
    """An int where the number is whole."""
    return int(value) if value.is_integer() else value


def leave_out_broken_masks(contents: dict[str, Any]) -> list[str]:
    """Take out objects whose mask encloses nothing, in place; which ones, and why.

    A polygon of fewer than three points has no area: it is taken out of a mask that has others; an object with no other
    is taken out, and so is one with a polygon of an odd count of numbers, which could be read in several ways.
    """
    kept, left_out = [], []
    for number, annotation in enumerate(contents["annotations"]):
        mask = annotation.get("segmentation")
        if mask and isinstance(mask, list) and all(map(_is_polygon, mask)):
            whole = [polygon for polygon in mask if len(polygon) >= 6]
            odd = next((len(polygon) for polygon in mask if len(polygon) % 2), None)
            if odd is not None or not whole:
                why = f"a polygon of {odd} numbers" if odd is not None else "no polygon of at least three points"
                left_out.append(f"annotations[{number}] (id {annotation.get('id')!r}): {why}")
                continue
            if len(whole) < len(mask):
                annotation["segmentation"] = whole
        kept.append(annotation)
    contents["annotations"] = kept
    return left_out


def _is_polygon(part: object) -> bool:
    return isinstance(part, list) and all(map(is_real, part))


def fill_in_boxes(contents: dict[str, Any]) -> None:
    """Give objects that come with polygons only the box around these, in place."""
    for annotation in contents["annotations"]:
        mask = annotation.get("segmentation")
        if annotation.get("bbox") or not mask or not isinstance(mask, list) or not all(map(_is_polygon, mask)):
            continue
        x = [value for polygon in mask for value in polygon[0::2]]
        y = [value for polygon in mask for value in polygon[1::2]]
        annotation["bbox"] = [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def find_files(images: list[dict[str, Any]], folder: Path) -> None:
    """Correct, in place, names of files that are not in `folder` but would be with another spelling: the separators of
    Windows, the escapes of a URL, or the name of the folder once more."""
    for image in images:
        name = image["file_name"]
        if not any(sign in name for sign in "\\%/") or (folder / name).is_file():
            continue
        for spelling in _spellings(name, folder):
            if (folder / spelling).is_file():
                image["file_name"] = spelling
                break


def _spellings(name: str, folder: Path) -> Iterator[str]:
    for one in (name, unquote(name)):
        for spelling in (one, PureWindowsPath(one).as_posix()):
            yield spelling
            yield spelling.removeprefix("./").removeprefix(f"{folder.name}/")
