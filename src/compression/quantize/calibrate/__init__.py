"""Quantizing with the inputs that a network sees: what its layers compute from them is kept, not the weights alone."""
