"""What a command prints and with which status it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from src.common.errors import DataError, RunError
from src.run import command
from src.settings import Settings
from tests.conftest import ROOT


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("epochs: 4\n")
    return path


def run(job: command.Callable[[Settings], int], default: Path, *argv: str) -> int:
    return command.run(
        job, prog="python -m src.job", purpose="Does a job.", default_config=str(default), argv=list(argv)
    )


def raising(error: BaseException) -> command.Callable[[Settings], int]:
    def job(settings: Settings) -> int:  # noqa: ARG001 (of a protocol)
        raise error

    return job


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_printed_and_nothing_runs(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(AssertionError()), Path("none.yaml"), "--epochs", "1", flag) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: python -m src.job")
    assert "Does a job." in out
    assert err == ""


def test_config_and_overrides_reach_the_job_and_its_status_comes_back(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("epochs: 7\n")
    seen: list[tuple[int, int]] = []

    def job(settings: Settings) -> int:
        seen.append((settings.epochs, settings.seed))
        return 3

    assert run(job, file) == 3
    assert run(job, file, "--seed", "5", "--config", str(other)) == 3
    assert run(job, file, f"--config={other}", "--seed=5", "--epochs=1") == 3
    assert seen == [(4, 0), (7, 5), (1, 5)]


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--config", "--seed=1"]])
def test_config_without_a_value_is_an_error(argv: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(AssertionError()), file, *argv) == 2
    assert "error: command line: --config has no value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [(DataError("no images"), 2), (RunError("disk full"), 1), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141)],
)
def test_errors_for_people_have_a_status_and_no_traceback(
    error: BaseException, status: int, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_silence_output", lambda: None)  # would point the test run's own output at nothing
    assert run(raising(error), file) == status
    expected = {130: "interrupted\n", 141: ""}.get(status, f"error: {error}\n")
    assert capsys.readouterr().err == expected


def test_defects_keep_their_traceback(file: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), file)


def test_bad_settings_and_keys_without_effect_are_reported(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(AssertionError()), file, "--epoch", "2") == 2
    assert capsys.readouterr().err == "error: command line: epoch = 2: unknown key; did you mean epochs?\n"
    assert run(lambda _settings: 0, file, "--momentum", "0.5") == 0
    assert capsys.readouterr().out == "warning: momentum has no effect: only optimizer sgd has a momentum\n"


def test_a_reader_that_goes_away_leaves_no_noise() -> None:
    code = (
        "import sys; from src.run.command import run; sys.exit(run(lambda s: 0, prog='p', purpose='q', "
        "default_config='r', argv=['-h']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before a line is written: the process takes longer to start
    noise = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert noise == b""
