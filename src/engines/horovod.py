"""Processes started by horovodrun: horovod.torch. `make horovod` builds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import SettingsError
from .launch import Launch
from .processes import Processes, device_for

INSTALL = (
    "build and install it with `make horovod` (there are no ready-made packages of it), or start the run with "
    "torchrun instead"
)


def _load() -> Any:
    """horovod.torch.

    Raises:
        SettingsError: it is not installed, or was built for another torch.
    """
    try:
        import horovod.torch as library
    except ImportError as error:
        raise SettingsError(f"engine: horovod cannot be used here ({error}): {INSTALL}") from error
    if not hasattr(library, "init"):  # horovod.torch prints why, and continues without its own functions
        raise SettingsError(f"engine: the installed horovod does not fit torch {torch.__version__}: {INSTALL}")
    return library


class Horovod(Processes):
    """One of several processes that talk through Horovod.

    Horovod tells exchanges apart by name, so every exchange here has one that is the same on all processes.
    """

    def __init__(self, launch: Launch, device: torch.device) -> None:
        """Meet the others.

        Raises:
            SettingsError: Horovod is missing or the processes cannot meet, or the device does not fit.
        """
        super().__init__(launch, device_for(launch, device))
        self._horovod = _load()
        try:
            self._horovod.init()
        except (RuntimeError, ValueError) as error:
            raise SettingsError(
                f"engine: Horovod could not start ({error}). Start the run with `horovodrun -np N python -m ...`, "
                "and let the machines reach each other"
            ) from error
        self._exchanges = 0

    def _name(self, what: str) -> str:
        self._exchanges += 1
        return f"pqf.{what}.{self._exchanges}"

    def _add(self, values: Tensor) -> Tensor:
        return self._horovod.allreduce_(values, name=self._name("sum"), op=self._horovod.Sum)

    def _collect(self, values: Tensor) -> list[Tensor]:
        counts = self._horovod.allgather(torch.tensor([values.numel()]), name=self._name("sizes"))
        together = self._horovod.allgather(values, name=self._name("rows"))
        return list(together.split(counts.tolist()))

    def _send(self, values: Tensor, source: int) -> Tensor:
        return self._horovod.broadcast_(values, source, name=self._name("broadcast"))

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """`model` itself, with rank 0's values; from now on its gradients are averaged during a backward pass."""
        self.broadcast([*model.parameters(), *model.buffers()])
        _Averaging(self._horovod, model)
        return model

    def lost_contact(self, error: Exception) -> bool:
        """True if `error` is Horovod's own, also after a way through autograd."""
        return isinstance(error, self._horovod.HorovodInternalError) or (
            isinstance(error, RuntimeError) and "Horovod" in str(error)
        )

    def close(self) -> None:
        """Leave the group."""
        self._horovod.shutdown()


class _Averaging:
    """Averages the gradients of a model over the processes: each as soon as it is there, all of them when the backward
    pass ends.

    Horovod's own DistributedOptimizer waits in `step`, after a gradient scaler has checked the gradients of this
    process alone, and refuses gradients that are not contiguous; here the exchange is over when `backward` returns, as
    it is with DistributedDataParallel.
    """

    def __init__(self, library: Any, model: nn.Module) -> None:
        self._horovod = library
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._under_way: dict[str, tuple[int, Tensor]] = {}
        self._announced = False
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def start(parameter: Tensor) -> None:
            if not self._announced:
                self._announced = True
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)
            self._start(name, parameter)

        return start

    def _start(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:  # not reached by the loss of this process, but perhaps by that of another
            parameter.grad = torch.zeros_like(parameter)
        wide = torch.float32 if parameter.grad.dtype == torch.bfloat16 else parameter.grad.dtype
        gradient = parameter.grad.to(wide).contiguous()
        handle = self._horovod.allreduce_async_(gradient, name=f"gradient.{name}", op=self._horovod.Average)
        self._under_way[name] = (handle, gradient)

    def _finish(self) -> None:
        for name, parameter in self._parameters.items():
            if name not in self._under_way:
                self._start(name, parameter)
        for name, (handle, gradient) in self._under_way.items():
            self._horovod.synchronize(handle)
            own = self._parameters[name].grad
            if own is not None and own.data_ptr() != gradient.data_ptr():
                own.copy_(gradient)
        self._under_way.clear()
        self._announced = False
