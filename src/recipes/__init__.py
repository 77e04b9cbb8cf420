"""The only place where everything meets: settings -> engine, data, model, permute, quantize, fine-tune, results."""

from .classification import evaluate_classification, train_classification
from .compressing import coding_spec
from .detection import evaluate_detection, train_detection
from .models import load_compressed

__all__ = [
    "coding_spec",
    "evaluate_classification",
    "evaluate_detection",
    "load_compressed",
    "train_classification",
    "train_detection",
]
