"""Permute, quantize, fine-tune: make vision networks 20 to 40 times smaller (arXiv 2010.15703)."""

__version__ = "0.1.0"
