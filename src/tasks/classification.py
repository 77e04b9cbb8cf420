"""Image classification: cross entropy on batches of labelled images, top-1 and top-5 accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from ..common import progress
from ..common.errors import DataError, SettingsError
from ..common.memory import named_when_out_of_memory
from ..compression.finetune.distillation import Distillation, watching
from ..compression.finetune.task import StepLoss, evaluating
from ..engines.engine import Engine
from .batch_norms import check_lone_values
from .images import FOLDERS, KEY, ImageFolderIndex, check_same_classes, some
from .loading import Batch, EpochOrder, ImageDataset, LoaderSpec, UnreadableFiles, amp_type, batches, make_loader
from .places import describe
from .transforms import ImageSpec, Normalise, Transform
from .unlabelled import Unlabelled, with_unlabelled

__all__ = ["Classification", "ImageSpec", "check_batch_norms", "check_classes", "images_per_process"]


def check_classes(n_classes: int, n_outputs: int, key: str = KEY, advice: str = "", called: str = FOLDERS) -> None:
    """Compare the number of classes with the outputs of a model.

    A label is a place in the list of classes (sorted, where they are folders): with another number of them the labels
    would mean other classes. `advice` ends the message, in which `called` says what the classes are.

    Raises:
        DataError: the two differ.
    """
    if n_classes != n_outputs:
        place = "sorted list of folders" if called == FOLDERS else f"list of {called}"
        raise DataError(
            f"{key}: there are {n_classes:,} {called}, but the model has {n_outputs:,} outputs. A label is a place in "
            f"the {place}, so both must agree: use the data the model was trained for, or a model made for these "
            f"classes.{advice}"
        )


def check_batch_norms(model: nn.Module, task: Classification, image_size: int) -> None:
    """Batch norms need more than one value per channel to have a variance: find out before any work.

    Args:
        model: on the CPU, in evaluation or training mode; comes back as it was.
        task: says how small its smallest training batch is.
        image_size: side of the images that the network sees.

    Raises:
        SettingsError: a training batch is a single image, of which a batch norm sees one value per channel.
    """
    if task.smallest_batch > 1:
        return
    check_lone_values(
        model,
        lambda network: network(torch.zeros(1, 3, image_size, image_size)),
        "Use a batch_size of at least 2 and at least 2 training images per process, or a larger dataloader.image_size",
    )


class Classification:
    """The task of telling images apart: what the training loop and an evaluation ask for.

    Args:
        engine: the processes that share the work.
        train_index: training images; None where the task is only used to validate.
        validation_index: validation images.
        images: how an image becomes what the network sees.
        loading: how images are loaded.
        label_smoothing: share of a label's weight that is spread over all classes, in training.
        unlabelled: images without labels that each training batch gets besides; None: none.

    Attributes:
        unreadable: reason by path of the files that turned out to be unreadable while loading.
        smallest_batch: images in the smallest training batch of a process.
        distillation: what is learnt from another network; None: cross entropy alone.
    """

    metric_name = "accuracy"

    def __init__(
        self,
        engine: Engine,
        train_index: ImageFolderIndex | None,
        validation_index: ImageFolderIndex,
        images: ImageSpec,
        loading: LoaderSpec,
        *,
        label_smoothing: float = 0.0,
        unlabelled: Unlabelled | None = None,
    ) -> None:
        if images.image_size > images.resize:
            raise SettingsError(
                f"image_size {images.image_size} is larger than resize {images.resize}: the crop would not fit into "
                "the image"
            )
        self.engine, self.seed = engine, loading.seed
        self.show_progress = loading.show_progress
        self.amp_type = amp_type(loading.amp)
        self.memory_format = torch.channels_last if images.channels_last else torch.contiguous_format
        self.n_classes = len(validation_index.classes)
        self.label_smoothing = label_smoothing
        self.distillation: Distillation | None = None
        self._files = UnreadableFiles(loading.skip_unreadable, KEY)
        self.unreadable = self._files.reasons
        self._loading = (loading.batch_size, loading.num_workers, engine.device.type == "cuda")

        place = (loading.seed, engine.rank, engine.world_size)
        self._normalise = Normalise(images.mean, images.std, engine.device)
        self._validation_order = EpochOrder(len(validation_index), loading.validation_shuffle, *place)
        self._validation_loader = self._loader(validation_index, images.for_validation(), self._validation_order)
        self._paths, self._train_paths = validation_index.paths, [] if train_index is None else train_index.paths
        self._train_loader: DataLoader | None = None
        self.steps_per_epoch = self.position = self.smallest_batch = 0
        if train_index is not None:
            check_same_classes(train_index, validation_index)
            per_process = images_per_process(len(train_index), loading.batch_size, engine.world_size)
            to_train = images.for_training()
            self._train_order = EpochOrder(len(train_index), loading.train_shuffle, *place, per_process)
            if unlabelled is None:
                self._train_loader = self._loader(train_index, to_train, self._train_order)
            else:
                index, mixed = with_unlabelled(train_index, unlabelled, self._train_order, loading.batch_size)
                dataset = ImageDataset(index, to_train, self.seed)
                self._train_loader = make_loader(dataset, mixed, None, *self._loading[1:])
            self.steps_per_epoch = math.ceil(per_process / loading.batch_size)
            self.smallest_batch = per_process % loading.batch_size or loading.batch_size
            self.smallest_batch += 0 if unlabelled is None else unlabelled.per_batch

    def _loader(self, index: ImageFolderIndex, transform: Transform, order: EpochOrder) -> DataLoader:
        return make_loader(ImageDataset(index, transform, self.seed), order, *self._loading)

    def training_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `epoch` after the first `start`, still on the CPU; less those without a readable image.

        Raises:
            DataError: a file is unreadable (unless `skip_unreadable`), or there are no training images.
        """
        if self._train_loader is None:
            raise DataError(f"{KEY}: this task was made without training images; give it the index of a training split")
        self._train_order.set_epoch(epoch, start * self._loading[0])
        self.position = start
        for batch in batches(self._train_loader):
            self.position += 1
            self._files.report(batch)
            if batch.n_labelled and (len(batch) > 1 or not batch.unreadable):
                yield batch
            elif self.engine.world_size > 1:  # the other processes would wait for this one's step for ever
                raise self._files.error(batch)

    def training_loss(self, model: nn.Module, batch: Batch) -> StepLoss:
        """Mean cross entropy of `model` on the labelled images of `batch`, or what `distillation` makes of that and of
        the teacher's answers to all images; and the percentage of the labelled ones that it gets right."""
        images, labels = self._to_device(batch)
        learned, n = self.distillation, batch.n_labelled  # the labelled ones come first
        autocast = torch.autocast(self.engine.device.type, dtype=self.amp_type, enabled=self.amp_type is not None)
        with watching(model, () if learned is None else learned.stages) as seen, autocast:
            logits = model(images)
        self._check_outputs(logits)
        logits, labels = logits.float(), labels[:n]
        accuracy = (logits.detach()[:n].argmax(1) == labels).float().mean() * 100
        own = None
        if learned is None or learned.spec.labels:
            own = functional.cross_entropy(logits[:n], labels, label_smoothing=self.label_smoothing)
        if learned is None:
            assert own is not None
            return StepLoss(own, len(batch), {"accuracy": accuracy})
        loss, parts = learned.loss(images, logits, seen, own)
        return StepLoss(loss, len(batch), {"accuracy": accuracy, **parts})

    def in_words(self, batch: Batch) -> str:
        """Which images are in the training batch that was taken last, and what makes batches smaller."""
        first = self.position * self._loading[0] - self._loading[0] - self._train_order.start
        return self._in_words(self._train_paths, self._train_order, first, len(batch))

    def _in_words(self, paths: Sequence[str], order: EpochOrder, first: int, count: int) -> str:
        """The images of a batch that begins at `first` in `order`."""
        numbers = [number for _, number in islice(order, first, first + self._loading[0])]
        return (
            f"on a batch of {count:,} images, {some(describe(paths[number]) for number in numbers)}. Use a smaller "
            "dataloader.batch_size or dataloader.image_size."
        )

    def validate(self, model: nn.Module, label: str) -> dict[str, float]:
        """Every validation image once over all processes, in float32.

        Returns:
            `accuracy` and `accuracy_top5` in percent (top 5, or as many as the model has outputs), mean `loss`, and the
            counts `correct`, `correct_top5`, `images`, `skipped` (unreadable, not among `images`).

        Raises:
            DataError: a file is unreadable (unless `skip_unreadable`), or none is readable.
        """
        exact = torch.float32 if self.engine.device.type == "mps" else torch.float64  # MPS has no float64
        totals = torch.zeros(5, dtype=exact, device=self.engine.device)
        self._validation_order.set_epoch(0)
        with evaluating(model), torch.no_grad():
            n_batches = len(self._validation_loader)
            every = progress.bar(batches(self._validation_loader), label, n_batches, self.show_progress, "batch")
            for number, batch in enumerate(every):
                self._files.report(batch)
                totals[4] += len(batch.unreadable)
                first = number * self._loading[0]
                if len(batch):
                    with named_when_out_of_memory(
                        partial(self._in_words, self._paths, self._validation_order, first, len(batch))
                    ):
                        totals[:4] += self._figures(model, batch, exact)
        loss, correct, correct_top5, images, skipped = self.engine.sum(totals).tolist()
        if images == 0:
            raise DataError(f"{KEY}: not one validation image could be read ({skipped:,.0f} were skipped)")
        percent = {
            "accuracy": 100 * correct / images,
            "accuracy_top5": 100 * correct_top5 / images,
            "loss": loss / images,
        }
        return {**percent, "correct": correct, "correct_top5": correct_top5, "images": images, "skipped": skipped}

    def _figures(self, model: nn.Module, batch: Batch, exact: torch.dtype) -> Tensor:
        """Summed loss, hits, hits among the best five, images."""
        images, labels = self._to_device(batch)
        logits = model(images).float()
        self._check_outputs(logits)
        loss = functional.cross_entropy(logits, labels, reduction="none").to(exact).sum()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (N, 5)
        counts = [hits[:, 0].sum(), hits.any(1).sum(), torch.tensor(len(batch), device=hits.device)]
        return torch.stack([loss, *(count.to(exact) for count in counts)])

    def inputs(self, batch: Batch) -> Tensor:
        """What the network sees of a batch, on its device: bytes travel there, and are normalised there."""
        images = batch.images.to(self.engine.device, non_blocking=True)
        return self._normalise(images, self.memory_format)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.inputs(batch), batch.labels.to(self.engine.device, non_blocking=True)

    def _check_outputs(self, logits: Tensor) -> None:
        if logits.shape[1] < self.n_classes:  # on CUDA such a label would end in an assertion of the device
            check_classes(self.n_classes, logits.shape[1])


def images_per_process(n_images: int, batch_size: int, world_size: int) -> int:
    """Training images per epoch on each process: the same on all, and never a last batch of a single image.

    A batch norm over one value per channel has no variance, so networks cannot train on a batch of one small image; the
    one image left over is another one in each shuffled epoch.

    Raises:
        DataError: there are fewer images than processes.
    """
    each = n_images // world_size
    if each == 0:
        raise DataError(f"{KEY}: {n_images:,} training images are too few for {world_size:,} processes; start fewer")
    return each - 1 if each > batch_size > 1 and each % batch_size == 1 else each
