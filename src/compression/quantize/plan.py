"""Which layers are quantized, and how: settings and per-layer overrides resolved once, before any work.

Precedence, highest first: `ignored_modules` (the layer stays as it is); `layer_specs.<layer>.<key>`; the key itself.
The clamp of the centroids comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ...common.errors import PlanError
from .subvectors import BlockRule, bits_per_code, can_be_quantized, clamp_centroids, subvector_size, weight_shape


@dataclass(frozen=True)
class LayerSpec:
    """Overrides for one layer (`layer_specs.<layer>`); None: as for all layers."""

    k: int | None = None
    k_means_type: str | None = None
    k_means_n_iters: int | None = None
    subvector_size: int | None = None
    large_subvectors: bool | None = None


@dataclass(frozen=True)
class QuantizationSpec:
    """How a network is quantized (`model.compression_parameters`)."""

    k: int = 256
    k_means_type: str = "src"
    k_means_n_iters: int = 1000
    rule: BlockRule = field(default_factory=BlockRule)
    ignored_modules: Sequence[str] = ()
    layer_specs: Mapping[str, LayerSpec] = field(default_factory=dict)
    k_means_tolerance: float = 0.0


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized: subvector length d, centroids k, and the clustering."""

    name: str
    d: int
    k: int
    k_means_type: str
    k_means_n_iters: int
    k_means_tolerance: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What happens to every layer of a network.

    Attributes:
        layers: the layers to code, by name; a layer with several names stands under the first.
        notes: what a reader should know: layers left alone and why, names that the network does not have.
    """

    layers: dict[str, LayerPlan]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Subvector length of every layer that will be quantized, by name."""
        return {name: layer.d for name, layer in self.layers.items()}


def make_plan(model: nn.Module, spec: QuantizationSpec) -> Plan:
    """Resolve `spec` for every layer of `model`.

    Names in `ignored_modules` and `layer_specs` that the network does not have are noted, not refused: users' files
    list the old and new names of one layer.

    Raises:
        PlanError: a layer cannot be quantized as asked, for example because d does not divide its rows.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    notes = [note for key in ("ignored_modules", "layer_specs") if (note := _unknown(key, getattr(spec, key), modules))]
    # every module below an ignored one, and every other name of it, is ignored
    ignored = {id(m) for name in spec.ignored_modules if name in modules for m in modules[name].modules()}
    layers: dict[str, LayerPlan] = {}
    spec_of = {id(modules[name]): name for name in spec.layer_specs if name in modules}
    left: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if id(module) in ignored:
            continue
        if not can_be_quantized(module):
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear | nn.Embedding):
                left.setdefault(f"a {type(module).__name__} cannot be quantized", []).append(name)
            continue
        if not weight_shape(module).numel():
            continue
        plan, note = _plan_layer(name, module, spec, spec.layer_specs.get(spec_of.get(id(module), ""), LayerSpec()))
        if note:
            left.setdefault(note, []).append(name)
        if plan:
            layers[name] = plan
    for name, reason in _tied_otherwise(modules, layers).items():
        del layers[name]
        left.setdefault(f"{reason}, left uncompressed", []).append(name)
    notes += [f"{', '.join(names)}: {note}" for note, names in left.items()]
    return Plan(layers, tuple(notes))


def _plan_layer(
    name: str, module: nn.Module, spec: QuantizationSpec, own: LayerSpec
) -> tuple[LayerPlan | None, str | None]:
    large = spec.rule.large_subvectors if own.large_subvectors is None else own.large_subvectors
    rule = BlockRule(spec.rule.fc_subvector_size, spec.rule.pw_subvector_size, large)
    where = f"model.compression_parameters.layer_specs.{name}"
    try:
        d, note = subvector_size(module, rule, own.subvector_size)
        k = spec.k if own.k is None else own.k
        bits_per_code(k)
    except PlanError as error:
        raise PlanError(
            f"layer {name!r} {tuple(weight_shape(module))}: {error}. Set {where}.subvector_size, or add it to "
            "model.compression_parameters.ignored_modules"
        ) from None
    clamped = clamp_centroids(k, weight_shape(module).numel() // d)
    if clamped == 0:
        return None, "too small for two centroids, left uncompressed"
    kind = own.k_means_type or spec.k_means_type
    iterations = spec.k_means_n_iters if own.k_means_n_iters is None else own.k_means_n_iters
    layer = LayerPlan(
        name=name,
        d=d,
        k=clamped,
        k_means_type=kind,
        k_means_n_iters=iterations,
        k_means_tolerance=spec.k_means_tolerance,
    )
    return layer, note


def _unknown(key: str, names: Sequence[str] | Mapping[str, object], modules: Mapping[str, nn.Module]) -> str | None:
    unknown = [name for name in names if name not in modules]
    if not unknown:
        return None
    return (
        f"model.compression_parameters.{key} names layers that this network does not have, they take no effect: "
        f"{', '.join(unknown)}"
    )


def _tied_otherwise(modules: Mapping[str, nn.Module], layers: Mapping[str, LayerPlan]) -> dict[str, str]:
    """Planned layers that share their weight with something that is not quantized alike: layer -> reason."""
    users: dict[int, list[str]] = {}
    named = {id(module): name for name, module in reversed(list(modules.items()))}  # the first name of each module
    for name in named.values():
        for attribute, parameter in modules[name].named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append(f"{name}.{attribute}" if name else attribute)
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        for user in users[id(modules[name].weight)]:
            other, _, attribute = user.rpartition(".")
            twin = layers.get(other)
            alike = (
                twin is not None
                and attribute == "weight"
                and type(modules[other]) is type(modules[name])
                and (twin.d, twin.k) == (layer.d, layer.k)
            )
            if not alike:
                reasons[name] = f"shares its weight with {user}, which is not quantized alike"
    return reasons
