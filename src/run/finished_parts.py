"""Finished groups of a permutation search and finished clusterings, each in a file of its own, for a run that resumes
after a crash.

In several processes each writes what it finished itself, into the one folder that all share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import CheckpointError
from ..common.paths import write_text
from ..compression.permute.permute import GroupResult, group_result, group_row
from ..compression.quantize.clustering import Clustering
from ..model_files.safetensors_file import read_container, write_container
from .fingerprint import tensor_digest


class FinishedSearches:
    """Finished groups of the permutation search, one file each."""

    def __init__(self, folder: Path, numbers: Sequence[int]) -> None:
        self._folder, self._numbers = folder, numbers

    def recall(self, number: int) -> GroupResult | None:
        """The group at `number` of those that are searched; None where it is not there or cannot be read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            return group_result("", json.loads(self._path(number).read_text(encoding="utf-8")))
        return None

    def keep(self, number: int, result: GroupResult) -> None:
        """Write one."""
        write_text(self._path(number), json.dumps(group_row(result)))

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._numbers[number]:06d}.json"


class FinishedClusterings:
    """Finished clusterings, one file each, found by the layer and its weight."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recall(self, name: str, weight: Tensor) -> Clustering | None:
        """The clustering of the layer; None where it is not there, cannot be read, or is that of another weight."""
        with suppress(CheckpointError, ValueError, KeyError, TypeError):
            tensors, metadata = read_container(self._path(name))
            if metadata["weight"] == tensor_digest(weight) and metadata["layer"] == name:
                values = json.loads(metadata["values"])
                return Clustering(
                    codebook=tensors["codebook"],
                    codes=tensors["codes"].to(torch.int32),
                    distortion=values["distortion"],
                    iterations=values["iterations"],
                )
        return None

    def keep(self, name: str, weight: Tensor, clustering: Clustering) -> None:
        """Write one."""
        codes = clustering.codes.cpu()
        few = clustering.codebook.shape[0] <= 256
        tensors = {"codebook": clustering.codebook.cpu(), "codes": codes.to(torch.uint8 if few else torch.int32)}
        values = json.dumps({"distortion": clustering.distortion, "iterations": clustering.iterations})
        write_container(self._path(name), tensors, {"layer": name, "weight": tensor_digest(weight), "values": values})

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
