"""What a two-stage detector learns from a teacher: what its heads give for the same proposals, before boxes are
selected.

The network's own forward pass proposes boxes and draws those to learn from; the teacher judges the same ones, on the
same images as the network has resized them. Shapes: A anchors, P proposals, N classes, 0 the background.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from ..compression.finetune.distillation import Distillation, difference, divergence


@dataclass
class Heads:
    """What the heads gave in a forward pass.

    Attributes:
        maps: feature maps of the backbone or its pyramid, by level.
        objectness: per level (B, anchors per place, H, W).
        offsets: of the anchors, per level (B, 4 * anchors per place, H, W).
        classes: logits (P, N).
        boxes: offsets of the proposals for each class (P, 4 * N).
        masks: logits (proposals with an object in them, N, H, W); None: there is no such head.
    """

    maps: Mapping[str, Tensor] = field(default_factory=dict)
    objectness: list[Tensor] = field(default_factory=list)
    offsets: list[Tensor] = field(default_factory=list)
    classes: Tensor = field(default_factory=lambda: torch.empty(0))
    boxes: Tensor = field(default_factory=lambda: torch.empty(0))
    masks: Tensor | None = None


@dataclass
class Seen(Heads):
    """What the trained network's heads gave, and what for.

    Attributes:
        images: as the network has resized, normalised and padded them (B, 3, H, W).
        proposals: the inputs of the pool of the box head: maps, boxes per image, sizes of images.
        of_masks: the same of the mask head.
    """

    images: Tensor = field(default_factory=lambda: torch.empty(0))
    proposals: tuple[Any, ...] = ()
    of_masks: tuple[Any, ...] = ()


def why_nothing_is_learnt(model: nn.Module, name: str) -> str:
    """Why `model`, called `name`, has no heads as they are compared here; empty: it has."""
    if isinstance(model, GeneralizedRCNN):
        return ""
    return (
        f"{name} judges all places of its maps at once, and only detectors that propose boxes and look into each, such "
        "as Faster and Mask R-CNN, learn from a teacher here"
    )


class DetectionDistillation:
    """The loss of a two-stage detector that learns from another one of its architecture.

    weight * (KL of classes, T^2 as in classification; binary KL of objectness and of masks; squared differences of the
    offsets of anchors and proposals, weighted by how sure the teacher is) + labels * (the network's own losses) +
    features * (what the maps of the pyramid differ).
    """

    def __init__(self, learned: Distillation) -> None:
        self.learned = learned

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Seen]:
        """What the heads of `model` give in a forward pass meanwhile."""
        net: Any = model if hasattr(model, "roi_heads") else model.module  # as an engine wraps it
        seen, heads = Seen(), net.roi_heads

        def transformed(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.images = output[0].tensors

        def mapped(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.maps = _maps(output)

        def proposing(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.objectness, seen.offsets = output

        def pooling(_module: nn.Module, inputs: Any) -> None:
            seen.proposals = inputs[1:]

        def judged(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.classes, seen.boxes = output

        def pooling_masks(_module: nn.Module, inputs: Any) -> None:
            seen.of_masks = inputs[1:]

        def masked(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.masks = output

        with ExitStack() as hooks:
            hooks.callback(net.transform.register_forward_hook(transformed).remove)
            hooks.callback(net.backbone.register_forward_hook(mapped).remove)
            hooks.callback(net.rpn.head.register_forward_hook(proposing).remove)
            hooks.callback(heads.box_roi_pool.register_forward_pre_hook(pooling).remove)
            hooks.callback(heads.box_predictor.register_forward_hook(judged).remove)
            if heads.has_mask():
                hooks.callback(heads.mask_roi_pool.register_forward_pre_hook(pooling_masks).remove)
                hooks.callback(heads.mask_predictor.register_forward_hook(masked).remove)
            yield seen

    def loss(self, seen: Seen, own: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts for the log; `own` is the sum of the network's own losses."""
        spec, wanted = self.learned.spec, self.answers(seen)
        parts = {
            "divergence_classes": divergence(seen.classes, wanted.classes, spec.temperature),
            "difference_boxes": _of_boxes(seen, wanted),
            **_of_anchors(seen, wanted, spec.temperature),
        }
        if seen.masks is not None and wanted.masks is not None:
            parts["divergence_masks"] = _mean(_binary(seen.masks, wanted.masks, spec.temperature))
        total = spec.weight * torch.stack(list(parts.values())).sum()
        if spec.features:
            parts["feature_difference"] = difference(seen.maps, wanted.maps)
            total = total + spec.features * parts["feature_difference"]
        if spec.labels:
            total = total + spec.labels * own
        return total, {name: value.detach() for name, value in parts.items()}

    @torch.no_grad()
    def answers(self, seen: Seen) -> Heads:
        """What the teacher's heads give for the same proposals."""
        net: Any = self.learned.teacher
        heads, device = net.roi_heads, seen.images.device.type
        with torch.autocast(device, dtype=self.learned.amp, enabled=self.learned.amp is not None):
            maps = _maps(net.backbone(seen.images))
            objectness, offsets = net.rpn.head(list(maps.values()))
            classes, boxes = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, *seen.proposals)))
            masks = None
            if seen.masks is not None and heads.has_mask():
                masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, *seen.of_masks)))
        return Heads(maps, objectness, offsets, classes, boxes, masks)


def _maps(output: Any) -> dict[str, Tensor]:
    """A backbone without a pyramid gives one map."""
    return {"0": output} if isinstance(output, Tensor) else dict(output)


def _mean(values: Tensor) -> Tensor:
    """Their mean; 0 of none, such as of masks where there is no object."""
    return values.mean() if values.numel() else values.sum()


def _binary(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL between yes and no, for each logit."""
    own, wanted = student.float() / temperature, teacher.float() / temperature
    least = functional.binary_cross_entropy_with_logits(wanted, wanted.sigmoid(), reduction="none")
    found = functional.binary_cross_entropy_with_logits(own, wanted.sigmoid(), reduction="none")
    return (found - least) * temperature**2


def _of_boxes(seen: Heads, wanted: Heads) -> Tensor:
    """Squared difference of the proposals' offsets, each class as much as the teacher believes in it; mean over
    proposals."""
    sure = wanted.classes.float().softmax(1)[:, 1:]  # (P, N - 1)
    apart = (seen.boxes.float() - wanted.boxes.float()).square().view(len(sure), -1, 4).sum(2)
    return _mean((apart[:, 1:] * sure).sum(1))


def _of_anchors(seen: Heads, wanted: Heads, temperature: float) -> dict[str, Tensor]:
    """Divergence of objectness and squared difference of offsets, means over all anchors; each counts as much as one of
    the two networks (for offsets: the teacher) believes that there is an object."""
    total = {"divergence_objectness": torch.zeros(()), "difference_anchors": torch.zeros(())}
    weights = dict.fromkeys(total, torch.full((), 1e-6))
    levels = zip(seen.objectness, wanted.objectness, seen.offsets, wanted.offsets, strict=True)
    for own, theirs, offsets, their_offsets in levels:
        sure = theirs.float().sigmoid()  # (B, anchors per place, H, W)
        either = torch.maximum(sure, own.detach().float().sigmoid())
        apart = (offsets.float() - their_offsets.float()).square()
        apart = apart.view(sure.shape[0], sure.shape[1], 4, *sure.shape[2:]).sum(2)
        for name, values, weight in (
            ("divergence_objectness", _binary(own, theirs, temperature), either),
            ("difference_anchors", apart, sure),
        ):
            total[name] = total[name].to(values.device) + (values * weight).sum()
            weights[name] = weights[name].to(values.device) + weight.sum()
    return {name: value / weights[name] for name, value in total.items()}


__all__ = ["DetectionDistillation", "Heads", "Seen", "why_nothing_is_learnt"]
