"""Random streams by name.

Every random choice draws from its own generator, derived from the run's one seed and the name of the thing that is
drawn ("codebook of layer1.0.conv1", "augmentation of image 17 in epoch 3"). The result of a run therefore does not
depend on the order in which layers are processed, nor on the number of loader workers.
"""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on every name (order matters)."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for the thing called `names`."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, *names))
