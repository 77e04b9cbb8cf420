"""What detection networks have in common, and where they differ: the sizes of images that they see, how many boxes
they propose, and whether they find masks.

Read from the network itself, so that it holds for those of users too. R-CNNs propose boxes and look into each; SSD,
RetinaNet and FCOS judge all places of their feature maps at once, so that numbers of boxes mean nothing to them. SSD
and SSDlite bring every image to one size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork

from ..common.errors import SettingsError
from .architecture import Architecture
from .detector_outputs import detector_outputs

MIN_SIZE, MAX_SIZE = "dataloader.min_size", "dataloader.max_size"
BOXES, PROPOSALS = "model.boxes_per_image", "model.proposals"


@dataclass(frozen=True)
class ImageSizes:
    """To which size a network brings images.

    Attributes:
        min_size: length of the short side in pixels; the smallest of several that training draws from.
        max_size: most pixels of the long side, which counts where it makes the image smaller.
        fixed: (height, width) of every image; None: images keep their shape.
    """

    min_size: int
    max_size: int
    fixed: tuple[int, int] | None = None

    def of(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) to which an image of that size is brought, of at least one pixel."""
        if self.fixed is not None:
            return self.fixed
        scale = min(self.min_size / min(width, height), self.max_size / max(width, height))
        return max(1, int(height * scale)), max(1, int(width * scale))


def as_detector(architecture: Architecture, network: nn.Module) -> Architecture:
    """`architecture` with what is known of it as one of a detector of torchvision's form.

    Args:
        architecture: found by a name.
        network: what it builds; its weights do not matter.
    """
    sizes = image_sizes(network)
    side = max(sizes.fixed) if sizes is not None and sizes.fixed else architecture.image_size
    names = old_names(network)
    return replace(architecture, task="detection", outputs=detector_outputs, old_names=names, image_size=side)


def image_sizes(model: nn.Module) -> ImageSizes | None:
    """To which size `model` brings images in the mode that it is in; None: it does not say."""
    transform = getattr(model, "transform", None)
    if not isinstance(transform, GeneralizedRCNNTransform):
        return None
    fixed = transform.fixed_size  # as (width, height)
    min_size = min(transform.min_size) if model.training else transform.min_size[-1]
    return ImageSizes(int(min_size), int(transform.max_size), (fixed[1], fixed[0]) if fixed else None)


def finds_masks(model: nn.Module) -> bool:
    """Whether `model` finds masks beside boxes, and learns them from masks in its targets."""
    return any(heads.has_mask() for heads in _parts(model, RoIHeads))


def finds_keypoints(model: nn.Module) -> bool:
    """Whether `model` finds keypoints, and cannot learn without them in its targets."""
    return any(heads.has_keypoint() for heads in _parts(model, RoIHeads))


def set_image_size(model: nn.Module, min_size: int | None = None, max_size: int | None = None) -> list[str]:
    """Have images scaled so that the short side has `min_size` pixels, or the long side `max_size` where that is
    smaller; None leaves the network's own.

    Returns:
        The settings that were given and have no effect on this network.

    Raises:
        SettingsError: `max_size` would be below `min_size`, where one of them is the network's own.
    """
    given = {MIN_SIZE: min_size, MAX_SIZE: max_size}
    own = image_sizes(model)
    if own is None or own.fixed is not None:
        return [key for key, value in given.items() if value is not None]
    transform: Any = model.transform
    if min_size is not None:
        transform.min_size = (min_size,)
    if max_size is not None:
        transform.max_size = max_size
    largest = max(transform.min_size)
    if transform.max_size < largest:
        missing, value = (MAX_SIZE, transform.max_size) if max_size is None else (MIN_SIZE, largest)
        raise SettingsError(
            f"{MAX_SIZE}: at least {MIN_SIZE} ({largest}), got {transform.max_size}: the long side cannot be shorter "
            f"than the short one. {missing} is not set, and the network's own is {value}; set both"
        )
    return []


def set_box_numbers(model: nn.Module, boxes_per_image: int | None = None, proposals: int | None = None) -> list[str]:
    """Have a training step learn from `boxes_per_image` boxes of each image, out of at most `proposals` (in training
    twice as many); None leaves the network's own.

    Returns:
        The settings that were given and have no effect on this network.
    """
    unused = []
    if boxes_per_image is not None:
        heads = _parts(model, RoIHeads)
        for one in heads:
            one.fg_bg_sampler.batch_size_per_image = boxes_per_image
        unused += [] if heads else [BOXES]
    if proposals is not None:
        most = {"training": 2 * proposals, "testing": proposals}
        proposing = _parts(model, RegionProposalNetwork)
        for one in proposing:
            one._pre_nms_top_n, one._post_nms_top_n = dict(most), dict(most)
        unused += [] if proposing else [PROPOSALS]
    return unused


def memory_settings(model: nn.Module) -> list[str]:
    """The settings that make this network need less memory, besides the batch size."""
    sizes = image_sizes(model)
    keys = [MAX_SIZE] if sizes is not None and sizes.fixed is None else []
    keys += [BOXES] if _parts(model, RoIHeads) else []
    return keys + ([PROPOSALS] if _parts(model, RegionProposalNetwork) else [])


def old_names(model: nn.Module) -> dict[str, str]:
    """Names that layers of `model` had in torchvision before 0.14, which its published files use -> names now."""
    found = {}
    for prefix, module in model.named_modules():
        for old, now in _old_names_in(module):
            found[f"{prefix}.{old}"] = f"{prefix}.{now}"
    return found


def _old_names_in(module: nn.Module) -> Iterator[tuple[str, str]]:
    if isinstance(module, FeaturePyramidNetwork):
        for level in range(len(module.inner_blocks)):
            yield from ((f"{blocks}.{level}", f"{blocks}.{level}.0") for blocks in ("inner_blocks", "layer_blocks"))
    elif isinstance(module, RPNHead):
        yield "conv", "conv.0.0"
    elif isinstance(module, MaskRCNNHeads):
        yield from ((f"mask_fcn{number + 1}", f"{number}.0") for number in range(len(module)))
    elif isinstance(module, RetinaNetClassificationHead | RetinaNetRegressionHead):
        # a convolution and its activation were two entries of the list
        yield from ((f"conv.{2 * number}", f"conv.{number}.0") for number in range(len(module.conv)))


def _parts(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]
