"""One call of an operator, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_flatten

from .graph import Graph
from .labels import Labels, Operand, trailing, varying, vector_along


@dataclass
class Record:
    """What is known of one tensor.

    Attributes:
        labels: of its channels.
        depends: whether its values depend on inputs or weights, so that they say nothing about another run.
        from_input: whether they depend on an input.
    """

    labels: Labels
    depends: bool
    from_input: bool


class Records(Protocol):
    """What is known of all tensors of a pass."""

    graph: Graph

    def record(self, tensor: Tensor) -> Record:
        """What is known of a tensor."""

    def put(self, tensor: Tensor, labels: Labels) -> None:
        """Give a tensor its labels, if it has none yet."""

    def note_unknown(self, operator: str) -> None:
        """Remember an operator without a rule."""


class Call:
    """An operator, its arguments by name and its results.

    Attributes:
        name: of the operator, without its overload.
        func: the operator.
        args: as passed.
        kwargs: as passed.
        tensors: all tensors among the arguments.
        outputs: all tensors among the results.
        in_place: whether an argument is changed.
        graph: what the rules write to.
    """

    def __init__(self, records: Records, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self._records = records
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name: str = func.overloadpacket.__name__
        self.tensors = tensors_of((args, kwargs))
        self.outputs = tensors_of(result)
        self.in_place: bool = func._schema.is_mutable
        self.graph = records.graph

    def __getitem__(self, argument: str) -> Any:
        """The argument of this name, or its default."""
        for position, expected in enumerate(self.func._schema.arguments):
            if expected.name == argument:
                if position < len(self.args) and not expected.kwarg_only:
                    return self.args[position]
                return self.kwargs.get(argument, expected.default_value)
        return None

    def labels(self, tensor: Tensor) -> Labels:
        """The labels of a tensor."""
        return self._records.record(tensor).labels

    def operand(self, tensor: Tensor, rank: int | None = None) -> Operand:
        """Shape and labels of a tensor that is broadcast to `rank` axes (None: those of the first result)."""
        rank = self.outputs[0].dim() if rank is None else rank
        # what was stretched has one value there, which tells no positions apart
        shape = tuple(1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return trailing(shape, self.labels(tensor), rank)

    def vector(self, tensor: Tensor, axis: int) -> Operand:
        """Shape and labels of a vector that runs along one axis of the first result."""
        return vector_along(tensor.numel(), self.labels(tensor), axis, self.outputs[0].dim())

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from parameters alone."""
        return not self._records.record(tensor).from_input

    def is_known(self, tensor: Tensor) -> bool:
        """Whether a tensor's values are the same whatever the inputs and weights are."""
        return not self._records.record(tensor).depends

    def put(self, labels: Labels, output: int = 0) -> None:
        """Give a result its labels."""
        if output < len(self.outputs):
            self._records.put(self.outputs[output], [label for label in labels if varying(label)])

    def fix(self, *tensors: Tensor) -> None:
        """Tell all positions of these tensors apart."""
        for tensor in tensors:
            for label in self.labels(tensor):
                self.graph.fix(label)

    def unknown(self) -> None:
        """Tell everything apart, and remember that this operator is not known."""
        if any(self.labels(tensor) for tensor in self.tensors):
            self._records.note_unknown(self.name)
            self.fix(*self.tensors)


Rule = Callable[[Call], None]


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors in nested lists and maps."""
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
