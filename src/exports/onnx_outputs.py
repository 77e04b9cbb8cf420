"""A network as a graph sees it: images in, named tensors out.

Outputs in dicts, tuples and lists get names; auxiliary ones, which only training needs, are left out. One of
torchvision's detectors takes one image, and gives what it found in it; what its heads give before boxes are selected
(`HEADS`) can be asked for too, since a rounding may move the selection and never these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..architectures.detector_outputs import is_detector

INPUT, LOGITS, OUTPUT = "images", "logits", "output"
AUXILIARY, HEADS = "aux", "heads"


class Called(nn.Module):
    """A network that takes images (B, 3, H, W) and gives a tuple of tensors, whose names are in `names`.

    Args:
        net: the network; it goes into evaluation mode.
        with_heads: for a detector, also what its heads give.
    """

    def __init__(self, net: nn.Module, with_heads: bool = False) -> None:
        super().__init__()
        self.net = net
        self.detects = is_detector(net)
        self.names: tuple[str, ...] = ()
        self._from_heads: list[Any] = []
        self._hook = None
        if self.detects and with_heads:
            found: Any = net
            heads = found.rpn.head if hasattr(found, "rpn") else found.head
            self._hook = heads.register_forward_hook(lambda _module, _inputs, given: self._from_heads.append(given))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs; their names are in `names` afterwards."""
        self._from_heads.clear()
        given = self.net(list(images))[0] if self.detects else self.net(images)
        named = dict(_named(given))
        if len(named) > 1:
            named = {name: one for name, one in named.items() if AUXILIARY not in name.split(".")} or named
        for taken in self._from_heads:
            named |= {f"{HEADS}.{number}": one for number, (_, one) in enumerate(_named(taken))}
        self._from_heads.clear()
        self.names = tuple(named)
        return tuple(named.values())

    def leave(self) -> None:
        """Take the hook away from the network again."""
        if self._hook is not None:
            self._hook.remove()


def _named(given: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a network gives, under names: of dicts their keys, of named tuples their fields."""
    if isinstance(given, Tensor):
        yield prefix or LOGITS, given
        return
    if isinstance(given, Mapping):
        parts = [(str(key), value) for key, value in given.items()]
    elif isinstance(given, tuple) and hasattr(given, "_fields"):
        parts = list(zip(given._fields, given, strict=True))
    elif isinstance(given, (tuple, list)):
        parts = [(str(number) if prefix else f"{OUTPUT}.{number}", value) for number, value in enumerate(given)]
    else:  # a number, a text, nothing
        parts = []
    for name, value in parts:
        yield from _named(value, f"{prefix}.{name}" if prefix else name)
