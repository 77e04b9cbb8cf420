"""How a run writes its models: `.pth` as published, packed `.safetensors`, or both (`save_format`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import __version__
from ..architectures.architecture import Architecture, n_outputs
from ..model_files.compression_report import FILE_NAME, read_outputs_lost, read_permutations
from ..model_files.packed import ModelInfo, save_packed
from ..model_files.pth import save_compressed, save_dense, save_dense_safetensors
from ..settings import Settings
from .output_folder import OutputFolder

PRODUCER = f"pqf {__version__}"


class ModelWriter:
    """Writes a model of a run in the formats that the settings ask for."""

    def __init__(
        self, settings: Settings, architecture: Architecture, folder: OutputFolder, compressed: ModelInfo | None = None
    ) -> None:
        """What packed files will say about the model comes from the settings and from the run's `compression.json`, or
        from `compressed`, the file that the run started from, where the run did not compress it itself."""
        self._settings, self._architecture, self._folder = settings, architecture, folder
        self._compressed = compressed

    def __call__(self, model: nn.Module, path: Path, metrics: Mapping[str, float] | None) -> None:
        """Write `path` (.pth), or a .safetensors file of the same name, or both."""
        wanted, quantized = self._settings.save_format, self._settings.model.use_compression
        if wanted != "safetensors":
            (save_compressed if quantized else save_dense)(model, path)
        if wanted != "pth":
            packed = path.with_suffix(".safetensors")
            if quantized:
                save_packed(model, packed, self._info(model, metrics))
            else:
                save_dense_safetensors(model, packed)

    def _info(self, model: nn.Module, metrics: Mapping[str, float] | None) -> ModelInfo:
        earlier = self._compressed
        report = self._folder.path / FILE_NAME  # from the file, so that a run that resumes another one has them too
        return ModelInfo(
            arch=self._architecture.name,
            num_classes=n_outputs(self._architecture, model),
            settings=compression_settings(self._settings) if earlier is None else earlier.settings,
            metric=metrics,
            permutations=read_permutations(report) if earlier is None else earlier.permutations,
            producer=PRODUCER,
            outputs_lost=read_outputs_lost(report) if earlier is None else earlier.outputs_lost,
        )


def compression_settings(settings: Settings) -> dict[str, Any]:
    """The settings that say how a network was compressed, as plain values; what is null is left out."""
    model = settings.model.model_dump(mode="json")
    parameters = model["compression_parameters"]
    parameters["layer_specs"] = {
        layer: {key: value for key, value in spec.items() if value is not None}
        for layer, spec in parameters["layer_specs"].items()
    }
    wanted = settings.compression
    budget = {key: value for key in ("size", "ratio") if (value := getattr(wanted, key)) is not None}
    search = {key: model[key] for key in ("use_permutations", "search", "sls_iterations")}
    return {"compression_parameters": parameters, **search, **budget, "seed": settings.seed}
