"""Keys of fine-tuning from a teacher: type, default and meaning of each."""

from typing import Annotated, Literal

from pydantic import Field

from .read_by import IMAGES_IN_FOLDERS
from .section import Section
from .values import Positive, RealAboveZero, RealFromZero, Text


class DistillationSettings(Section):
    """What is learnt from the answers of a teacher, the dense network, instead of labels or beside them."""

    weight: RealFromZero = Field(
        1.0,
        description=(
            "Weight of the divergence (KL) of the network's answers from the teacher's; 0: no teacher. It helps where "
            "training images are few, as the teacher says more of an image than its label does."
        ),
    )
    temperature: RealAboveZero = Field(
        4.0, description="What logits are divided by first: the larger, the more unlikely classes count."
    )
    labels: RealFromZero = Field(
        1.0, description="Weight of the loss by labels beside the teacher; 0 where labels cannot be trusted."
    )
    features: RealFromZero = Field(
        0.0,
        description=(
            "Weight of the squared difference from the outputs of the teacher's stages (detection: from its feature "
            "maps); 0: they are not looked at."
        ),
    )
    stages: Annotated[tuple[Text, ...], IMAGES_IN_FOLDERS] = Field(
        (), description="Modules whose outputs are compared; empty: the last one of each size of maps, four at most."
    )
    teacher: Text | None = Field(
        None,
        description=(
            "Dense network's file of the same architecture, or the name of another architecture with published "
            "weights; null: the network that is compressed, before that."
        ),
    )
    amp: Literal["none", "bf16", "fp16"] = Field(
        "none", description="Mixed precision of the teacher; none: float32, whatever the network is trained in."
    )
    images: Annotated[Text | None, IMAGES_IN_FOLDERS] = Field(
        None,
        description=(
            "Folder with images without labels, in whatever folders below it, in shards or in a saved data set, or "
            "hf:OWNER/NAME, that are learnt from too; null: none."
        ),
    )
    images_per_batch: Annotated[Positive | None, IMAGES_IN_FOLDERS] = Field(
        None, description="How many of them each training batch gets besides its own; null: as many as its own."
    )
