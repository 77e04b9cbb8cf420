"""Small COCO folders made for tests: coloured rectangles and ellipses on noise, with exact polygons or run lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_codec

CATEGORIES = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}, {"id": 4, "name": "bar"}]


def rectangle(number: int, image_id: int, category_id: int, box: list[float], **more: Any) -> dict[str, Any]:
    """An annotation of a filled rectangle."""
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": w * h, "iscrowd": 0,
        "segmentation": [polygon],
        **more,
    }  # fmt: skip


def crowd(number: int, image_id: int, category_id: int, mask: np.ndarray) -> dict[str, Any]:
    """An annotation of a crowd region (H, W)."""
    encoded = mask_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
    box = [float(value) for value in mask_codec.toBbox(encoded)]
    runs = {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": float(mask.sum()),
        "iscrowd": 1, "segmentation": runs,
    }  # fmt: skip


def contents(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """An annotation file."""
    return {
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES if categories is None else categories,
    }


def entry(image_id: int, width: int, height: int) -> dict[str, Any]:
    """An image in an annotation file."""
    return {"id": image_id, "file_name": f"{image_id:06d}.png", "width": width, "height": height}


def write(root: Path, split: str, what: dict[str, Any], pictures: bool = True) -> Path:
    """Write a split into the folder `root`; returns the annotation file. Objects' boxes are painted in their category's
    colour."""
    source = root / "annotations" / f"instances_{split}2017.json"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(json.dumps(what))
    folder = root / f"{split}2017"
    folder.mkdir(exist_ok=True)
    if pictures:
        for image in what["images"]:
            draw = np.random.default_rng(image["id"])
            pixels = draw.integers(0, 60, (image["height"], image["width"], 3), dtype=np.uint8)
            for annotation in what["annotations"]:
                if annotation["image_id"] == image["id"]:
                    x, y, w, h = (int(value) for value in annotation["bbox"])
                    pixels[max(y, 0) : y + h, max(x, 0) : x + w, annotation["category_id"] % 3] += 150
            Image.fromarray(pixels).save(folder / image["file_name"])
    return source


def small_coco(root: Path) -> Path:
    """Four training images of two shapes and three for validation (one without objects), with a crowd and a degenerate
    box each."""
    sizes = {1: (96, 64), 2: (64, 96), 3: (96, 64), 4: (64, 96)}
    annotations = []
    for image_id, (width, height) in sizes.items():
        first = 10 * image_id
        annotations += [
            rectangle(first, image_id, 1, [8, 8, 24, 20]),
            rectangle(first + 1, image_id, 4, [30, 30, 30, 24]),
        ]
        if image_id == 1:
            region = np.zeros((height, width), dtype=bool)
            region[40:60, 4:20] = True
            annotations += [crowd(first + 2, image_id, 2, region), rectangle(first + 3, image_id, 2, [5, 5, 0, 9])]
    images = [entry(image_id, *size) for image_id, size in sizes.items()]
    write(root, "train", contents(images, annotations))
    kept = [annotation for annotation in annotations if annotation["image_id"] != 3]
    write(root, "val", contents(images[:3], [annotation for annotation in kept if annotation["image_id"] < 3]))
    return root


def varied_coco(root: Path, n_images: int = 24, seed: int = 0) -> Path:
    """Two splits like COCO's own in kind: images of many shapes, 5 categories with gaps in their numbers, polygons of
    several parts, ellipses with holes cut by other objects, crowds as compressed and as plain run lengths, objects
    without masks' usual order, boxes at the borders, and images without objects."""
    categories = [{"id": number, "name": name} for number, name in ((1, "a"), (3, "b"), (4, "c"), (18, "d"), (90, "e"))]
    for place, split in enumerate(("train", "val")):
        draw = np.random.default_rng([seed, place])
        images, annotations = [], []
        for number in range(n_images):
            width, height = (int(side) for side in draw.integers(40, 320, 2))
            image_id = 1000 * (place + 1) + 7 * number
            images.append(entry(image_id, width, height))
            if number % 8 == 7:
                continue  # without objects
            for _ in range(int(draw.integers(1, 7))):
                category = int(draw.choice([row["id"] for row in categories]))
                annotations.append(_object(len(annotations) + 1, image_id, category, width, height, draw))
            if number % 5 == 2:
                region = _ellipse(width, height, draw) | _ellipse(width, height, draw)
                annotations.append(crowd(len(annotations) + 1, image_id, int(draw.choice([1, 18])), region))
        write(root, split, contents(images, annotations, categories))
    return root


def _object(
    number: int, image_id: int, category_id: int, width: int, height: int, draw: np.random.Generator
) -> dict[str, Any]:
    """An object of one or two polygons within the image."""
    parts = []
    for _ in range(int(draw.integers(1, 3))):
        centre = draw.uniform([0.2 * width, 0.2 * height], [0.8 * width, 0.8 * height])
        radius = draw.uniform(5, 0.45 * min(width, height) + 5)
        corners = int(draw.integers(7, 13))  # blunt ones, which have pixels in them
        angles = 2 * np.pi * (np.arange(corners) + draw.uniform(-0.3, 0.3, corners)) / corners
        points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
        parts.append(np.clip(points, 0, [width, height]).round(2).reshape(-1).tolist())
    mask = mask_codec.decode(mask_codec.merge(mask_codec.frPyObjects(parts, height, width)))
    points = np.concatenate([np.reshape(part, (-1, 2)) for part in parts])
    (left, top), (right, bottom) = points.min(0), points.max(0)
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "area": float(mask.sum()), "iscrowd": 0,
        "segmentation": parts,
        "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
    }  # fmt: skip


def _ellipse(width: int, height: int, draw: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    cx, cy, a, b = draw.uniform([0, 0, 6, 6], [width, height, width / 2, height / 2])
    return ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 <= 1
