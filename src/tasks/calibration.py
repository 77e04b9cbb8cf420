"""Images that show a network what it sees, without labels: any below a folder, or training images as a validation
would show them.

They are read once and kept as bytes, a quarter of what the network is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..common.errors import DataError
from ..common.log import log
from ..common.progress import bar
from ..common.randomness import stream
from .images import KEY as TRAINING_KEY
from .images import ImageFolderIndex, check_images, some
from .loading import EpochOrder, ImageDataset, Seeded, Unreadable, UnreadableFiles, batches, collate, make_loader
from .places import below, describe
from .splits import unlabelled
from .transforms import Normalise, crop_of_bytes, in_zero_to_one, whole_bytes

KEY = "calibration.images"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CalibrationSpec:
    """How images are shown; the names are those of the settings.

    Attributes:
        count: images that are drawn, at most.
        batch_size: images at a time.
        num_workers: processes that read images; 0: the main process does.
        image_size: side of the square crop; None: images as they are, of several sizes, in 0..1, as detectors take
            them.
        resize: length of the short side before the crop.
        mean, std: of the three channels, on the scale 0 to 1, where images are cropped.
        seed: of the draw.
    """

    count: int = 1024
    batch_size: int = 64
    num_workers: int = 0
    image_size: int | None = 224
    resize: int = 256
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    seed: int = 0


class ImageBatches(Sequence[Any]):
    """Batches as a network takes them, float32 on the CPU: (B, 3, H, W), or lists of images (3, H, W) of several sizes.

    Each is made of bytes when it is asked for, always the same.
    """

    def __init__(
        self, kept: Sequence[Tensor | tuple[Tensor, ...]], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self._kept, self._mean, self._std = kept, mean, std
        self._normalise = Normalise(mean, std)

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, number: int) -> Any: ...
    @overload
    def __getitem__(self, number: slice) -> ImageBatches: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return ImageBatches(self._kept[number], self._mean, self._std)
        kept = self._kept[number]
        if isinstance(kept, Tensor):
            return self._normalise(kept, torch.contiguous_format)
        return [in_zero_to_one(image) for image in kept]


@dataclass(frozen=True)
class Several:
    """Images (3, H, W) of several sizes, and the files of this batch that could not be read."""

    images: tuple[Tensor, ...]
    unreadable: tuple[Unreadable, ...] = ()

    def __len__(self) -> int:
        return len(self.images)


def collate_several(items: list[tuple[Tensor, int] | Unreadable]) -> Several:
    """A batch of the readable items, whatever their sizes; the others are kept beside it."""
    images = tuple(item[0] for item in items if not isinstance(item, Unreadable))
    return Several(images, tuple(item for item in items if isinstance(item, Unreadable)))


class ImagesToShow:
    """Images that were chosen and not read yet.

    Args:
        paths: their files.
        dataset: gives each as bytes (3, H, W).
        collate_items: makes batches of them.
        spec: how they are shown.
        files: what happens where one turns out to be unreadable.

    Attributes:
        paths: their files.
    """

    def __init__(
        self,
        paths: list[str],
        dataset: Seeded,
        collate_items: Callable[[list[Any]], Any],
        spec: CalibrationSpec,
        files: UnreadableFiles,
    ) -> None:
        self.paths = paths
        self._dataset, self._collate, self._spec, self._files = dataset, collate_items, spec, files

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Any]:
        """All batches, read anew."""
        return iter(self.read(False))

    def read(self, show_progress: bool = True) -> ImageBatches:
        """All batches; always the same ones in the same order.

        Raises:
            DataError: an image is unreadable (unless such are left out), or all are.
            RunError: a process of the loader died.
        """
        spec = self._spec
        order = EpochOrder(len(self.paths), False, spec.seed, 0, 1)
        loader = make_loader(self._dataset, order, spec.batch_size, spec.num_workers, False, self._collate)
        kept: list[Any] = []
        total = -(-len(self.paths) // spec.batch_size)
        for batch in bar(batches(loader), "read images", total, show_progress, "batch"):
            self._files.report(batch)
            if len(batch):
                # what comes from another process lies in shared memory, of which there is little
                images = batch.images
                kept.append(images.clone() if isinstance(images, Tensor) else tuple(one.clone() for one in images))
        if not kept:
            raise DataError(f"{self._files.key}: none of the {len(self.paths):,} images for calibration can be read")
        return ImageBatches(kept, spec.mean, spec.std)


class CalibrationImages(ImagesToShow):
    """The images of a folder or a data set on the hub (`where`), of which `spec.count` are drawn; unreadable ones are
    left out and said.

    Raises:
        DataError: it cannot be read, or holds no image that can.
    """

    def __init__(self, where: Path | str, spec: CalibrationSpec, show_progress: bool = True) -> None:
        folder, paths = unlabelled(where, KEY)
        chosen = [paths[number] for number in drawn(len(paths), spec)]
        index = ImageFolderIndex(folder, ("images",), chosen, [0] * len(chosen))
        resize = None if spec.image_size is None else spec.resize
        bad = dict(check_images(index, "quick", show_progress, resize=resize, part="calibration"))
        if bad:
            named = some(f"{describe(path)} ({why})" for path, why in bad.items())
            log.warning("%s: left out %s unreadable images: %s", KEY, f"{len(bad):,}", named)
        paths = [path for path in chosen if path not in bad]
        if not paths:
            raise DataError(f"{KEY}: none of the {len(bad):,} images drawn from {where} can be read")
        index = replace(index, paths=paths, labels=[0] * len(paths))
        show = whole_bytes if spec.image_size is None else crop_of_bytes(spec.resize, spec.image_size)
        together = collate_several if spec.image_size is None else collate
        super().__init__(paths, ImageDataset(index, show, spec.seed), together, spec, UnreadableFiles(True, KEY))
        self._folder = folder

    def listed(self) -> Iterator[str]:
        """The images, by their paths below the folder."""
        return below(self.paths, self._folder)


def training_images(
    index: ImageFolderIndex, spec: CalibrationSpec, skip_unreadable: bool, reasons: MutableMapping[str, str]
) -> ImagesToShow:
    """`spec.count` of the training images, as a validation shows them.

    Args:
        index: of the training images.
        spec: how they are shown; with a crop.
        skip_unreadable: leave unreadable ones out; otherwise they end the run.
        reasons: why, by path, of the unreadable ones that the run met so far; further ones are put in.
    """
    chosen = drawn(len(index), spec)
    part = replace(index, paths=[index.paths[i] for i in chosen], labels=[index.labels[i] for i in chosen])
    assert spec.image_size is not None
    dataset = ImageDataset(part, crop_of_bytes(spec.resize, spec.image_size), spec.seed)
    return ImagesToShow(part.paths, dataset, collate, spec, unreadable_files(skip_unreadable, TRAINING_KEY, reasons))


def drawn(n_images: int, spec: CalibrationSpec) -> list[int]:
    """The numbers of the images that are drawn from so many, rising; the same for the same seed."""
    order = torch.randperm(n_images, generator=stream(spec.seed, "calibration"))
    return sorted(order[: spec.count].tolist())


def unreadable_files(skip: bool, key: str, reasons: MutableMapping[str, str]) -> UnreadableFiles:
    """What happens where images turn out to be unreadable, beside what the run knows of such already."""
    files = UnreadableFiles(skip, key)
    files.reasons = reasons
    return files
