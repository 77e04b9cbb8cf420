"""Optimizers that were made before a network was quantized: they hold parameters that are gone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class ReplacedParameter(nn.Parameter):
    """A parameter that gave way to a codebook and codes. An optimizer that was made before still holds it, and would
    train nothing: the gradient that it asks for is an error."""

    replaced: str

    @property
    def grad(self) -> Tensor | None:
        """There is none any more."""
        raise RuntimeError(
            f"the optimizer was made before {self.replaced!r} was quantized and would not train it: make the optimizer "
            "after compressing or loading"
        )

    @grad.setter
    def grad(self, _: Tensor | None) -> None:
        self.grad  # noqa: B018 (raises)


def mark_replaced(before: Mapping[int, tuple[str, nn.Parameter]], model: nn.Module) -> None:
    """Let optimizers notice that they were made before.

    Args:
        before: id -> name and parameter, of all parameters before quantizing.
        model: afterwards.
    """
    now = {id(parameter) for parameter in model.parameters()}
    for key, (name, parameter) in before.items():
        if key not in now and type(parameter) is nn.Parameter:
            parameter.__class__ = ReplacedParameter
            parameter.replaced = name  # type: ignore[attr-defined]
