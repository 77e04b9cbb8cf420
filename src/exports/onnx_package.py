"""The packages onnx and onnxruntime, imported here only: pip install pqf[onnx]."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

from ..common.errors import SettingsError

ONNXSCRIPT = (0, 6, 2)
"""Earlier ones make graphs of torch's newer exporter that they cannot write."""


def needed() -> Any:
    """The package onnx.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.numpy_helper
    except ImportError as error:
        raise SettingsError(
            "ONNX files need the package onnx, which is not installed: pip install pqf[onnx], or pip install "
            "onnx onnxruntime"
        ) from error
    return onnx


def runtime() -> Any:
    """The package onnxruntime; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return onnxruntime


def exporting_program() -> Any:
    """The part of onnxscript in which torch's newer exporter gives its graphs.

    Raises:
        SettingsError: it is not installed, or too old.
    """
    try:
        from onnxscript import ir
    except ImportError as error:
        raise SettingsError(
            "--exporter dynamo needs the package onnxscript, which is not installed: pip install pqf[onnx], or pip "
            "install onnxscript"
        ) from error
    found = version("onnxscript")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < ONNXSCRIPT:
        least = ".".join(map(str, ONNXSCRIPT))
        raise SettingsError(
            f"--exporter dynamo needs onnxscript {least} or later, and this is {found}: pip install -U onnxscript"
        )
    return ir
