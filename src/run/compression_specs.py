"""From the settings of a network to what the compression package wants: plain records without a settings object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..architectures.detector_outputs import batch_outputs
from ..common.errors import PlanError
from ..compression.permute.results import PermutationSpec, SearchSpec
from ..compression.quantize import plan
from ..compression.quantize.budget.loss import Losses
from ..compression.quantize.budget.prediction import Prediction
from ..compression.quantize.budget.sensitivity import losses_by_inputs, some_inputs
from ..compression.quantize.budget.tradeoff import Tradeoff, measure
from ..compression.quantize.budget.wanted import Budget, megabytes
from ..compression.quantize.plan import Plan, QuantizationSpec, make_plan
from ..compression.quantize.subvector_size import BlockRule
from ..model_files.beside import LikelyFile, bytes_beside
from ..model_files.metadata import AppliedPermutation
from ..model_files.size import model_size
from ..settings import BudgetSettings, ModelSettings


def quantization_of(model: ModelSettings) -> QuantizationSpec:
    """How each weight is quantized."""
    given = model.compression_parameters
    return QuantizationSpec(
        k=given.k,
        k_means_type=given.k_means_type,
        k_means_n_iters=given.k_means_n_iters,
        rule=BlockRule(
            fc_subvector_size=given.fc_subvector_size,
            pw_subvector_size=given.pw_subvector_size,
            large_subvectors=given.large_subvectors,
        ),
        ignored_modules=given.ignored_modules,
        layer_specs={name: plan.LayerSpec(**spec.model_dump()) for name, spec in given.layer_specs.items()},
        k_means_tolerance=given.k_means_tolerance,
        codebook_bits=given.codebook_bits,
        layout=given.layout or "input",
    )


def budget_of(wanted: BudgetSettings, prefix: str = "") -> Budget | None:
    """The size that is asked for; None: the settings decide.

    Args:
        wanted: size or ratio.
        prefix: what stands before these names where the user gives them.
    """
    if wanted.size is None and wanted.ratio is None:
        return None
    return Budget(size=wanted.size, ratio=wanted.ratio, prefix=prefix)


def tradeoff_of(model: nn.Module, spec: QuantizationSpec, seed: int, *, show_progress: bool = True) -> Tradeoff:
    """What each plan of a dense network would cost, counted as everywhere else, and about what it would lose.

    Raises:
        PlanError: layers cannot be quantized as asked, or at all.
    """
    return measure(model, spec, model_size(model).bits, seed=seed, show_progress=show_progress)


TRIES, NEAR = 4, 8
"""How often a plan is chosen whose file takes what is left of a size, and how many bytes nobody asks about."""


@dataclass(frozen=True)
class Sized:
    """A wanted size of a network, and what can be done with each of its weights.

    Attributes:
        budget: the wanted size; the network can have it.
        tradeoff: of the network.
        file: what is known of a file of that size; None: a file is not spoken of.
    """

    budget: Budget
    tradeoff: Tradeoff
    file: LikelyFile | None = None

    def by(self, losses: Losses) -> Sized:
        """The same with other losses."""
        return replace(self, tradeoff=self.tradeoff.with_losses(losses))

    def plan(self) -> Plan:
        """The plan that loses least within the size; its last note says so."""
        found = self.tradeoff.plan_for(self.budget)
        text = f"block length and centroids of {len(found.layers)} weights are chosen for {self.budget}"
        if found.unit:
            text += " by what losing them changes"
        beside = _for_other(self.budget.beside + self.budget.beside_scale * found.scales)
        note = f"{text}: {outlook(found)}{beside} (as set: {outlook(self.tradeoff.of_settings())})"
        return replace(found.plan, notes=(*found.plan.notes, note))

    def plan_anew(self, model: nn.Module, plan: Plan, permutations: tuple[AppliedPermutation, ...] | None) -> Plan:
        """The plan that loses least of those whose file is not larger than the wanted size, now that it is known which
        permutations the file has to name. Subvectors keep their lengths where channels were permuted, as that was for
        those lengths. Its only note says what changed; there is none where nothing did.

        Args:
            model: the dense network.
            plan: that was chosen.
            permutations: those that were applied.
        """
        size, best = self.budget.size, None
        if self.file is None or size is None:
            return replace(plan, notes=())
        info, budget = replace(self.file.info, permutations=permutations), self.budget
        file = replace(self.file, info=info)
        for _ in range(TRIES):
            try:
                found = self.tradeoff.plan_for(budget, plan if permutations else None)
            except PlanError:  # what is left is more than the largest plan takes, or less than the smallest
                break
            beside = bytes_beside(model, found.plan, file)
            left = size - beside - found.bits // 8
            if left >= 0 and (best is None or found.loss < best[0].loss):
                best = found, beside
            if 0 <= left < NEAR:
                break
            least = beside - budget.beside_scale * found.scales  # with less it would come again
            budget = replace(budget, beside=budget.beside - left if left >= 0 else max(budget.beside - left, least))
        if best is None or best[0].plan.layers == plan.layers:
            return replace(plan, notes=())
        text = f"chosen anew for {self.budget} once channels were permuted: {outlook(best[0])}"
        return replace(best[0].plan, notes=(f"{text}{_for_other(best[1])}",))


def _for_other(beside: int) -> str:
    """What a file holds beside what its size counts; it may also hold norms in fewer bytes than are counted."""
    return f", {beside:,} bytes of a file for other things" if beside > 0 else ""


def sized_for(
    model: nn.Module,
    spec: QuantizationSpec,
    budget: Budget | None,
    seed: int,
    *,
    file: LikelyFile | None = None,
    show_progress: bool = True,
) -> tuple[Plan, Sized | None]:
    """How every weight of a dense network is quantized: as the settings say, or so that it has the wanted size and
    loses least of the weights' energy; and what is needed to choose for that size otherwise.

    Args:
        model: the dense network.
        spec: what the settings say.
        budget: the wanted size.
        seed: of all random choices.
        file: what is known of a file of that size.
        show_progress: show a progress bar.

    Raises:
        PlanError: layers cannot be quantized as asked, or the network cannot have such a size.
    """
    if budget is None:
        return make_plan(model, spec), None
    sized = Sized(budget, tradeoff_of(model, spec, seed, show_progress=show_progress), file)
    return sized.plan(), sized


def sized_by_inputs(
    model: nn.Module,
    spec: QuantizationSpec,
    budget: Budget | None,
    file: LikelyFile,
    inputs: Sequence[Any] | None,
    *,
    seed: int,
    device: torch.device | str | None,
    show_progress: bool,
) -> tuple[Plan, Sized | None]:
    """As `sized_for`, and a size is spent on what matters to the outputs for some inputs, where there are any.

    Args:
        model, spec, budget, file, seed, show_progress: as for `sized_for`.
        inputs: batches.
        device: where to run the network; None: where it is.

    Raises:
        PlanError: layers cannot be quantized as asked, or the network cannot have such a size.
        DataError: outputs are not finite, or cannot be compared.
    """
    plan, sized = sized_for(model, spec, budget, seed, file=file, show_progress=show_progress)
    if sized is None or inputs is None:
        return plan, sized
    losses = losses_by_inputs(
        model,
        sized.tradeoff,
        some_inputs(inputs),
        outputs=batch_outputs,
        seed=seed,
        device=device,
        show_progress=show_progress,
    )
    sized = sized.by(losses)
    return sized.plan(), sized


def outlook(found: Prediction) -> str:
    """Size and predicted loss of a plan, in a few words."""
    lost = f"a {found.unit} of about {found.loss:.3g}" if found.unit else f"about {100 * found.share:.2f} % lost"
    return f"{megabytes(found.bits)}, {found.ratio:.2f}x smaller, {lost}"


def search_of(model: ModelSettings, reshapes: Mapping[str, tuple[int, ...]] | None = None) -> SearchSpec:
    """How permutations are searched.

    Args:
        model: the settings.
        reshapes: of linear layers that read a flattened map, where the settings give none.
    """
    known = reshapes or {}
    specs = {name: PermutationSpec(reshape) for name, reshape in known.items()}
    for name, spec in model.permutation_specs.items():
        specs[name] = PermutationSpec(spec.reshape or known.get(name), spec.optimization)
    return SearchSpec(
        search=model.search,
        sls_iterations=model.sls_iterations,
        search_seconds=model.search_seconds,
        permutation_specs=specs,
    )
