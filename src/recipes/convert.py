"""One model file into another form: published `.pth`, packed or dense `.safetensors`, ONNX with codes or dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ..architectures.structure import without_weights
from ..common.errors import SettingsError
from ..common.hub import find_model
from ..common.log import log, note
from ..common.memory import named_when_out_of_memory
from ..common.paths import check_name
from ..common.progress import bar
from ..compression.quantize.calibrate.inputs import few_inputs, run_on
from ..compression.quantize.dequantize import dequantized_state
from ..engines.choosing import pick_device
from ..exports.coreml import write_coreml
from ..exports.onnx_file import AUTO, OnnxOptions, write_onnx
from ..exports.onnx_trace import BATCH, FREE, OPSET
from ..model_files.norm_estimation import reestimate_norms, retake_norms, retakeable_norms
from ..model_files.norms import folded_norms
from ..model_files.open_model_file import OpenModelFile, open_model_file
from ..model_files.packed import is_packed, save_packed
from ..model_files.pth import save_compressed, save_dense, save_dense_safetensors
from ..model_files.size import model_size
from ..run.model_writer import PRODUCER
from ..settings import Settings
from .data import images_of_folder


@dataclass(frozen=True)
class ConvertOptions:
    """What to write, and how.

    Attributes:
        dense: dequantized weights, for programs that know nothing of codes. Dense networks are always written densely.
        entropy_coding: entropy-code the codes of a packed file where that is smaller.
        arch: name of the architecture, where the file does not tell.
        image_size: side of the images with which a graph is traced and checked; 0: what the network is made for.
        overwrite: replace what is there.
        size: whether an ONNX graph takes images of any size: `auto` where it can, `free`, `fixed`.
        opset: of an ONNX graph; None: 18.
        exporter: torch's that makes an ONNX graph: `auto`, `torchscript`, `dynamo`.
        fit: re-quantize what a form cannot hold, where it is Core ML's.
    """

    dense: bool = False
    entropy_coding: bool = False
    arch: str | None = None
    image_size: int = 0
    overwrite: bool = False
    size: str = AUTO
    opset: int | None = None
    exporter: str = AUTO
    fit: bool = False


@dataclass(frozen=True)
class Form:
    """A form that files are written in, known by the ending of the name.

    Attributes:
        write: writes an open model file under a name, as the options say.
        needs_network: whether it takes more than the tensors of a file.
        is_folder: whether what is written is a folder.
    """

    write: Callable[[OpenModelFile, Path, ConvertOptions], None]
    needs_network: bool = False
    is_folder: bool = False


def convert(source: str, target: str, options: ConvertOptions, norms: Settings | None = None) -> int:
    """Read `source`, whatever it is, and write it as `target`, whose ending says as what (`FORMS`).

    Args:
        source: `.pth` or `.safetensors`.
        target: `.pth`: published format; `.safetensors`: packed; `.onnx`: codebooks and codes.
        options: what else says what to write.
        norms: with `model.reestimate_norms` the running statistics of batch norms are taken anew from
            `calibration.images`.

    Returns:
        The exit status.

    Raises:
        SettingsError: the file is not there, `target` is, or the two do not go together.
        CheckpointError: `source` cannot be read.
        DataError: there are no images to take the statistics from.
        RunError: `target` cannot be written, or does not compute what it should.
    """
    path, to = find_model(source, "the model to convert"), Path(target).expanduser()
    _check_target(path, to, options)
    form = FORMS[to.suffix]
    retake = norms is not None and _check_norms(norms)
    needs_network = options.dense or retake or form.needs_network or not is_packed(path)
    file = open_model_file(path, options.arch, needs_network=needs_network)
    side = options.image_size or file.architecture.image_size
    options = replace(options, dense=options.dense or not file.quantized, image_size=side)
    if options.dense and options.entropy_coding:
        raise SettingsError("--entropy: a dense network has no codes")
    log.info("%s: %s %s, %s bytes", path, file.kind, file.architecture.name, f"{path.stat().st_size:,}")
    if norms is not None and retake:
        _retake_norms(file, norms)
    form.write(file, to, options)
    bits, size = model_size(file.model).bits, _bytes_of(to)
    share = "" if options.dense else f", {size / (bits / 8):.4f} of the {bits / 8:,.0f} that are reported"
    log.info("%s: %s, %s bytes%s", to, "dense" if options.dense else "quantized", f"{size:,}", share)
    return 0


def _bytes_of(path: Path) -> int:
    """The size of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _check_target(source: Path, target: Path, options: ConvertOptions) -> None:
    form = FORMS.get(target.suffix)
    if form is None:
        raise SettingsError(
            f"{target} ends in {target.suffix!r}; expected one of {', '.join(FORMS)}, which says what to write"
        )
    if options.entropy_coding and (options.dense or target.suffix != ".safetensors"):
        raise SettingsError("--entropy is for packed files: write to a .safetensors file, without --dense")
    if options.fit and (options.dense or target.suffix != ".mlpackage"):
        raise SettingsError("--fit is for Core ML packages: write to a .mlpackage, without --dense")
    check_name(target)
    another_kind = target.exists() and target.is_dir() != form.is_folder
    if another_kind or (target.exists() and source.exists() and target.samefile(source)):
        what = "the file to convert" if not another_kind else "a folder" if target.is_dir() else "a file"
        raise SettingsError(f"{target} is {what}; name another {'folder' if form.is_folder else 'file'} to write")
    if target.exists() and not options.overwrite:
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


def _write_pth(file: OpenModelFile, target: Path, options: ConvertOptions) -> None:
    if options.dense:
        save_dense(_dequantized(file), target)
    else:
        save_compressed(file.model, target)


def _write_safetensors(file: OpenModelFile, target: Path, options: ConvertOptions) -> None:
    if options.dense:
        save_dense_safetensors(_dequantized(file), target)
    else:
        info = replace(file.info, producer=PRODUCER)
        save_packed(file.model, target, info, entropy_coding=options.entropy_coding)


def _write_onnx(file: OpenModelFile, target: Path, options: ConvertOptions) -> None:
    how = OnnxOptions(
        image_size=options.image_size, size=options.size, opset=options.opset or OPSET, exporter=options.exporter
    )
    about = {
        "producer": PRODUCER,
        "arch": file.architecture.name,
        "weights": "dense" if options.dense else "codebook and codes",
    }
    coded = None if options.dense else file.model
    made = write_onnx(_dequantized(file), coded, target, how, about)
    side, kept = options.image_size, made.why_not_free
    if made.free != FREE:
        batch = "any number of images" if made.free == BATCH and file.architecture.task != "detection" else "one image"
        why = f": {kept}" if kept else ""
        note(f"the file takes {batch} of {side} x {side} pixels only (--image_size N sets another size){why}")
    if made.filled.unused:
        names = ", ".join(made.filled.unused)
        note(f"left out, because evaluation does not use them: {names}")
    if made.off is None:
        checked = "not checked: onnxruntime is not installed"
    else:
        checked = f"onnxruntime's {made.outputs[0]} are PyTorch's to {made.off:.1e}"
    log.info("%s; %d weights as codebook and codes", checked, len(made.filled.coded))


def _write_coreml(file: OpenModelFile, target: Path, options: ConvertOptions) -> None:
    if file.architecture.task != "classification":
        raise SettingsError(
            f"Core ML packages are written for classification networks; {file.architecture.name} is for "
            f"{file.architecture.task}"
        )
    write_coreml(
        file.model,
        lambda: _dequantized(file),
        target,
        {"producer": PRODUCER, "arch": file.architecture.name},
        dense=options.dense,
        image_size=options.image_size,
        fit=options.fit,
    )


FORMS: dict[str, Form] = {
    ".pth": Form(write=_write_pth),
    ".safetensors": Form(write=_write_safetensors),
    ".onnx": Form(write=_write_onnx, needs_network=True),
    ".mlpackage": Form(write=_write_coreml, needs_network=True, is_folder=True),
}
"""What can be written, by the ending of the name."""
