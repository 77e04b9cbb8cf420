"""From a wanted size to the plan of a network.

Distortions of weights add up, and the bits of every d and k are known exactly, so the best plan of a size takes of
every weight the option where one more bit saves as much as in any other weight: one common slope of loss and bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ....common.errors import PlanError
from ....common.progress import bar
from ..compress import check_weights, places_of
from ..plan import LayerPlan, LayerSpec, Plan, QuantizationSpec, make_plan, specs_by_place
from ..weights import WeightPlace
from .choose import Choice, Chooser, Options
from .loss import Floats, Losses
from .options import WeightOptions, measured, settings_for, with_option
from .prediction import PredictedLayer, Prediction
from .wanted import Budget, megabytes


@dataclass(frozen=True)
class Tradeoff:
    """What each plan of a network would cost and lose.

    Attributes:
        plan: that of the settings.
        weights: the options of each weight.
        own: overrides by name of a weight.
        other_bits: of everything that stays as it is.
        dense_bits: of the network before.
        losses: what distortions of the weights cost the network.
    """

    plan: Plan
    weights: tuple[WeightOptions, ...]
    own: Mapping[str, LayerSpec]
    other_bits: int
    dense_bits: int
    losses: Losses = field(default_factory=Losses)

    @property
    def smallest(self) -> int:
        """Bits of the network in its smallest plan."""
        return self.other_bits + self._chooser.smallest

    @property
    def largest(self) -> int:
        """Bits of the network in the plan that loses least."""
        return self.other_bits + self._chooser.largest

    def plan_for(self, budget: Budget, earlier: Plan | None = None) -> Prediction:
        """The plan that loses least within a budget.

        The plan of the settings is taken where it fits and none is predicted to be better.

        Args:
            budget: what is wanted.
            earlier: a plan whose subvector lengths stay; it is taken where it fits and none is better.

        Raises:
            PlanError: no plan is so small, or none so large; says what is possible.
        """
        bits = budget.bits(self.dense_bits)
        if earlier is not None:
            return self._prediction(self._with_lengths_of(earlier, bits - self.other_bits, 8 * budget.beside_scale))
        chooser = self._chooser_for(8 * budget.beside_scale) if budget.beside_scale else self._chooser
        smallest, largest = self.other_bits + chooser.smallest, self.other_bits + chooser.largest
        if bits < smallest:
            raise PlanError(self._impossible(budget, bits, smallest, largest))
        best = chooser.within(bits - self.other_bits)
        if bits > largest and best.loss > 0:  # where nothing is lost, nothing would be gained by more
            raise PlanError(self._impossible(budget, bits, smallest, largest))
        settings = self._of_settings
        if self.other_bits + settings.bits <= bits and settings.loss < best.loss:
            best = settings
        return self._prediction(best)

    def of_settings(self) -> Prediction:
        """The plan of the settings, without a budget."""
        return replace(self._prediction(self._of_settings), plan=self.plan)

    def curve(self) -> list[Prediction]:
        """The best plans from the smallest to the largest; each is larger and loses less than the one before."""
        return [self._prediction(choice) for choice in self._chooser.path()]

    def with_sensitivities(self, sensitivities: Mapping[str, float]) -> Tradeoff:
        """The same with other sensitivities.

        Raises:
            PlanError: one is negative or not a number.
        """
        return self.with_losses(Losses(dict(sensitivities)))

    def with_losses(self, losses: Losses) -> Tradeoff:
        """The same with other losses.

        Raises:
            PlanError: a sensitivity is negative or not a number.
        """
        losses.check()
        return replace(self, losses=losses)

    @cached_property
    def _chooser(self) -> Chooser:
        return self._chooser_for(0)

    def _chooser_for(self, scale: int, earlier: Plan | None = None) -> Chooser:
        """One that reckons with so many further bits of a file for a scale that the settings do not ask for.

        Args:
            scale: bits of one.
            earlier: a plan whose subvector lengths stay; None: they may be any.
        """
        return Chooser(
            [
                Options(weight.bits + scale * _scales(weight), losses + _excluded(weight, earlier))
                for weight, losses in zip(self.weights, self._losses, strict=True)
            ]
        )

    def _with_lengths_of(self, earlier: Plan, bits: int, scale: int) -> Choice:
        """The best choice with the subvector lengths of `earlier`; that plan itself where it fits and none is better,
        or where none fits."""
        chooser, own = self._chooser_for(scale, earlier), self._choice(earlier.layers)
        if bits < chooser.smallest:
            return own
        best = chooser.within(bits)
        taken = sum(int(item.bits[option]) for item, option in zip(chooser.items, own.options, strict=True))
        return best if best.loss < own.loss or taken > bits else own

    @cached_property
    def _of_settings(self) -> Choice:
        return self._choice({name: weight.own for weight in self.weights for name in weight.names})

    def _choice(self, layers: Mapping[str, LayerPlan]) -> Choice:
        """The options that a plan takes."""
        options = [weight.number_of(layers[weight.names[0]]) for weight in self.weights]
        return Choice(
            options=tuple(options),
            bits=sum(int(weight.bits[option]) for weight, option in zip(self.weights, options, strict=True)),
            loss=sum(float(losses[option]) for losses, option in zip(self._losses, options, strict=True)),
        )

    @cached_property
    def _losses(self) -> list[Floats]:
        """Of every option of every weight."""
        return [self.losses.of(weight.names, weight.distortion, weight.power) for weight in self.weights]

    def _prediction(self, choice: Choice) -> Prediction:
        chosen: dict[str, LayerPlan] = {}
        layers = []
        for weight, losses, option in zip(self.weights, self._losses, choice.options, strict=True):
            d, k, codebook_bits = setting = weight.settings[option]
            for name in weight.names:
                chosen[name] = with_option(self.plan.layers[name], name, setting, self.own.get(name))
            layers.append(
                PredictedLayer(
                    name=weight.names[0],
                    d=d,
                    k=k,
                    codebook_bits=codebook_bits,
                    bits=int(weight.bits[option]),
                    distortion=float(weight.distortion[option]),
                    loss=float(losses[option]),
                    power=weight.power,
                    n_values=weight.n_values,
                )
            )
        notes = tuple(note for note in self.plan.notes if note not in self.plan.about_sizes)  # other sizes are chosen
        layers_plan = {name: chosen[name] for name in self.plan.layers}
        matters = [self.losses.sensitivity(weight.names) for weight in self.weights]
        lost, power = (
            sum(each * one for each, one in zip(matters, ones, strict=True))
            for ones in ([layer.distortion for layer in layers], [layer.power for layer in layers])
        )
        return Prediction(
            plan=replace(self.plan, layers=layers_plan, notes=notes, about_sizes=()),
            layers=tuple(layers),
            bits=self.other_bits + sum(layer.bits for layer in layers),
            dense_bits=self.dense_bits,
            loss=choice.loss,
            share=lost / power if power else 0.0,
            unit=self.losses.unit,
            scales=sum(int(_scales(one)[at]) for one, at in zip(self.weights, choice.options, strict=True)),
        )

    def _impossible(self, budget: Budget, bits: int, smallest: int, largest: int) -> str:
        verdict = "smaller" if bits < smallest else "larger"
        of_ratio = "" if budget.size is not None else f", that is {megabytes(bits)},"
        beside = 0 if budget.size is None else 8 * budget.beside
        text = (
            f"{budget}{of_ratio} is {verdict} than this network can be made: from {megabytes(smallest + beside)} "
            f"({-(-(smallest + beside) // 8):,} bytes, {self.dense_bits / self.smallest:.2f} times smaller) to "
            f"{megabytes(largest + beside)} ({(largest + beside) // 8:,} bytes, "
            f"{self.dense_bits / self.largest:.2f} times smaller)"
        )
        if bits < smallest and self.plan.dense:
            share = 100 * self.other_bits / self.smallest
            text += f". What stays dense is {share:.0f} % of the smallest: {', '.join(_names(self.plan))}"
        return text


def _scales(weight: WeightOptions) -> NDArray[np.int64]:
    """(c,) How many scales each option brings that the settings do not ask for: of codebooks of 8-bit values."""
    asked = weight.own.codebook_bits == 8
    return np.array([0 if asked or bits != 8 else len(weight.names) for _, _, bits in weight.settings], dtype=np.int64)


def _excluded(weight: WeightOptions, earlier: Plan | None) -> Floats:
    """(c,) Infinite for options with another subvector length than in a plan, else 0."""
    if earlier is None:
        return np.zeros(len(weight.settings))
    return np.array([0.0 if d == earlier.layers[weight.names[0]].d else np.inf for d, _, _ in weight.settings])


def _names(plan: Plan, most: int = 8) -> list[str]:
    names = [weight.name or "(the network itself)" for weight in plan.dense]
    return [*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])]


def measure(
    model: nn.Module,
    spec: QuantizationSpec,
    dense_bits: int,
    *,
    seed: int = 0,
    sensitivities: Mapping[str, float] | None = None,
    show_progress: bool = True,
) -> Tradeoff:
    """Find out what every d and k of every weight would cost and lose.

    Args:
        model: the dense network.
        spec: what is to be quantized, and how. Overrides of single layers stand; what its general keys say of d and k
            is one option among others.
        dense_bits: of the network, as `model_files.size` counts them.
        seed: of the run.
        sensitivities: what a unit of distortion of a weight costs the network, by name; where there is none, 1.
        show_progress: show a progress bar.

    Raises:
        PlanError: layers cannot be quantized as asked, or at all; a sensitivity is no number of at least 0.
    """
    plan = make_plan(model, spec)
    check_weights(model, plan)
    modules = dict(model.named_modules(remove_duplicate=False))
    specs = specs_by_place(modules, spec.layer_specs)
    places = places_of(model, plan)
    own = {name: specs[key] for name, place in places.items() if (key := (id(place.host), place.attribute)) in specs}
    tied: dict[int, list[str]] = {}
    for name, place in places.items():
        tied.setdefault(id(place.parameter), []).append(name)
    weights = [
        _weight_options(tuple(names), places, plan, own, spec.codebook_bits, seed)
        for names in bar(list(tied.values()), "sizes", None, show_progress, "layer")
    ]
    quantized = [places[names[0]].parameter for names in tied.values()]
    other_bits = dense_bits - sum(weight.numel() * weight.element_size() * 8 for weight in quantized)
    tradeoff = Tradeoff(plan=plan, weights=tuple(weights), own=own, other_bits=other_bits, dense_bits=dense_bits)
    return tradeoff.with_sensitivities(sensitivities or {})


def _weight_options(
    names: tuple[str, ...],
    places: Mapping[str, WeightPlace],
    plan: Plan,
    own: Mapping[str, LayerSpec],
    codebook_bits: int | None,
    seed: int,
) -> WeightOptions:
    place, planned = places[names[0]], plan.layers[names[0]]
    given = next((own[name] for name in names if name in own), None)
    return measured(names, place, planned, settings_for(place, planned, given, codebook_bits), seed)
