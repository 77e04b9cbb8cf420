"""`pip install .` gives the package `pqf` with settings files and models inside it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

from src.__main__ import COMMANDS
from tests.conftest import ROOT
from tests.support.patience import PATIENCE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the project was installed, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    files = [
        path
        for path in subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        if (ROOT / path).is_file()
    ]
    source = folder / "source"  # building writes beside the sources; a copy keeps the checkout clean
    for path in files:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
    (wheel,) = folder.glob("pqf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(installed)}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_the_entries_find_their_settings_files(installed: Path) -> None:
    for entry in ("pqf.train_resnet", "pqf.evaluate_resnet"):
        helped = run(installed, entry, "--help")
        assert helped.returncode == 0
        assert f"python -m {entry}" in helped.stdout
    refused = run(installed, "pqf.train_resnet", "--output_path", "out")
    assert refused.returncode == 2
    assert "dataloader.imagenet_path" in refused.stderr
    assert "config/train_resnet50.yaml" in refused.stderr


def test_the_committed_models_come_along(installed: Path) -> None:
    for name, megabytes in (("resnet18", 2), ("maskrcnn", 10)):
        assert (installed / "pqf" / "compressed_models" / f"digits_{name}.pth").stat().st_size < megabytes << 20
        assert (installed / "pqf" / "config" / "digits" / f"evaluate_{name}.yaml").is_file()


def test_requirements_txt_pins_what_the_project_asks_for() -> None:
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    }
    assert {name.split(">=")[0].lower() for name in project()["dependencies"]} <= pinned


def test_every_package_is_installed() -> None:
    found = {path.parent for path in (ROOT / "src").rglob("__init__.py")}
    names = {".".join(("pqf", *folder.relative_to(ROOT / "src").parts)) for folder in found}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name for name in listed if not name.startswith(("pqf.config", "pqf.compressed_models"))} == names


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_command_for_all(installed: Path) -> None:
    helped = run(installed, "pqf", "--help")
    assert helped.returncode == 0
    for name in COMMANDS:
        assert f"  {name} " in helped.stdout
        own = run(installed, "pqf", name, "--help")
        assert own.returncode == 0, own.stderr
        assert f"usage: python -m pqf {name} " in own.stdout
    assert run(installed, "pqf").returncode == 2
    refused = run(installed, "pqf", "train_resnt")
    assert refused.returncode == 2
    assert refused.stderr == "error: pqf: unknown command 'train_resnt'; did you mean train-resnet?\n"
    refused = run(installed, "pqf", "train-resnet", "--output_path", "out")
    assert refused.returncode == 2
    assert "dataloader.imagenet_path" in refused.stderr
    assert project()["scripts"] == {"pqf": "pqf.__main__:main"}


def test_the_list_of_commands_is_shown_without_loading_torch() -> None:
    code = "import sys; from src.__main__ import main; assert main(['--help']) == 0; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode == 0
