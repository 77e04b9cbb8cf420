"""What the recipes ask of an architecture: how to build it, where its published weights are, which layers share a
permutation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from ..common.errors import SettingsError
from ..compression.permute.channels import ChannelGroup
from ..compression.permute.groups import Group, Outputs, call_network


@dataclass(frozen=True)
class Architecture:
    """A network by name.

    Attributes:
        name: as in `model.arch`.
        task: "classification" or "detection".
        build: number of classes -> network with freshly initialised weights.
        weights_url: the published dense weights; the file name ends in the first hex digits of their SHA-256.
        n_classes: classes of the published weights.
        head: name of the layer whose rows are the classes.
        heads_beside: further layers whose rows are counted in classes.
        groups: network -> its permutation groups (spec: `model.permutations` left out); None: they are found by
            following channels.
        licence: of the published weights, where it restricts their use.
        build_frozen: the same network with frozen batch norms, for state dicts that come from such a one.
        outputs: network, images (B, 3, H, W) -> everything that a permutation must leave as it is.
        reshapes: `permutation_specs.<layer>.reshape` of layers that read a flattened map.
        old_names: layers' names in earlier versions of torchvision -> their names now.
        backbone: name of the module that is a ResNet without its classifier, if there is one.
        image_size: side of the images that it is made for.
        rows_per_class, more_rows: the head has rows_per_class * classes + more_rows rows.
        sizes_by_classes: whether it can be built for any number of classes.
        normalisation: mean and standard deviation per channel of the images that the published weights were trained on,
            on the scale 0 to 1; None: not known.
        download: whether to show progress -> the published weights, where they do not come from `weights_url`.
    """

    name: str
    task: str
    build: Callable[[int], nn.Module]
    weights_url: str
    n_classes: int
    head: str
    groups: Callable[[nn.Module], Sequence[Group | ChannelGroup]] | None
    heads_beside: tuple[str, ...] = ()
    licence: str = ""
    build_frozen: Callable[[int], nn.Module] | None = None
    outputs: Outputs = call_network
    reshapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    old_names: Mapping[str, str] = field(default_factory=dict)
    backbone: str = ""
    image_size: int = 224
    rows_per_class: int = 1
    more_rows: int = 0
    sizes_by_classes: bool = True
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    download: Callable[[bool], dict[str, Tensor]] | None = None

    def published_weights(self, progress: bool = True) -> dict[str, Tensor]:
        """Download (once; kept in torch's cache folder) the published dense weights and verify their checksum.

        Raises:
            SettingsError: no network, or a checksum that does not match; says where the file can be put by hand.
        """
        if self.download is not None:
            return self.download(progress)
        if not self.weights_url:
            raise SettingsError(
                f"model.weights: pretrained: there are no published weights of {self.name}. Name a state dict of your "
                "own with --model.weights PATH, or start from random weights with --model.weights none."
            )
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        advice = (
            f"Put the file into {folder} by hand, or name a state dict of your own with --model.weights PATH, "
            "or start from random weights with --model.weights none."
        )
        try:
            state = torch.hub.load_state_dict_from_url(
                self.weights_url, map_location="cpu", progress=progress, check_hash=True, weights_only=True
            )
        except (URLError, OSError) as error:
            raise SettingsError(
                f"model.weights: pretrained: cannot download {self.weights_url} ({getattr(error, 'reason', error)}).\n "
                f" {advice}"
            ) from error
        except RuntimeError as error:
            raise SettingsError(
                f"model.weights: pretrained: {self.weights_url} is damaged or not what was published ({error}).\n  "
                f"{advice}"
            ) from error
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}

    def classes_of(self, state: Mapping[str, Tensor]) -> int | None:
        """Number of classes of a state dict or compressed model of this architecture; None if its head is not in it."""
        for entry in ("bias", "weight", "codes_matrix"):
            tensor = state.get(f"{self.head}.{entry}")
            if tensor is not None and tensor.dim() > 0:
                return self.classes(int(tensor.shape[0]))
        return None

    def classes(self, rows: int) -> int | None:
        """Classes of a head with so many rows; None: it is none of this architecture's."""
        classes, left = divmod(rows - self.more_rows, self.rows_per_class)
        return classes if classes > 0 and not left else None

    def belongs_to_a_head(self, name: str) -> bool:
        """Whether the tensor `name` has rows for classes, so that it is of no use to other classes."""
        return name.rpartition(".")[0] in (self.head, *self.heads_beside)

    def build_for(self, state: Mapping[str, Tensor], n_classes: int | None = None) -> nn.Module:
        """A network with `n_classes`, or those of `state`, and with frozen norms where `state` has norms that never
        counted a batch."""
        leaves = {name.rpartition(".")[2] for name in state}
        frozen = "running_var" in leaves and "num_batches_tracked" not in leaves
        make = self.build_frozen if frozen and self.build_frozen else self.build
        return make(n_classes or self.classes_of(state) or self.n_classes)

    def backbone_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors of `backbone` where `state` is that of a classifier, from which this network can start; else
        None."""
        if not self.backbone or "conv1.weight" not in state or "fc.weight" not in state:
            return None
        return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}

    def current_name(self, layer: str) -> str:
        """The name of a layer in this version of torchvision; names without an old form stay."""
        return self.old_names.get(layer, layer)

    def current_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` with old layer names replaced, unless the file holds the layer under its present name too."""
        renamed = {}
        for key, tensor in state.items():
            layer, dot, entry = key.rpartition(".")
            now = self.current_name(layer) + dot + entry
            renamed[key if now in state else now] = tensor
        return renamed


def n_outputs(architecture: Architecture, model: nn.Module) -> int:
    """Number of classes that `model` tells apart."""
    head: Any = model.get_submodule(architecture.head)
    rows = next(int(getattr(head, name)) for name in ("out_features", "out_channels") if hasattr(head, name))
    return architecture.classes(rows) or rows
