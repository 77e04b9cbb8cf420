"""Pictures of detections: boxes, masks, labels and scores on the image, the dense network's beside the compressed
one's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#808000", "#000075")
"""Told apart on light and on dark images; a category always has the same one."""
SHORTEST_SIDE = 480
"""Pixels to which smaller images are enlarged, so that labels can be read and do not cover them."""
LARGEST_SCALE = 4
MASK_OPACITY = 0.5
CAPTION_HEIGHT = 26
GAP = 6


def draw_side_by_side(
    image: Tensor,
    dense: Mapping[str, Tensor] | None,
    compressed: Mapping[str, Tensor],
    names: Mapping[int, str],
    score_threshold: float = 0.5,
) -> Image.Image:
    """The image with what the dense network found beside the image with what the compressed one found.

    Args:
        image: (3, H, W) uint8.
        dense: the dense network's output as torchvision gives it (see `Detections.add`); None: one picture only.
        compressed: the compressed network's.
        names: of the categories by their output of the head.
        score_threshold: detections with a lower score are not drawn.
    """
    outputs = {"compressed": compressed} if dense is None else {"dense": dense, "compressed": compressed}
    pictures = []
    for title, output in outputs.items():
        kept = {name: value.cpu() for name, value in output.items()}
        kept = {name: value[kept["scores"] >= score_threshold] for name, value in kept.items()}
        count = len(kept["scores"])
        caption = f"{title}: {count or 'no'} detection{'' if count == 1 else 's'}, score {score_threshold:g} or more"
        pictures.append(_with_caption(to_pil_image(draw_detections(image, kept, names)), caption))
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP
    return sheet


def draw_detections(image: Tensor, output: Mapping[str, Tensor], names: Mapping[int, str]) -> Tensor:
    """The image, enlarged if small, with all detections of `output` drawn, the best on top: (3, H, W) uint8."""
    scale = max(1, min(LARGEST_SCALE, SHORTEST_SIDE // min(image.shape[-2:])))
    canvas = image.cpu().repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    order = output["scores"].argsort()
    labels, scores = output["labels"][order].tolist(), output["scores"][order].tolist()
    if not labels:
        return canvas
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    if "masks" in output:
        masks = output["masks"][order, 0] > 0.5
        masks = masks.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        canvas = draw_segmentation_masks(canvas, masks, alpha=MASK_OPACITY, colors=colours)
    boxes = _visible(output["boxes"][order].float() * scale, canvas.shape[-1], canvas.shape[-2])
    canvas = draw_bounding_boxes(canvas, boxes, colors=colours, width=2)
    return _with_labels(
        canvas,
        boxes,
        [f"{names.get(label, label)} {score:.2f}" for label, score in zip(labels, scores, strict=True)],
        colours,
    )


def _visible(boxes: Tensor, width: int, height: int) -> Tensor:
    """Boxes whose rims lie within the image and that are at least a pixel wide, as drawing needs."""
    corners = torch.minimum(boxes.clamp_min(0), torch.tensor([width - 2, height - 2, width - 1, height - 1]))
    return torch.cat([corners[:, :2], torch.maximum(corners[:, 2:], corners[:, :2] + 1)], dim=1)


def _with_labels(canvas: Tensor, boxes: Tensor, texts: list[str], colours: list[str]) -> Tensor:
    """Each text in white on its colour, above its box where there is room, else inside."""
    picture = to_pil_image(canvas)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    for (left, top, _, _), text, colour in zip(boxes.tolist(), texts, colours, strict=True):
        x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
        width, height = x1 - x0 + 4, y1 - y0 + 4
        x = max(0.0, min(left, picture.width - width))
        y = top - height if top >= height else top
        pen.rectangle([x, y, x + width, y + height], fill=colour)
        pen.text((x + 2 - x0, y + 2 - y0), text, fill="white", font=font)
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        .reshape(picture.height, picture.width, 3)
        .permute(2, 0, 1)
    )


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    framed = Image.new("RGB", (picture.width, picture.height + CAPTION_HEIGHT), "white")
    framed.paste(picture, (0, CAPTION_HEIGHT))
    ImageDraw.Draw(framed).text((4, 4), caption, fill="black", font=ImageFont.load_default(size=14))
    return framed
