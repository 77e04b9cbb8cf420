"""Masks as run lengths in COCO's compressed form: made quickly, and checked where they come from a file.

A mask (h, w) is read column by column; the lengths of its runs, the first one of zeros, are written as text.
"""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_codec
from torch import Tensor

from .checks import decoded_counts


def encode_masks(masks: Tensor) -> list[str]:
    """The `counts` of each mask.

    Only the columns from a mask's first to its last pixel are read: what is left and right of them is one run of zeros.

    Args:
        masks: (N, h, w) bool, on any device.
    """
    height, width = masks.shape[-2:]
    found = masks.cpu().numpy()
    columns = np.asarray(found.any(1))  # (N, w)
    return [_encode(mask, np.flatnonzero(used), height, width) for mask, used in zip(found, columns, strict=True)]


def _encode(mask: np.ndarray, used: np.ndarray, height: int, width: int) -> str:
    n_pixels = height * width
    changes = np.empty(0, dtype=np.int64)  # places where a run begins, but for the first run
    if len(used):
        first, last = int(used[0]), int(used[-1])
        pixels = np.zeros((last - first + 1) * height + 2, dtype=bool)  # with a zero before and after
        pixels[1:-1] = mask[:, first : last + 1].ravel(order="F")
        changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + first * height
    edges = np.concatenate([[0], changes, [n_pixels][: int(len(changes) == 0 or changes[-1] < n_pixels)]])
    return _as_text(np.diff(edges).tolist(), height, width)


def check_rle(segmentation: object, height: int, width: int) -> str:
    """The compressed `counts` of a result's segmentation.

    Args:
        segmentation: a map with `size` and `counts`, which is a text, or a list of run lengths.
        height, width: of the image.

    Raises:
        ValueError: it is something else, or not of this size.
    """
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("expected a run-length encoded mask {size: [height, width], counts: ...}")
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        raise ValueError(f"the mask's size is {size}, the image's [{height}, {width}] (height, width)")
    if isinstance(counts, str):
        try:
            lengths = decoded_counts(counts)
        except ValueError as error:
            raise ValueError("the mask's counts are not a compressed run-length encoding") from error
    elif isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts):
        lengths = counts
    else:
        raise ValueError("the mask's counts are neither text nor a list of run lengths")
    if sum(lengths) != height * width:
        raise ValueError(f"the mask's runs make {sum(lengths):,} pixels, but its image has {height * width:,}")
    return counts if isinstance(counts, str) else _as_text(lengths, height, width)


def _as_text(lengths: list[int], height: int, width: int) -> str:
    return mask_codec.frPyObjects({"size": [height, width], "counts": lengths}, height, width)["counts"].decode("ascii")
