"""Keys about the network, its permutation and its compression: type, default and meaning of each."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Gt, MinLen
from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapSerializer,
    WrapValidator,
    field_validator,
    model_validator,
)

from .names import ArchitectureName, QuantizerName, SearchName, StepName
from .read_by import COCO, COMPRESSING, COMPRESSION, EVALUATION, TRAINING, WITH_DATA
from .section import Section, empty_map
from .values import Centroids, Flag, Natural, Positive, Real, RealAboveZero, RealFromZero, Size, Text

Names = Annotated[tuple[Text, ...], MinLen(1)]


class LayerSpec(Section):
    """Compression settings of one layer; null: those of the whole model."""

    k: Centroids | None = Field(None, description="Centroids of this layer.")
    k_means_type: Annotated[QuantizerName | None, COMPRESSING] = Field(None, description="Clustering of this layer.")
    k_means_n_iters: Annotated[Natural | None, COMPRESSING] = Field(
        None, description="Clustering iterations of this layer."
    )
    subvector_size: Positive | None = Field(None, description="Block length of a linear layer or 1x1 convolution.")
    large_subvectors: Flag | None = Field(None, description="Large or small blocks for a convolution.")
    codebook_bits: Annotated[Literal[16, 8] | None, COMPRESSING] = Field(
        None, description="Bits of each of the codebook's values, of this layer."
    )
    layout: Literal["input", "output"] | None = Field(None, description="Along what this layer's blocks run.")


class CompressionSettings(Section):
    """How weights are cut into blocks and clustered."""

    k: Centroids = Field(256, description="Centroids per layer; fewer where a layer has too few blocks.")
    k_means_type: Annotated[QuantizerName, COMPRESSING] = Field("src", description="Clustering.")
    k_means_n_iters: Annotated[Natural, COMPRESSING] = Field(1000, description="Clustering iterations.")
    k_means_tolerance: Annotated[RealFromZero, COMPRESSING] = Field(
        0.0,
        description=(
            "Share of the distortion: stop when 10 iterations of kmeans, or one of the short annealings that src then "
            "makes, gain less; 0: never."
        ),
    )
    fc_subvector_size: Positive = Field(4, description="Block length in linear layers.")
    pw_subvector_size: Positive = Field(4, description="Block length in 1x1 convolutions.")
    large_subvectors: Flag = Field(False, description="Blocks of two kernels instead of one in other convolutions.")
    codebook_bits: Annotated[Literal[16, 8] | None, COMPRESSING] = Field(
        None,
        description=(
            "Bits of each value of a codebook: 16, floats, or 8, whole numbers times one scale per layer. null: 16, or "
            "what pays where compression.size or compression.ratio is given."
        ),
    )
    layout: Literal["input", "output"] | None = Field(
        None,
        description=(
            "Along what blocks run: input, the inputs and kernel of one output; output, neighbouring outputs, by "
            "the rule of Apple's Neural Engine: blocks of 2, 4, 8 or 16 (pw_subvector_size for all convolutions) with "
            "k times their length at most 256. null: input."
        ),
    )
    ignored_modules: tuple[Text, ...] = Field((), description="Layers to leave uncompressed.")
    layer_specs: Annotated[dict[str, LayerSpec], BeforeValidator(empty_map)] = Field(
        default_factory=dict, description="Settings of single layers."
    )


def _flag_or_file(value: object) -> object:
    """True, False, or a file's name with an ending that is known."""
    if isinstance(value, bool) or (isinstance(value, str) and value.lower().endswith((".csv", ".png"))):
        return value
    raise ValueError("True, or a file that ends in .csv or .png")


class BudgetSettings(Section):
    """A size instead of settings: block length and centroids of every layer are chosen for it."""

    size: Size | None = Field(
        None,
        description=(
            "Largest size of the compressed network, such as 1.2MB, 900KB or 1_200_000 (bytes; MB are 2^20 bytes): "
            "block length and centroids of every layer are chosen for it; layer_specs and ignored_modules stand. null: "
            "the settings decide."
        ),
    )
    ratio: Annotated[Real, Gt(1)] | None = Field(
        None, description="The same as how many times smaller than the dense network; only one of the two."
    )
    count: Annotated[Positive, COMPRESSING] = Field(
        128,
        description=(
            "Images that say what a wanted size is best spent on, at most, spread evenly over those that calibrate; "
            "each is shown to the network once for every weight."
        ),
    )
    plan: Annotated[bool | str, BeforeValidator(_flag_or_file), COMPRESSION] = Field(
        False,
        description=(
            "True: show the plan of every layer, what it is predicted to lose and the size, and do nothing; a file "
            "that ends in .csv or .png: write what every size is predicted to lose to it, too."
        ),
    )

    @field_validator("ratio")
    @classmethod
    def _one_of_the_two(cls, ratio: float | None, info: ValidationInfo) -> float | None:
        if ratio is not None and info.data.get("size") is not None:
            raise ValueError("compression.size or compression.ratio, not both; set one of them to null")
        return ratio


class GroupSettings(Section):
    """Layers that share one permutation: the outputs of `parents` are what `children` read."""

    parents: Names = Field(description="Layers whose output channels are permuted.")
    children: Names = Field(description="Layers whose input channels are permuted alike.")

    @model_validator(mode="before")
    @classmethod
    def _two_maps_are_one(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        parts = data if isinstance(data, list | tuple) else [data]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("a group: [{parents: [names]}, {children: [names]}]")
        keys = [key for part in parts for key in part]
        if sorted(keys) != ["children", "parents"]:
            raise ValueError(
                "a group with the keys parents and children, each once: [{parents: [names]}, {children: [names]}]"
            )
        return {key: value for part in parts for key, value in part.items()}


AUTO = "auto"


def _auto_or_groups(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """`auto` as it is; anything else is a list of groups, and errors are those of its items."""
    return value if value == AUTO else read(value)


def _auto_or_plain(value: Any, write: SerializerFunctionWrapHandler) -> Any:
    return value if value == AUTO else write(value)


if TYPE_CHECKING:
    Groups: TypeAlias = tuple[GroupSettings, ...] | Literal["auto"] | None
else:
    Groups = Annotated[tuple[GroupSettings, ...] | None, WrapValidator(_auto_or_groups), WrapSerializer(_auto_or_plain)]


class PermutationSpec(Section):
    """How the permutation of one layer's inputs is searched."""

    reshape: tuple[Positive, ...] | None = Field(
        None, description="Shape in which a linear layer's weight reads a flattened feature map."
    )
    optimization: tuple[StepName, ...] | None = Field(
        None, description="Searches to run, in this order; null: the usual ones."
    )


class ModelSettings(Section):
    """The network, its permutation and its compression."""

    arch: ArchitectureName = Field(
        "resnet50",
        description=(
            "Architecture: one of these; one of torchvision's models (torchvision:NAME, or NAME); timm:NAME; or "
            "package.module:callable, which builds a network and is given num_classes where it takes that."
        ),
    )
    weights: Text = Field(
        "pretrained",
        description=(
            "Starting weights: pretrained, none (random), or the path of a dense network, or of a compressed one to "
            "train it on; or hf:OWNER/NAME, such a file on the Hugging Face hub."
        ),
    )
    new_head: Annotated[Flag, TRAINING] = Field(
        False,
        description=(
            "Start from model.weights but for the layers that are sized by the classes: these get new random weights, "
            "for the classes of the data."
        ),
    )
    reestimate_norms: Annotated[Flag, TRAINING] = Field(
        False,
        description=(
            "Before training, take from training images the running statistics of batch norms of which model.weights "
            "holds scale and shift only, and of all those of a compressed network. For a model file: convert."
        ),
    )
    use_compression: Annotated[Flag, WITH_DATA] = Field(
        True, description="Compress the network; False trains or evaluates it as it is."
    )
    state_dict_compressed: Annotated[Text | None, EVALUATION] = Field(
        None,
        description=(
            "Compressed model to evaluate: a path, or hf:OWNER/NAME on the Hugging Face hub (its model.safetensors; "
            "hf:OWNER/NAME/FILE another file; @REVISION at the end another version)."
        ),
    )
    decode: Annotated[Literal["kept", "each_forward", "compiled"], EVALUATION] = Field(
        "kept",
        description=(
            "When weights are decoded: kept, once; each_forward, whenever a layer runs, so that the weight of one "
            "layer is in memory at a time; compiled, in the graph that torch.compile makes, which keeps none either."
        ),
    )
    compression_parameters: CompressionSettings = Field(
        default_factory=CompressionSettings, description="How weights are compressed."
    )
    boxes_per_image: Annotated[Positive | None, TRAINING, COCO] = Field(
        None,
        description=(
            "R-CNNs: proposed boxes of an image that a training step learns from, at most; null: the network's own "
            "(Mask R-CNN: 512)."
        ),
    )
    proposals: Annotated[Positive | None, COCO, WITH_DATA] = Field(
        None,
        description=(
            "R-CNNs: boxes of an image that are proposed to the heads, at most; twice as many in training. null: the "
            "network's own (Mask R-CNN: 1000)."
        ),
    )
    use_permutations: Annotated[Flag, COMPRESSING] = Field(True, description="Permute channels before compressing.")
    search: Annotated[SearchName, COMPRESSING] = Field("best", description="Search for permutations.")
    search_seconds: Annotated[RealAboveZero | None, COMPRESSING] = Field(
        None, description="Stop the best search after so long; the result then depends on the machine. null: no limit."
    )
    sls_iterations: Annotated[Natural, COMPRESSING] = Field(
        10_000, description="Swaps tried per group by search: published, and by the first of best's own searches."
    )
    permutations: Annotated[Groups, COMPRESSING] = Field(
        None,
        description=(
            "Groups of layers; auto: found by following channels through the network; null: those of the architecture, "
            "or auto where it has none."
        ),
    )
    permutation_specs: Annotated[dict[str, PermutationSpec], BeforeValidator(empty_map), COMPRESSING] = Field(
        default_factory=dict, description="Search settings of single layers."
    )
