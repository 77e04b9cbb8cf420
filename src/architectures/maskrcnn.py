"""Mask R-CNN with a ResNet-50 FPN backbone: construction, published weights, layers that share a permutation, old layer
names.

Class 0 is the background, so a network for COCO's category ids (up to 90) has 91 classes.

Norms. The published weights were trained with frozen batch norms, whose eps torchvision sets to 0; a network from
random weights needs norms that learn. A state dict says which it is: frozen norms count no batches. A compressed file
holds folded norms and loads into either.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from ..compression.permute.groups import Group
from .architecture import Architecture
from .resnet import resnet_groups

BODY = "backbone.body."
N_LEVELS = 4
"""Feature maps of the backbone that the pyramid reads, one per stage."""
INNER = tuple(f"backbone.fpn.inner_blocks.{level}.0" for level in range(N_LEVELS))
OUTER = tuple(f"backbone.fpn.layer_blocks.{level}.0" for level in range(N_LEVELS))
RPN_CONV = "rpn.head.conv.0.0"
FC6, FC7 = "roi_heads.box_head.fc6", "roi_heads.box_head.fc7"
MASK_CONVS = tuple(f"roi_heads.mask_head.{number}.0" for number in range(4))
MASK_DECONV = "roi_heads.mask_predictor.conv5_mask"
HEAD = "roi_heads.box_predictor.cls_score"

RESHAPES = {FC6: (1024, 256, 7, 7)}
"""fc6 reads a flattened 256 x 7 x 7 map."""

OLD_NAMES = {
    **{name.removesuffix(".0"): name for name in (*INNER, *OUTER)},
    "rpn.head.conv": RPN_CONV,
    **{f"roi_heads.mask_head.mask_fcn{number}": name for number, name in enumerate(MASK_CONVS, start=1)},
}
"""Names in torchvision before 0.14, which published files and users' settings files use -> names now."""


def maskrcnn_groups(model: nn.Module) -> list[Group]:
    """Permutation groups of the whole network, in its order: backbone, pyramid, region proposals, box head, mask
    head."""
    body = cast(MaskRCNN, model).backbone.body
    return [
        *resnet_groups(body, BODY, [(inner,) for inner in INNER]),
        Group(INNER, OUTER),
        Group(OUTER, (FC6, RPN_CONV, MASK_CONVS[0])),
        Group((RPN_CONV,), ("rpn.head.cls_logits", "rpn.head.bbox_pred")),
        Group((FC6,), (FC7,)),
        Group((FC7,), (HEAD, "roi_heads.box_predictor.bbox_pred")),
        *(Group((one,), (next_one,)) for one, next_one in zip(MASK_CONVS, (*MASK_CONVS[1:], MASK_DECONV), strict=True)),
        Group((MASK_DECONV,), ("roi_heads.mask_predictor.mask_fcn_logits",)),
    ]


def build(n_classes: int) -> nn.Module:
    """With batch norms that learn, for random weights and for compressed files."""
    return MaskRCNN(_backbone(nn.BatchNorm2d), num_classes=n_classes)


def build_frozen(n_classes: int) -> nn.Module:
    """With frozen batch norms of eps 0, as the published weights were trained; every convolution is trained, the stem
    too."""
    model = MaskRCNN(_backbone(FrozenBatchNorm2d), num_classes=n_classes)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    return model


def _backbone(norm: type[nn.Module]) -> nn.Module:
    return resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=5)


def head_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What all heads give for fixed boxes on `images` (B, 3, H, W), both sides at least 64.

    Everything that follows (proposals, their suppression, detections) is a function of these, and has no weights; with
    random weights it may leave no detection at all, so that there would be nothing to compare.

    Returns:
        Per level objectness and box offsets of the region proposals; then class logits, box offsets and mask logits of
        the boxes.
    """
    net = cast(MaskRCNN, model)
    height, width = images.shape[-2:]
    whole = torch.tensor([0, 0, width, height], dtype=images.dtype, device=images.device)
    parts = [[0, 0, 1, 1], [0.1, 0.2, 0.7, 0.6], [0.5, 0.25, 0.95, 0.9], [0.3, 0.6, 0.5, 0.8]]
    boxes = [whole[[2, 3, 2, 3]] * torch.tensor(parts, dtype=images.dtype, device=images.device)] * len(images)
    sizes = [(int(height), int(width))] * len(images)
    features = net.backbone(images)
    objectness, offsets = net.rpn.head(list(features.values()))
    heads = net.roi_heads
    classes, box_offsets = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))
    masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, sizes)))
    return [*objectness, *offsets, classes, box_offsets, masks]


MASKRCNN = Architecture(
    name="maskrcnn",
    task="detection",
    build=build,
    weights_url=MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url,
    n_classes=91,
    head=HEAD,
    heads_beside=("roi_heads.box_predictor.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits"),
    groups=maskrcnn_groups,
    build_frozen=build_frozen,
    outputs=head_outputs,
    reshapes=RESHAPES,
    old_names=OLD_NAMES,
    backbone=BODY.removesuffix("."),
)
