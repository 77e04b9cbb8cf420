"""Which layers are quantized, and how: settings and per-layer overrides resolved once, before any work.

Precedence, highest first: `ignored_modules` (the layer stays as it is); `layer_specs.<layer>.<key>`; the key itself.
The clamp of the centroids comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ...common.errors import PlanError
from .output_layout import check_rule, check_size, size_along_outputs
from .stored_codebook import check_codebook_bits
from .subvector_size import BlockRule, subvector_size
from .subvectors import AlongOutputs, bits_per_code, clamp_centroids
from .weights import WeightPlace, find_weight, matrices, why_dense


@dataclass(frozen=True)
class LayerSpec:
    """Overrides for one layer (`layer_specs.<layer>`); None: as for all layers."""

    k: int | None = None
    k_means_type: str | None = None
    k_means_n_iters: int | None = None
    subvector_size: int | None = None
    large_subvectors: bool | None = None
    codebook_bits: int | None = None
    layout: str | None = None


@dataclass(frozen=True)
class QuantizationSpec:
    """How a network is quantized (`model.compression_parameters`); without `codebook_bits` 16, or what pays where the
    settings are chosen for a size."""

    k: int = 256
    k_means_type: str = "src"
    k_means_n_iters: int = 1000
    rule: BlockRule = field(default_factory=BlockRule)
    ignored_modules: Sequence[str] = ()
    layer_specs: Mapping[str, LayerSpec] = field(default_factory=dict)
    k_means_tolerance: float = 0.0
    codebook_bits: int | None = None
    layout: str = "input"


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized: subvector length d, centroids k, the clustering, what its codebook is clustered in
    units of (`sixteen_bits`), the bits of each of the codebook's values in files (`stored_codebook`), and along what
    its subvectors run (`subvectors`)."""

    name: str
    d: int
    k: int
    k_means_type: str
    k_means_n_iters: int
    k_means_tolerance: float = 0.0
    scale: float = 1.0
    codebook_bits: int = 16
    layout: str = "input"


@dataclass(frozen=True)
class DenseWeight:
    """A weight that is not quantized.

    Attributes:
        name: of its module for a `weight`, else `module.parameter`.
        n_values: in it.
        reason: why it stays dense.
    """

    name: str
    n_values: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What happens to every weight of a network.

    Attributes:
        layers: the weights to quantize, by name; one with several names stands under the first.
        notes: what a reader should know: weights left dense and why, names that the network does not have.
        dense: the weights left dense.
        about_sizes: those of the notes that say where the settings' subvector lengths could not be followed.
    """

    layers: dict[str, LayerPlan]
    notes: tuple[str, ...]
    dense: tuple[DenseWeight, ...] = ()
    about_sizes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Subvector length of every weight that will be quantized, by name; along outputs it is an `AlongOutputs`."""
        return {
            name: AlongOutputs(layer.d) if layer.layout == "output" else layer.d for name, layer in self.layers.items()
        }


def make_plan(model: nn.Module, spec: QuantizationSpec) -> Plan:
    """Resolve `spec` for every weight of `model`.

    Names in `ignored_modules` and `layer_specs` that the network does not have are noted, not refused: users' files
    list the old and new names of one layer. `layer_specs` may name any parameter (`module.parameter`).

    Raises:
        PlanError: layers cannot be quantized as asked, for example because d does not divide their rows; names all.
    """
    if spec.layout == "output":
        check_rule(spec.k, spec.rule)
    modules = dict(model.named_modules(remove_duplicate=False))
    notes = [note for key in ("ignored_modules", "layer_specs") if (note := _unknown(key, getattr(spec, key), modules))]
    ignored = _ignored(modules, spec.ignored_modules)
    own_specs = specs_by_place(modules, spec.layer_specs)
    layers: dict[str, LayerPlan] = {}
    places: dict[str, WeightPlace] = {}
    remarks: dict[str, list[str]] = {}
    dense: dict[str, str] = {}
    problems = []
    for place in matrices(model):
        own = own_specs.get((id(place.host), place.attribute))
        places[place.name] = place
        if id(place.host) in ignored or (id(place.host), place.attribute) in ignored:
            dense[place.name] = "named in ignored_modules"
            continue
        reason = why_dense(place)
        if reason is not None and not (own is not None and place.parameter.is_floating_point()):
            dense[place.name] = reason
            continue
        if not place.parameter.numel():
            continue
        try:
            plan, note = _plan_layer(place, spec, own or LayerSpec())
        except PlanError as error:
            problems.append(str(error))
            continue
        if plan is None:
            dense[place.name] = note or ""
            continue
        layers[place.name] = plan
        if note:
            remarks.setdefault(note, []).append(place.name)
    if problems:
        raise PlanError("\n  ".join(problems))
    for name, reason in _tied_otherwise(places, layers).items():
        del layers[name]
        dense[name] = reason
    left = tuple(
        DenseWeight(name=name, n_values=places[name].parameter.numel(), reason=dense[name])
        for name in places
        if name in dense
    )
    about_sizes = tuple(f"{_some(names)}: {note}" for note, names in remarks.items())
    notes += about_sizes
    notes += dense_notes(left, sum(place.parameter.numel() for place in places.values()))
    return Plan(layers=layers, notes=tuple(notes), dense=left, about_sizes=about_sizes)


def specs_by_place(
    modules: Mapping[str, nn.Module], layer_specs: Mapping[str, LayerSpec]
) -> dict[tuple[int, str], LayerSpec]:
    """What `layer_specs` says of each parameter that it names: (id of its module, its name there) -> overrides.

    Args:
        modules: of the network by name, under all their names.
        layer_specs: by the name that a plan or file gives a weight.
    """
    return {
        (id(place.host), place.attribute): own
        for name, own in layer_specs.items()
        if (place := find_weight(modules, name)) is not None
    }


def _ignored(modules: Mapping[str, nn.Module], names: Sequence[str]) -> set[object]:
    """What `ignored_modules` names: every module below one of them, under whatever name, and single parameters."""
    found: set[object] = {id(m) for name in names if name in modules for m in modules[name].modules()}
    for name in names:
        if name not in modules and (place := find_weight(modules, name)) is not None:
            found.add((id(place.host), place.attribute))
    return found


def dense_notes(dense: Sequence[DenseWeight], n_values: int) -> list[str]:
    """A line for every reason, with the names of such weights and their share of the `n_values` of all weights."""
    by_reason: dict[str, list[DenseWeight]] = {}
    for weight in dense:
        by_reason.setdefault(weight.reason, []).append(weight)
    return [
        f"{_some([weight.name or '(the network itself)' for weight in weights])}: {reason}, left uncompressed "
        f"({100 * sum(weight.n_values for weight in weights) / n_values:.2f} % of all weights)"
        for reason, weights in by_reason.items()
    ]


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _plan_layer(place: WeightPlace, spec: QuantizationSpec, own: LayerSpec) -> tuple[LayerPlan | None, str | None]:
    large = spec.rule.large_subvectors if own.large_subvectors is None else own.large_subvectors
    rule = BlockRule(spec.rule.fc_subvector_size, spec.rule.pw_subvector_size, large)
    name, shape = place.name, tuple(place.parameter.shape)
    k = spec.k if own.k is None else own.k
    try:
        d, note, layout = _size_and_layout(place, rule, own.subvector_size, own.layout or spec.layout, k)
        bits_per_code(k)
    except PlanError as error:
        raise PlanError(
            f"layer {name!r} {shape}: {error}. Set model.compression_parameters.layer_specs.{name}.subvector_size, or "
            "add it to model.compression_parameters.ignored_modules"
        ) from None
    clamped = clamp_centroids(k, place.parameter.numel() // d)
    if clamped == 0:
        return None, "too small for two centroids"
    layer = LayerPlan(
        name=name,
        d=d,
        k=clamped,
        k_means_type=own.k_means_type or spec.k_means_type,
        k_means_n_iters=spec.k_means_n_iters if own.k_means_n_iters is None else own.k_means_n_iters,
        k_means_tolerance=spec.k_means_tolerance,
        codebook_bits=check_codebook_bits(own.codebook_bits or spec.codebook_bits or 16),
        layout=layout,
    )
    return layer, note


def _size_and_layout(
    place: WeightPlace, rule: BlockRule, override: int | None, layout: str, k: int
) -> tuple[int, str | None, str]:
    """The subvector length d of a weight, a note where the settings could not be followed, and the layout."""
    remark = None
    if layout == "output":
        d, remark = size_along_outputs(place, rule, override)
        if d is not None:
            check_size(d, k)
            return d, remark, layout
    d, note = subvector_size(place, rule, override)
    return d, remark or note, "input"


def _unknown(key: str, names: Sequence[str] | Mapping[str, object], modules: Mapping[str, nn.Module]) -> str | None:
    unknown = [name for name in names if name not in modules and find_weight(modules, name) is None]
    if not unknown:
        return None
    return (
        f"model.compression_parameters.{key} names layers that this network does not have, they take no effect: "
        f"{', '.join(unknown)}"
    )


def _alike(layer: LayerPlan) -> tuple[object, ...]:
    """What two weights that share their values must have in common."""
    return layer.d, layer.k, layer.codebook_bits, layer.layout


def _tied_otherwise(places: Mapping[str, WeightPlace], layers: Mapping[str, LayerPlan]) -> dict[str, str]:
    """Planned weights that are shared with something that is not quantized alike: name -> reason."""
    users: dict[int, list[str]] = {}
    for name, place in places.items():
        users.setdefault(id(place.parameter), []).append(name)
    reasons: dict[str, str] = {}
    for name, layer in layers.items():
        for other in users[id(places[name].parameter)]:
            twin = layers.get(other)
            if twin is None or _alike(twin) != _alike(layer):
                user = other if places[other].below else f"{other}.weight"
                reasons[name] = f"shares its weight with {user}, which is not quantized alike"
    return reasons
