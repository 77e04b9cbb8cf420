"""Pictures of what networks detect: the dense one's beside the compressed one's."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from ..architectures.architecture import Architecture, n_outputs
from ..common.errors import SettingsError
from ..common.log import note
from ..common.paths import write_atomically
from ..common.progress import bar
from ..compression.finetune.task import evaluating
from ..engines.engine import Engine
from ..run.inputs import weights_source
from ..run.open_run import Job
from ..settings import Settings
from ..tasks.coco.data import CocoSplit
from ..tasks.coco.orientation import load_as_annotated
from ..tasks.drawing import draw_side_by_side
from .initial_model import dense_model


@dataclass(frozen=True)
class Pictures:
    """What is to be drawn.

    Attributes:
        folder: receives one PNG per image.
        most: images to draw.
        dense: the network to draw beside, on the CPU; None where there is none.
    """

    folder: Path
    most: int
    dense: nn.Module | None

    @staticmethod
    def of(job: Job, architecture: Architecture, n_classes: int) -> Pictures | None:
        """What the settings ask for; None: nothing, or another process draws.

        The dense network is that of `model.weights`. Where it cannot be had, or tells other classes apart, a note says
        so.

        Raises:
            CheckpointError: `model.weights` is a file that does not fit.
        """
        settings = job.settings
        if settings.visualize is None or not job.engine.is_main:
            return None
        dense = None
        if settings.model.use_compression and settings.model.weights != "none":
            dense = _dense(settings, architecture, n_classes)
        most = settings.evaluation.visualized_images or sys.maxsize
        return Pictures(Path(settings.visualize).expanduser().absolute(), most, dense)

    def draw(self, split: CocoSplit, model: nn.Module, dense: nn.Module | None, engine: Engine) -> int:
        """Draw the first images of `split`; returns how many.

        Args:
            split: the images.
            model: the network that is evaluated, on the engine's device.
            dense: the one beside it, there too; None: no picture beside.
            engine: gives the device.
        """
        image_ids = split.image_ids[: self.most]
        for image_id in bar(image_ids, "draw", unit="image"):
            image = pil_to_tensor(load_as_annotated(split.path(image_id), split.size(image_id)))
            beside = None if dense is None else detected(dense, image, engine.device)
            picture = draw_side_by_side(image, beside, detected(model, image, engine.device), split.label_names())
            target = self.folder / f"{Path(split.path(image_id)).stem}.png"
            write_atomically(target, lambda temporary, picture=picture: picture.save(temporary, format="PNG"))  # type: ignore[misc]
        return len(image_ids)


def detected(model: nn.Module, image: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What `model` finds in an image (3, H, W) uint8, on the CPU."""
    with evaluating(model), torch.no_grad():
        (output,) = model([image.to(device).float() / 255])
    return {name: value.cpu() for name, value in output.items()}


def _dense(settings: Settings, architecture: Architecture, n_classes: int) -> nn.Module | None:
    try:
        dense = dense_model(architecture, weights_source(settings), n_classes, show_progress=True)
    except SettingsError as error:
        if settings.model.weights != "pretrained":
            raise
        note(f"no dense network to draw beside: {error}")
        return None
    if n_outputs(architecture, dense) != n_classes:
        note(
            f"no dense network to draw beside: that of model.weights has {n_outputs(architecture, dense)} classes, not "
            f"{n_classes}"
        )
        return None
    return dense
