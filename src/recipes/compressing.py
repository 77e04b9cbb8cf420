"""From settings to a permuted and coded network: everything is checked first, then done, then reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from ..architectures.architecture import Architecture
from ..compression.finetune.task import Engine
from ..compression.permute.groups import Group, check_function, resolve
from ..compression.permute.permute import GroupResult, PermutationSpec, permute
from ..compression.quantize.compress import LayerResult, compress
from ..compression.quantize.plan import CodingSpec, LayerSpec, Plan, make_plan
from ..compression.size import model_size
from ..compression.subvectors import BlockRule
from ..paths import write_text
from ..recorder import RunRecorder
from ..settings import Settings


@dataclass(frozen=True)
class Intent:
    """What will be done to a network, checked against it."""

    plan: Plan
    groups: Sequence[Group]
    specs: dict[str, PermutationSpec]
    search: str
    n_tries: int
    seconds: float | None
    seed: int


def coding_spec(settings: Settings) -> CodingSpec:
    """`model.compression_parameters` as the compression package wants it."""
    given = settings.model.compression_parameters
    return CodingSpec(
        given.k,
        given.k_means_type,
        given.k_means_n_iters,
        BlockRule(given.fc_subvector_size, given.pw_subvector_size, given.large_subvectors),
        given.ignored_modules,
        {name: LayerSpec(**spec.model_dump()) for name, spec in given.layer_specs.items()},
        given.k_means_tolerance,
    )


def intend(settings: Settings, architecture: Architecture, model: nn.Module, example: Tensor) -> Intent:
    """Resolve plan and groups and check both on the network, random permutations included.

    Args:
        settings: of the run.
        architecture: gives the groups where the settings do not.
        model: the dense network.
        example: a batch of inputs (B, 3, H, W) to try the groups on.

    Raises:
        PlanError: a layer cannot be coded as asked.
        GroupError: a group does not fit, or would change the network's function.
    """
    given = settings.model
    plan = make_plan(model, coding_spec(settings))
    if not given.use_permutations:
        groups = []
    elif given.permutations is None:
        groups = architecture.groups(model)
    else:
        groups = [Group(tuple(group.parents), tuple(group.children)) for group in given.permutations]
    specs = {name: PermutationSpec(spec.reshape, spec.optimization) for name, spec in given.permutation_specs.items()}
    reshapes = {name: spec.reshape for name, spec in specs.items() if spec.reshape}
    resolve(model, groups, reshapes)
    check_function(model, groups, example, reshapes, settings.seed)
    return Intent(plan, groups, specs, given.search, given.sls_iterations, given.search_seconds, settings.seed)


def carry_out(
    intent: Intent, model: nn.Module, engine: Engine, recorder: RunRecorder, say: Callable[[str], None]
) -> tuple[nn.Module, dict[str, float]]:
    """Permute and code `model`, report distortion and size; returns the coded network and its size figures."""
    for note in intent.plan.notes:
        say(f"note: {note}")
    permuted = permute(
        model,
        intent.groups,
        intent.plan.sizes,
        how=intent.search,
        n_tries=intent.n_tries,
        seconds=intent.seconds,
        specs=intent.specs,
        seed=intent.seed,
        show_progress=engine.is_main,
    )
    say(_permutation_summary(permuted))
    model, layers = compress(model, intent.plan, seed=intent.seed, device=engine.device, show_progress=engine.is_main)
    for layer in layers:
        recorder.scalar(f"Distortion/{layer.name or 'model'}", layer.relative_error)
    say(_coding_summary(layers))
    _write_table(recorder.folder.path / "compression.json", layers, permuted, intent)
    counted = model_size(model)
    say(f"size: {counted.summary()}")
    size = {"bits": counted.bits, "megabytes": round(counted.megabytes, 4), "ratio": round(counted.ratio, 4)}
    for name, value in size.items():
        recorder.scalar(f"Size/{name}", value)
    return model, size


def _permutation_summary(results: Sequence[GroupResult]) -> str:
    if not results:
        return "permute: no groups"
    improved = [r for r in results if r.children and r.after < r.before]
    fixed = sum(not r.children for r in results)
    mean = sum(r.after - r.before for r in improved) / len(improved) if improved else 0.0
    text = f"permute: {len(improved)} of {len(results)} groups reordered, log det(Cov) changed by {mean:.3f} on average"
    return text + (f"; {fixed} do not depend on the order of channels" if fixed else "")


def _coding_summary(layers: Sequence[LayerResult]) -> str:
    if not layers:
        return "quantize: no layer was coded"
    lost = sum(layer.distortion for layer in layers) / (sum(layer.power for layer in layers) or math.nan)
    worst = max(layers, key=lambda layer: layer.relative_error)
    most = f"most in {worst.name or 'the model'}: {100 * worst.relative_error:.2f} %"
    return f"quantize: {len(layers)} layers coded, {100 * lost:.2f} % of the weights' energy lost ({most})"


def _write_table(path: Path, layers: Sequence[LayerResult], permuted: Sequence[GroupResult], intent: Intent) -> None:
    """Distortion per layer and the permutations as applied, for later analysis."""
    groups = [
        {
            "group": result.label,
            "parents": group.parents,
            "readers": group.children,
            "reshapes": {
                name: intent.specs[name].reshape for name in group.children if name in intent.specs and intent.specs[name].reshape
            },
            "children": result.children,
            "before": result.before,
            "after": result.after,
            "permutation": None if result.permutation is None else result.permutation.tolist(),
        }
        for group, result in zip(intent.groups, permuted, strict=True)
    ]
    table = {"layers": [{**asdict(layer), "relative_error": layer.relative_error} for layer in layers], "groups": groups}
    write_text(path, json.dumps(table, indent=1) + "\n")
