"""From settings to a permuted and coded network: everything is checked first, then done, then reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from torch import Tensor, nn

from ..architectures.architecture import Architecture
from ..compression.permute.groups import Group, check_function, resolve
from ..compression.permute.permute import GroupResult, PermutationSpec, SearchSpec, permute
from ..compression.quantize.compress import LayerResult, candidate_distortion, compress
from ..compression.quantize.plan import Plan, make_plan
from ..engines.engine import Engine
from ..model_files.size import model_size
from ..run.recorder import AnyRecorder
from ..run.resume import ResumableRun
from ..settings import Settings
from .compress_distributed import permute_together, quantize_together
from .specs import permutation_specs, quantization_spec


@dataclass(frozen=True)
class CompressionPlan:
    """What will be done to a network, checked against it."""

    plan: Plan
    groups: Sequence[Group]
    specs: dict[str, PermutationSpec]
    search: str
    n_tries: int
    seconds: float | None
    seed: int


def plan_compression(
    settings: Settings, architecture: Architecture, model: nn.Module, example: Tensor
) -> CompressionPlan:
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
    plan = make_plan(model, quantization_spec(settings))
    if not given.use_permutations:
        groups = []
    elif given.permutations is None:
        groups = architecture.groups(model)
    else:
        groups = [Group(tuple(group.parents), tuple(group.children)) for group in given.permutations]
    specs = permutation_specs(settings, architecture)
    reshapes = {name: spec.reshape for name, spec in specs.items() if spec.reshape}
    resolve(model, groups, reshapes)
    check_function(model, groups, example, reshapes, settings.seed, architecture.outputs)
    return CompressionPlan(plan, groups, specs, given.search, given.sls_iterations, given.search_seconds, settings.seed)


def run_compression(
    intent: CompressionPlan,
    model: nn.Module,
    engine: Engine,
    recorder: AnyRecorder,
    say: Callable[[str], None],
    kept: ResumableRun,
) -> nn.Module:
    """Permute and code `model` and report distortion; returns the coded network. Groups and layers that `kept` has are not done again."""
    for note in intent.plan.notes:
        say(f"note: {note}")
    search = partial(
        permute,
        sizes=intent.plan.sizes,
        spec=SearchSpec(
            search=intent.search,
            sls_iterations=intent.n_tries,
            search_seconds=intent.seconds,
            permutation_specs=intent.specs,
        ),
        seed=intent.seed,
        measure=candidate_distortion(intent.plan, intent.seed),
        show_progress=engine.is_main,
    )
    reshapes = {name: spec.reshape for name, spec in intent.specs.items() if spec.reshape}
    permuted = permute_together(
        engine,
        model,
        intent.groups,
        reshapes,
        lambda part, groups, numbers: search(part, groups, finished=kept.searches(numbers)),
    )
    say(_permutation_summary(permuted))
    code = partial(
        compress, seed=intent.seed, device=engine.device, show_progress=engine.is_main, finished=kept.clusterings
    )
    model, layers = quantize_together(engine, model, intent.plan, code)
    for layer in layers:
        recorder.scalar(f"Distortion/{layer.name or 'model'}", layer.relative_error)
    say(_quantization_summary(layers))
    recorder.file("compression.json", _table(layers, permuted, intent))
    return model


def report_size(model: nn.Module, recorder: AnyRecorder, say: Callable[[str], None]) -> dict[str, float]:
    """Say and keep the size of a coded network; returns its figures."""
    counted = model_size(model)
    say(f"size: {counted.summary()}")
    size = {"bits": counted.bits, "megabytes": round(counted.megabytes, 4), "ratio": round(counted.ratio, 4)}
    for name, value in size.items():
        recorder.scalar(f"Size/{name}", value)
    return size


def _permutation_summary(results: Sequence[GroupResult]) -> str:
    if not results:
        return "permute: no groups"
    improved = [r for r in results if r.children and r.after < r.before]
    fixed = sum(not r.children for r in results)
    mean = sum(r.after - r.before for r in improved) / len(improved) if improved else 0.0
    text = f"permute: {len(improved)} of {len(results)} groups reordered, log det(Cov) changed by {mean:.3f} on average"
    return text + (f"; {fixed} do not depend on the order of channels" if fixed else "")


def _quantization_summary(layers: Sequence[LayerResult]) -> str:
    if not layers:
        return "quantize: no layer was coded"
    lost = sum(layer.distortion for layer in layers) / (sum(layer.power for layer in layers) or math.nan)
    worst = max(layers, key=lambda layer: layer.relative_error)
    most = f"most in {worst.name or 'the model'}: {100 * worst.relative_error:.2f} %"
    return f"quantize: {len(layers)} layers coded, {100 * lost:.2f} % of the weights' energy lost ({most})"


def _table(layers: Sequence[LayerResult], permuted: Sequence[GroupResult], intent: CompressionPlan) -> str:
    """Distortion per layer and the permutations as applied, for later analysis."""
    groups = [
        {
            "group": result.label,
            "parents": group.parents,
            "readers": group.children,
            "reshapes": {
                name: intent.specs[name].reshape
                for name in group.children
                if name in intent.specs and intent.specs[name].reshape
            },
            "children": result.children,
            "before": result.before,
            "after": result.after,
            "permutation": None if result.permutation is None else result.permutation.tolist(),
        }
        for group, result in zip(intent.groups, permuted, strict=True)
    ]
    table = {
        "layers": [{**asdict(layer), "relative_error": layer.relative_error} for layer in layers],
        "groups": groups,
    }
    return json.dumps(table, indent=1) + "\n"
