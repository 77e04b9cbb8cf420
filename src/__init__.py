"""Permute, quantize, fine-tune: make vision networks 20 to 40 times smaller (arXiv 2010.15703).

From Python: `compress`, `save`, `load`, `dequantize`, `inspect`, `groups`, and `PQFModel` for the Hugging Face hub; see
docs/python.md.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import Report, compress, dequantize, groups, inspect, load, save
    from .pretrained import PQFModel

__all__ = ["PQFModel", "Report", "compress", "dequantize", "groups", "inspect", "load", "save"]


def __getattr__(name: str) -> Any:
    """What needs torch is loaded when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "PQFModel":
        from .pretrained import PQFModel

        return PQFModel
    from . import api

    return getattr(api, name)
