"""Whatever is wrong with numba: the results are the same, and one note says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytest.importorskip("numba")

SCRIPT = """
import json
import numpy as np, torch
from src.common.log import lines_of
from src.compression.permute.group_objective import RUN_SWAPS, GroupObjective
from src.compression.permute.objective import ChildObjective
from src.compression.quantize.kmeans import ACCUMULATE, means

with lines_of(lambda: True):
    draw = np.random.default_rng(0)
    weights = draw.normal(size=(20, 24)) * draw.uniform(0.1, 2, 24)
    objective = GroupObjective([ChildObjective(weights, 24, 4)], [1.0])
    made = objective.run(draw.integers(0, 24, 300), draw.integers(0, 24, 300))
    centroids, counts = means(torch.from_numpy(draw.normal(size=(500, 4))).float(), torch.arange(500) % 7, 7)
print(json.dumps({
    "compiled": [RUN_SWAPS.function() is not None, ACCUMULATE.function() is not None],
    "results": [made, round(objective.value, 6), [round(x, 4) for x in centroids.flatten().tolist()], counts.tolist()],
}))
"""


def computed(before: str = "", **variables: str) -> tuple[dict[str, Any], list[str]]:
    """What a fresh process computes with the loops, and what it notes; `before` is run first."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{before}\n{SCRIPT}"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *notes, last = done.stdout.splitlines()
    return json.loads(last), notes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cache that is filled."""
    folder = tmp_path_factory.mktemp("numba")
    found, notes = computed(NUMBA_CACHE_DIR=str(folder))
    assert found["compiled"] == [True, True]
    assert notes == []
    return folder


@pytest.fixture(scope="module")
def expected(cache: Path) -> list[Any]:
    """The results where all is well."""
    found, notes = computed(NUMBA_CACHE_DIR=str(cache))
    assert notes == []
    return list(found["results"])


def test_without_numba_the_results_are_the_same(expected: list[Any]) -> None:
    found, notes = computed("sys.modules['numba'] = None")
    assert found == {"compiled": [False, False], "results": expected}
    assert notes == []  # it is optional


@pytest.mark.parametrize("error", ["ImportError('numba needs NumPy 2.2 or less')", "SystemError('initialization')"])
def test_a_numba_that_cannot_be_imported_is_a_note(error: str, expected: list[Any], tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text(f"raise {error}\n")
    found, notes = computed(f"sys.path.insert(0, {str(tmp_path)!r})")
    assert found == {"compiled": [False, False], "results": expected}
    assert len(notes) == 1
    assert notes[0].startswith("note: numba cannot be used here (")


def test_a_numba_that_does_not_compile_is_a_note(expected: list[Any]) -> None:
    breaks = (
        "from numba.core.dispatcher import Dispatcher\n"
        "def compile(self, kinds): raise OSError('libLLVM cannot be loaded')\n"
        "Dispatcher.compile = compile"
    )
    found, notes = computed(breaks)
    assert found == {"compiled": [False, False], "results": expected}
    assert any(note.startswith("note: numba does not compile here (") for note in notes)


@pytest.mark.slow
def test_no_folder_for_the_cache_is_a_note(expected: list[Any]) -> None:
    found, notes = computed("from numba.core import caching\ncaching.CacheImpl._locator_classes = []")
    assert found == {"compiled": [True, True], "results": expected}
    assert [note.startswith("note: numba has no folder for its cache") for note in notes] == [True]


@pytest.mark.slow
def test_a_broken_cache_is_passed_over(cache: Path, expected: list[Any]) -> None:
    files = [path for path in cache.rglob("*.nb?") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:20] if path.suffix == ".nbi" else b"no code")
    found, _ = computed(NUMBA_CACHE_DIR=str(cache))
    assert found == {"compiled": [True, True], "results": expected}


def test_compiling_switched_off_is_numpy(expected: list[Any]) -> None:
    found, _ = computed(NUMBA_DISABLE_JIT="1")
    assert found == {"compiled": [False, False], "results": expected}
