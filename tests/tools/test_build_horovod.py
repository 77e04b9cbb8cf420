"""The script that builds Horovod: what a build depends on, what it says when it cannot, and how it patches. CI runs the
build itself."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools import build_horovod
from tools.build_horovod import CPU_PATCH, PATCHES, BuildError, Patch, apply, check_tools, for_gpu, key, options


def test_the_cache_key_depends_on_torch_python_and_the_wanted_build() -> None:
    plain = key("2.14.1", {})
    assert plain == key("2.14.1", {"PATH": "/elsewhere"})
    assert plain.startswith("horovod-0.28.1-torch-2.14.1-")
    others = [
        key("2.14.2", {}),
        key("2.14.1", {"HOROVOD_GPU_OPERATIONS": "NCCL"}),
        key("2.14.1", {"HOROVOD_WITH_MPI": "1"}),
    ]
    assert len({plain, *others}) == 4


def test_horovods_own_variables_win_over_the_defaults() -> None:
    assert options({})["HOROVOD_WITHOUT_MPI"] == "1"
    assert "HOROVOD_WITHOUT_MPI" not in options({"HOROVOD_WITH_MPI": "1"})
    assert not for_gpu({"HOROVOD_WITH_MPI": "1", "HOROVOD_GPU_OPERATIONS": ""})
    assert for_gpu({"HOROVOD_GPU_OPERATIONS": "NCCL"})


def test_a_patch_replaces_its_text_or_says_that_the_source_is_another(tmp_path: Path) -> None:
    for patch in (*PATCHES, CPU_PATCH):
        file = tmp_path / patch.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"before\n    {patch.old}\nafter\n")
        apply(tmp_path, patch)
        assert file.read_text() == f"before\n    {patch.new}\nafter\n"
        with pytest.raises(BuildError, match="does not contain"):
            apply(tmp_path, Patch(patch.file, patch.old, patch.new))


def test_missing_tools_are_named_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"cmake, g\+\+, make"):
        check_tools({})


def test_the_message_of_a_failed_build_says_what_it_needs(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "tools.build_horovod", "--wheel-only"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "missing here: cmake, g++, make" in done.stderr
    assert "C++20 compiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wheel_in_the_cache_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from importlib import metadata

    folder = build_horovod.cache_folder() / key(metadata.version("torch"), {})
    folder.mkdir(parents=True)
    wheel = folder / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    wheel.touch()
    assert build_horovod.cached_wheel({}) == wheel


def test_pyproject_and_the_script_mean_the_same_release() -> None:
    assert f'"horovod>={build_horovod.VERSION}"' in (ROOT / "pyproject.toml").read_text()
    assert f"Horovod {build_horovod.VERSION}" in (ROOT / "docs" / "several-processes.md").read_text()


def test_without_a_cached_wheel_nothing_is_built_and_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build_horovod.main(["--if-cached"]) == 0
    assert "its tests are skipped" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    folder = build_horovod.cache_folder() / build_horovod.key(metadata.version("torch"), dict(os.environ))
    folder.mkdir(parents=True)
    (folder / "horovod-0.whl").touch()
    assert build_horovod.is_cached(dict(os.environ))
