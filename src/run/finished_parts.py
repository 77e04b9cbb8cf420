"""Finished groups of a permutation search, finished clusterings and finished parts of a calibration, each in a file of
its own, for a run that resumes after a crash.

In several processes each writes what it finished itself, into the one folder that all share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import CheckpointError
from ..common.paths import write_text
from ..compression.permute.permute import GroupResult, group_result, group_row
from ..compression.quantize.calibrate.found import Part
from ..compression.quantize.clustering import Clustering
from ..model_files.safetensors_file import read_container, write_container
from .agreement import digest_of
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
                return _clustering(tensors, json.loads(metadata["values"]), torch.int32)
        return None

    def keep(self, name: str, weight: Tensor, clustering: Clustering) -> None:
        """Write one."""
        tensors, values = _tensors_and_values(clustering)
        texts = {"layer": name, "weight": tensor_digest(weight), "values": json.dumps(values)}
        write_container(self._path(name), tensors, texts)

    def _path(self, name: str) -> Path:
        return _file_of(self._folder, name)


class FinishedCalibration:
    """Finished parts of a calibration, one file each.

    What is found for a weight depends on all that came before it, so each part holds a digest of that: of what the
    calibration is made with, and of all parts before it. Parts are asked for and kept in the order of the network, and
    one that follows on something else is as good as not there.
    """

    def __init__(self, folder: Path, made_with: str, writes: bool) -> None:
        """Nothing is read yet.

        Args:
            folder: of the files.
            made_with: a digest of the network, its plan, the images, and whatever else decides what is found.
            writes: whether this process writes; all read.
        """
        self._folder, self._before, self._writes = folder, made_with, writes
        self._recalled: Part | None = None

    def recall(self, label: str) -> Part | None:
        """The next part, where it is there, can be read, and follows on the same."""
        self._recalled = None
        with suppress(CheckpointError, ValueError, KeyError, TypeError):
            tensors, metadata = read_container(_file_of(self._folder, label))
            if metadata["part"] == label and metadata["before"] == self._before:
                self._recalled = _part(tensors, json.loads(metadata["values"]))
        return self._recalled

    def keep(self, label: str, part: Part) -> None:
        """Write a part, unless it was read; the next one follows on it."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {"lost": part.lost, "norms": list(part.norms)}
        if part.clustering is not None:
            tensors, values["clustering"] = _tensors_and_values(part.clustering)
        for number, (mean, variance) in enumerate(part.norms.values()):
            tensors |= {f"mean {number}": mean, f"variance {number}": variance}
        text = json.dumps(values)
        if self._writes and part is not self._recalled:
            write_container(
                _file_of(self._folder, label), tensors, {"part": label, "before": self._before, "values": text}
            )
        after = [self._before, label, text, *(f"{name} {tensor_digest(tensors[name])}" for name in sorted(tensors))]
        self._before = digest_of(after)


def _part(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Part:
    found = values.get("clustering")
    return Part(
        clustering=None if found is None else _clustering(tensors, found, torch.int64),
        lost=tuple((str(step), float(share)) for step, share in values["lost"]),
        norms={
            name: (tensors[f"mean {number}"], tensors[f"variance {number}"])
            for number, name in enumerate(values["norms"])
        },
    )


def _tensors_and_values(clustering: Clustering) -> tuple[dict[str, Tensor], dict[str, float]]:
    few = clustering.codebook.shape[0] <= 256
    codes = clustering.codes.cpu().to(torch.uint8 if few else torch.int32)
    values = {"distortion": clustering.distortion, "iterations": clustering.iterations}
    return {"codebook": clustering.codebook.cpu(), "codes": codes}, values


def _clustering(tensors: Mapping[str, Tensor], values: Mapping[str, Any], codes: torch.dtype) -> Clustering:
    return Clustering(
        codebook=tensors["codebook"],
        codes=tensors["codes"].to(codes),
        distortion=values["distortion"],
        iterations=values["iterations"],
    )


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
