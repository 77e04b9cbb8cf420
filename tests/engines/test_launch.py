"""How a process finds out who started it, and what bad starts get: in this process where one is enough, else with two
real ones."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from src import train_resnet
from src.common.errors import SettingsError
from src.engines.launch import Launch, here
from src.recipes.specs import finetune_spec
from src.settings import ineffective, load
from tests.conftest import write_images
from tests.support import small_runs
from tests.support.launching import ENGINES, Finished, by_hand, command, free_port, launch, need, together

pytestmark = pytest.mark.timeout(1800)

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
HOROVOD = {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "8", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}

SMALL = [*small_runs.training(batch=4, workers=0, sls=5, k_means=1), "--epochs", "1"]
TRAIN = ["-m", "src.train_resnet", *SMALL]


# --- who started it ---


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, Launch()),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Launch()),  # anybody's
        (TORCHRUN, Launch("torchrun", 3, 8, 1, 2)),
        (HOROVOD, Launch("horovod", 3, 8, 1, 2)),
        (MPI, Launch("horovod", 3, 8, 1, 2)),
        ({**HOROVOD, **MPI}, Launch("horovod", 3, 8, 1, 2)),
        ({name: value for name, value in TORCHRUN.items() if "LOCAL" not in name}, Launch("torchrun", 3, 8, 3, 8)),
    ],
)
def test_the_environment_says_how_a_process_was_started(variables: dict[str, str], wanted: Launch) -> None:
    assert here(variables) == wanted


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**TORCHRUN, **HOROVOD}, ["horovod and torchrun", "MASTER_PORT"]),
        ({**TORCHRUN, "RANK": "first"}, ["RANK", "'first'"]),
        ({**TORCHRUN, "RANK": "-1"}, ["RANK", "'-1'"]),
        ({**HOROVOD, "HOROVOD_RANK": "8"}, ["process 8 of 8"]),
        ({**HOROVOD, "HOROVOD_LOCAL_RANK": "2"}, ["2 of 2 on this machine"]),
    ],
)
def test_an_environment_that_cannot_be(variables: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        here(variables)
    assert all(word in str(error.value) for word in words), error.value


def test_the_learning_rate_scales_with_the_number_of_processes_unless_told_otherwise() -> None:
    for flags, factor in (([], 4), (["--scale_learning_rate", "False"], 1)):
        settings = load(
            "../config/train_resnet18.yaml", ["--learning_rate", "0.003", "--lr_scheduler.min_lr", "0.001", *flags]
        )
        spec = finetune_spec(settings, 4)
        assert (spec.optimizer.learning_rate, spec.lr_scheduler.min_lr) == pytest.approx(
            (factor * 0.003, factor * 0.001)
        )


def test_what_one_process_alone_makes_ineffective_is_said() -> None:
    alone = ["--engine", "single", "--sync_batch_norm", "True", "--scale_learning_rate", "False"]
    said = [line for line in ineffective(load("../config/train_resnet18.yaml", alone)) if "engine single" in line]
    assert [line.split()[0] for line in said] == ["scale_learning_rate", "sync_batch_norm"]


# --- bad starts ---


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 2, 4, seed=0)
    write_images(root / "val", 2, 1, seed=1)
    return root


def where(images: Path, output: Path | str) -> list[str]:
    return ["--dataloader.imagenet_path", str(images), "--output_path", str(output)]


def refused(finished: Finished, *words: str) -> None:
    """The job ended soon, with one clear message of the first process, and without a traceback of ours."""
    assert finished.status != 0
    for word in words:
        assert word in finished.text, f"{word!r} is not in: {finished.text}"
    assert finished.text.count("error: process 0 of 2: ") == 1, finished.text
    assert "/src/" not in finished.text  # no traceback of ours; torchrun prints one of its own
    assert "results in" not in finished.text
    assert finished.seconds < 60
    assert finished.left == 0


@pytest.mark.parametrize(
    ("engine", "asked"),
    [
        ("torchrun", "horovod"),
        pytest.param("horovod", "torchrun", marks=pytest.mark.slow),
        pytest.param("torchrun", "single", marks=pytest.mark.slow),
    ],
)
def test_launched_under_one_engine_but_another_requested(engine: str, asked: str, images: Path, tmp_path: Path) -> None:
    finished = launch(engine, [*TRAIN, *where(images, tmp_path / "out"), "--engine", asked])
    refused(finished, f"engine: {asked} was asked for", f"started by {engine}, as one of 2", "--engine auto")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("asked", "start"), [("torchrun", "torchrun --nproc-per-node"), ("horovod", "horovodrun -np")])
def test_an_engine_that_needs_a_launcher_without_one(
    asked: str, start: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_resnet.main([*SMALL, *where(images, tmp_path / "out"), "--engine", asked]) == 2
    error = capsys.readouterr().err
    assert f"engine: {asked} was asked for" in error
    assert start in error


def test_engine_not_installed(images: Path, tmp_path: Path) -> None:
    without = (
        "import sys; sys.modules['horovod'] = None; from src import train_resnet; "
        "sys.exit(train_resnet.main(sys.argv[1:]))"
    )
    each = [
        (
            [sys.executable, "-c", without, *SMALL, *where(images, tmp_path / "out")],
            {"HOROVOD_RANK": str(rank), "HOROVOD_SIZE": "2"},
            tmp_path,
        )
        for rank in range(2)
    ]
    refused(together(each), "engine: horovod cannot be used here", "make horovod", "torchrun")
    assert not (tmp_path / "out").exists()


def test_port_taken(images: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        start = [*TRAIN, *where(images, tmp_path / "out")]
        finished = by_hand([(start, tmp_path), (start, tmp_path)], port, grace=5)
        assert finished.status == 2
        assert f"engine: port {port} of 127.0.0.1 is taken" in finished.err
        assert "--master-port" in finished.err
        assert "Traceback" not in finished.err
        assert finished.seconds < 60
        # torchrun itself is the one that wants the port, before this project's code runs
        arguments = command("torchrun", start)
        arguments[arguments.index("--master-port") + 1] = str(port)
        finished = together([(arguments, {}, tmp_path)])
        assert finished.status != 0
        assert "EADDRINUSE" in finished.err
        assert finished.left == 0


SECOND_WITH = "import os, sys; from src import train_resnet; a = sys.argv[1:]; b = a.index('--'); rank = os.environ['{}']; sys.exit(train_resnet.main(a[:b] + (a[b + 1:] if rank == '1' else [])))"  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_with_different_settings(engine: str, images: Path, tmp_path: Path) -> None:
    variable = {"torchrun": "RANK", "horovod": "HOROVOD_RANK"}[engine]
    script = tmp_path / "second_with.py"  # torchrun runs files and modules only
    script.write_text(SECOND_WITH.format(variable))
    others = ["--", "--seed", "7", "--model.compression_parameters.k", "64"]
    finished = launch(engine, [str(script), *SMALL, *where(images, tmp_path / "out"), *others])
    refused(
        finished,
        "different settings",
        "seed: 0 (process 0); 7 (process 1)",
        "model.compression_parameters.k: 256 (process 0); 64 (process 1)",
    )
    assert "epochs" not in finished.text
    assert not (tmp_path / "out").exists()


def test_dataset_smaller_than_the_number_of_processes(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 1, 1, seed=0)
    write_images(tmp_path / "val", 1, 1, seed=0)
    finished = launch("torchrun", [*TRAIN, *where(tmp_path, tmp_path / "out")])
    refused(finished, "1 training images are too few for 2 processes")
    assert list((tmp_path / "out").iterdir()) == []


def test_output_folder_not_shared(images: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "machine0", tmp_path / "machine1"]
    for folder in folders:
        folder.mkdir()
    finished = by_hand([([*TRAIN, *where(images, "out")], folder) for folder in folders], free_port())
    refused(finished, f"output_path: {folders[1] / 'out'}", "is not the folder that process 0", "all machines share")
    assert list((folders[0] / "out").iterdir()) == []
    assert not (folders[1] / "out").exists()


@pytest.mark.slow
def test_other_images_on_another_machine(tmp_path: Path) -> None:
    folders = [tmp_path / "machine0", tmp_path / "machine1"]
    for folder, each in zip(folders, (2, 3), strict=True):
        write_images(folder / "data" / "train", 2, each, seed=0)
        write_images(folder / "data" / "val", 2, 1, seed=0)
    start = [*TRAIN, "--dataloader.imagenet_path", "data", "--output_path", str(tmp_path / "out")]
    refused(
        by_hand([(start, folder) for folder in folders], free_port()),
        "the list of images in",
        "not the same on all processes",
    )


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_not_overwritten_by_several(images: Path, tmp_path: Path) -> None:
    need("torchrun")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.txt").write_text("precious")
    refused(launch("torchrun", [*TRAIN, *where(images, tmp_path / "out")]), "already holds a run", "--overwrite True")
    assert (tmp_path / "out" / "results.txt").read_text() == "precious"
