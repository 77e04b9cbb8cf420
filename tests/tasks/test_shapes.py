"""Which shapes of images cannot be resized, told from their sizes."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from src.tasks.shapes import MOST_PIXELS, too_long, too_narrow


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (30_000, 20_000), (10_240, 10), (10, 10_240)])
def test_usual_images_can_be_brought_to_a_short_side(size: tuple[int, int]) -> None:
    assert too_long(size, 256) is None


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (4_000, 3)])
def test_lines_would_become_too_long(size: tuple[int, int]) -> None:
    problem = too_long(size, 256)
    assert problem is not None
    assert f"{size[0]}x{size[1]}" in problem
    assert f"{MOST_PIXELS // 256:,}" in problem
    assert "dataloader.resize" in problem


@pytest.mark.parametrize(
    "size", [(4000, 3), (3, 4000), (1333, 1), (1334, 1), (640, 480), (2, 2666), (2, 2670), (1, 1), (7, 9331), (7, 9332)]
)
def test_nothing_is_left_of_just_the_images_that_torchvision_cannot_resize(size: tuple[int, int]) -> None:
    resize = GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
    width, height = size
    try:
        resize([torch.zeros(3, height, width)])
        fails = False
    except RuntimeError:
        fails = True
    assert (too_narrow(size, 800, 1333) is not None) is fails


def test_the_setting_to_change_is_named() -> None:
    assert "4000x3" in str(too_narrow((4000, 3), 800, 1333))
    assert "dataloader.max_size" in str(too_narrow((4000, 3), 800, 1333))
