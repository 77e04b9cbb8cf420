"""Where a forward pass multiplies with a weight, and the inputs that each of the weight's rows meets there.

Operators are seen as they reach PyTorch's dispatcher, so that it does not matter which module, function or attention
the weight belongs to, what a module does to its inputs first, or whether it is called at all: a weight is known by its
storage.

Shapes: P places (positions of outputs, or rows of a matrix), C columns of the weight, g groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_TIMES_TRANSPOSED: dict[Any, int] = {aten.mm.default: 0, aten.addmm.default: 1, aten._addmm_activation.default: 1}
"""Operators that multiply a matrix with a transposed weight, and which argument the matrix is; the weight follows."""


@dataclass(frozen=True)
class Convolution:
    """The settings of a convolution, one number per axis of the kernel."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    groups: int


@dataclass(frozen=True)
class Use:
    """One multiplication with a weight.

    Attributes:
        name: of the weight.
        start, stop: its rows that take part; all of them in a convolution.
        inputs: (P, C) of a matrix product, (N, channels, ...) of a convolution.
        convolution: its settings; None: a matrix product.
        paired: whether two networks that see the same images have the same places here: nothing before it chose places
            by values, as the boxes of a detector are chosen.
    """

    name: str
    start: int
    stop: int
    inputs: Tensor
    convolution: Convolution | None
    paired: bool

    @property
    def groups(self) -> int:
        """Groups of channels, each with inputs of its own."""
        return 1 if self.convolution is None else self.convolution.groups

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.convolution is not None and self.convolution.transposed

    @property
    def n_places(self) -> int:
        """P."""
        if self.convolution is None:
            return self.inputs.shape[0]
        return self.inputs.shape[0] * math.prod(_output_size(self.inputs, self.convolution))

    @property
    def n_columns(self) -> int:
        """C."""
        if self.convolution is None:
            return self.inputs.shape[1]
        return self.inputs.shape[1] // self.groups * math.prod(self.convolution.kernel)

    def without_inputs(self) -> Use:
        """The same, but for the values."""
        return replace(self, inputs=self.inputs.new_empty(0, *self.inputs.shape[1:]))

    def at(self, places: Tensor) -> Tensor:
        """The inputs that meet the weight's columns at some of the places: (g, places, C)."""
        if self.convolution is None:
            return self.inputs[places.to(self.inputs.device)][None]
        return _windows(self.inputs, self.convolution, places.to(self.inputs.device))


def _ready(inputs: Tensor, convolution: Convolution) -> Tensor:
    """Padded inputs, over which a kernel slides: those of a transposed convolution with zeros in between."""
    pads = convolution.padding
    widths = [dilation * (k - 1) for k, dilation in zip(convolution.kernel, convolution.dilation, strict=True)]
    after = list(pads)
    if convolution.transposed:
        sizes = [(s - 1) * step + 1 for s, step in zip(inputs.shape[2:], convolution.stride, strict=True)]
        spread = inputs.new_zeros(*inputs.shape[:2], *sizes)
        between = [slice(None, None, step) for step in convolution.stride]
        spread[(slice(None), slice(None), *between)] = inputs
        inputs = spread
        pads = tuple(width - pad for width, pad in zip(widths, pads, strict=True))
        after = [pad + more for pad, more in zip(pads, convolution.output_padding, strict=True)]
    flat = [pad for pair in zip(reversed(pads), reversed(after), strict=True) for pad in pair]
    return F.pad(inputs, flat) if any(flat) else inputs


def _steps(convolution: Convolution) -> tuple[int, ...]:
    return (1,) * len(convolution.kernel) if convolution.transposed else convolution.stride


def _output_size(inputs: Tensor, convolution: Convolution) -> list[int]:
    sizes = []
    for axis, (k, step, pad, dilation, more) in enumerate(
        zip(
            convolution.kernel,
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            convolution.output_padding,
            strict=True,
        )
    ):
        size, width = inputs.shape[2 + axis], dilation * (k - 1)
        if convolution.transposed:
            sizes.append((size - 1) * step - 2 * pad + width + more + 1)
        else:
            sizes.append((size + 2 * pad - width - 1) // step + 1)
    return sizes


def _windows(inputs: Tensor, convolution: Convolution, places: Tensor) -> Tensor:
    """What the kernel meets at output positions `places` (numbers in N x positions): (g, P, channels/g * area)."""
    sizes = _output_size(inputs, convolution)
    slid = _ready(inputs, convolution)
    for axis, (k, step, dilation) in enumerate(
        zip(convolution.kernel, _steps(convolution), convolution.dilation, strict=True)
    ):
        slid = slid.unfold(2 + axis, dilation * (k - 1) + 1, step)[..., ::dilation]
    # (N, channels, positions ..., kernel ...), a view: only what is asked for is copied
    image = places // math.prod(sizes)
    numbers: list[Tensor] = []
    rest = places % math.prod(sizes)
    for size in reversed(sizes):
        numbers.insert(0, rest % size)
        rest = rest // size
    found = slid.movedim(1, -1 - len(sizes))[(image, *numbers)]  # (P, channels, kernel ...)
    if convolution.transposed:
        found = found.flip(tuple(range(2, found.dim())))
    return found.reshape(len(places), convolution.groups, -1).transpose(0, 1)


class Watcher(TorchDispatchMode):
    """Tells of every use of some weights, before it happens, and of what comes out.

    Args:
        weights: by name.
        before: is told of each use.
        after: is told of the name and the output.
        each: is told of what every operator returns, whatever it is.
        by: runs what an operator does, and returns what that returns.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, Tensor]],
        before: Callable[[Use], None],
        after: Callable[[str, Tensor], None] | None = None,
        each: Callable[[Any], None] | None = None,
        by: Callable[[Callable[[], Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        self._weights: dict[int, list[tuple[str, Tensor]]] = {}
        for name, weight in weights:
            self._weights.setdefault(weight.untyped_storage().data_ptr(), []).append((name, weight))
        self._before, self._after, self._each, self._by = before, after, each, by
        self._chosen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and tell of it."""
        use = self._use(func, args)
        if use is not None:
            self._before(use)
        run = partial(func, *args, **(kwargs or {}))
        out = run() if self._by is None else self._by(partial(_below_autograd, run))
        if use is not None and self._after is not None:
            self._after(use.name, out)
        if self._each is not None:
            self._each(out)
        if torch.Tag.dynamic_output_shape in func.tags or "nms" in func.name():
            self._chosen = True
        return out

    def _use(self, func: Any, args: Sequence[Any]) -> Use | None:
        if func is aten.convolution.default:
            inputs, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
            found = self._find(weight, weight.shape[1:].numel(), weight.shape[0])
            if found is None or found[1].shape != weight.shape or found[1].stride() != weight.stride():
                return None
            if inputs.shape[1] != (weight.shape[0] if transposed else weight.shape[1] * groups):
                return None  # it will fail
            axes = weight.dim() - 2
            convolution = Convolution(
                kernel=tuple(weight.shape[2:]),
                stride=_each(stride, axes),
                padding=_each(padding, axes),
                dilation=_each(dilation, axes),
                output_padding=_each(output_padding, axes),
                transposed=transposed,
                groups=groups,
            )
            return self._made(found, weight.shape[0], inputs, convolution)
        if func is aten.linear.default:
            inputs, weight = args[0], args[1]
            turned = weight.t()
        elif func in _TIMES_TRANSPOSED:
            inputs, turned = args[_TIMES_TRANSPOSED[func] :][:2]
        else:
            return None
        found = self._find(turned, turned.shape[0], turned.shape[1])
        if inputs.shape[-1] != turned.shape[0]:
            return None  # it will fail
        if found is None or not found[1].is_contiguous() or turned.stride(0) != 1 or turned.shape[0] > turned.stride(1):
            return None
        return self._made(found, turned.shape[1], inputs.reshape(-1, inputs.shape[-1]), None)

    def _find(self, operand: Tensor, n_columns: int, n_rows: int) -> tuple[str, Tensor, int] | None:
        """The weight of which an operand shows whole rows: name, weight, first row."""
        for name, weight in self._weights.get(operand.untyped_storage().data_ptr(), ()):
            offset = int(operand.storage_offset()) - int(weight.storage_offset())
            own = weight.shape[1:].numel()
            if own == n_columns and 0 <= offset <= weight.numel() - own * n_rows and not offset % own:
                return name, weight, offset // own
        return None

    def _made(
        self, found: tuple[str, Tensor, int], n_rows: int, inputs: Tensor, convolution: Convolution | None
    ) -> Use:
        name, _, first = found
        return Use(name, first, first + n_rows, inputs, convolution, not self._chosen)


def _below_autograd(run: Callable[[], Any]) -> Any:
    """Run an operator without what notes gradients and views, as a mode's own thread does: that is done there."""
    notes = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(notes):
        return run()


def _each(values: Sequence[int], axes: int) -> tuple[int, ...]:
    """One number per axis, of a list that may hold one for all."""
    return tuple(values) if len(values) == axes else tuple(values) * axes
