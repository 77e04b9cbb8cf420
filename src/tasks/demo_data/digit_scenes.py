"""Scenes of scikit-learn's handwritten digits in COCO's folder and JSON layout: boxes and exact masks without a
download.

A scene is a canvas with several digits, each scaled, coloured and placed at random; a later digit hides what is below
it. An annotation covers the visible part of its digit, to the pixel. Category ids are 1 to 10, for the digits 0 to 9.
The digits of the training scenes and of the validation scenes are disjoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_codec

from ...common.randomness import derived_seed
from .digits import VALIDATION_EVERY, load_digit_images, write_folder_at_once

SIDE = 96
N_SCENES = {"train": 1500, "val": 100}
DIGITS_PER_SCENE = (2, 4)
"""Fewest and most digits that are placed in a scene."""
HEIGHTS = (28, 56)
"""Smallest and largest height of a digit in pixels, before it is cut to its strokes."""
SLIMNESS = (0.85, 1.25)
"""Width of a digit as a share of its height."""
INK = 0.4
"""Share of full ink from which a pixel belongs to a digit: it makes strokes about a quarter of a digit wide."""
EDGE = 0.15
"""Over this much ink a stroke fades into the canvas."""
VISIBLE = 0.7
"""Share of every digit that stays visible."""
CONTRAST = 0.2
"""Least difference, in one channel, between the colours of two digits of a scene."""
TRIES = 30
"""Of a place, and of a colour, for one digit."""

SEED = 0


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: (SIDE, SIDE, 3) uint8.
        digits: (n,) the digits 0 to 9, from the bottom to the top.
        masks: (n, SIDE, SIDE) bool, the visible part of each.
    """

    image: np.ndarray
    digits: list[int]
    masks: np.ndarray


def write_digit_scenes(root: Path) -> None:
    """Write `<root>/annotations/instances_{train,val}2017.json` and the scenes of `<root>/{train,val}2017/` as PNG
    files.

    The folder appears all at once or not at all; if it is already complete nothing happens.

    Raises:
        DataError: `root` holds something else, or cannot be written.
        SettingsError: scikit-learn is not installed.
    """
    description = (
        f"the digit scenes folder ({N_SCENES['train']:,} PNG files in train2017, {N_SCENES['val']:,} in val2017, and "
        "annotations)"
    )
    write_folder_at_once(root, "digit_scenes", description, _is_complete, _write)


def scenes(split: str) -> Iterator[Scene]:
    """The scenes of a split, in order; the same every time."""
    images, labels = load_digit_images()
    mine = _digits_of(split, labels)
    for number in range(1, N_SCENES[split] + 1):
        yield compose(images[mine], labels[mine], derived_seed(SEED, "digit scene", split, number))


def compose(images: np.ndarray, labels: np.ndarray, seed: int) -> Scene:
    """One scene.

    Args:
        images: digits to draw from (n, 8, 8), values 0 to 16.
        labels: (n,) which digit each is.
        seed: decides everything about the scene.
    """
    draw = np.random.default_rng(seed)
    canvas, brightness = _canvas(draw)
    masks: list[np.ndarray] = []
    digits: list[int] = []
    colours: list[np.ndarray] = []
    wanted = int(draw.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1))
    whole: list[int] = []  # pixels of each digit with nothing above it
    for _ in range(wanted):
        chosen = int(draw.integers(len(images)))
        ink = _ink(images[chosen], draw)
        colour = _colour(brightness, colours, draw)
        for _ in range(TRIES):
            placed = np.zeros((SIDE, SIDE))
            top, left = (int(draw.integers(SIDE - size + 1)) for size in ink.shape)
            placed[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
            mask = placed >= INK
            if all((below & ~mask).sum() >= VISIBLE * area for below, area in zip(masks, whole, strict=True)):
                break
        else:
            continue  # no room is left for this one
        opacity = np.clip((placed - INK) / EDGE + 0.5, 0, 1)[:, :, None]
        canvas = canvas * (1 - opacity) + colour * opacity
        masks = [below & ~mask for below in masks] + [mask]
        digits.append(int(labels[chosen]))
        colours.append(colour)
        whole.append(int(mask.sum()))
    noisy = canvas + draw.normal(0, 0.02, (SIDE, SIDE, 1))
    return Scene(np.round(np.clip(noisy, 0, 1) * 255).astype(np.uint8), digits, np.stack(masks))


def _ink(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A digit scaled smoothly and cut to its strokes: ink from 0 to 1 (h, w)."""
    height = int(draw.integers(HEIGHTS[0], HEIGHTS[1] + 1))
    width = round(height * draw.uniform(*SLIMNESS))
    padded = np.pad(image / image.max(), 1).astype(np.float32)  # so that strokes at the border end round too
    scaled = Image.fromarray(padded).resize((width * 10 // 8, height * 10 // 8), Image.Resampling.BICUBIC)
    ink = np.asarray(scaled, dtype=np.float64)
    rows, columns = np.flatnonzero((ink >= INK).any(1)), np.flatnonzero((ink >= INK).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _canvas(draw: np.random.Generator) -> tuple[np.ndarray, float]:
    """A plain or softly textured canvas (SIDE, SIDE, 3) with values 0 to 1, and its mean brightness."""
    brightness = float(draw.choice([draw.uniform(0.05, 0.35), draw.uniform(0.65, 0.95)]))
    tint = draw.uniform(-0.05, 0.05, 3)
    strength = draw.choice([0.0, draw.uniform(0.02, 0.06)])
    coarse = draw.normal(0, strength, (8, 8)).astype(np.float32)
    texture = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64)
    return np.clip(brightness + tint + texture[:, :, None], 0, 1), brightness


def _colour(canvas: float, others: list[np.ndarray], draw: np.random.Generator) -> np.ndarray:
    """A colour (3,) unlike `others`, if one is found soon: a level 0.35 or more from the canvas's brightness, and often
    a tint around it."""
    for _ in range(TRIES):
        level = draw.uniform(canvas + 0.35, 1.0) if canvas < 0.5 else draw.uniform(0.0, canvas - 0.35)
        colour = np.clip(level + draw.uniform(-0.25, 0.25, 3), 0, 1) if draw.random() < 0.7 else np.full(3, level)
        if all(np.abs(colour - other).max() >= CONTRAST for other in others):
            break
    return colour


def _write(folder: Path) -> None:
    (folder / "annotations").mkdir()
    for split in N_SCENES:
        place = folder / f"{split}2017"
        place.mkdir()
        pictures: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, scene in enumerate(scenes(split), start=1):
            name = f"{number:012d}.png"
            Image.fromarray(scene.image).save(place / name)
            pictures.append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
            for digit, mask in zip(scene.digits, scene.masks, strict=True):
                annotations.append(annotation(len(annotations) + 1, number, digit + 1, mask))
        categories = [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)]
        table = {
            "info": {"description": "scenes of scikit-learn's handwritten digits"},
            "licenses": [],
            "images": pictures,
            "annotations": annotations,
            "categories": categories,
        }
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(table), encoding="utf-8")


def annotation(number: int, image_id: int, category_id: int, mask: np.ndarray) -> dict[str, Any]:
    """COCO's annotation of one object, its mask (h, w, bool) as a compressed RLE, its box tight around it."""
    code = mask_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [float(side) for side in mask_codec.toBbox(code)],
        "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode()},
    }


def _digits_of(split: str, labels: np.ndarray) -> np.ndarray:
    """Numbers of the digits that the scenes of a split are made of: every fifth of a class is for validation."""
    seen = [0] * 10
    chosen = []
    for number, label in enumerate(labels):
        validation = seen[label] % VALIDATION_EVERY == VALIDATION_EVERY - 1
        seen[label] += 1
        if validation == (split == "val"):
            chosen.append(number)
    return np.array(chosen)


def _is_complete(root: Path) -> bool:
    for split, count in N_SCENES.items():
        if not (root / "annotations" / f"instances_{split}2017.json").is_file():
            return False
        if not (root / f"{split}2017").is_dir() or sum(1 for _ in (root / f"{split}2017").glob("*.png")) != count:
            return False
    return True
