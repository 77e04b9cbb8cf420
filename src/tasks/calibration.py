"""Images that show a network what it sees: any images below a folder, without labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import DataError
from ..common.log import log
from ..common.randomness import stream
from .folders import images_below, tell_others
from .images import ImageFolderIndex, check_images, some
from .loading import EpochOrder, ImageDataset, UnreadableFiles, batches, make_loader
from .transforms import validation_transform

KEY = "calibration.images"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CalibrationSpec:
    """How images are shown; the names are those of the settings.

    Attributes:
        count: images that are drawn, at most.
        batch_size: images at a time.
        num_workers: processes that read images; 0: the main process does.
        image_size: side of the square crop.
        resize: length of the short side before the crop.
        seed: of the draw.
    """

    count: int = 1024
    batch_size: int = 64
    num_workers: int = 0
    image_size: int = 224
    resize: int = 256
    seed: int = 0


class CalibrationImages:
    """The images of a folder, of which `spec.count` are drawn; unreadable ones are left out and said.

    Raises:
        DataError: the folder cannot be read, or holds no image that can.
    """

    def __init__(self, folder: Path, spec: CalibrationSpec, show_progress: bool = True) -> None:
        others: Counter[str] = Counter()
        try:
            paths = images_below(folder, others)
        except OSError as error:
            raise DataError(f"{KEY}: {folder} cannot be read: {error.strerror or error}") from error
        if not paths:
            raise DataError(f"{KEY}: there are no images below {folder}")
        tell_others(folder, others)
        drawn = torch.randperm(len(paths), generator=stream(spec.seed, "calibration"))[: spec.count]
        chosen = [paths[number] for number in sorted(drawn.tolist())]
        index = ImageFolderIndex(folder, ("images",), chosen, [0] * len(chosen))
        bad = dict(check_images(index, "quick", show_progress, resize=spec.resize, part="calibration"))
        if bad:
            named = some(f"{path} ({why})" for path, why in bad.items())
            log.warning("%s: left out %s unreadable images: %s", KEY, f"{len(bad):,}", named)
        self.paths = [path for path in chosen if path not in bad]
        if not self.paths:
            raise DataError(f"{KEY}: none of the {len(bad):,} images drawn from {folder} can be read")
        self._spec = spec
        self._index = ImageFolderIndex(folder, ("images",), self.paths, [0] * len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Tensor]:
        """Batches (B, 3, H, W) float32, on the CPU; always the same ones in the same order.

        Raises:
            RunError: a process of the loader died.
        """
        spec = self._spec
        show = validation_transform(spec.resize, spec.image_size, MEAN, STD)
        order = EpochOrder(len(self.paths), False, spec.seed, 0, 1)
        loader = make_loader(
            ImageDataset(self._index, show, spec.seed), order, spec.batch_size, spec.num_workers, pin_memory=False
        )
        files = UnreadableFiles(True, KEY)
        for batch in batches(loader):
            files.report(batch)
            if len(batch):
                yield batch.images
