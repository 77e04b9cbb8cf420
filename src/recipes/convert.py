"""One model file into another form: published `.pth`, packed or dense `.safetensors`, ONNX with codes or dense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..architectures.structure import without_weights
from ..common.errors import SettingsError
from ..common.hub import find_model
from ..common.log import log, note
from ..common.memory import named_when_out_of_memory
from ..common.paths import check_name
from ..common.progress import bar
from ..common.randomness import stream
from ..compression.quantize.calibrate.inputs import few_inputs, run_on
from ..compression.quantize.dequantize import dequantized_state
from ..compression.quantize.layers import QuantizedLayer
from ..engines.choosing import pick_device
from ..exports.onnx_file import dense_graph, difference, put_codes, write_graph
from ..model_files.norm_estimation import reestimate_norms, retake_norms, retakeable_norms
from ..model_files.norms import folded_norms
from ..model_files.open_model_file import OpenModelFile, open_model_file
from ..model_files.packed import is_packed, save_packed
from ..model_files.pth import save_compressed, save_dense, save_dense_safetensors
from ..model_files.size import model_size
from ..run.model_writer import PRODUCER
from ..settings import Settings
from .data import images_of_folder

SUFFIXES = (".pth", ".safetensors", ".onnx")


def convert(
    source: str,
    target: str,
    *,
    dense: bool = False,
    entropy_coding: bool = False,
    arch: str | None = None,
    image_size: int = 224,
    overwrite: bool = False,
    norms: Settings | None = None,
) -> int:
    """Read `source`, whatever it is, and write it as `target`, whose ending says as what.

    Args:
        source: `.pth` or `.safetensors`.
        target: `.pth`: published format; `.safetensors`: packed; `.onnx`: codebooks and codes.
        dense: dequantize the weights instead, for other programs. Dense networks are always written densely.
        entropy_coding: entropy-code the codes of a packed file where that is smaller.
        arch: name of the architecture, where the file does not tell.
        image_size: side of the images with which an ONNX graph is traced and checked.
        overwrite: replace `target`.
        norms: with `model.reestimate_norms` the running statistics of batch norms are taken anew from
            `calibration.images`.

    Returns:
        The exit status.

    Raises:
        SettingsError: the file is not there, `target` is, or the two do not go together.
        CheckpointError: `source` cannot be read.
        DataError: there are no images to take the statistics from.
        RunError: `target` cannot be written, or an ONNX file does not compute what it should.
    """
    path, to = find_model(source, "the model to convert"), Path(target).expanduser()
    _check_target(path, to, dense, entropy_coding, overwrite)
    retake = norms is not None and _check_norms(norms)
    needs_network = dense or retake or to.suffix == ".onnx" or not is_packed(path)
    file = open_model_file(path, arch, needs_network=needs_network)
    dense = dense or not file.quantized
    if dense and entropy_coding:
        raise SettingsError("--entropy: a dense network has no codes")
    log.info("%s: %s %s, %s bytes", path, file.kind, file.architecture.name, f"{path.stat().st_size:,}")
    if norms is not None and retake:
        _retake_norms(file, norms)
    if to.suffix == ".onnx":
        _write_onnx(file, to, dense, image_size)
    elif dense:
        (save_dense if to.suffix == ".pth" else save_dense_safetensors)(_dequantized(file), to)
    elif to.suffix == ".pth":
        save_compressed(file.model, to)
    else:
        save_packed(file.model, to, replace(file.info, producer=PRODUCER), entropy_coding=entropy_coding)
    bits = model_size(file.model).bits
    share = "" if dense else f", {to.stat().st_size / (bits / 8):.4f} of the {bits / 8:,.0f} that are reported"
    log.info("%s: %s, %s bytes%s", to, "dense" if dense else "quantized", f"{to.stat().st_size:,}", share)
    return 0


def _check_target(source: Path, target: Path, dense: bool, entropy_coding: bool, overwrite: bool) -> None:
    if target.suffix not in SUFFIXES:
        raise SettingsError(
            f"{target} ends in {target.suffix!r}; expected one of {', '.join(SUFFIXES)}, which says what to write"
        )
    if entropy_coding and (dense or target.suffix != ".safetensors"):
        raise SettingsError("--entropy is for packed files: write to a .safetensors file, without --dense")
    check_name(target)
    if target.is_dir() or (target.exists() and source.exists() and target.samefile(source)):
        raise SettingsError(
            f"{target} is {'a folder' if target.is_dir() else 'the file to convert'}; name another file to write"
        )
    if target.exists() and not overwrite:
        raise SettingsError(f"{target} already exists; name another file, or replace it with --overwrite")


def _check_norms(settings: Settings) -> bool:
    """Whether batch norms are to be looked at; raises SettingsError where there is nothing to look at them with."""
    if not settings.model.reestimate_norms:
        given = ", ".join(sorted(".".join(path) for path in settings.command_line))
        note(f"{given}: no effect without --model.reestimate_norms True")
        return False
    if settings.calibration.images is None:
        raise SettingsError(
            "model.reestimate_norms is True, and calibration.images is not set: name a folder with images of the kind "
            "that the network will see (--calibration.images FOLDER); they need no labels"
        )
    return True


def _retake_norms(file: OpenModelFile, settings: Settings) -> None:
    """Take the running statistics of all batch norms of an open model file from images; in place."""
    model, device = file.model, pick_device(settings.device)
    whole, folded = retakeable_norms(model), folded_norms(model)
    if not whole and not folded:
        raise SettingsError(
            f"model.reestimate_norms: a {file.architecture.name} has no batch norms with running statistics of their "
            "own; there is nothing to take anew"
        )
    images = images_of_folder(settings, file.architecture, True)
    assert images is not None
    batches = images.read()
    with named_when_out_of_memory(lambda: "on a batch of images. Use a smaller calibration.batch_size."):
        retaken = retake_norms(model, bar(batches, "norms", len(batches), unit="batch"), device)
        rebuilt = reestimate_norms(model.to(device), lambda net: [run_on(device, net, batch) for batch in batches])
    model.to("cpu")
    n_images = sum(map(len, batches))
    log.info("norms: running statistics of %d batch norms taken anew from %s images", len(retaken), f"{n_images:,}")
    if text := few_inputs(n_images):
        note(text)
    if rebuilt:
        note(
            f"of {len(rebuilt)} batch norms the file holds scale and shift only: their running statistics were "
            "rebuilt, and what they compute stays as it is"
        )


def _dequantized(file: OpenModelFile) -> nn.Module:
    """The dense network of an open model file; it may share what is not quantized with it."""
    if not file.quantized:
        return file.model
    state = dequantized_state(file.model)
    model = without_weights(lambda: file.architecture.build_for(state))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _write_onnx(file: OpenModelFile, target: Path, dense: bool, image_size: int) -> None:
    if file.architecture.task != "classification":
        raise SettingsError(
            f"ONNX files are written for classification networks; {file.architecture.name} is for "
            f"{file.architecture.task}"
        )
    graph = dense_graph(_dequantized(file), image_size)
    if not dense:
        put_codes(graph, file.model)
    about = {
        "producer": PRODUCER,
        "arch": file.architecture.name,
        "weights": "dense" if dense else "codebook and codes",
    }
    images = torch.randn(2, 3, image_size, image_size, generator=stream(0, "onnx check"))
    found: list[float | None] = []
    write_graph(graph, target, about, lambda written: found.append(difference(written, file.model, images)))
    off = found[0]
    quantized = sum(isinstance(module, QuantizedLayer) for module in file.model.modules())
    checked = (
        "not checked: onnxruntime is not installed"
        if off is None
        else f"onnxruntime's logits are PyTorch's to {off:.1e}"
    )
    log.info("%s; %d weights as codebook and codes", checked, 0 if dense else quantized)
