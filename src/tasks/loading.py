"""From image files to batches: transforms, the dataset, the order of an epoch, and the loader.

What an image looks like depends on (seed, epoch, number of the image) alone: never on the number of worker processes.
An unreadable file travels to the main process as an `Unreadable`, which decides there whether that ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..common.errors import DataError, SettingsError
from ..common.log import log
from ..common.memory import TOO_MUCH, out_of_memory
from ..common.randomness import stream
from .decoding import open_image, reason
from .images import ImageFolderIndex, unreadable_error
from .places import describe
from .transforms import Transform
from .workers import CollateToShip, LoadingFailed, Shipped, broken_loader, prepare_worker

NO_LABEL = -1
"""In the place of an image's label."""
PREFETCHED_PER_WORKER = 2
LOADING_LESS = (
    "Use a smaller dataloader.batch_size or fewer dataloader.num_workers, or make the image smaller (and its objects "
    "fewer)."
)
AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def amp_type(name: str) -> torch.dtype | None:
    """The type of the forward pass in training; None: float32. Raises SettingsError for an unknown name."""
    if name not in AMP_TYPES:
        raise SettingsError(f"amp: {name!r} is not known; there are {', '.join(AMP_TYPES)}")
    return AMP_TYPES[name]


@dataclass(frozen=True)
class LoaderSpec:
    """How images reach the network; the names are those of the settings.

    Attributes:
        batch_size: images per batch and process.
        num_workers: processes that load images (0: the main process does).
        train_shuffle, validation_shuffle: go through the images in an order drawn from `seed` (for training anew each
            epoch).
        skip_unreadable: continue without files that turn out to be unreadable; otherwise they end the run.
        seed: the run's seed.
        amp: `none`, `bf16` or `fp16`: the type of the forward pass in training. Validation always computes in float32.
        show_progress: False on processes other than the first.
    """

    batch_size: int
    num_workers: int = 0
    train_shuffle: bool = True
    validation_shuffle: bool = False
    skip_unreadable: bool = False
    seed: int = 0
    amp: str = "none"
    show_progress: bool = True


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be decoded when its turn came."""

    path: str
    reason: str


class ImageDataset(Dataset):
    """Images by (epoch, number): what the transform makes of one, and its label, or `Unreadable`."""

    def __init__(self, index: ImageFolderIndex, transform: Transform, seed: int) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Unreadable:
        epoch, i = key
        path = self.index.paths[i]
        try:
            image = open_image(path)
        except Exception as error:  # any complaint about a bad file; ours to report, not to die of in a worker
            return Unreadable(path, TOO_MUCH if isinstance(error, MemoryError) else reason(error))
        with image:
            try:
                seen = self.transform(image, stream(self.seed, "augmentation", epoch, i))
            except MemoryError:
                return Unreadable(path, TOO_MUCH)
            except DataError as error:
                return Unreadable(path, str(error))
        return seen, self.index.labels[i]


@dataclass(frozen=True)
class Batch:
    """Images (N, 3, H, W) uint8, or float32 where they are normalised already, labels (N,) int64, and the files of this
    batch that could not be read (not counted in N). Images without a label come after the others, with `NO_LABEL`."""

    images: Tensor
    labels: Tensor
    unreadable: tuple[Unreadable, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def n_labelled(self) -> int:
        """Images that have a label; call it while the labels are on the CPU."""
        return int((self.labels != NO_LABEL).sum())

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (the loader calls this for CUDA)."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.unreadable)


def collate(items: list[tuple[Tensor, int] | Unreadable]) -> Batch:
    """A batch of the readable items; the others are kept beside it."""
    good = [item for item in items if not isinstance(item, Unreadable)]
    bad = tuple(item for item in items if isinstance(item, Unreadable))
    images = _stacked([image for image, _ in good]) if good else torch.empty(0)
    return Batch(images, torch.tensor([label for _, label in good], dtype=torch.int64), bad)


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Images (3, H, W) as one tensor. Where the colours of a pixel lie together in memory they stay so
    (`torch.channels_last`): what is copied then is whole rows."""
    if all(image.stride(0) == 1 for image in images):
        return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return torch.stack(list(images))


class HasUnreadable(Protocol):
    """A batch that keeps beside its items the files that could not be read."""

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """The files that could not be read."""

    def __len__(self) -> int: ...


class UnreadableFiles:
    """Files that turn out to be unreadable while loading: they end the run, or are left out with one warning each.

    Args:
        skip: leave them out (`dataloader.skip_unreadable`).
        key: the setting that leads to the files, for messages.

    Attributes:
        reasons: reason by path of those met so far.
    """

    def __init__(self, skip: bool, key: str) -> None:
        self.skip, self.key = skip, key
        self.reasons: MutableMapping[str, str] = {}

    def report(self, batch: HasUnreadable) -> None:
        """Check what `batch` could not read.

        Raises:
            DataError: there is any, and `skip` is False.
            RunError: there was no memory to load an image, which may be a good one.
        """
        for item in batch.unreadable:
            if item.reason.startswith(TOO_MUCH):
                raise out_of_memory(f"on an image, {describe(item.path)}. {LOADING_LESS}", MemoryError(item.reason))
        if batch.unreadable and not self.skip:
            raise self.error(batch)
        for item in batch.unreadable:
            if item.path not in self.reasons:
                self.reasons[item.path] = item.reason
                log.warning("skipped unreadable image %s: %s", describe(item.path), item.reason)

    def error(self, batch: HasUnreadable) -> DataError:
        """The error that names the unreadable files of `batch`."""
        return unreadable_error([(item.path, item.reason) for item in batch.unreadable], self.key)


class EpochOrder(Sampler[tuple[int, int]]):
    """The images that this process reads in an epoch, as (epoch, number): every `world_size`-th of a common order, from
    `rank`.

    Args:
        n_images: images in the whole split.
        shuffle: a new permutation in each epoch, drawn from (seed, epoch); otherwise the order of the index.
        per_process: how many images each process takes at most (training: the same number everywhere, so that all
            processes make the same number of steps); None takes every image exactly once over all processes.
    """

    def __init__(
        self, n_images: int, shuffle: bool, seed: int, rank: int, world_size: int, per_process: int | None = None
    ) -> None:
        self.n_images, self.shuffle, self.seed = n_images, shuffle, seed
        self.rank, self.world_size, self.per_process = rank, world_size, per_process
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and how many of its first images it leaves out."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return len(range(self.n_images)[self.rank :: self.world_size][: self.per_process])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.n_images)
        if self.shuffle:
            order = torch.randperm(self.n_images, generator=stream(self.seed, "order", self.epoch))
        for i in order[self.rank :: self.world_size][: self.per_process][self.start :].tolist():
            yield self.epoch, i


class Seeded(Protocol):
    """A dataset that knows the run's seed."""

    seed: int

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> Any: ...


def make_loader(
    dataset: Seeded,
    order: Sampler,
    batch_size: int | None,
    num_workers: int,
    pin_memory: bool,
    collate_items: Callable[[list[Any]], Any] = collate,
) -> DataLoader:
    """One loader for all epochs: its workers stay alive between them, and `EpochOrder.set_epoch` says what comes next.

    Args:
        dataset: gives items by (epoch, number).
        order: of single items, or of whole batches with `batch_size` None.
        batch_size: items per batch.
        num_workers: processes that load; 0: the main process does.
        pin_memory: whether batches come in page-locked memory.
        collate_items: makes a batch of items.
    """
    batching: dict[str, Any] = (
        {"batch_sampler": order} if batch_size is None else {"batch_size": batch_size, "sampler": order}
    )
    return DataLoader(
        cast(Dataset, dataset),
        **batching,
        num_workers=num_workers,
        collate_fn=CollateToShip(collate_items) if num_workers > 0 else collate_items,
        worker_init_fn=prepare_worker if num_workers > 0 else None,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCHED_PER_WORKER if num_workers > 0 else None,
        generator=stream(dataset.seed, "loader"),  # else the loader draws from torch's global generator
    )


def batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches.

    Raises:
        RunError: a process or a thread of the loader died, or the machine lacks what they need.
    """
    try:
        for batch in loader:
            if isinstance(batch, LoadingFailed):
                _end(loader)
                raise batch.error()
            yield batch.unpacked() if isinstance(batch, Shipped) else batch
    except (OSError, EOFError, MemoryError, RuntimeError) as error:
        _end(loader)
        if fault := broken_loader(error):
            raise fault from error
        raise


def _end(loader: DataLoader[Any]) -> None:
    """End the processes of a loader that failed: torch would tell of their deaths later, as an error wherever the main
    process is then."""
    shut_down = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
    if shut_down is not None:
        with suppress(Exception):  # it may meet one of these deaths itself
            shut_down()
