"""What the heads of torchvision's detectors give before boxes are selected.

Selection (proposals, suppression, the best so many) jumps when a value changes by rounding, and with random weights it
may leave nothing. Everything behind it is a function, without weights, of what the heads give for the feature maps and
for fixed boxes; so that is what a permutation must leave as it is, and what shows all layers of a detector at work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from ..common.errors import GroupError

ONE_STAGE = (RetinaNet, FCOS, SSD)
BOXES = ((0, 0, 1, 1), (0.1, 0.2, 0.7, 0.6), (0.5, 0.25, 0.95, 0.9), (0.3, 0.6, 0.5, 0.8))
"""As parts of the image."""


def is_detector(model: nn.Module) -> bool:
    """Whether `detector_outputs` knows how to run the network."""
    return isinstance(model, (*ONE_STAGE, GeneralizedRCNN))


def detector_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What all heads give for `images` (B, 3, H, W), as they are: not normalised, not resized.

    Returns:
        Of a one-stage detector (RetinaNet, FCOS, SSD, SSDlite): everything its heads give. Of a two-stage one (Faster,
        Mask, Keypoint R-CNN): objectness and box offsets of the region proposals per level; then, of fixed boxes, class
        logits, box offsets, and mask and keypoint logits where there are such heads.

    Raises:
        GroupError: the network is no detector of torchvision's.
    """
    net: Any = model
    if isinstance(model, ONE_STAGE):
        features = _maps(net.backbone(images))
        return list(net.head(list(features.values())).values())
    if not isinstance(model, GeneralizedRCNN):
        raise GroupError(
            f"a {type(model).__name__} is no detector of torchvision's; give a function that runs it and returns what "
            "its heads give before boxes are selected"
        )
    features = _maps(net.backbone(images))
    objectness, offsets = net.rpn.head(list(features.values()))
    height, width = (int(side) for side in images.shape[-2:])
    scale = torch.tensor([width, height, width, height], dtype=images.dtype, device=images.device)
    boxes = [torch.tensor(BOXES, dtype=images.dtype, device=images.device) * scale] * len(images)
    sizes = [(height, width)] * len(images)
    heads = net.roi_heads
    results = [*objectness, *offsets, *heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))]
    for kind in ("mask", "keypoint"):
        pool = getattr(heads, f"{kind}_roi_pool", None)
        if pool is not None:
            head, predictor = getattr(heads, f"{kind}_head"), getattr(heads, f"{kind}_predictor")
            results.append(predictor(head(pool(features, boxes, sizes))))
    return results


def _maps(features: Any) -> dict[str, Tensor]:
    """A backbone without a pyramid gives one map."""
    return {"0": features} if isinstance(features, Tensor) else features


def batch_outputs(model: nn.Module, batch: Any) -> object:
    """What a network gives for a batch of its inputs: one of torchvision's detectors what its heads give for the images
    (3, H, W) as it prepares them itself, any other what it returns.

    Args:
        model: the network.
        batch: inputs; a dict holds keyword arguments.
    """
    if is_detector(model):
        net: Any = model
        return detector_outputs(model, net.transform(list(batch))[0].tensors)
    return model(**batch) if isinstance(batch, Mapping) else model(batch)
