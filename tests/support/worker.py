"""What the tests of several processes run in each of them: python -m tests.support.worker JOB FOLDER [more]."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from src.common.errors import RunError
from src.compression.finetune.distillation import Distillation, DistillationSpec
from src.compression.finetune.loop import FinetuneSpec, finetune
from src.compression.finetune.optimizers import OptimizerSpec, ScheduleSpec
from src.compression.permute.channels import ChannelGroup
from src.compression.permute.groups import Group
from src.compression.permute.permute import GroupResult, group_row, permute
from src.compression.quantize.compress import compress
from src.compression.quantize.plan import LayerPlan, LayerSpec, Plan, make_plan
from src.engines import choosing
from src.engines.batch_norm import join_batch_norms
from src.engines.engine import Engine
from src.recipes.compress_distributed import agreed, permute_together, quantize_together
from src.run import command
from src.run.processes import processes
from src.settings import Settings
from src.tasks.classification import Classification, ImageSpec
from src.tasks.coco.data import read_coco
from src.tasks.coco.loading import CocoDataset, collate_detection
from src.tasks.detection import Detection
from src.tasks.images import read_folder
from src.tasks.loading import LoaderSpec
from src.tasks.unlabelled import Unlabelled, read_unlabelled
from tests.support.channel_networks import DenseBlock, below, correlated
from tests.support.coco import small_coco
from tests.support.helpers import lively, quantized, spec
from tests.tasks.test_detection import network as detector

EPOCHS = 2
EVERY_STEP = {"log_every_n_steps": 1, "show_progress": False}
GROUPS = [Group(("0", "1"), ("3",)), Group(("3", "4"), ("6",)), Group(("6",), ("9",))]


def network() -> nn.Sequential:
    """A small network with batch norms, groups whose order matters, and two linear layers that share one weight."""
    torch.manual_seed(0)
    tied = nn.Linear(32, 32)
    body = [
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
    ]
    head = [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 32),
        nn.ReLU(),
        tied,
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.Linear(32, 3),
    ]
    model = nn.Sequential(*body, *head)
    model[13].weight = tied.weight
    lively(model)
    return model


class Diary:
    """A recorder of every process: losses by step, metrics by epoch, and a digest of the parameters and buffers by
    epoch."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.rates: dict[int, float] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.digests: dict[int, str] = {}

    def step(self, step: int, figures: dict[str, float]) -> None:
        self.losses[step], self.rates[step] = figures["loss"], figures["learning_rate"]

    def validation(self, epoch: int, step: int, metrics: dict[str, float]) -> None:  # noqa: ARG002 (of a protocol)
        self.metrics[epoch] = metrics

    def model(self, epoch: int, model: nn.Module) -> None:
        self.digests[epoch] = digest(model.state_dict().values())

    def best(self, epoch: int, model: nn.Module) -> None:
        pass


def digest(tensors) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def whole_run(engine: Engine, images: Path, batch_size: int, norms: str) -> dict:
    """Permute, code and fine-tune; what came out, on every process the same."""
    model = network()
    eight = {"6": LayerSpec(codebook_bits=8)}
    plan = make_plan(model, spec(8, "src", 4, ignored=["0", "14"], layers=eight))

    def search(part: nn.Module, groups: list[Group], numbers: list[int]) -> list[GroupResult]:  # noqa: ARG001 (of a protocol)
        return permute(part, groups, plan.sizes, seed=3, show_progress=False)

    groups = permute_together(engine, model, GROUPS, {}, search)
    quantize = partial(compress, seed=3, show_progress=False)
    model, layers = quantize_together(engine, model, plan, quantize)
    quantized = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = classification(engine, images, batch_size)
    if norms == "joint":
        model = join_batch_norms(model, engine) if engine.world_size > 1 else model
    model.train()
    diary = Diary()
    optimizer = OptimizerSpec("sgd", learning_rate=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = ScheduleSpec("cosine", min_lr=1e-3)
    finetune(model, task, FinetuneSpec(EPOCHS, optimizer, schedule, **EVERY_STEP), engine, diary)
    state = model.state_dict()
    assert not any(name.startswith("module.") for name in state)
    digests = engine.gather([diary.digests])
    results = [
        [group.label, list(group.children), group.before, group.after, _list(group.permutation)] for group in groups
    ]
    rows = [[layer.name, layer.distortion, layer.power] for layer in layers]
    figures = {
        "losses": diary.losses,
        "rates": diary.rates,
        "metrics": diary.metrics,
        "digests": digests,
        "groups": results,
        "layers": rows,
    }
    return {**figures, "quantized": quantized, "state": state, "tied": model[13].codebook is model[11].codebook}


def taught(engine: Engine, images: Path, batch_size: int, per_batch: int) -> dict:
    """Fine-tune with a teacher, images without labels and the usual tools; what came out, and the digests of all
    processes."""
    model = quantized(network(), spec(8, "src", 4, ignored=["0", "14"]), seed=3)
    model = join_batch_norms(model, engine) if engine.world_size > 1 else model
    task = classification(engine, images, batch_size, more=Unlabelled(read_unlabelled(images / "val"), per_batch))
    task.distillation = Distillation(network(), DistillationSpec(weight=2.0, labels=0.5))
    diary, optimizer = Diary(), OptimizerSpec("sgd", 0.05, 0.9, codebook_learning_rate=0.5)
    tools = {"accumulate": 2, "clip_gradients": 0.5, "ema": 0.9}
    how = FinetuneSpec(EPOCHS, optimizer, ScheduleSpec(min_lr=1e-3, warmup=1.5), **EVERY_STEP, **tools)
    finetune(model.train(), task, how, engine, diary)
    digests = engine.gather([digest(model.state_dict().values())])
    return {"losses": diary.losses, "rates": diary.rates, "state": model.state_dict(), "digests": digests}


def side_by_side(engine: Engine) -> list:
    """Permute a network in which channels of several groups stand side by side in one weight."""
    torch.manual_seed(0)
    model = correlated(nn.Sequential(DenseBlock(), DenseBlock()).eval())
    plan = make_plan(model, spec(8))

    def search(part: nn.Module, groups: list[ChannelGroup], numbers: list[int]) -> list[GroupResult]:  # noqa: ARG001
        return permute(part, groups, plan.sizes, seed=3, show_progress=False)

    groups = [below(group, prefix) for prefix in "01" for group in model[int(prefix)].groups()]
    results = permute_together(engine, model, groups[::2] + groups[1::2], {}, search)
    return json.loads(json.dumps([digest(model.state_dict().values()), *map(group_row, results)]))


def _list(permutation: Tensor | None) -> list[int] | None:
    return None if permutation is None else permutation.tolist()


def classification(
    engine: Engine, images: Path, batch_size: int, most: int | None = None, more: Unlabelled | None = None
) -> Classification:
    training, validation = (read_folder(images, split, False) for split in ("train", "val"))
    validation = replace(validation, paths=validation.paths[:most], labels=validation.labels[:most])
    how = ImageSpec(resize=32, image_size=32, crop_padding=2, mean=[0.5] * 3, std=[0.25] * 3)
    loading = LoaderSpec(batch_size, seed=5, show_progress=False)
    return Classification(engine, training, validation, how, loading, unlabelled=more)


def detection(engine: Engine, coco: Path) -> Detection:
    loading = LoaderSpec(batch_size=1, seed=5, show_progress=False)
    return Detection(engine, read_coco(coco, "train"), read_coco(coco, "val"), loading)


def detecting(engine: Engine, coco: Path) -> dict:
    """What a small quantized Mask R-CNN finds before and after two epochs, and who saw which image."""
    model, task, diary = quantized(detector(), spec(16, iterations=2)), detection(engine, coco), Diary()
    seen = engine.gather([[image_id for batch in task.training_batches(1) for image_id in batch.image_ids]])
    before = task.detect(model, "before")
    finetune(model, task, FinetuneSpec(EPOCHS, OptimizerSpec(learning_rate=5e-3), **EVERY_STEP), engine, diary)
    after = task.detect(model, "after")
    digests = engine.gather([diary.digests])
    figures = {"metrics": diary.metrics, "losses": diary.losses, "digests": digests, "seen": seen}
    return {**figures, "before": before, "after": after, "state": model.state_dict()}


def nothing_here(engine: Engine, coco: Path) -> list[bool]:
    """Two steps in which the second process has neither objects nor proposals, and so losses that are no numbers: True
    if all is well."""
    model = detector().train()
    model.rpn.score_thresh = 1.1
    trained = engine.wrap_model(model)
    dataset = CocoDataset(
        read_coco(coco, "train" if engine.is_main else "val"), 0, flip=False
    )  # those of validation bring no objects
    batch = collate_detection([dataset[1, 0]])
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        detection(engine, coco).training_loss(trained, batch).loss.backward()
    found = engine.gather([digest(p.grad for p in model.parameters())])
    return [
        found[0] == found[-1],
        all(bool(p.grad.isfinite().all()) for p in model.parameters()),
        bool(batch.targets[0]["boxes"].numel()),
    ]


def exchanges(engine: Engine) -> dict:
    """Sums, gathered rows and broadcast tensors, to be compared with what they must be."""
    rank = engine.rank
    sums = {}
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "uint8"):
        values = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=getattr(torch, name)).t() * (rank + 1)  # not contiguous
        total = engine.sum(values)
        sums[name] = [
            str(total.dtype),
            total.tolist(),
            values.tolist() == (torch.tensor([[1, 4], [2, 5], [3, 6]]) * (rank + 1)).tolist(),
        ]
    rows = engine.gather(
        [{"rank": rank, "box": [0.1 + rank, 1e-300], "text": "ä\n\udcff"}] * (3 * rank)
    ) + engine.gather([])
    sent = [
        torch.arange(6, dtype=torch.int16).reshape(2, 3).t() + rank,
        torch.tensor(rank == 1),
        torch.tensor(1.5 + rank, dtype=torch.bfloat16),
        torch.full((2, 2), 7.25 + rank, requires_grad=True),
    ]
    engine.broadcast(sent, source=1)
    first = LayerPlan("a", 4 << rank, 16 >> rank, "src", 100 - rank, codebook_bits=8 << rank)
    own = {"a": first, "b": LayerPlan("b", 1, 2, "kmeans", 5)}
    plan = agreed(engine, Plan(layers=own, notes=()))
    engine.barrier()
    return {
        "sums": sums,
        "rows": rows,
        "sent": [tensor.tolist() for tensor in sent],
        "plan": [[one.d, one.k, one.codebook_bits, one.k_means_n_iters] for one in plan.layers.values()],
        "scalar": engine.sum(torch.tensor(2.5)).item(),
    }


def gradients(engine: Engine, both: bool = False) -> dict:
    """Averaged gradients of parameters of several kinds, and how many bytes of them went out; `both`: what two
    processes should find."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1).to(memory_format=torch.channels_last), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2)
    )
    model[1].weight.requires_grad_(False)
    with torch.no_grad():
        model[3].bias += engine.rank  # the first process's values must win
    trained, sent = (model, []) if both else counting(engine, model)
    ranks = [0, 1] if both else [engine.rank]
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        sent.clear()
        for rank in ranks:
            x = torch.full((2, 3, 3, 3), 1.0 + rank).contiguous(memory_format=torch.channels_last)
            (trained(x).square().sum() / len(ranks)).backward()
    found = {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()}
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"gradients": found, "bias": model[3].bias.tolist(), "sent": sum(sent), "trained": size}


def counting(engine: Engine, model: nn.Module) -> tuple[nn.Module, list[int]]:
    """The wrapped model, and a list that collects the bytes of every exchange of gradients."""
    sent: list[int] = []
    if hasattr(engine, "_horovod"):
        library = engine._horovod

        def count(tensor: Tensor, **more):
            sent.append(tensor.numel() * tensor.element_size())
            return library.allreduce_async_(tensor, **more)

        engine._horovod = SimpleNamespace(**{**vars(library), "allreduce_async_": count})
        wrapped = engine.wrap_model(model)
        engine._horovod = library
        return wrapped, sent
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrapped = engine.wrap_model(model)

    def hook(group, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(engine._group, hook)
    return wrapped, sent


def some_not_reached(engine: Engine) -> list:
    """Gradients where a loss reaches one layer in the first process only (Horovod; DistributedDataParallel refuses such
    a model)."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1).to(torch.bfloat16)])
    engine.wrap_model(model)
    loss = model[0](torch.ones(1, 2)).sum()
    if engine.is_main:
        loss = loss + model[1](torch.ones(1, 2, dtype=torch.bfloat16)).float().sum() * 3
    loss.backward()
    return [[str(p.grad.dtype), p.grad.tolist()] for p in model.parameters()]


def optimizer_state(engine: Engine) -> dict:
    """Adam's state, which differs between the processes, before the engine takes the optimizer and after."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.full((1, 2), 1.0 + engine.rank)).sum().backward()
    optimizer.step()

    def state() -> list:
        return [
            [name, value.tolist()] for p in model.parameters() for name, value in sorted(optimizer.state[p].items())
        ]

    before, parameters = state(), digest(model.state_dict().values())
    same = engine.wrap_optimizer(optimizer, model) is optimizer
    return {
        "before": before,
        "after": state(),
        "same": same,
        "untouched": digest(model.state_dict().values()) == parameters,
    }


def laws(folder: Path, images: Path) -> None:
    """Everything that one launch can show; the first process keeps it."""
    engine = choosing.make("auto", torch.device("cpu"))
    found = {"exchanges": engine.gather([exchanges(engine)]), "joint": whole_run(engine, images, 4, "joint")}
    found["plain"] = {
        name: value for name, value in whole_run(engine, images, 4, "plain").items() if name in ("digests", "metrics")
    }
    found["taught"] = taught(engine, images, 4, 2)
    found["side by side"] = engine.gather([side_by_side(engine)])
    found["one image"] = engine.gather([classification(engine, images, 4, most=1).validate(network(), "one image")])
    found["gradients"] = engine.gather([gradients(engine)])
    found["optimizer"] = engine.gather([optimizer_state(engine)])
    found["not reached"] = engine.gather([some_not_reached(engine)]) if hasattr(engine, "_horovod") else []
    coco = folder / "coco"
    if engine.is_main:
        small_coco(coco)
    engine.barrier()
    found["detection"] = detecting(engine, coco)
    found["nothing here"] = engine.gather([nothing_here(engine, coco)])
    if engine.is_main:
        torch.save(found, folder / "found.pth")
    engine.close()


def failing(how: str, settings: Settings) -> int:
    """The second process fails while the first one waits for it."""
    with processes(settings) as engine:
        engine.barrier()
        if engine.rank == 1:
            if how == "user":
                raise RunError("out of luck on purpose")
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("a defect on purpose")
        engine.sum(torch.zeros(3))
    return 0


def main(arguments: list[str]) -> int:
    job, *rest = arguments
    if job == "laws":
        laws(Path(rest[0]), Path(rest[1]))
        return 0
    argv = ["--device", "cpu"]
    return command.run(
        partial(failing, job),
        prog="worker",
        purpose="Fails.",
        default_config="../config/train_resnet18.yaml",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
