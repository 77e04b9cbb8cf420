"""The map of the house: which part may import which. Arrows point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SRC = ROOT / "src"

ENTRIES = (
    "train_resnet", "train_maskrcnn", "evaluate_resnet", "evaluate_maskrcnn", "train_classifier", "train_detector",
    "evaluate_classifier", "evaluate_detector", "compress", "convert", "inspect", "paper_models",
    "__main__",
)  # fmt: skip

# The longest name that a module's own starts with decides; a part may always import itself and its own files.
# `a.b` allows that module and what is below it.
REGISTRIES = (
    "architectures", "compression.finetune.registry", "compression.permute.registry", "compression.quantize.registry",
    "engines.registry", "tasks.augmentation_names", "tasks.coco.backends", "tasks.sources",
)  # fmt: skip
"""What there is, by name; nothing in them is imported before it is asked for."""
ALLOWED: dict[str, tuple[str, ...]] = {
    "common": (),
    "engines": ("common",),
    "engines.registry": ("common",),
    "engines.launch": ("common", "engines.registry"),
    "engines.machine": ("engines.launch",),
    "compression.quantize": ("common", "engines.machine"),
    "compression.quantize.subvectors": ("common",),
    "compression.permute": (
        "common",
        "engines.machine",
        "compression.quantize.subvectors",
        "compression.quantize.weights",
    ),
    "compression.finetune": ("common", "engines.engine"),
    "architectures": ("common", "compression.permute.groups", "compression.permute.channels"),
    "model_files": ("common", "compression.quantize", "compression.permute", "architectures"),
    "model_files.pickle_safety": ("common",),
    "model_files.safetensors_file": ("common",),
    "model_files.bit_packing": (),
    "model_files.published": ("common",),
    "model_files.entropy": ("model_files.bit_packing",),
    "model_files.rans": ("model_files.bit_packing",),
    "exports": ("common", "compression.quantize", "architectures", "model_files"),
    "settings": ("common", *REGISTRIES),
    "tasks": ("common", "engines.engine", "compression.finetune.task", "compression.finetune.distillation"),
    "run": (
        "common",
        "engines",
        "settings",
        "compression",
        "architectures.architecture",
        "architectures.detector_outputs",
        "model_files",
        "tasks.workers",
    ),
    "run.signals": (),
    "run.launched": ("common",),
    "run.output_folder": ("common", "run.launched"),
    "run.recorder": ("common", "run.output_folder", "compression.finetune.outcome"),
    "run.said": ("common", "engines.launch"),
    "run.command": ("common", "engines.launch", "settings", "run.signals", "run.inputs", "run.said"),
    "run.inputs": ("common", "settings", "architectures", "tasks.sources", "run.wandb_sink"),
    "run.wandb_sink": ("common",),
    "recipes": (
        "common",
        "engines",
        "settings",
        "compression",
        "architectures",
        "model_files",
        "exports",
        "tasks",
        "run",
    ),
    "api": ("common", "settings", "compression", "architectures", "model_files", "run.compression_specs"),
    "pretrained": ("common", "compression.quantize", "architectures", "model_files", "api"),
    "demo": ("common", "train_resnet", "evaluate_resnet", "train_maskrcnn", "evaluate_maskrcnn", "compress", "api"),
}
ENTRY_MAY = ("common", "run.command", "recipes", "settings")
OF_ENTRIES = {
    "paper_models": "model_files.published",
    "train_classifier": "train_resnet",
    "evaluate_classifier": "evaluate_resnet",
    "train_detector": "train_maskrcnn",
    "evaluate_detector": "evaluate_maskrcnn",
}
"""What single entries may import besides: those with two names are one command."""


def below(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below `root` -> file; the root's own __init__ is ''."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, root: Path, known: set[str]) -> set[str]:
    """Modules of the project that a file imports anywhere in it, relative imports resolved."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix(f"{root.name}.")
                for alias in node.names
                if alias.name.split(".")[0] == root.name
            }
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".") if package else []
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            elif node.module and node.module.split(".")[0] == root.name:
                base = node.module.partition(".")[2]
            else:
                continue
            # `from . import x` imports the module x where there is one
            for alias in node.names:
                full = f"{base}.{alias.name}" if base else alias.name
                found.add(full if full in known else base)
    return found - {""}


def allowed(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The part a module belongs to, and what that part may import; None: it has no place on the map."""
    if name in ENTRIES:
        return name, (*ENTRY_MAY, OF_ENTRIES[name]) if name in OF_ENTRIES else ENTRY_MAY
    rows = [part for part in ALLOWED if below(name, part)]
    if rows:
        part = max(rows, key=len)
        return part, ALLOWED[part]
    if name in {"", "compression"}:  # the root's and the science's __init__; the root's shows the Python interface
        return f"{name}.__init__", () if name else ("api", "pretrained")
    return None


def wrong_arrows(root: Path) -> list[str]:
    known = modules(root)
    wrong = []
    for name, path in known.items():
        place = allowed(name)
        if place is None:
            wrong.append(f"{name}: has no place on the map; give it a row in this test")
            continue
        part, may = place
        targets = sorted(imports(name, path, root, set(known)))
        wrong += [
            f"{name} -> {target}"
            for target in targets
            if not any(below(target, permitted) for permitted in (part, *may))
        ]
    return wrong


def test_every_import_follows_an_arrow_of_the_map() -> None:
    assert len(modules(SRC)) > 30
    assert wrong_arrows(SRC) == []


def test_registries_settings_and_commands_load_without_torch() -> None:
    names = [*REGISTRIES, "settings", "run.command", "run.inputs", "engines.launch", "__main__", *ENTRIES[:8]]
    code = (
        f"import importlib, sys; [importlib.import_module('src.' + name) for name in {names}]; sys.exit('torch' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_walk_sees_relative_absolute_and_late_imports() -> None:
    known = modules(SRC)

    def of(name: str) -> set[str]:
        return imports(name, known[name], SRC, set(known))

    assert {"compression.permute.groups", "common.errors"} <= of("architectures.architecture")
    assert {"compression.quantize.layers", "compression.quantize.subvectors"} <= of("model_files.size")
    assert "recipes" in of("train_resnet")  # imported inside a function
    assert "settings.load" in of("settings")


WRONG = [
    ("compression/permute/search.py", "from ..quantize.kmeans import cluster", "compression.permute.search -> compression.quantize.kmeans"),
    ("compression/quantize/plan.py", "from ..permute import groups", "compression.quantize.plan -> compression.permute.groups"),
    ("compression/finetune/loop.py", "from ...model_files.pth import save", "compression.finetune.loop -> model_files.pth"),
    ("compression/quantize/subvectors.py", "from . import layers", "compression.quantize.subvectors -> compression.quantize.layers"),
    ("compression/quantize/layers.py", "from ...settings import Settings", "compression.quantize.layers -> settings"),
    ("compression/permute/permute.py", "import src.run.recorder", "compression.permute.permute -> run.recorder"),
    ("model_files/pth.py", "from ..settings import Settings", "model_files.pth -> settings"),
    ("model_files/pth.py", "from ..run.output_folder import take", "model_files.pth -> run.output_folder"),
    ("tasks/classification.py", "def f():\n    from ..compression.quantize import layers", "tasks.classification -> compression.quantize.layers"),
    ("tasks/coco/data.py", "from ...recipes import quantization_spec", "tasks.coco.data -> recipes"),
    ("run/resume.py", "from ..recipes.train import train", "run.resume -> recipes.train"),
    ("engines/single.py", "from ..tasks import classification", "engines.single -> tasks.classification"),
    ("architectures/resnet.py", "from ..compression.permute.search import search", "architectures.resnet -> compression.permute.search"),
    ("architectures/resnet.py", "from src.run.command import run", "architectures.resnet -> run.command"),
    ("settings/load.py", "from .. import recipes", "settings.load -> recipes"),
    ("train_resnet.py", "from .model_files.pth import read_tensors", "train_resnet -> model_files.pth"),
    ("train_detector.py", "from . import train_resnet", "train_detector -> train_resnet"),
    ("run/recorder.py", "from ..settings import Settings", "run.recorder -> settings"),
    ("common/errors.py", "from ..engines import launch", "common.errors -> engines.launch"),
    ("newroom.py", "", "newroom: has no place on the map; give it a row in this test"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "line", "complaint"), WRONG, ids=[complaint.replace(" ", "") for *_, complaint in WRONG]
)
def test_a_wrong_arrow_is_found(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    for path in modules(SRC).values():  # the same house, empty
        copy = tmp_path / "src" / path.relative_to(SRC)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("", encoding="utf-8")
    assert wrong_arrows(tmp_path / "src") == []
    (tmp_path / "src" / file).write_text(line + "\n", encoding="utf-8")
    assert wrong_arrows(tmp_path / "src") == [complaint]


def circle(root: Path) -> list[str]:
    """Modules that import each other in a ring, late and type-checking imports counted; empty where there is none. A
    package's face (its __init__) only passes names on."""
    known = modules(root)
    arrows = {
        name: sorted(imports(name, path, root, set(known)))
        for name, path in known.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done or name not in arrows:
            return []
        found = next((ring for target in arrows[name] if (ring := walk(target, [*way, name]))), [])
        done.add(name)
        return found

    return next((ring for name in arrows if (ring := walk(name, []))), [])


def test_no_modules_import_each_other_in_a_ring(tmp_path: Path) -> None:
    assert circle(SRC) == []
    for name, line in (("a", "from .b import x"), ("b", "from . import c"), ("c", "def f():\n    from .a import y")):
        (tmp_path / f"{name}.py").write_text(line + "\n", encoding="utf-8")
    assert circle(tmp_path) == ["a", "b", "c", "a"]


def talkers(root: Path) -> list[str]:
    """Modules outside engines/ that name torch.distributed, DistributedDataParallel or Horovod's package in their
    code."""
    found = []
    for name, path in modules(root).items():
        if below(name, "engines"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            named = isinstance(node, ast.Attribute) and node.attr in ("distributed", "DistributedDataParallel")
            if named or any(below(one, "torch.distributed") or below(one, "horovod") for one in imported):
                found.append(name)
    return found


def test_only_engines_know_torch_distributed_and_horovod(tmp_path: Path) -> None:
    assert talkers(SRC) == []
    (tmp_path / "src" / "engines").mkdir(parents=True)
    for line in (
        "import torch.distributed as d",
        "from torch import distributed",
        "import horovod.torch",
        "x = torch.distributed.get_rank()",
    ):
        for name in ("engines/ours.py", "theirs.py"):
            (tmp_path / "src" / name).write_text(f"def f():\n    {line}\n", encoding="utf-8")
        assert talkers(tmp_path / "src") == ["theirs"]
