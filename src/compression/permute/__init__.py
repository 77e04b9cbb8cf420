"""Permute: reorder channels so that the network computes the same and its weights quantize better (paper section
3.2)."""
