"""faster-coco-eval, an optional evaluator: pycocotools' figures, with the matching in C++."""

from __future__ import annotations

import importlib.util
from typing import Any

from ...common.errors import SettingsError


def evaluator() -> type[Any]:
    """Its evaluator class, which has pycocotools' interface.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        raise SettingsError(
            "the evaluator 'faster' needs faster-coco-eval: pip install faster-coco-eval; or use pycocotools"
        ) from error
    return COCOeval_faster


def installed() -> bool:
    """Whether it can be used."""
    return importlib.util.find_spec("faster_coco_eval") is not None
