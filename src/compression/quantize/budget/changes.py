"""How much the outputs of a network change when one of its weights is quantized, its batch norms put right.

A batch goes through the dense network once, and through a copy once for every weight. The copy has this one weight
quantized; each batch norm, when the pass comes to it, is moved by the difference of what it sees of this batch in the
two networks (`calibrate.norms`), so that norms further down see what corrected ones before them give. That is the
correction of calibrating but for two things, both small where a batch has dozens of inputs: it is that of the batch
alone, and it also takes away what the statistics of this very batch differ by chance. Held are two networks, the
quantized weights, and one batch's outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ....common.errors import DataError
from ....common.progress import bar
from ..calibrate.inputs import count, moved
from ..calibrate.norms import Statistics, move_norm, norms_of, seen_by, statistics_of
from ..calibrate.passes import inspectable, order_of
from ..calibrate.uses import Use, Watcher
from ..compress import places_of
from ..plan import Plan
from ..subvectors import from_subvectors

Outputs = Callable[[nn.Module, Any], object]
"""What of a network's outputs for a batch is compared: tensors, in lists and dicts of any depth."""

CHUNK = 1 << 22
"""Values of outputs that are compared at a time."""
KL, ENERGY = "KL divergence", "share of the outputs' energy"
"""How outputs are compared."""


@dataclass
class Changes:
    """Sums over inputs.

    Attributes:
        kind: `KL` or `ENERGY`; empty: there was no input.
        count: inputs.
        sums: of every trial: the change of the outputs, summed over inputs.
    """

    kind: str = ""
    count: int = 0
    sums: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """A weight quantized alone.

    Attributes:
        name: of the weight.
        codebook: (k, d) as it is multiplied with.
        codes: (n,)
        distortion: sum of squares that the weight loses.
        layout: along what its subvectors run.
    """

    name: str
    codebook: Tensor
    codes: Tensor
    distortion: float
    layout: str = "input"


def call(model: nn.Module, batch: Any) -> object:
    """The output of a network for a batch; a dict holds keyword arguments."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def changes(
    model: nn.Module,
    plan: Plan,
    trials: Sequence[Trial],
    batches: Sequence[Any],
    *,
    outputs: Outputs = call,
    device: torch.device,
    show_progress: bool = True,
) -> Changes:
    """Quantize one weight at a time, and compare the outputs of the network with those of the dense one.

    Where all outputs are scores of at least two classes, (N, C) or (N, C, height, width), with as many classes, that is
    the Kullback-Leibler divergence of the classes that they predict, mean over positions and outputs, per input in
    nats. Else it is the sum of squares of the difference as a share of the output's own around its mean, mean over
    outputs.

    Args:
        model: the dense network; it is copied, not changed.
        plan: with the names of all weights.
        trials: which weights, and what they become.
        batches: of inputs.
        outputs: what of the outputs is compared.
        device: where to compute.
        show_progress: show a progress bar.

    Raises:
        DataError: outputs of the dense network, or before them inputs of a layer, are not finite; names it. Outputs
            have no values, or other shapes when a weight changes.
    """
    found = Changes(sums=[0.0] * len(trials))
    dense, changed = (copy.deepcopy(model).eval().to(device) for _ in range(2))
    weights = {name: place.parameter.detach() for name, place in places_of(changed, plan).items()}
    norms = _Norms(dense, changed)
    behind = _norms_behind(dense, plan, outputs, moved(batches[0], device)) if len(batches) else {}
    steps = bar(range(len(batches) * len(trials)), "sensitivities", None, show_progress, "pass")
    with torch.no_grad():
        for given in batches:
            batch, n = moved(given, device), count([given])
            with norms.watched():
                wanted = list(tensors_of(outputs(dense, batch)))
            if not wanted or not all(bool(one.isfinite().all()) for one in wanted):
                raise DataError(_why_not_finite(dense, plan, outputs, batch) if wanted else NOTHING)
            found.kind = KL if _are_scores(wanted) else ENERGY
            for number, trial in enumerate(trials):
                weight = weights[trial.name]
                own = weight.clone()
                weight.copy_(from_subvectors(trial.codebook[trial.codes.long()], weight.shape, trial.layout))
                with norms.corrected(behind[trial.name]):
                    now = list(tensors_of(outputs(changed, batch)))
                weight.copy_(own)
                found.sums[number] += n * _change(found.kind, wanted, now)
                next(steps)
            found.count += n
    steps.close()
    return found


NOTHING = (
    "calibration: the network's outputs hold no floating-point values, so how much they change cannot be told; without "
    "calibration a wanted size is spent by what weights lose"
)


class _Norms:
    """The batch norms of a network, dense and changed."""

    def __init__(self, dense: nn.Module, changed: nn.Module) -> None:
        self._dense, self._changed = norms_of(dense), norms_of(changed)
        self._seen: dict[str, list[Statistics | None]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Meanwhile the dense network runs on a batch, once."""
        self._seen = {name: [] for name in self._dense}

        def see(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen[name].append(seen_by([inputs[:1]]))

        with _hooked(self._dense, see):
            yield

    @contextmanager
    def corrected(self, names: Set[str]) -> Iterator[None]:
        """Meanwhile the changed network runs on the same batch, once.

        Args:
            names: of the norms that may see something else; the others are as in the dense network.
        """
        calls = dict.fromkeys(self._dense, 0)

        def correct(name: str, norm: Any, inputs: tuple[Tensor, ...]) -> None:
            then = self._seen[name][calls[name]] if calls[name] < len(self._seen[name]) else None
            calls[name] += 1
            now = seen_by([inputs[:1]]) if name in names else None
            same = then is None or now is None or _same(then, now)
            if then is not None and now is not None and not same:
                move_norm(norm, self._dense[name], then, now)
            else:
                for own, dense in zip(statistics_of(norm), statistics_of(self._dense[name]), strict=True):
                    own.copy_(dense)

        with _hooked(self._changed, correct):
            yield


def _norms_behind(dense: nn.Module, plan: Plan, outputs: Outputs, batch: Any) -> dict[str, Set[str]]:
    """The batch norms that a pass comes to after each weight, for the first time or again; of a weight that may be used
    unseen, as an embedding is, all."""
    places = places_of(dense, plan)
    everything: Set[str] = norms_of(dense).keys()
    behind = dict.fromkeys(places, everything)
    with inspectable():
        weights = {name: place.parameter.detach() for name, place in places.items()}
        items = order_of(dense, weights, outputs, batch)
    for number, item in enumerate(items):
        if not item.calls and places[item.name].is_convolution:
            later = {one.name for one in items[number:] if one.calls}
            behind[item.name] = later | {one.name for one in items[:number] if one.calls > 1}
    return behind


def _same(one: Statistics, other: Statistics) -> bool:
    return torch.equal(one.mean, other.mean) and torch.equal(one.variance, other.variance)


@contextmanager
def _hooked(norms: Mapping[str, _BatchNorm], call_before: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    handles = [norm.register_forward_pre_hook(partial(call_before, name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(output: object) -> Iterator[Tensor]:
    """The floating-point tensors with values in an output of any form."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)


def _are_scores(outputs: Sequence[Tensor]) -> bool:
    """Whether all tensors look like scores of the same classes."""
    return all(one.dim() in (2, 4, 5) and one.shape[1] == outputs[0].shape[1] >= 2 for one in outputs)


def _change(kind: str, wanted: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """Of the outputs for a batch, mean per input."""
    if [one.shape for one in wanted] != [one.shape for one in given]:
        raise DataError(
            "calibration: the shapes of the network's outputs depend on its values, as those of a detector's boxes do, "
            "so how much they change cannot be told; without calibration a wanted size is spent by what weights lose"
        )
    compare = _divergence if kind == KL else _lost_energy
    return sum(compare(*pair) for pair in zip(wanted, given, strict=True)) / len(wanted)


def _pieces(wanted: Tensor, given: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in double precision, some inputs at a time; some devices do not have it."""
    step = max(1, CHUNK // max(1, wanted[:1].numel())) if wanted.dim() else 1
    for pair in zip(wanted.split(step), given.split(step), strict=True) if wanted.dim() else [(wanted, given)]:
        one, other = ((values.cpu() if values.device.type == "mps" else values).double() for values in pair)
        yield one, other


def _divergence(wanted: Tensor, given: Tensor) -> float:
    """Mean over inputs and positions."""
    total = 0.0
    for one, other in _pieces(wanted, given):
        one, other = F.log_softmax(one, 1), F.log_softmax(other, 1)
        total += float(F.kl_div(other, one, reduction="sum", log_target=True))
    return total * wanted.shape[1] / wanted.numel()


def _lost_energy(wanted: Tensor, given: Tensor) -> float:
    lost = energy = 0.0
    middle = float(wanted.float().mean())  # scores of rare things have a large bias, which says nothing
    for one, other in _pieces(wanted, given):
        lost += float((other - one).square().sum())
        energy += float((one - middle).square().sum())
    return lost / energy if energy else float(lost > 0)


def _why_not_finite(dense: nn.Module, plan: Plan, outputs: Outputs, batch: Any) -> str:
    """Names the first layer whose inputs are not finite."""
    named: list[str] = []

    def see(use: Use) -> None:
        if not named and not bool(use.inputs.isfinite().all()):
            named.append(use.name)

    weights = [(name, place.parameter.detach()) for name, place in places_of(dense, plan).items()]
    with inspectable(), Watcher(weights, see):
        outputs(dense, batch)
    what = f"the inputs of layer {named[0]!r}" if named else "the outputs of the network"
    return f"calibration: {what} are not finite (NaN or infinity): check the images, and the dense network on them"
