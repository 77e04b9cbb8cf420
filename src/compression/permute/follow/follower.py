"""The forward pass watched: every operator that reaches PyTorch's dispatcher says what it does to channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .call import Call, Record, tensors_of
from .graph import Graph
from .labels import Labels
from .rules import FACTORIES, rule_for


class Follower(TorchDispatchMode):
    """Collects the graph of channels while it is active. It keeps no tensor of the pass alive.

    Attributes:
        graph: what the operators said.
        slots: by name of parameter or buffer, its labels; those that took part in the pass.
        unknown: operators without a rule that met a channel, and the layer where each was met first.
        used: names of the parameters and buffers that took part.
        changed: copies of parameters and buffers made before the pass changed them in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = Graph()
        self.slots: dict[str, Labels] = {}
        self.unknown: dict[str, str] = {}
        self.used: set[str] = set()
        self.changed: dict[str, Tensor] = {}
        self.module = ""
        self._records = WeakTensorKeyDictionary()
        self._names = {id(tensor): name for name, tensor in tensors_by_name(model).items()}
        self._blocks: dict[int, int] = {}
        for module in model.modules():
            if isinstance(module, _ConvNd) and module.groups > 1:
                with torch.no_grad():
                    shape = module.weight.shape
                # also what the weight is computed from
                self._blocks.update({id(p): module.groups for p in module.parameters() if p.shape == shape})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and let its rule speak."""
        kwargs = kwargs or {}
        rule = rule_for(func)
        if rule is None and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable:
            self._save(tensors_of((args, kwargs)))
        result = func(*args, **kwargs)
        self.graph.step += 1
        call = Call(self, func, args, kwargs, result)
        records = [self.record(tensor) for tensor in call.tensors]
        if call.name in FACTORIES and not call.in_place:
            for tensor in call.outputs:
                labels = self.graph.axes(tensor.shape) if tensor.is_floating_point() else []
                self._records[tensor] = Record(labels, depends=False, from_input=False)
            return result
        self._inherit(call, records)
        if any(record.labels for record in records):
            (rule or Call.unknown)(call)
        for tensor in call.outputs:
            self.put(tensor, [])
        return result

    def _inherit(self, call: Call, records: list[Record]) -> None:
        """Results depend on what their arguments depend on."""
        depends = any(record.depends for record in records)
        from_input = any(record.from_input for record in records)
        for tensor in call.outputs:
            for one in (tensor, tensor._base) if call.in_place else (tensor,):
                if one is None:
                    continue
                record = self._records.get(one)
                if record is None:
                    self._records[one] = Record([], depends, from_input)
                else:
                    record.depends |= depends
                    record.from_input |= from_input

    def record(self, tensor: Tensor) -> Record:
        """What is known of a tensor; parameters get their labels when they are first met."""
        found = self._records.get(tensor)
        if found is not None:
            return found
        name = self._names.get(id(tensor))
        labels: Labels = []
        if name is None:
            depends = from_input = True
        else:
            self.used.add(name)
            depends, from_input = tensor.is_floating_point(), False
            if tensor.is_floating_point():
                labels = self._blockwise(tensor) if id(tensor) in self._blocks else self.graph.axes(tensor.shape)
                self.slots[name] = labels
        self._records[tensor] = record = Record(labels, depends, from_input)
        return record

    def labels(self, tensor: Tensor) -> Labels:
        """The labels of a tensor."""
        return self.record(tensor).labels

    def put(self, tensor: Tensor, labels: Labels) -> None:
        """Give a tensor its labels, if it has none yet."""
        record = self._records.get(tensor)
        if record is None:
            self._records[tensor] = Record(labels, depends=True, from_input=True)
        elif not record.labels:
            record.labels = labels

    def note_unknown(self, operator: str) -> None:
        """Remember an operator without a rule."""
        self.unknown.setdefault(operator, self.module)

    def _blockwise(self, weight: Tensor) -> Labels:
        """Nodes of a grouped convolution's weight: its rows, and for each block of rows its channels on axis 1. A
        depthwise one has rows only."""
        groups = self._blocks[id(weight)]
        rows, width, *rest = weight.shape
        ones = [1] * len(rest)
        labels = [self.graph.fresh(rows).reshape(rows, 1, *ones)]
        if width > 1:
            nodes = self.graph.fresh(groups * width).reshape(groups, 1, width)
            labels.append(nodes.expand(groups, rows // groups, width).reshape(rows, width, *ones))
        return labels

    def _save(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            for one in (tensor, tensor._base):
                name = None if one is None else self._names.get(id(one))
                if one is not None and name is not None and name not in self.changed:
                    self.changed[name] = one.detach().clone()


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones under the first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def watch_modules(model: nn.Module, follower: Follower) -> Callable[[], None]:
    """Tell the follower which module runs; returns what ends that."""
    handles: list[Any] = []
    path: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            path.append(follower.module)
            follower.module = name

        return hook

    def leave(*_: Any) -> None:
        follower.module = path.pop() if path else ""

    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def restore(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Put back the values that the pass changed in place."""
    with torch.no_grad():
        for name, value in saved.items():
            tensors[name].data.copy_(value)
