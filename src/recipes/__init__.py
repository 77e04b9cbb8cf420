"""The only place where everything meets: settings -> engine, data, model, permute, quantize, fine-tune, results."""

from .classification import evaluate_classification, train_classification
from .compressing import coding_spec
from .converting import convert
from .detection import evaluate_detection, train_detection
from .inspecting import inspect
from .models import load_compressed

__all__ = [
    "coding_spec",
    "convert",
    "evaluate_classification",
    "evaluate_detection",
    "inspect",
    "load_compressed",
    "train_classification",
    "train_detection",
]
