"""Trying groups: a permuted float64 copy of the network, every vector of it random, must compute the same.

How much "the same" is depends on the network: sums in another order differ by rounding, and a deep network can answer a
change of 1e-15 with one of 1e-5. The tolerance is therefore the network's own answer to tiny noise in its weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ...common.errors import GroupError, UserError
from ...common.memory import is_out_of_memory
from ...common.randomness import stream
from .channels import ChannelGroup

NOISE = 4e-15
"""Relative noise in every weight whose effect is the tolerance; rounding in float64 is 1e-16 per operation."""
MARGIN = 8.0
"""A permutation may change as much as that noise does, times this."""
SMALLEST, LARGEST = 1e-13, 1e-3
"""Bounds of the tolerance: a wrong group changes outputs by far more than the one; a network that turns noise into more
than the other cannot be used to try anything."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _wide(values: Any, written: set[int]) -> Any:
    """Nested arguments with float64 in place of smaller types; what an operator writes to stays."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in FLOATS and id(value) not in written:
            return value.double()
        return torch.float64 if isinstance(value, torch.dtype) and value in FLOATS else value

    return tree_map(wide, values)


class Float64Operators(TorchDispatchMode):
    """While active, every operator computes in float64, also where the network's code asks for less."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator on float64 copies of what is smaller."""
        kwargs = kwargs or {}
        written = {id(value) for value in (*args, *kwargs.values())} if func._schema.is_mutable else set()
        return func(*_wide(args, written), **_wide(kwargs, written))


class Float64Functions(TorchFunctionMode):
    """The same for functions, which compare the types of their arguments before any operator runs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function with float64 copies of what is smaller."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith("_"):  # in place, and reading or writing attributes
            return func(*args, **kwargs)
        return func(*_wide(args, set()), **_wide(kwargs, set()))


def said_by_the_network(run: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """`run`, whose errors become one that says that the network does not run on what it was given."""

    def running(model: nn.Module) -> Any:
        try:
            return run(model)
        except UserError:
            raise
        except Exception as error:  # whatever a network raises
            if is_out_of_memory(error):
                raise
            why = (str(error).strip().splitlines() or ["no message"])[0][:200]
            raise GroupError(
                f"the network does not run on the example inputs: {type(error).__name__}: {why}. Give what it is "
                "called with: a tensor, a tuple of arguments or a dict of keyword arguments; in commands the side of "
                "the images is calibration.image_size or dataloader.image_size"
            ) from error

    return running


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of a network's output: in lists, maps, or attributes of an object."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors_of(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in tensors_of(value)]
    return tensors_of(vars(output)) if hasattr(output, "__dict__") else []


def make_channels_differ(model: nn.Module, generator: torch.Generator) -> None:
    """Give every channel of every vector a value of its own, and values to tensors that are constant; in place.

    In a fresh network a forgotten norm, bias or zero-initialised layer would go unnoticed. Values keep their size:
    scales change by up to a half, and what is zero becomes up to 0.1.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point() or id(tensor) in seen or not tensor.numel():
                continue
            seen.add(id(tensor))
            values = tensor.data
            drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values) - 0.5
            if sum(size > 1 for size in values.shape) < 2:
                size = float(values.square().mean().sqrt())
                spread = 0.2 * size if size > 1e-2 else 0.2
                values.mul_(1 + drawn)
                if "var" not in name:
                    other = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values) - 0.5
                    values.add_(other * spread)
            elif bool((values == values.reshape(-1)[0]).all()):
                values.add_(drawn * 2 / math.sqrt(values[0].numel()))


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the network; torch does not copy what a module computed from its parameters (pruning's masked weights),
    so that gets the values alone."""
    computed = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed if not t.is_leaf})


class Trial:
    """A float64 copy of a network on which changes are tried.

    Attributes:
        tolerance: how much the outputs may change, relative to their norm.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Any], seed: int) -> None:
        """Copy the network, make its channels differ, and measure its own noise.

        Args:
            model: the dense network; not changed.
            run: network -> the outputs that must not change.
            seed: of the random vectors and the noise.

        Raises:
            GroupError: the outputs are empty, not finite, or answer noise with so much that nothing can be compared.
        """
        self._run = run
        self.model = _copied(model).double()
        make_channels_differ(self.model, stream(seed, "check vectors"))
        self._before = self._outputs()
        given = dict(model.named_parameters())
        # a second float64 copy of a large network would cost too much memory
        kept = {
            name: parameter.detach().clone()
            for name, parameter in self.model.named_parameters()
            if not torch.equal(parameter, given[name].to(parameter.dtype))
        }
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                generator = stream(seed, "check noise", name, device=parameter.device)
                drawn = torch.empty_like(parameter).uniform_(1 - NOISE, 1 + NOISE, generator=generator)
                parameter.mul_(drawn)
        noise = self.change()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(kept.get(name, given[name]))
        if not MARGIN * noise <= LARGEST:
            raise GroupError(
                "groups of channels cannot be checked: the network's outputs are "
                + ("empty or not finite" if math.isinf(noise) else f"changed by {noise:.1e} of their norm by rounding")
                + ", so that nothing can be compared. Compare outputs that are finite and the same each time, for a "
                "detector those of its heads before boxes are selected"
            )
        self.tolerance = max(MARGIN * noise, SMALLEST)

    def change(self) -> float:
        """The largest change of an output since the start, relative to its norm; infinite where one is not finite."""
        after = self._outputs()
        if [tensor.shape for tensor in after] != [tensor.shape for tensor in self._before]:
            return math.inf
        smallest = torch.finfo(torch.float64).tiny
        changes = [
            float((b - a).norm() / a.norm().clamp_min(smallest)) for a, b in zip(self._before, after, strict=True)
        ]
        return max((change if math.isfinite(change) else math.inf for change in changes), default=math.inf)

    def _outputs(self) -> list[Tensor]:
        self.model.train()  # some networks keep what they computed from weights in evaluation, until they train again
        self.model.eval()
        with torch.no_grad(), Float64Functions(), Float64Operators():
            return [tensor.detach().clone() for tensor in tensors_of(self._run(self.model))]


def check_groups(
    model: nn.Module, groups: Sequence[ChannelGroup], run: Callable[[nn.Module], Any], seed: int = 0
) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
    """Try random permutations of all groups at once, and find those that change the network's outputs.

    Args:
        model: the dense network; not changed.
        groups: as found, or made by hand.
        run: network -> outputs that depend continuously on its weights. What is selected (boxes after suppression, the
            best so many) does not: give the values before the selection.
        seed: of the permutations, the vectors and the noise.

    Returns:
        The groups that leave the outputs as they are, and the others; both in the given order.

    Raises:
        GroupError: nothing can be compared, see `Trial`.
    """
    if not groups:
        return [], []
    trial = Trial(model, run, seed)
    permutations = [group.random(stream(seed, "check", group.label)) for group in groups]

    def harmless(numbers: Sequence[int]) -> bool:
        for number in numbers:
            groups[number].apply(trial.model, permutations[number])
        change = trial.change()
        for number in reversed(numbers):
            groups[number].apply(trial.model, permutations[number].argsort())
        return change <= trial.tolerance

    kept = set(_largest_harmless(list(range(len(groups))), harmless))
    return (
        [group for number, group in enumerate(groups) if number in kept],
        [group for number, group in enumerate(groups) if number not in kept],
    )


def _largest_harmless(numbers: list[int], harmless: Callable[[Sequence[int]], bool]) -> list[int]:
    """The numbers without those that do harm, found by halving."""
    if not numbers or harmless(numbers):
        return numbers
    if len(numbers) == 1:
        return []
    middle = len(numbers) // 2
    left = _largest_harmless(numbers[:middle], harmless)
    right = _largest_harmless(numbers[middle:], harmless)
    if not (left and right) or harmless([*left, *right]):
        return [*left, *right]
    for number in right:  # harmless on each side, but not together
        if harmless([*left, number]):
            left.append(number)
    return left
