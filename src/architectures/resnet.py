"""ResNets: construction, published weights, and the layers that share a permutation (paper section 3.2.1, figure 2).

Inside a block every intermediate map has one producer (a convolution and its norm) and one consumer. The residual
stream of a stage has several of each, since additions join them: they share one permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import nn
from torchvision.models import ResNet, resnet18, resnet34, resnet50, resnet101
from torchvision.models import ResNet18_Weights as W18
from torchvision.models import ResNet34_Weights as W34
from torchvision.models import ResNet50_Weights as W50
from torchvision.models import ResNet101_Weights as W101
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..compression.permute.groups import Group
from .architecture import Architecture

SEMI_SUPERVISED_URL = (
    "https://dl.fbaipublicfiles.com/semiweaksupervision/model_files/semi_supervised_resnet50-08389792.pth"
)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of its images."""

CLASSIFIER = ((), (), (), ("fc",))


def resnet_groups(
    model: nn.Module, prefix: str = "", consumers_outside: Sequence[tuple[str, ...]] = CLASSIFIER
) -> list[Group]:
    """Permutation groups of a torchvision ResNet, stem first, in the order of the network.

    Args:
        model: the ResNet.
        prefix: of the layer names, for a ResNet inside another network.
        consumers_outside: full names of the layers after or outside the stages that read stage 1, 2, 3, 4.
    """
    net = cast(ResNet, model)
    stages: list[list[BasicBlock | Bottleneck]] = [
        list(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)
    ]
    groups: list[Group] = []
    producers = ["conv1", "bn1"]  # of the stream that is being followed
    outside: tuple[str, ...] = ()
    for s, blocks in enumerate(stages, start=1):
        if blocks[0].downsample is not None:
            consumers = [f"layer{s}.0.conv1", f"layer{s}.0.downsample.0"]
            groups.append(_group(prefix, producers, [*_other_consumers(stages, s - 1), *consumers], outside))
            producers = [f"layer{s}.0.downsample.0", f"layer{s}.0.downsample.1"]
            outside = ()
        for b, block in enumerate(blocks):
            name = f"layer{s}.{b}"
            n_convs = 3 if isinstance(block, Bottleneck) else 2
            groups += [
                _group(prefix, [f"{name}.conv{c}", f"{name}.bn{c}"], [f"{name}.conv{c + 1}"]) for c in range(1, n_convs)
            ]
            producers += [f"{name}.conv{n_convs}", f"{name}.bn{n_convs}"]
        outside += consumers_outside[s - 1]
    groups.append(_group(prefix, producers, _other_consumers(stages, len(stages)), outside))
    return groups


def _other_consumers(stages: list, stage: int) -> list[str]:
    """The conv1 of the blocks of `stage` that consume the residual stream to which they add."""
    if stage == 0:
        return []
    first = 0 if stages[stage - 1][0].downsample is None else 1
    return [f"layer{stage}.{b}.conv1" for b in range(first, len(stages[stage - 1]))]


def _group(prefix: str, parents: list[str], children: list[str], children_outside: tuple[str, ...] = ()) -> Group:
    return Group(tuple(prefix + p for p in parents), (*(prefix + c for c in children), *children_outside))


def _resnet(name: str, constructor: Callable[..., nn.Module], url: str, licence: str = "") -> Architecture:
    return Architecture(
        name=name,
        task="classification",
        build=lambda n_classes: constructor(weights=None, num_classes=n_classes),
        weights_url=url,
        n_classes=1000,
        head="fc",
        groups=resnet_groups,
        licence=licence,
        normalisation=IMAGENET,
    )


RESNET18 = _resnet("resnet18", resnet18, W18.IMAGENET1K_V1.url)
RESNET34 = _resnet("resnet34", resnet34, W34.IMAGENET1K_V1.url)
RESNET50 = _resnet("resnet50", resnet50, W50.IMAGENET1K_V1.url)
RESNET101 = _resnet("resnet101", resnet101, W101.IMAGENET1K_V1.url)
RESNET50SSL = _resnet("resnet50ssl", resnet50, SEMI_SUPERVISED_URL, "CC BY-NC 4.0: not for commercial use")
