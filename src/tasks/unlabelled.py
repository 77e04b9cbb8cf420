"""Images without labels beside those with labels: what a network learns from another one's answers needs none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import Sampler

from ..common.randomness import stream
from .images import ImageFolderIndex
from .loading import NO_LABEL, EpochOrder
from .splits import unlabelled

KEY = "distillation.images"


@dataclass(frozen=True)
class Unlabelled:
    """Images without labels.

    Attributes:
        index: of the images; all have `NO_LABEL`.
        per_batch: how many each training batch gets.
    """

    index: ImageFolderIndex
    per_batch: int


def read_unlabelled(where: Path | str) -> ImageFolderIndex:
    """All images of a folder or of a data set on the hub.

    Raises:
        DataError: it cannot be read, or holds no image.
    """
    folder, paths = unlabelled(where, KEY)
    return ImageFolderIndex(folder, ("without labels",), paths, [NO_LABEL] * len(paths))


class MixedBatches(Sampler[list[tuple[int, int]]]):
    """The batches of an epoch: those of labelled images in their order, each with further images behind them.

    The further ones are drawn from (seed, epoch): all of them once before one comes again. Where an epoch is entered
    at a later batch it goes on as it would have.

    Args:
        order: of the labelled images.
        batch_size: labelled images in a batch.
        first: number of the first further image.
        n_images: how many there are.
        per_batch: how many of them each batch gets.
    """

    def __init__(self, order: EpochOrder, batch_size: int, first: int, n_images: int, per_batch: int) -> None:
        self._order, self._batch_size = order, batch_size
        self._first, self._n_images, self._per_batch = first, n_images, per_batch

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        labelled, order = iter(self._order), self._order
        done = order.start // self._batch_size * self._per_batch
        further = islice(self._further(), done * order.world_size + order.rank, None, order.world_size)
        while batch := list(islice(labelled, self._batch_size)):
            yield batch + [(order.epoch, number) for number in islice(further, self._per_batch)]

    def _further(self) -> Iterator[int]:
        """Without end: what all processes draw from."""
        turn = 0
        while True:
            generator = stream(self._order.seed, "order without labels", self._order.epoch, turn)
            yield from (torch.randperm(self._n_images, generator=generator) + self._first).tolist()
            turn += 1


def with_unlabelled(
    train: ImageFolderIndex, more: Unlabelled, order: EpochOrder, batch_size: int
) -> tuple[ImageFolderIndex, MixedBatches]:
    """One index of all training images, and the order in which batches take them from it."""
    paths: Sequence[str] = more.index.paths
    together = replace(train, paths=[*train.paths, *paths], labels=[*train.labels, *more.index.labels])
    return together, MixedBatches(order, batch_size, len(train), len(paths), more.per_batch)
