"""Tensors that are watched: a dequantized weight that nobody can write into, and a codebook whose every change shows.

A dequantized weight is computed from codebook and codes. What somebody writes into it would be lost in training, and
in evaluation it would be measured but not saved.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

ADVICE = (
    "the weight of a quantized layer is computed from its codebook and codes, and what is written into it would be "
    "lost: write to the layer's codebook, give both with layer.set_codes(codebook, codes), or work on a copy "
    "(layer.weight.detach().clone())"
)


class DequantizedWeight(Tensor):
    """A weight to compute with. Writing into it, or into a view of it, is a RuntimeError that says what to write to.

    Operators take it as an ordinary tensor, and what they compute from it is ordinary.
    """

    # operators cost nothing extra; only what is asked of the object itself differs
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(weight: Tensor) -> DequantizedWeight:
        """`weight` itself, seen as one; its gradient is passed on."""
        return weight.as_subclass(DequantizedWeight)

    def plain(self) -> Tensor:
        """The same memory as an ordinary tensor."""
        return self.as_subclass(Tensor)

    @property
    def data(self) -> Tensor:
        """Without its history, and as little to be written into."""
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise RuntimeError(ADVICE)

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array of the same memory."""
        array = self.plain().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        array = self.plain().__array__(*arguments, **options)
        array.flags.writeable = False
        return array

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.plain().detach().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().detach().clone().__reduce_ex__(protocol)


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{name}: {ADVICE}")

    return refused


def _view(name: str) -> Callable[..., Any]:
    original = getattr(Tensor, name)

    def view(self: Tensor, *arguments: Any, **options: Any) -> Any:
        found = original(self, *arguments, **options)
        if isinstance(found, Tensor):
            return found.as_subclass(DequantizedWeight)
        return type(found)(part.as_subclass(DequantizedWeight) for part in found)

    return view


_OPERATORS = r"__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__|__setitem__"
_VIEWS = (
    "__getitem__", "as_strided", "chunk", "contiguous", "detach", "diagonal", "expand", "flatten", "movedim", "narrow",
    "permute", "ravel", "reshape", "select", "split", "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten",
    "unfold", "unsqueeze", "view", "view_as",
)  # fmt: skip
for _name in dir(Tensor):
    # methods that end in an underscore change the tensor that they are called on
    if re.fullmatch(rf"[a-z]\w*[a-z0-9]_|{_OPERATORS}", _name):
        setattr(DequantizedWeight, _name, _refuse(_name))
for _name in _VIEWS:
    setattr(DequantizedWeight, _name, _view(_name))


class Codebook(nn.Parameter):
    """A parameter whose `data` counts versions with it, as `detach()` does.

    Averages of weights and optimizers of users' own write through `data`, of which PyTorch takes no note otherwise.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Codebook, (self.detach(), self.requires_grad)


def _data(self: Codebook) -> Tensor:
    """The values without their history; writing into them counts as writing into the codebook."""
    return self.detach()


# `data` is an attribute of every tensor, which a class body may not turn into a property
Codebook.data = property(_data, Tensor.data.__set__)  # type: ignore[assignment, attr-defined]

COMPILES_SUBCLASSES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
"""Whether torch.compile takes a parameter of a class of its own."""


def watch(codebook: Tensor | None) -> None:
    """Make a codebook that is not on the CPU a `Codebook`; it stays the same object for optimizers and ties."""
    if type(codebook) is nn.Parameter and codebook.device.type not in ("cpu", "meta") and COMPILES_SUBCLASSES:
        codebook.__class__ = Codebook
