"""A model file as a Core ML package, with what is kept of it told line by line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..common.log import log, note
from ..compression.quantize.layers import QuantizedLayer
from .coreml_package import check_installed, exported_program, put_codes, write_package
from .fewer_centroids import fit_centroids
from .tables import CODE_BITS, LARGEST_K, bits_of_code

SHOWN = 8
"""Names that a note lists."""


def write_coreml(
    model: nn.Module,
    dequantized: Callable[[], nn.Module],
    target: Path,
    about: dict[str, str],
    *,
    dense: bool,
    image_size: int,
    fit: bool,
) -> None:
    """Write a classification network as the package `target`.

    Args:
        model: the network, with quantized layers or without.
        dequantized: makes the dense network that computes what `model` computes then.
        target: the folder to write.
        about: producer and arch, which go into the package's metadata.
        dense: write no codes.
        image_size: side of the images, which is fixed in the package.
        fit: give layers with more centroids than a package can hold fewer; they change in `model` too.

    Raises:
        SettingsError: coremltools is missing, or the network cannot be converted.
        RunError: the package cannot be written.
    """
    check_installed()
    if fit and not dense:
        for changed in fit_centroids(model, LARGEST_K):
            log.info(
                "%s: %d of %s centroids, which adds an error of %.4f of its energy",
                *(changed.name, LARGEST_K, f"{changed.k:,}", changed.lost),
            )
    program = exported_program(dequantized(), image_size)
    layers = {} if dense else {id(m.codebook): m for m in model.modules() if isinstance(m, QuantizedLayer)}
    left = {} if dense else put_codes(program, model)
    _tell(left, fit)
    _tell_longer_codes([layer.k for layer in layers.values()])
    kept = len(layers) - len(left)
    write_package(program, target, {**about, "weights": "codebook and codes" if kept else "dense"})
    log.info(
        "not run: Core ML runs on Apple's systems only. Input images (1, 3, %d, %d), output logits; %d weights as "
        "codebook and codes",
        *(image_size, image_size, kept),
    )


def _tell(left: dict[str, str], fit: bool) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        note(
            f"dense in the package: {', '.join(names[:SHOWN])}{more}: {reason}"
            + (f" (--fit gives them {LARGEST_K} centroids)" if "is above" in reason and not fit else "")
        )


def _tell_longer_codes(ks: list[int]) -> None:
    longer = sorted({k for k in ks if k <= LARGEST_K and k.bit_length() - 1 not in CODE_BITS})
    for k in longer:
        note(
            f"{ks.count(k)} weights with k = {k}: a code takes {bits_of_code(k)} bits in Core ML, not "
            f"{k.bit_length() - 1}"
        )
