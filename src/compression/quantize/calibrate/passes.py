"""Forward passes that end as soon as they have shown what was asked for; memory is that of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ....common.errors import DataError, UserError
from ....common.memory import is_out_of_memory
from .live import LiveTensors
from .norms import norms_of
from .uses import Use, Watcher

Run = Callable[[nn.Module, Any], object]
"""Runs a network on a batch."""
Key = tuple[str, bool]
"""The name of a weight or batch norm, and whether it is a norm."""


class _SeenAll(BaseException):
    """Ends a forward pass; no `except Exception` of a network's own stops it."""


@dataclass(frozen=True)
class Item:
    """A weight or a batch norm, as a forward pass comes to it for the first time.

    Attributes:
        name: of the weight or norm.
        uses: of the weight in one pass, without inputs.
        calls: of the norm in one pass; 0: it is a weight.
        follows: the weight whose outputs the norm sees directly.
    """

    name: str
    uses: list[Use] = field(default_factory=list)
    calls: int = 0
    follows: str | None = None

    @property
    def key(self) -> Key:
        """Which it is."""
        return self.name, self.calls > 0

    @property
    def happens_once(self) -> bool:
        """Whether a pass comes to it no more than once."""
        return (self.calls or len(self.uses)) == 1


@dataclass(frozen=True)
class Taken:
    """What was taken of a use, and whether it has a pair (`Use.paired`)."""

    paired: bool
    values: Tensor


def telling(run: Run) -> Run:
    """A run whose errors say that the network failed on what it was calibrated with.

    Raises:
        DataError: instead of what the network raises, unless memory ran out.
    """

    def run_and_tell(model: nn.Module, batch: Any) -> object:
        try:
            return run(model, batch)
        except Exception as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            said = next(iter(str(error).splitlines()), "")
            raise DataError(
                f"calibration: the network fails on its inputs{_shape_of(batch)}: {type(error).__name__}: {said}"
            ) from error

    return run_and_tell


def _shape_of(batch: Any) -> str:
    return f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else ""


@contextmanager
def inspectable() -> Iterator[None]:
    """Attention meanwhile by single operators, not by a fused one that shows nothing of its inside; no gradients."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def order_of(
    model: nn.Module, weights: dict[str, Tensor], run: Run, batch: Any, live: LiveTensors | None = None
) -> list[Item]:
    """Weights and batch norms in the order in which a pass comes to them; those that it does not reach are left out.

    Args:
        model: in evaluation mode.
        weights: parameters of the model, by name.
        run: runs it.
        batch: what on.
        live: counts what the pass needs.
    """
    items: dict[Key, Item] = {}
    last: list[tuple[str, Tensor, int]] = []

    def used(use: Use) -> None:
        items.setdefault((use.name, False), Item(use.name)).uses.append(use.without_inputs())

    def came_out(name: str, out: Tensor) -> None:
        last[:] = [(name, out, out._version)]

    def reached(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            known = items.get((name, True))
            if known is not None:
                items[name, True] = Item(name, calls=known.calls + 1)
                return
            follows = last[0][0] if last and _is_still(*last[0][1:], inputs[0]) else None
            items[name, True] = Item(name, calls=1, follows=follows)

        return hook

    def each(out: Any) -> None:
        if live is not None:
            live.made(out)
            live.count()

    hooks = [norm.register_forward_pre_hook(reached(name)) for name, norm in norms_of(model).items()]
    try:
        with Watcher(weights.items(), used, came_out, each):
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(items.values())


def _is_still(out: Tensor, version: int, seen: Tensor) -> bool:
    """Whether what is seen is an output of this version, as it came out."""
    same_place = out.data_ptr() == seen.data_ptr() and out._version == version
    return same_place and out.shape == seen.shape and out.stride() == seen.stride()


def inputs_of_weights(
    model: nn.Module,
    items: Sequence[Item],
    weights: Mapping[str, Tensor],
    run: Run,
    batch: Any,
    take: Callable[[int, Use], Tensor],
) -> dict[str, list[Taken]]:
    """What `take` makes of the uses of some weights on a batch, told of the number of each among the weight's own.

    Args:
        model: a network.
        items: the weights, as `order_of` found them.
        weights: their parameters in this network, by name.
        run: runs the network.
        batch: what on; the pass ends where all uses were seen.
        take: is given each use.
    """
    found: dict[str, list[Taken]] = {item.name: [] for item in items}
    left = sum(len(item.uses) for item in items)

    def used(use: Use) -> None:
        nonlocal left
        found[use.name].append(Taken(use.paired, take(len(found[use.name]), use)))
        left -= 1
        if not left:
            raise _SeenAll

    try:
        with Watcher([(item.name, weights[item.name]) for item in items], used):
            run(model, batch)
    except _SeenAll:
        pass
    return found


def inputs_of_norm(norm: _BatchNorm, model: nn.Module, item: Item, run: Run, batch: Any) -> list[Tensor]:
    """What a norm of the model is given on a batch."""
    found: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(inputs[0])
        if len(found) == item.calls:
            raise _SeenAll

    handle = norm.register_forward_pre_hook(hook)
    try:
        run(model, batch)
    except _SeenAll:
        pass
    finally:
        handle.remove()
    return found
