"""What a user wants: a size, or how many times smaller."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What was asked for; one of the two.

    Attributes:
        size: bytes of the whole network.
        ratio: how many times smaller than the dense network.
        prefix: what stands before the name of each in the user's settings.
        beside: bytes of the size that a file needs for what is not counted.
        beside_scale: the same for the scale of each codebook of 8-bit values, where the settings do not ask for such.
    """

    size: int | None = None
    ratio: float | None = None
    prefix: str = ""
    beside: int = 0
    beside_scale: int = 0

    def bits(self, dense_bits: int) -> int:
        """The most bits that are allowed, of a network of so many."""
        if self.size is not None:
            return 8 * (self.size - self.beside)
        assert self.ratio is not None, "a size or a ratio"
        return int(dense_bits / self.ratio)

    def __str__(self) -> str:
        if self.size is not None:
            return f"{self.prefix}size {megabytes(8 * self.size)} ({self.size:,} bytes)"
        return f"{self.prefix}ratio {self.ratio:g}"


def megabytes(bits: int) -> str:
    """As the program shows sizes: MB of 2^20 bytes, small ones with more digits."""
    size = bits / 8 / 2**20
    return f"{size:.2f} MB" if size >= 1 else f"{size:.4f} MB"
