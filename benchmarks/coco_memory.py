"""Memory and time of scoring detections on a data set of COCO's size: 5,000 images with 100 detections each.

No network runs: boxes are drawn around and between the objects of a made-up ground truth (7 per image, 80 categories),
their masks as a network's head gives them (28 x 28 probabilities, pasted into an image of 640 x 480 by torchvision's
own function), and one image after the other goes through `Detections.add` and then `coco_figures`. Ten images in a row
share what was drawn (making it up takes longer than scoring it), but each is encoded and kept by itself. This happens
in a process of its own, whose peak memory the system reports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from src.tasks.coco.metrics import BACKENDS, Detections, coco_figures, read_results, write_results

from .report import largest_resident_set, machine, print_machine, print_table, verdict, write_json

HEIGHT, WIDTH = 480, 640
N_CATEGORIES = 80
OBJECTS = 7
LIMIT_GB = 4.0
SHARED = 10
"""Images in a row with the same detections."""


def boxes(count: int, draw: np.random.Generator) -> Tensor:
    """Boxes (count, 4) of COCO's spread of sizes, left, top, right, bottom."""
    sides = np.exp(draw.normal(4.2, 0.9, (count, 2))).clip(6, [WIDTH - 1, HEIGHT - 1])
    corners = draw.random((count, 2)) * ([WIDTH, HEIGHT] - sides)
    return torch.from_numpy(np.concatenate([corners, corners + sides], axis=1)).float()


def head_masks(count: int, draw: np.random.Generator) -> Tensor:
    """Probabilities (count, 1, 28, 28): a blob with a ragged rim."""
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    angle = np.arctan2(y, x)
    waves = sum(
        draw.normal(0, 0.12, (count, 1, 1)) * np.sin(n * angle + draw.random((count, 1, 1)) * 6.3) for n in range(2, 9)
    )
    return torch.from_numpy(1 / (1 + np.exp(-12 * (0.85 + waves - np.hypot(x, y)))))[:, None].float()


def ground_truth(n_images: int, draw: np.random.Generator) -> tuple[COCO, dict[int, Tensor]]:
    """Annotations, and the boxes of each image."""
    found, objects = {}, Detections()
    for image_id in range(1, n_images + 1):
        if (image_id - 1) % SHARED == 0:
            drawn = boxes(OBJECTS, draw)
            masks = paste_masks_in_image(head_masks(OBJECTS, draw), drawn, (HEIGHT, WIDTH))
            labels = torch.from_numpy(draw.integers(1, N_CATEGORIES + 1, OBJECTS))
        found[image_id] = drawn
        objects.add(image_id, {"boxes": drawn, "labels": labels, "scores": torch.ones(OBJECTS), "masks": masks})
    annotations = objects.rows()
    for number, annotation in enumerate(annotations, start=1):
        annotation |= {"id": number, "iscrowd": 0, "area": int(mask_codec.area(annotation["segmentation"]))}
    api = COCO()
    api.dataset = {
        "images": [{"id": image_id, "height": HEIGHT, "width": WIDTH} for image_id in found],
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in range(1, N_CATEGORIES + 1)],
    }
    api.createIndex()
    return api, found


def output_like(api: COCO, image_id: int, truth: Tensor, count: int, draw: np.random.Generator) -> dict[str, Tensor]:
    """`count` detections in an image: a third near its objects with mostly the right label, the others anywhere."""
    labels = torch.from_numpy(draw.integers(1, N_CATEGORIES + 1, count))
    found = boxes(count, draw)
    near = count // 3
    chosen = draw.integers(0, len(truth), near)
    found[:near] = truth[chosen] + torch.from_numpy(draw.normal(0, 4, (near, 4))).float()
    found[:, 0::2].clamp_(0, WIDTH)
    found[:, 1::2].clamp_(0, HEIGHT)
    found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 1)
    right = torch.tensor([annotation["category_id"] for annotation in api.imgToAnns[image_id]])[chosen]
    labels[:near] = torch.where(torch.from_numpy(draw.random(near) < 0.7), right, labels[:near])
    masks = paste_masks_in_image(head_masks(count, draw), found, (HEIGHT, WIDTH))
    return {"boxes": found, "labels": labels, "scores": torch.from_numpy(draw.random(count)).float(), "masks": masks}


def peak_gb() -> float:
    """Largest resident memory of this process so far."""
    return largest_resident_set() / 2**30


def measure(n_images: int, per_image: int, backend: str) -> dict[str, Any]:
    """Everything in this process; seconds and peak memory after each step."""
    draw = np.random.default_rng(0)
    torch.set_num_threads(1)
    steps: list[dict[str, Any]] = [{"step": "imports", "seconds": 0.0, "peak_gb": peak_gb()}]

    def note(step: str, seconds: float) -> None:
        steps.append({"step": step, "seconds": seconds, "peak_gb": peak_gb()})

    start = time.perf_counter()
    api, truth = ground_truth(n_images, draw)
    note("ground truth made up", time.perf_counter() - start)
    found, making, adding = Detections(), 0.0, 0.0
    for image_id, its_boxes in truth.items():
        start = time.perf_counter()
        if (image_id - 1) % SHARED == 0:
            output = output_like(api, image_id, its_boxes, per_image, draw)
        middle = time.perf_counter()
        found.add(image_id, output)
        making, adding = making + middle - start, adding + time.perf_counter() - middle
    note("detections made up", making)
    note("Detections.add", adding)
    rows = found.rows()
    results: dict[str, float] = {}
    for kind in ("bbox", "segm"):
        start = time.perf_counter()
        results[kind] = coco_figures(api, rows, kind, list(truth), backend=backend).stats["AP"]
        note(f"coco_figures, {kind}", time.perf_counter() - start)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_results(Path(folder) / "detections.json", rows)
        note("write_results", time.perf_counter() - start)
        start = time.perf_counter()
        read_results(Path(folder) / "detections.json", api)
        note("read_results", time.perf_counter() - start)
    return {
        "images": n_images,
        "detections": len(rows),
        "backend": backend,
        "AP": results,
        "steps": steps,
        "peak_gb": peak_gb(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coco_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--per-image", type=int, default=100, help="detections in each")
    parser.add_argument("--backend", choices=list(BACKENDS), default="pycocotools")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/coco_memory.json"), help="where the results are written"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(measure(options.images, options.per_image, options.backend)))
        return
    found = machine()
    print_machine(found)
    command = [sys.executable, "-m", "benchmarks.coco_memory", "--child", "--images", str(options.images)]
    command += ["--per-image", str(options.per_image), "--backend", options.backend]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    rows = [[step["step"], f"{step['seconds']:.1f}", f"{step['peak_gb']:.2f}"] for step in result["steps"]]
    title = (
        f"{result['images']:,} images, {result['detections']:,} detections with masks of {WIDTH} x {HEIGHT}, "
        f"{result['backend']}"
    )
    print_table(title, ["step", "seconds", "peak GB so far"], rows)
    print(f"\npeak memory {result['peak_gb']:.2f} GB, {verdict(result['peak_gb'], LIMIT_GB)}")
    write_json(options.json, {"machine": found, "limit_gb": LIMIT_GB, **result})


if __name__ == "__main__":
    main()
