"""Small detection networks of every kind that torchvision has, for tests: real ones, with little in them. Each can be
named as a user's own callable, `tests.support.detectors:fcos`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import MultiScaleRoIAlign

SIZES = {"min_size": 64, "max_size": 96}


class Backbone(nn.Sequential):
    """One map of 32 channels, an eighth of the image."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict([("0", super().forward(x))])


def retinanet(num_classes: int = 91) -> nn.Module:
    """RetinaNet on one map."""
    anchors = AnchorGenerator(((24,),), ((0.8, 1.25),))
    return RetinaNet(Backbone(), num_classes, anchor_generator=anchors, **SIZES)


def fcos(num_classes: int = 91) -> nn.Module:
    """FCOS on one map."""
    return FCOS(Backbone(), num_classes, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)), **SIZES)


def ssd(num_classes: int = 91) -> nn.Module:
    """SSD on one map, for images of 96 x 64 pixels."""
    boxes = DefaultBoxGenerator([[2]], scales=[0.3, 0.4])
    head = SSDHead([32], boxes.num_anchors_per_location(), num_classes)
    return SSD(Backbone(), boxes, (96, 64), num_classes, head=head)


def fasterrcnn(num_classes: int = 91) -> nn.Module:
    """Faster R-CNN on one map."""
    return FasterRCNN(Backbone(), **_rcnn(), box_predictor=FastRCNNPredictor(64, num_classes), **SIZES)


def keypointrcnn(num_classes: int = 2) -> nn.Module:
    """Keypoint R-CNN on one map, with three keypoints."""
    return KeypointRCNN(
        Backbone(),
        **_rcnn(),
        box_predictor=FastRCNNPredictor(64, num_classes),
        keypoint_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        keypoint_head=KeypointRCNNHeads(32, (16,)),
        keypoint_predictor=KeypointRCNNPredictor(16, 3),
        **SIZES,
    )


def _rcnn() -> dict[str, object]:
    return {
        "rpn_anchor_generator": AnchorGenerator(((16, 32),), ((1.0,),)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 5, 2),
        "box_head": TwoMLPHead(32 * 25, 64),
    }


WITHOUT_MASKS: dict[str, Callable[[int], nn.Module]] = {
    "retinanet": retinanet,
    "fcos": fcos,
    "ssd": ssd,
    "fasterrcnn": fasterrcnn,
}
"""Those that learn from boxes alone."""
