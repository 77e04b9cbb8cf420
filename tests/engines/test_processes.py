"""Two real processes under each engine: exchanges, laws of a run, the commands, and how a failure ends.

One launch shows several laws, as starting takes most of the time.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from src import evaluate_resnet, train_resnet
from src.engines.launch import Launch
from src.engines.single import SingleProcess
from src.model_files.pth import read_tensors
from src.settings import load
from tests.conftest import write_images
from tests.support import small_runs
from tests.support.coco import small_coco
from tests.support.helpers import quantized, spec
from tests.support.launching import ENGINES, Finished, by_hand, free_port, launch
from tests.support.worker import detection, exchanges, gradients, side_by_side, taught, whole_run
from tests.tasks.test_detection import network as detector
from tests.test_entries import scalars

pytestmark = [pytest.mark.timeout(1800), pytest.mark.usefixtures("one_thread")]

SMALL = [
    *small_runs.training(batch=8, workers=0, sls=50, k_means=2),
    *("--optimizer", "sgd", "--epochs", "1", "--log_every_n_steps", "1", "--sync_batch_norm", "True"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes, 24 training and 15 validation images: an odd number, so that one process validates one more than the
    other."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 3, 8, seed=0)
    write_images(root / "val", 3, 5, seed=1)
    return root


# --- laws, each under both engines ---


@pytest.fixture(scope="module", params=ENGINES)
def found(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two processes found, with a batch of 4 each."""
    folder = tmp_path_factory.mktemp("found")
    finished = launch(request.param, ["-m", "tests.support.worker", "laws", str(folder), str(images)])
    assert finished.status == 0, finished.text
    assert finished.left == 0
    return torch.load(folder / "found.pth")


@pytest.fixture(scope="module")
def alone(images: Path) -> dict:
    """The same by one process, with a batch of 8."""
    return whole_run(SingleProcess(Launch(), torch.device("cpu")), images, 8, "joint")


def test_exchanges(found: dict) -> None:
    one = exchanges(SingleProcess(Launch(), torch.device("cpu")))["sums"]
    for rank, result in enumerate(found["exchanges"]):
        for name, (dtype, total, unchanged) in result["sums"].items():
            own = one[name][1]
            assert (dtype, total, unchanged) == (
                f"torch.{name}",
                [[3 * value for value in row] for row in own],
                True,
            ), (rank, name)
        assert result["rows"] == [{"rank": 1, "box": [1.1, 1e-300], "text": "ä\n\udcff"}] * 3
        assert result["sent"] == [
            [[1, 4], [2, 5], [3, 6]],
            True,
            2.5,
            [[8.25, 8.25], [8.25, 8.25]],
        ]  # those of process 1
        assert result["plan"] == [[4, 16, 8, 100], [1, 2, 16, 5]]  # that of process 0
        assert result["scalar"] == 5.0


def test_parameters_and_statistics_are_equal_on_all_ranks_after_every_epoch(found: dict) -> None:
    for norms in ("joint", "plain"):
        first, second = found[norms]["digests"]
        assert first == second
        assert len(set(first.values())) == 3  # before training and after two epochs


def test_permutations_codes_and_codebooks_are_those_of_one_process(found: dict, alone: dict) -> None:
    joint = found["joint"]
    assert joint["groups"] == alone["groups"]
    assert any(permutation is not None for *_, permutation in joint["groups"])
    assert joint["layers"] == alone["layers"]
    assert joint["quantized"].keys() == alone["quantized"].keys()
    assert all(torch.equal(joint["quantized"][name], tensor) for name, tensor in alone["quantized"].items())
    assert joint["tied"]
    assert alone["tied"]


def test_groups_that_follow_each_other_are_searched_as_by_one_process(found: dict) -> None:
    alone = side_by_side(SingleProcess(Launch(), torch.device("cpu")))
    assert found["side by side"] == [alone, alone]
    assert sum(row[3] is not None for row in alone[1:]) == 8


def test_losses_and_codebooks_agree_with_one_process_and_the_joint_batch(found: dict, alone: dict) -> None:
    joint = found["joint"]
    assert joint["losses"].keys() == alone["losses"].keys()
    assert len(joint["losses"]) == 6
    assert joint["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(joint["state"][name], tensor, rtol=1e-5, atol=1e-5)
        moved = (tensor.double() - alone["quantized"][name].double()).norm()
        if name.endswith("codebook"):
            assert moved > 1e-3  # else the comparison would say nothing
    assert joint["rates"] == alone["rates"]


def test_learning_from_a_teacher_with_all_tools_agrees_with_one_process(found: dict, images: Path) -> None:
    together, alone = found["taught"], taught(SingleProcess(Launch(), torch.device("cpu")), images, 8, 4)
    first, second = together["digests"]
    assert first == second
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert together["rates"] == alone["rates"]
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(together["state"][name], tensor, rtol=1e-4, atol=1e-4)


def test_every_validation_image_counts_once(found: dict, alone: dict) -> None:
    for epoch, metrics in alone["metrics"].items():
        assert found["joint"]["metrics"][epoch]["images"] == metrics["images"] == 15
        assert found["joint"]["metrics"][epoch] == pytest.approx(metrics, rel=1e-5)


def test_a_process_without_a_validation_image_takes_part(found: dict) -> None:
    first, second = found["one image"]
    assert first == second
    assert first["images"] == 1


def test_gradients_are_averaged_and_no_more_than_the_trained_parameters_is_sent(found: dict) -> None:
    first, second = found["gradients"]
    assert first == second
    one = gradients(SingleProcess(Launch(), torch.device("cpu")), both=True)
    for name, wanted in one["gradients"].items():
        if wanted is None:
            assert first["gradients"][name] is None
        else:
            torch.testing.assert_close(torch.tensor(first["gradients"][name]), torch.tensor(wanted))
    assert first["bias"] == one["bias"]
    assert first["sent"] == one["trained"] > 0


def test_a_layer_that_one_process_does_not_reach_counts_as_zero_there(found: dict) -> None:
    for rows in found["not reached"]:  # Horovod only
        assert rows == [
            ["torch.float32", [[1.0, 1.0]]],
            ["torch.float32", [1.0]],
            ["torch.bfloat16", [[1.5, 1.5]]],
            ["torch.bfloat16", [1.5]],
        ]


def test_the_optimizer_state_becomes_that_of_the_first_process(found: dict) -> None:
    first, second = found["optimizer"]
    assert first["before"] != second["before"]
    assert first["after"] == second["after"] == first["before"]
    assert {name for name, _ in first["after"]} == {"exp_avg", "exp_avg_sq", "step"}
    for one in (first, second):
        assert one["same"]  # so that its state dict does not tell the engine
        assert one["untouched"]


def test_two_processes_detect_what_one_does_and_each_image_counts_once(found: dict, tmp_path: Path) -> None:
    together, one = found["detection"], SingleProcess(Launch(), torch.device("cpu"))
    coco = small_coco(tmp_path)
    model, task = quantized(detector(), spec(16, iterations=2)), detection(one, coco)
    rows, image_ids = task.detect(model, "before")
    assert together["before"] == (rows, image_ids)
    assert image_ids == [1, 2, 3]
    assert len(rows) > 10
    assert together["metrics"][0] == task.validate(model, "before")
    model.load_state_dict(together["state"])
    assert together["after"] == task.detect(model, "after") != (rows, image_ids)
    assert together["metrics"][2] == task.validate(model, "after")


def test_detection_trains_alike_on_all_ranks_each_with_images_of_its_own(found: dict) -> None:
    together = found["detection"]
    first, second = together["digests"]
    assert first == second
    assert len(set(first.values())) == 3  # before training and after two epochs
    assert [len(images) for images in together["seen"]] == [2, 2]
    assert sorted(image_id for images in together["seen"] for image_id in images) == [1, 2, 3, 4]
    assert list(together["losses"]) == [1, 2, 3, 4]


def test_a_process_without_objects_and_proposals_takes_part(found: dict) -> None:
    assert found["nothing here"] == [[True, True, True], [True, True, False]]


# --- the commands ---


@pytest.fixture(scope="module")
def run_alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, batches of 8, at twice the learning rate."""
    output = tmp_path_factory.mktemp("alone") / "run"
    flags = ["--dataloader.batch_size", "8", "--learning_rate", "2e-4", "--lr_scheduler.min_lr", "2e-5"]
    assert (
        train_resnet.main([*SMALL, *flags, "--dataloader.imagenet_path", str(images), "--output_path", str(output)])
        == 0
    )
    return output


@pytest.fixture(scope="module", params=["torchrun", pytest.param("horovod", marks=pytest.mark.slow)])
def launched(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Finished]:
    """The command in two processes, batches of 4 each."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    flags = ["--dataloader.batch_size", "4", "--learning_rate", "1e-4", "--lr_scheduler.min_lr", "1e-5"]
    where = ["--dataloader.imagenet_path", str(images), "--output_path", str(output)]
    finished = launch(request.param, ["-m", "src.train_resnet", *SMALL, *flags, *where])
    assert finished.status == 0, finished.text
    assert finished.left == 0
    return request.param, output, finished


def test_a_launched_run_is_that_of_one_process_at_the_scaled_learning_rate(
    launched: tuple[str, Path, Finished], run_alone: Path
) -> None:
    _, output, _ = launched
    together, single = (scalars(place) for place in (output, run_alone))
    assert together.keys() == single.keys()
    for tag in ("Train/learning_rate", "Train/loss", "Train/accuracy", "Validation/loss", "Validation/accuracy"):
        assert [step for step, _ in together[tag]] == [step for step, _ in single[tag]]
        assert [value for _, value in together[tag]] == pytest.approx([value for _, value in single[tag]], rel=1e-4), (
            tag
        )
    first, second = (read_tensors(place / "trained_models" / "0.pth") for place in (output, run_alone))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert (output / "compression.json").read_text() == (run_alone / "compression.json").read_text()


def test_only_the_first_process_writes_and_prints(launched: tuple[str, Path, Finished], run_alone: Path) -> None:
    engine, output, finished = launched
    names = [
        {str(path.relative_to(place)) for path in place.rglob("*") if "events" not in path.name}
        for place in (output, run_alone)
    ]
    assert names[0] - names[1] == ({".launch"} if engine == "torchrun" else set())  # for processes that it restarts
    assert names[1] <= names[0]
    assert len(list((output / "tensorboard").iterdir())) == 1
    for line in (
        "permute: ",
        "quantize: ",
        "epoch 1: ",
        "results in ",
        "2 processes: learning_rate 0.0002, min_lr 2e-05",
    ):
        assert finished.out.count(line) == 1, finished.text
    assert load(str(output / "config.yaml")).learning_rate == 1e-4


def test_a_launched_evaluation_gives_the_figures_of_one_process(
    launched: tuple[str, Path, Finished], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, output, _ = launched
    best = str(output / "trained_models" / "best.pth")
    flags = [
        "--dataloader.imagenet_path",
        str(images),
        "--model.state_dict_compressed",
        best,
        "--device",
        "cpu",
        "--dataloader.batch_size",
        "4",
    ]
    flags += ["--dataloader.resize", "32", "--dataloader.image_size", "32", "--dataloader.num_workers", "0"]
    finished = launch(engine, ["-m", "src.evaluate_resnet", *flags, "--engine", engine])
    assert finished.status == 0, finished.text
    assert evaluate_resnet.main(flags) == 0
    printed = re.sub(r"\[0\]<stdout>:", "", finished.out)
    wanted = [line for line in capsys.readouterr().out.splitlines() if re.match("top-|size|cross", line)]
    assert len(wanted) == 4
    assert "of 15)" in wanted[1]
    for line in wanted:
        assert printed.count(line) == 1, printed
    history = json.loads((output / "results.json").read_text())["history"]
    assert f"{max(metrics['accuracy'] for metrics in history.values()):.2f} %" in wanted[1]


# --- how a failure ends ---


@pytest.mark.parametrize("engine", ["torchrun", pytest.param("horovod", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("user", "error: process 1 of 2: out of luck on purpose"),
        pytest.param("defect", "ZeroDivisionError: a defect on purpose", marks=pytest.mark.slow),
        pytest.param("killed", "", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_ends_the_whole_job_with_its_message(engine: str, how: str, words: str) -> None:
    finished = launch(engine, ["-m", "tests.support.worker", how])
    assert finished.status != 0
    assert words in finished.text
    assert "process 0 of 2" not in finished.text
    assert finished.seconds < 60
    assert finished.left == 0


@pytest.mark.slow
def test_without_a_launcher_the_others_notice_too(tmp_path: Path) -> None:
    finished = by_hand([(["-m", "tests.support.worker", "user"], tmp_path)] * 2, free_port())
    assert finished.status == 1
    assert "process 1 of 2: out of luck on purpose" in finished.err
    assert "process 0 of 2: another process of this run has ended" in finished.err
    assert "Traceback" not in finished.err
    assert finished.seconds < 60
    assert finished.left == 0
