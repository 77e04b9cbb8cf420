"""The only place where everything meets: settings -> engine, data, model, permute, quantize, fine-tune, results."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from . import architectures, engines
from .architectures.architecture import Architecture
from .compression.files import check_codes, is_compressed, load_state, read_tensors, save_compressed, save_dense
from .compression.finetune.loop import finetune
from .compression.finetune.optimizers import OptimizerSpec, Schedule, ScheduleSpec, make_optimizer
from .compression.finetune.task import Engine
from .compression.permute.groups import Group, check_function, resolve
from .compression.permute.permute import GroupResult, PermutationSpec, permute
from .compression.permute.search import PUBLISHED
from .compression.quantize.compress import LayerResult, build_coded, compress
from .compression.quantize.layers import set_memory_format
from .compression.quantize.plan import CodingSpec, LayerSpec, make_plan
from .compression.size import model_size
from .compression.subvectors import BlockRule, Layer
from .errors import CheckpointError, SettingsError
from .paths import candidates, find, write_text
from .recorder import OutputFolder, RunRecorder
from .settings import Settings, require, to_yaml
from .tasks.classification import Classification, check_classes
from .tasks.images import ImageFolderIndex, check_same_classes, read_folder, require_readable
from .tasks.sources import prepare

PAPER_MODELS_ADVICE = "The authors' models are downloaded and verified by: make paper-models"


def train_classification(settings: Settings) -> int:
    """Compress (unless `use_compression` is False) and fine-tune a classification network; returns the exit status."""
    engine = engines.make(settings.engine, engines.pick_device(settings.device))
    say = _printer(engine)
    architecture = architectures.get(settings.model.arch, "classification")
    weights = _weights_source(settings)
    require(settings, "output_path")
    output = OutputFolder(Path(settings.output_path), settings.overwrite)
    train, validation = _images(settings, ("train", "val"), engine)
    torch.manual_seed(settings.seed)  # initial weights and dropout; everything else draws from streams of its own
    model = _dense_model(architecture, weights, len(train.classes), engine)
    check_classes(len(train.classes), _outputs(architecture, model))
    task = _classification(settings, engine, train, validation)
    plan = make_plan(model, coding_spec(settings))
    groups = _groups(settings, architecture, model) if settings.model.use_compression and settings.model.use_permutations else []
    reshapes = {name: spec.reshape for name, spec in settings.model.permutation_specs.items() if spec.reshape}
    resolve(model, groups, reshapes)
    check_function(
        model, groups, torch.randn(2, 3, settings.dataloader.image_size, settings.dataloader.image_size), reshapes, settings.seed
    )

    output.begin()
    write_text(output.path / "config.yaml", to_yaml(settings))
    recorder = RunRecorder(output, save_compressed if settings.model.use_compression else save_dense, task.metric_name, say)
    recorder.text("config", to_yaml(settings))
    size = {}
    try:
        if settings.model.use_compression:
            for note in plan.notes:
                say(f"note: {note}")
            permuted = permute(
                model,
                groups,
                plan.sizes,
                n_tries=settings.model.sls_iterations,
                specs=_permutation_specs(settings),
                seed=settings.seed,
                show_progress=engine.is_main,
            )
            say(_permutation_summary(permuted))
            model, layers = compress(model, plan, seed=settings.seed, device=engine.device, show_progress=engine.is_main)
            _report_layers(layers, permuted, recorder, output, say)
            counted = model_size(model)
            say(f"size: {counted.summary()}")
            size = {"bits": counted.bits, "megabytes": round(counted.megabytes, 4), "ratio": round(counted.ratio, 4)}
            for name, value in size.items():
                recorder.scalar(f"Size/{name}", value)
        model = set_memory_format(model.to(engine.device), settings.channels_last)
        optimizer = make_optimizer(
            model, OptimizerSpec(settings.optimizer, settings.learning_rate, settings.momentum, settings.weight_decay)
        )
        schedule = Schedule(optimizer, ScheduleSpec(**settings.lr_scheduler.model_dump()), settings.epochs, task.steps_per_epoch)
        outcome = finetune(
            model, task, optimizer, schedule, engine, recorder,
            epochs=settings.epochs, amp=settings.amp, skip_initial_validation=settings.skip_initial_validation,
            log_every=settings.log_every_n_steps, show_progress=engine.is_main,
        )  # fmt: skip
        recorder.finish(outcome, {**size, "skipped images": len(task.unreadable)} if task.unreadable else size)
    finally:
        recorder.close()
        engine.close()
    say(f"results in {output.path / 'results.txt'}; models in {output.models}")
    return 0


def evaluate_classification(settings: Settings) -> int:
    """Evaluate a compressed (or dense) classification network; status 1 if `expected` is missed."""
    engine = engines.make(settings.engine, engines.pick_device(settings.device))
    say = _printer(engine)
    architecture = architectures.get(settings.model.arch, "classification")
    model, source = _model_to_evaluate(settings, architecture, engine)
    (validation,) = _images(settings, ("val",), engine)
    check_classes(len(validation.classes), _outputs(architecture, model))
    say(f"model: {source}")
    say(f"size: {model_size(model).summary()}")
    model = set_memory_format(model.to(engine.device), settings.channels_last)
    metrics = _classification(settings, engine, None, validation).validate(model, "evaluate")
    engine.close()
    images, correct, top5 = (int(metrics[name]) for name in ("images", "correct", "correct_top5"))
    say(f"top-1 accuracy: {metrics['accuracy']:.2f} % ({correct:,} of {images:,})")
    say(f"top-5 accuracy: {metrics['accuracy_top5']:.2f} % ({top5:,} of {images:,})")
    say(f"cross entropy: {metrics['loss']:.4f}")
    if metrics["skipped"]:
        say(f"skipped: {int(metrics['skipped']):,} unreadable images")
    expected = settings.expected
    if expected.accuracy is None:
        return 0
    off = metrics["accuracy"] - expected.accuracy
    inside = abs(off) <= expected.tolerance + 1e-9
    verdict = "as expected" if inside else "NOT AS EXPECTED"
    say(f"{verdict}: {expected.accuracy:.2f} % +- {expected.tolerance:g} was expected, {off:+.2f} off")
    return 0 if inside else 1


def load_compressed(path: Path, architecture: Architecture, spec: CodingSpec) -> nn.Module:
    """Build `architecture` for the file's classes and coding, without clustering anything, and load the file; on the CPU.

    An ordinary state dict gives the dense network.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        PlanError: the coding settings do not fit the architecture.
    """
    state = read_tensors(path)
    n_classes = architecture.classes_of(state) or architecture.n_classes
    with torch.device("meta"):
        model = architecture.build(n_classes)
    if is_compressed(state):
        check_codes(state, str(path))
        model = build_coded(model, make_plan(model, spec))
    model = model.to_empty(device="cpu").eval()
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    load_state(model, state, str(path))
    return model


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
    )


def _printer(engine: Engine) -> Callable[[str], None]:
    return lambda line: print(line, flush=True) if engine.is_main else None


def _images(settings: Settings, splits: Sequence[str], engine: Engine) -> list[ImageFolderIndex]:
    """The wanted splits, checked: folders, classes, readable files."""
    data = settings.dataloader
    require(settings, "dataloader.imagenet_path")
    if data.source == "folder":
        root = find(data.imagenet_path, "dataloader.imagenet_path", "Set it to the folder that holds train/ and val/")
    else:
        places = candidates(data.imagenet_path)
        root = next((place for place in places if place.exists()), places[0])
        prepare(data.source, root)
    indices = [read_folder(root, split, engine.is_main) for split in splits]
    for index in indices:
        if data.num_classes is not None and len(index.classes) != data.num_classes:
            raise SettingsError(
                f"dataloader.num_classes: {data.num_classes} were expected, but {index.root} has {len(index.classes)} class folders"
            )
    if len(indices) == 2:
        check_same_classes(*indices)
    checked = []
    for index in indices:
        readable, bad = require_readable(index, data.verify_images, data.skip_unreadable, engine.is_main)
        if bad and engine.is_main:
            print(
                f"warning: skipped {len(bad)} unreadable images of {index.root}: {', '.join(path for path, _ in bad[:5])}", file=sys.stderr
            )
        checked.append(readable)
    return checked


def _classification(settings: Settings, engine: Engine, train: ImageFolderIndex | None, validation: ImageFolderIndex) -> Classification:
    data = settings.dataloader
    return Classification(
        engine, train, validation,
        batch_size=data.batch_size, num_workers=data.num_workers, train_shuffle=data.train_shuffle, validation_shuffle=data.validation_shuffle,
        resize=data.resize, image_size=data.image_size, crop_padding=data.crop_padding, horizontal_flip=data.horizontal_flip,
        mean=data.mean, std=data.std, skip_unreadable=data.skip_unreadable, seed=settings.seed, amp=settings.amp,
        channels_last=settings.channels_last, show_progress=engine.is_main,
    )  # fmt: skip


def _weights_source(settings: Settings) -> str | Path:
    """`pretrained`, `none`, or the existing path of a state dict."""
    weights = settings.model.weights
    if weights in ("pretrained", "none"):
        return weights
    require(settings, "model.weights")
    return find(weights, "model.weights", "Expected pretrained, none, or the path of a state dict (.pth or .safetensors)")


def _dense_model(architecture: Architecture, weights: str | Path, n_classes: int, engine: Engine) -> nn.Module:
    """The dense network to start from."""
    if weights == "none":
        return architecture.build(n_classes)
    if isinstance(weights, Path):
        state, source = read_tensors(weights), str(weights)
        if is_compressed(state):
            raise CheckpointError(f"model.weights: {weights} is a compressed model; training starts from a dense one")
    else:
        if architecture.licence and engine.is_main:
            print(f"note: licence of the weights of {architecture.name}: {architecture.licence}", file=sys.stderr)
        state, source = architecture.published_weights(engine.is_main), architecture.weights_url
    model = architecture.build(architecture.classes_of(state) or architecture.n_classes)
    load_state(model, state, source)
    return model


def _model_to_evaluate(settings: Settings, architecture: Architecture, engine: Engine) -> tuple[nn.Module, str]:
    """The network of `state_dict_compressed`, or the dense one of `weights` with `use_compression: False`."""
    if not settings.model.use_compression:
        weights = _weights_source(settings)
        return _dense_model(
            architecture, weights, settings.dataloader.num_classes or architecture.n_classes, engine
        ).eval(), f"dense {architecture.name}, {weights}"
    if settings.model.state_dict_compressed is None:
        raise SettingsError("model.state_dict_compressed: the file to evaluate is not set; use --model.state_dict_compressed PATH")
    require(settings, "model.state_dict_compressed")
    path = find(settings.model.state_dict_compressed, "model.state_dict_compressed", PAPER_MODELS_ADVICE)
    return load_compressed(path, architecture, coding_spec(settings)), f"{architecture.name}, {path}"


def _outputs(architecture: Architecture, model: nn.Module) -> int:
    head: Layer = model.get_submodule(architecture.head)
    return int(head.out_features)


def _groups(settings: Settings, architecture: Architecture, model: nn.Module) -> list[Group]:
    """The groups of the settings, or those of the architecture."""
    if settings.model.permutations is None:
        return architecture.groups(model)
    return [Group(tuple(group.parents), tuple(group.children)) for group in settings.model.permutations]


def _permutation_specs(settings: Settings) -> Mapping[str, PermutationSpec]:
    return {name: PermutationSpec(spec.reshape, spec.optimization or PUBLISHED) for name, spec in settings.model.permutation_specs.items()}


def _permutation_summary(results: Sequence[GroupResult]) -> str:
    if not results:
        return "permute: no groups"
    improved = [r for r in results if r.child is not None and r.after < r.before]
    mean = sum(r.after - r.before for r in improved) / len(improved) if improved else 0.0
    return f"permute: {len(improved)} of {len(results)} groups reordered, log det(Cov) changed by {mean:.3f} on average; the rest do not depend on the order"


def _report_layers(
    layers: Sequence[LayerResult], permuted: Sequence[GroupResult], recorder: RunRecorder, output: OutputFolder, say: Callable[[str], None]
) -> None:
    """Per-layer distortion to TensorBoard and compression.json, a summary to the screen."""
    for layer in layers:
        recorder.scalar(f"Distortion/{layer.name or 'model'}", layer.relative_error)
    if layers:
        total = sum(layer.distortion for layer in layers) / (sum(layer.power for layer in layers) or math.nan)
        worst = max(layers, key=lambda layer: layer.relative_error)
        say(
            f"quantize: {len(layers)} layers coded, {100 * total:.2f} % of the weights' energy lost (most in {worst.name}: {100 * worst.relative_error:.2f} %)"
        )
    groups = [
        {"group": g.label, "child": g.child, "before": g.before, "after": g.after, "permutation": _listed(g.permutation)} for g in permuted
    ]
    table = {"layers": [{**asdict(layer), "relative_error": layer.relative_error} for layer in layers], "groups": groups}
    write_text(output.path / "compression.json", json.dumps(table, indent=1) + "\n")


def _listed(permutation: Tensor | None) -> list[int] | None:
    return None if permutation is None else permutation.tolist()
