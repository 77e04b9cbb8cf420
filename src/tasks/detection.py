"""Detection and segmentation: the losses of a detection network on images with boxes, and masks if it finds them;
COCO's average precisions.

The training loss is the sum of the losses that the network returns (paper section 4.2), each of which is logged by its
name. The metric is box AP plus mask AP, in percent; box AP alone for networks that find no masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..common import progress
from ..common.errors import DataError
from ..common.memory import named_when_out_of_memory
from ..common.randomness import derived_seed
from ..compression.finetune.task import StepLoss, evaluating
from ..engines.engine import Engine
from .coco.data import KEY, CocoSplit, check_same_categories
from .coco.loading import CocoDataset, DetectionBatch, EpochBatches, collate_detection, ratio_groups
from .coco.metrics import CocoFigures, Detections, Kind, coco_figures
from .distilled_detection import DetectionDistillation
from .images import some
from .loading import EpochOrder, LoaderSpec, UnreadableFiles, amp_type, batches, make_loader

KINDS = ("Box", "Mask")
"""How figures are called in metrics."""
OF_TRAINING = "model.boxes_per_image"
MEMORY_SETTINGS = ("dataloader.max_size", OF_TRAINING, "model.proposals")
"""What makes an R-CNN need less memory, besides the batch size; the second in training only."""


def metric_name(masks: bool) -> str:
    """The metric that counts."""
    return "BoxAP+MaskAP" if masks else "BoxAP"


@dataclass(frozen=True)
class Scores:
    """COCO's figures, in percent, of boxes and of masks; None: masks were not looked for."""

    boxes: CocoFigures
    masks: CocoFigures | None

    def metrics(self) -> dict[str, float]:
        """All figures that are defined, by name (`BoxAP`, `BoxAP50`, ..., `MaskARl`), and the metric that counts."""
        found = {
            f"{kind}{name}": value
            for kind, figures in zip(KINDS, self.figures(), strict=False)
            for name, value in figures.stats.items()
            if math.isfinite(value)
        }
        return {**found, metric_name(self.masks is not None): found.get("BoxAP", 0.0) + found.get("MaskAP", 0.0)}

    def figures(self) -> list[CocoFigures]:
        """Those of boxes, and of masks where they were looked for."""
        return [self.boxes] if self.masks is None else [self.boxes, self.masks]


def score(
    split: CocoSplit,
    rows: Sequence[dict],
    image_ids: Sequence[int],
    backend: str = "pycocotools",
    per_category: bool = False,
) -> Scores:
    """COCO's figures of the detections `rows` in the images `image_ids` of `split`; of masks if the split has them."""

    def figures(kind: Kind) -> CocoFigures:
        return coco_figures(split.api, rows, kind, image_ids, backend=backend, per_category=per_category)

    return Scores(figures("bbox"), figures("segm") if split.masks else None)


class Detection:
    """The task of finding objects: what the training loop and an evaluation ask for.

    Args:
        engine: the processes that share the work.
        train: training images; None where the task is only used to validate.
        validation: validation images; whether masks count is what they say (`masks`).
        loading: how images are loaded.
        group_by_aspect_ratio: make training batches of images of like shape.
        horizontal_flip: mirror half of the training images, with their boxes and masks.
        backend: what computes COCO's figures.
        memory_settings: those that make this network need less memory, besides the batch size.

    Attributes:
        metric_name: the metric that counts.
        unreadable: reason by path of the files that turned out to be unreadable while loading.
        smallest_batch: images in the smallest training batch; 0 without training images.
        distillation: what is learnt from another network; None: the network's own losses alone.
    """

    def __init__(
        self,
        engine: Engine,
        train: CocoSplit | None,
        validation: CocoSplit,
        loading: LoaderSpec,
        *,
        group_by_aspect_ratio: bool = True,
        horizontal_flip: bool = True,
        backend: str = "pycocotools",
        memory_settings: Sequence[str] = MEMORY_SETTINGS,
    ) -> None:
        self.metric_name = metric_name(validation.masks)
        self._memory_settings = memory_settings
        self.distillation: DetectionDistillation | None = None
        self.engine, self.seed, self.show_progress = engine, loading.seed, loading.show_progress
        self.validation, self.backend = validation, backend
        self.amp_type = amp_type(loading.amp)
        self._files = UnreadableFiles(loading.skip_unreadable, KEY)
        self.unreadable = self._files.reasons
        how = (loading.num_workers, engine.device.type == "cuda", collate_detection)
        place = (loading.seed, engine.rank, engine.world_size)
        self._validation_order = EpochOrder(len(validation), loading.validation_shuffle, *place)
        dataset = CocoDataset(validation, loading.seed, flip=False)
        self._validation_loader = make_loader(dataset, self._validation_order, loading.batch_size, *how)
        self._train_paths: dict[int, str] = {}
        self._train_loader: DataLoader | None = None
        self.steps_per_epoch = self.position = self.smallest_batch = 0
        self._epoch = 0
        if train is not None:
            check_same_categories(train, validation)
            self._train_paths = dict(zip(train.image_ids, train.paths, strict=True))
            per_process = len(train) // engine.world_size
            if not per_process:
                raise DataError(
                    f"{KEY}: {len(train):,} training images are too few for {engine.world_size:,} processes; start "
                    "fewer"
                )
            self._train_order = EpochOrder(len(train), loading.train_shuffle, *place, per_process)
            self._train_batches = EpochBatches(
                self._train_order, ratio_groups(train) if group_by_aspect_ratio else None, loading.batch_size
            )
            self._train_loader = make_loader(
                CocoDataset(train, loading.seed, horizontal_flip), self._train_batches, None, *how
            )
            self.steps_per_epoch = len(self._train_batches)
            self.smallest_batch = per_process % loading.batch_size or loading.batch_size

    def training_batches(self, epoch: int, start: int = 0) -> Iterator[DetectionBatch]:
        """The batches of epoch `epoch` after the first `start`, still on the CPU; less those without a readable image.

        Raises:
            DataError: a file is unreadable (unless `skip_unreadable`), or there are no training images.
        """
        if self._train_loader is None:
            raise DataError(f"{KEY}: this task was made without training images; give it a training split")
        self._train_order.set_epoch(epoch)
        self._train_batches.start = start
        self._epoch = epoch
        self.position = start
        for batch in batches(self._train_loader):
            self.position += 1
            self._files.report(batch)
            if len(batch):
                yield batch
            elif self.engine.world_size > 1:  # the other processes would wait for this one's step for ever
                raise self._files.error(batch)

    def training_loss(self, model: nn.Module, batch: DetectionBatch) -> StepLoss:
        """The sum of the network's losses on `batch`, or what `distillation` makes of that and of the teacher's
        answers; and each loss by its name with `loss_total`."""
        images, targets = self.inputs(batch), [self._to_device(target) for target in batch.targets]
        # torchvision draws the boxes to learn from out of torch's global generator: seeded, so that a step depends on
        # nothing before it
        torch.manual_seed(derived_seed(self.seed, "boxes to learn from", self._epoch, *batch.image_ids))
        learned = self.distillation
        autocast = torch.autocast(self.engine.device.type, dtype=self.amp_type, enabled=self.amp_type is not None)
        with nullcontext() if learned is None else learned.watching(model) as seen, autocast:
            losses = model(images, targets)
        losses = {name: value.float() for name, value in losses.items()}
        if not any(len(target["boxes"]) for target in targets):
            # means over no box at all are not numbers; a zero that reaches all parameters, as other processes wait for
            # their gradients
            zero = (
                0
                * torch.stack(
                    [parameter.float().sum() for parameter in model.parameters() if parameter.requires_grad]
                ).sum()
            )
            losses = {name: value if torch.isfinite(value) else zero for name, value in losses.items()}
        total = torch.stack(list(losses.values())).sum()
        scalars = {name: value.detach() for name, value in losses.items()}
        if learned is not None and seen is not None:
            total, parts = learned.loss(seen, total)
            scalars |= parts
        return StepLoss(total, len(batch), {**scalars, "loss_total": total.detach()})

    def in_words(self, batch: DetectionBatch) -> str:
        """Which images are in a training batch, with what takes memory in them, and what makes batches smaller."""
        images = some(
            f"{self._train_paths[image_id]} ({image.shape[-1]}x{image.shape[-2]} pixels, {len(target['boxes']):,} "
            "objects)"
            for image_id, image, target in zip(batch.image_ids, batch.images, batch.targets, strict=True)
        )
        return (
            f"on a batch of {len(batch):,} images, {images}. Use a smaller "
            f"{_one_of(['dataloader.batch_size', *self._memory_settings])}, or cut images with very many objects into "
            "parts."
        )

    def validate(self, model: nn.Module, label: str) -> dict[str, float]:
        """COCO's figures in percent over the whole validation set: `BoxAP`, `BoxAP50`, ..., `MaskAP`, ..., their sum,
        `images`."""
        rows, image_ids = self.detect(model, label)
        # once: COCO's figures take minutes and much memory
        figures = [score(self.validation, rows, image_ids, self.backend).metrics()] if self.engine.is_main else []
        (metrics,) = self.engine.gather(figures)
        return {**metrics, "images": len(image_ids)}

    def detect(self, model: nn.Module, label: str) -> tuple[list[dict], list[int]]:
        """What `model` finds in every validation image, in float32, over all processes.

        The network sees one image at a time: beside others it would be padded to their size, which changes what is
        found near its edges, and the result would depend on batch size and number of processes.

        Returns:
            Rows as in a COCO result file, and the ids of the images that were searched, both in the order of the ids.

        Raises:
            DataError: a file is unreadable (unless `skip_unreadable`), or none is readable.
        """
        found, image_ids = Detections(self.validation.outputs), list[int]()
        self._validation_order.set_epoch(0)
        with evaluating(model), torch.no_grad():
            n_batches = len(self._validation_loader)
            for batch in progress.bar(batches(self._validation_loader), label, n_batches, self.show_progress, "batch"):
                self._files.report(batch)
                for image_id, image in zip(batch.image_ids, batch.images, strict=True):
                    with named_when_out_of_memory(partial(self._image_in_words, image_id)):
                        (output,) = model([image.to(self.engine.device, non_blocking=True)])
                        found.add(image_id, output)
                    image_ids.append(image_id)
        rows = sorted(self.engine.gather(found.rows()), key=itemgetter("image_id"))
        image_ids = sorted(self.engine.gather(image_ids))
        if not image_ids:
            raise DataError(f"{KEY}: not one validation image could be read")
        return rows, image_ids

    def _image_in_words(self, image_id: int) -> str:
        width, height = self.validation.size(image_id)
        settings = [key for key in self._memory_settings if key != OF_TRAINING]
        advice = f" Use a smaller {_one_of(settings)}." if settings else ""
        return f"on the validation image {self.validation.path(image_id)} ({width}x{height} pixels).{advice}"

    def inputs(self, batch: DetectionBatch) -> list[Tensor]:
        """What the network sees of a batch, on its device."""
        return [image.to(self.engine.device, non_blocking=True) for image in batch.images]

    def _to_device(self, target: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: value.to(self.engine.device, non_blocking=True) for name, value in target.items()}


def _one_of(keys: Sequence[str]) -> str:
    return f"{', '.join(keys[:-1])} or {keys[-1]}" if len(keys) > 1 else "".join(keys)
