"""From the settings of a network to what the compression package wants: plain records without a settings object."""

from __future__ import annotations

from collections.abc import Mapping

from ..compression.permute.results import PermutationSpec, SearchSpec
from ..compression.quantize import plan
from ..compression.quantize.plan import QuantizationSpec
from ..compression.quantize.subvector_size import BlockRule
from ..settings import ModelSettings


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
    )


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
