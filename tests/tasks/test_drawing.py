"""Pictures of detections show what was found where it was found, and nothing where nothing was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from src.tasks.drawing import CAPTION_HEIGHT, GAP, LARGEST_SCALE, draw_detections, draw_side_by_side

NAMES = {1: "cat", 2: "dog"}


def output(boxes: list[list[float]], scores: list[float], side: tuple[int, int] = (60, 80)) -> dict[str, torch.Tensor]:
    masks = torch.zeros(len(boxes), 1, *side)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[0, int(top) : int(bottom), int(left) : int(right)] = 0.9
    labels = torch.tensor([1 + number % 3 for number in range(len(boxes))], dtype=torch.int64)
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": labels,
        "scores": torch.tensor(scores),
        "masks": masks,
    }


IMAGE = torch.full((3, 60, 80), 128, dtype=torch.uint8)


def body(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)[CAPTION_HEIGHT:]


def test_dense_and_compressed_stand_side_by_side():
    found = output([[10, 20, 40, 50]], [0.9])
    picture = draw_side_by_side(IMAGE, found, output([], []), NAMES)
    width, height = 80 * LARGEST_SCALE, 60 * LARGEST_SCALE
    assert picture.size == (2 * width + GAP, height + CAPTION_HEIGHT)
    left, right = body(picture)[:, :width], body(picture)[:, width + GAP :]
    assert (right == 128).all()
    inside = left[25 * LARGEST_SCALE : 45 * LARGEST_SCALE, 15 * LARGEST_SCALE : 35 * LARGEST_SCALE]
    assert (inside != 128).any(-1).all()
    assert (left[55 * LARGEST_SCALE :] == 128).all()


def test_without_a_dense_network_there_is_one_picture():
    picture = draw_side_by_side(IMAGE, None, output([[10, 20, 40, 50]], [0.9]), NAMES)
    assert picture.size == (80 * LARGEST_SCALE, 60 * LARGEST_SCALE + CAPTION_HEIGHT)
    assert (body(picture) != 128).any()


def test_detections_below_the_threshold_are_left_out():
    found = output([[10, 20, 40, 50], [50, 5, 70, 30]], [0.9, 0.4])
    high = draw_side_by_side(IMAGE, None, found, NAMES)
    assert (
        body(high).tobytes() == body(draw_side_by_side(IMAGE, None, output([[10, 20, 40, 50]], [0.9]), NAMES)).tobytes()
    )
    low = draw_side_by_side(IMAGE, None, found, NAMES, score_threshold=0.3)
    assert body(low).tobytes() != body(high).tobytes()


def test_the_image_itself_is_not_drawn_on():
    image = IMAGE.clone()
    draw_side_by_side(image, None, output([[10, 20, 40, 50]], [0.9]), NAMES)
    assert torch.equal(image, IMAGE)


def test_a_large_image_keeps_its_size_and_boxes_need_no_masks():
    image = torch.zeros(3, 500, 700, dtype=torch.uint8)
    found = {name: value for name, value in output([[10, 20, 40, 50]], [0.9]).items() if name != "masks"}
    drawn = draw_detections(image, found, NAMES)
    assert drawn.shape == image.shape
    assert drawn[:, 35, 10:12].any()  # the left rim
    assert not drawn[:, 35, 20:30].any()  # nothing fills the box


@given(st.lists(st.tuples(st.floats(-5, 90), st.floats(-5, 70), st.floats(0, 100), st.floats(0, 80)), max_size=4))
@settings(max_examples=30, deadline=None)
def test_any_boxes_can_be_drawn(boxes):
    found = output([], [])
    corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4)
    n = len(corners)
    found |= {
        "boxes": corners,
        "labels": torch.full((n,), 99),
        "scores": torch.ones(n),
        "masks": torch.zeros(n, 1, 60, 80),
    }
    assert draw_side_by_side(IMAGE, found, found, NAMES).height == 60 * LARGEST_SCALE + CAPTION_HEIGHT


@pytest.mark.parametrize("shape", [(1, 1), (3, 900)])
def test_odd_images(shape):
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    draw_side_by_side(image, None, output([[0, 0, 1, 1]], [0.9], shape), NAMES)
