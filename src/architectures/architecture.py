"""What the recipes ask of an architecture: how to build it, where its published weights are, which layers share a permutation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from ..compression.permute.groups import Group
from ..errors import SettingsError


@dataclass(frozen=True)
class Architecture:
    """A network by name.

    Attributes:
        name: as in `model.arch`.
        task: "classification".
        build: number of classes -> network with freshly initialised weights.
        weights_url: the published dense weights; the file name ends in the first hex digits of their SHA-256.
        n_classes: classes of the published weights.
        head: name of the layer whose rows are the classes.
        groups: network -> its permutation groups (spec: `model.permutations` left out).
        licence: of the published weights, where it restricts their use.
    """

    name: str
    task: str
    build: Callable[[int], nn.Module]
    weights_url: str
    n_classes: int
    head: str
    groups: Callable[[nn.Module], list[Group]]
    licence: str = ""

    def published_weights(self, progress: bool = True) -> dict[str, Tensor]:
        """Download (once; kept in torch's cache folder) the published dense weights and verify their checksum.

        Raises:
            SettingsError: no network, or a checksum that does not match; says where the file can be put by hand.
        """
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
                f"model.weights: pretrained: cannot download {self.weights_url} ({getattr(error, 'reason', error)}).\n  {advice}"
            ) from error
        except RuntimeError as error:
            raise SettingsError(
                f"model.weights: pretrained: {self.weights_url} is damaged or not what was published ({error}).\n  {advice}"
            ) from error
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}

    def classes_of(self, state: Mapping[str, Tensor]) -> int | None:
        """Number of classes of a state dict or compressed model of this architecture; None if its head is not in it."""
        for entry in ("bias", "weight", "codes_matrix"):
            tensor = state.get(f"{self.head}.{entry}")
            if tensor is not None and tensor.dim() > 0:
                return int(tensor.shape[0])
        return None
