"""The only place where everything meets: settings -> engine, data, model, permute, quantize, fine-tune, results."""

from .classification import evaluate_classification, train_classification
from .compress_only import compress_only
from .convert import convert
from .detection import evaluate_detection, train_detection
from .initial_model import load_compressed
from .inspect import inspect
from .specs import quantization_spec

__all__ = [
    "compress_only",
    "convert",
    "evaluate_classification",
    "evaluate_detection",
    "inspect",
    "load_compressed",
    "quantization_spec",
    "train_classification",
    "train_detection",
]
