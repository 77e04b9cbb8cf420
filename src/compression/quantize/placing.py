"""Codebook and codes in the place of a parameter, and what they are called there.

A parameter that is not its module's `weight`, such as attention's `in_proj_weight`, is held by a module of its own
below it, of the parameter's name and `SUFFIX`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn

from .layers import QuantizedLayer, dense_type, plain_state
from .read_only import ADVICE
from .weights import SUFFIX, WeightPlace


class QuantizedParameter(QuantizedLayer):
    """A quantized parameter that is not its module's `weight`: a module below it, which has the parameter's name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Module.__reduce_ex__(self, protocol)

    def forward(self) -> Tensor:
        """The parameter to compute with."""
        return self.weight


class QuantizedHost(nn.Module):
    """Mixed into the class of a module that has `QuantizedParameter`s."""

    _quantized: tuple[str, ...]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self)._quantized:
            raise AttributeError(f"{name}: {ADVICE}".replace("layer.", f"module.{name}{SUFFIX}."))
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return plain_state(super())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (dense_type(self), type(self)._quantized, True), self.__getstate__()


@cache
def _quantized_class(dense: Any, attributes: tuple[str, ...], below: bool) -> type[nn.Module]:
    """The subclass of `dense` whose parameters of these names are quantized, in the module itself or below it."""
    body: dict[str, Any] = {"_dense_type": dense, "_quantized": attributes, "__module__": dense.__module__}
    body["_rebuild"] = staticmethod(_rebuild)
    if not below:
        mixin: type[nn.Module] = QuantizedLayer
    else:
        mixin = QuantizedHost
        body |= {name: property(_reader(name)) for name in attributes}
        if issubclass(dense, nn.RNNBase):  # it keeps a list of its weights, and asks cuDNN to lay them out in one piece
            body |= {"_flat_weights": property(_flat_weights, _ignored), "flatten_parameters": _ignored}
    return type(f"Quantized{dense.__name__}", (mixin, dense), body)


def _reader(name: str) -> Any:
    def read(self: nn.Module) -> Tensor:
        return self._modules[name + SUFFIX].weight  # type: ignore[union-attr, return-value]

    read.__doc__ = f"The dequantized {name}; it cannot be written into."
    return read


def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _ignored(*_: object) -> None:
    """There is nothing to do: the weights are computed where they are read."""


def _rebuild(dense: Any, attributes: tuple[str, ...], below: bool) -> nn.Module:
    """A module without contents, for copies and pickles."""
    kind = _quantized_class(dense, attributes, below)
    return kind.__new__(kind)


def quantize_weight(
    place: WeightPlace, d: int, k: int, scale: float = 1.0, codebook_bits: int = 16, layout: str = "input"
) -> QuantizedLayer:
    """Put an empty codebook and codes in a parameter's place; returns what holds them.

    The values come from `set_codes` or a file. Works on the meta device. `scale`: see `sixteen_bits.scale_of`;
    `codebook_bits`: see `stored_codebook`; `layout`: see `subvectors`.

    Raises:
        ValueError: d does not divide what is cut, or k is not a power of two.
    """
    host, attribute, weight, kind = place.host, place.attribute, place.parameter, place.kind
    if not place.below:
        host.__class__ = _quantized_class(dense_type(host), ("weight",), False)
        host._set_up(weight, d, k, kind, scale, codebook_bits, layout)
        return host
    holder = QuantizedParameter()
    holder._set_up(weight, d, k, kind, scale, codebook_bits, layout)
    holder.training = host.training
    earlier = type(host)._quantized if isinstance(host, QuantizedHost) else ()
    host.__class__ = _quantized_class(dense_type(host), (*earlier, attribute), True)
    del host._parameters[attribute]
    host.__dict__.pop("_flat_weights", None)  # a recurrent layer's own list of them
    host._modules[attribute + SUFFIX] = holder
    return holder


def dense_name(prefix: str, layer: QuantizedLayer) -> str:
    """The name of the dense parameter that `layer`, the module called `prefix`, stands for."""
    if isinstance(layer, QuantizedParameter):
        return prefix.removesuffix(SUFFIX)
    return f"{prefix}.weight" if prefix else "weight"


def quantized_layers(model: nn.Module, names: Iterable[str]) -> dict[str, QuantizedLayer]:
    """What holds codebook and codes of the weights that a plan calls `names`."""
    modules = dict(model.named_modules())
    found = {name: modules.get(name, modules.get(name + SUFFIX)) for name in names}
    return {name: layer for name, layer in found.items() if isinstance(layer, QuantizedLayer)}
