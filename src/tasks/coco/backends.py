"""What computes COCO's figures, by name (`evaluation.backend`). To add one: a function that gives a class with the
interface of pycocotools' COCOeval, and its entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...common.registry import Entry, Registry

BACKENDS: Registry[Callable[[], type[Any]]] = Registry(
    "evaluator",
    {
        "pycocotools": Entry(".tasks.coco.metrics:pycocotools_evaluator", "the reference"),
        "faster": Entry(".tasks.coco.faster:evaluator", "faster-coco-eval, the same figures"),
    },
)
