"""What a command prints and with which status it leaves."""

from __future__ import annotations

import os
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
    error: BaseException, status: int, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


TELLING = """
import sys
from pathlib import Path
from src.common.log import log
from src.run.command import guarded

def job():
    log.info("{text}" * {times})
    log.warning("{text}")
    Path(sys.argv[1]).write_text("kept")
    log.info("{text}" * {times})
    return {status}

sys.exit(guarded(job))
"""
"""A job that tells something, keeps something, and tells something once more."""


def telling(folder: Path, redirection: str, times: int = 1, status: int = 0, **variables: str) -> tuple[int, str]:
    """Status and standard error of a job that talks, started by a shell; what it keeps is there in any case."""
    kept = folder / "kept.txt"
    kept.unlink(missing_ok=True)
    code = TELLING.format(text="stra\\u00dfe \\u732b", times=times, status=status)
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "$2" {redirection}', sys.executable, code, str(kept)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert kept.read_text() == "kept"
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252:strict"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}],
    ids=str,
)
def test_names_that_the_terminal_cannot_show_end_nothing(variables: dict[str, str], tmp_path: Path) -> None:
    assert telling(tmp_path, "> /dev/null", **variables) == (0, "")


@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-", "2>&-"])
def test_closed_outputs_end_nothing(redirection: str, tmp_path: Path) -> None:
    assert telling(tmp_path, redirection) == (0, "")
    assert telling(tmp_path, redirection, status=3) == (3, "")


def test_a_reader_that_goes_away_ends_nothing_and_shows_in_the_status(tmp_path: Path) -> None:
    assert telling(tmp_path, "| true; exit ${PIPESTATUS[0]}", times=100_000) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_standard_output_ends_nothing_and_is_told_afterwards(tmp_path: Path) -> None:
    status, told = telling(tmp_path, "> /dev/full")
    assert status == 1
    assert (
        told == "error: standard output cannot be written: No space left on device; what went into files is complete\n"
    )
    assert telling(tmp_path, "> /dev/full 2> /dev/full") == (1, "")


def test_a_closed_output_is_no_file_that_a_job_opens(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom src.run.command import guarded\n"
        "def job():\n with open(sys.argv[1], 'w') as file:\n  os.write(1, b'noise of a library')\n return 0\n"
        "sys.exit(guarded(job))"
    )
    target = tmp_path / "model"
    subprocess.run(
        ["bash", "-c", '"$0" -c "$1" "$2" >&-', sys.executable, code, str(target)], cwd=ROOT, check=True, timeout=120
    )
    assert target.read_bytes() == b""
