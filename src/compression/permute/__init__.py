"""Permute: reorder channels so that the network's function stays and its weights become cheaper to code (paper section 3.2)."""
