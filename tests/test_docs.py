"""The front door: links lead somewhere, commands are there, pages made from the program are up to date."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "compressed_models" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PROMISED = [
    "python -m src.train_resnet --config ../config/train_resnet50.yaml",
    "python -m src.train_maskrcnn --config ../config/train_maskrcnn.yaml",
    "tensorboard --logdir <your_output_path>/tensorboard --bind_all --port 6006",
    "python -m src.evaluate_resnet",
    "python -m src.evaluate_resnet --model.compression_parameters.large_subvectors True "
    "--model.state_dict_compressed ../compressed_models/resnet18_large.pth",
    "python -m src.evaluate_resnet --model.arch resnet50 --model.compression_parameters.layer_specs.fc.k 1024 "
    "--model.state_dict_compressed ../compressed_models/resnet50.pth",
    "python -m src.evaluate_resnet --model.arch resnet50 --model.compression_parameters.pw_subvector_size 8 "
    "--model.compression_parameters.large_subvectors True --model.compression_parameters.layer_specs.fc.k 1024 "
    "--model.state_dict_compressed ../compressed_models/resnet50_large.pth",
    "python -m src.evaluate_maskrcnn",
]


def anchors(page: Path) -> set[str]:
    """What the headings of a page can be linked by."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name.partition("?")[0]) if name else page
        assert target.exists(), f"{link} in {page.name}"
        if anchor:
            assert anchor in anchors(target), f"{link} in {page.name}"


def test_the_readme_is_short_and_has_every_promised_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S))
    commands = [" ".join(line.split()) for line in blocks.replace("\\\n", " ").splitlines()]
    for command in PROMISED:
        assert command in commands


def test_every_page_of_the_documentation_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert str(page.relative_to(ROOT)) in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_entries_and_settings_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in set(re.findall(r"python -m (src\.[a-z_.]+|tools\.[a-z_]+|benchmarks\.[a-z_]+)", text)):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for config in set(re.findall(r"--config \.\./(config/[\w/]+\.yaml)", text)):
        assert (ROOT / config).exists(), config
    for target in set(
        re.findall(r"\bmake ([a-z][a-z-]+)\b", re.sub(r"```.*?```|`", lambda m: m.group(0).strip("`"), text))
    ):
        if f"`make {target}" in text or f"\nmake {target}" in text:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_the_documentation_imports_what_exists(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        compile(code, str(page), "exec")
        for module, names in re.findall(r"^from (src[\w.]*) import (.*)$", code, flags=re.M):
            found = importlib.import_module(module)
            for name in names.split(","):
                assert hasattr(found, name.strip()), f"{module}.{name}"


def test_the_settings_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.settings_reference", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "make docs"
