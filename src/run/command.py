"""A command line around a job: help, settings, and errors as a person wants to read them."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..common import output
from ..common.errors import LostContactError, RunError, SettingsError, UserError
from ..common.log import lines_of, log
from ..engines import launch
from ..settings import Settings, from_command_line, help_text, ineffective, load
from .inputs import check_inputs
from .said import or_that_it_was_said
from .signals import Terminated

INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141
SAME_ERROR_SECONDS = 3.0
"""How long a process other than the first keeps an error back: if all of them have it, the first one's message ends the
run."""
LOST_CONTACT_SECONDS = 10.0
"""The same for the loss of another process, which has a message of its own."""


def run(
    job: Callable[[Settings], int],
    *,
    prog: str,
    purpose: str,
    default_config: str,
    argv: list[str] | None = None,
    kind: str | None = None,
    task: str | None = None,
) -> int:
    """Load the settings that the command line asks for and run `job` with them.

    Args:
        job: does the work and returns the exit status.
        prog: how the command is started, for the help.
        purpose: what it does, in a sentence, for the help.
        default_config: settings file that is read without `--config`.
        argv: arguments without the program's name; None: those of this process.
        kind, task: what sort of job it is (`train`, `evaluate`, `compress`), and on what (`classification`,
            `detection`): its help lists what such a job reads, and its files and folders are looked for before it
            starts. None: a job that needs none, or that is on anything.

    Returns:
        The exit status: the job's own, 0 after the help, a `UserError`'s status after its message, 130 after Ctrl-C,
            143 after SIGTERM where the job handles it, 141 when the reader of the output went away, 1 when the output
            could not be written. Any other exception is a defect and propagates.
    """

    def whole() -> int:
        arguments = sys.argv[1:] if argv is None else argv
        if "-h" in arguments or "--help" in arguments:
            output.out(help_text(prog, default_config, purpose, kind, task))
            return 0
        config, overrides = split_config(arguments, default_config)
        settings = load(config, overrides)
        for warning in ineffective(settings, kind, task):
            log.warning("%s", warning)
        if kind is not None:
            check_inputs(settings, kind, task)
        return job(settings)

    return guarded(whole)


def guarded(job: Callable[[], int]) -> int:
    """Run `job`; errors for people become one message, warnings and notes lines of the log.

    Standard output that cannot be written ends nothing: the job goes on and keeps what it keeps in files, and the
    status tells afterwards.

    Returns:
        As `run`.
    """
    output.keep_standard_files_open()
    status = _status(job)
    lost = output.loss()
    if lost is None:
        return status
    if isinstance(lost, BrokenPipeError):
        return status or BROKEN_PIPE
    reason = lost.strerror or str(lost)
    output.err(f"error: standard output cannot be written: {reason}; what went into files is complete\n")
    return status or RunError.status


def _status(job: Callable[[], int]) -> int:
    try:
        with lines_of(lambda: launch.here().is_main), _quiet_threads():
            return job()
    except UserError as error:
        output.err(f"error: {_whose(error)}{or_that_it_was_said(str(error))}\n")
        return error.status
    except KeyboardInterrupt as interrupt:
        if launch.here().is_main:
            output.err(": ".join(["interrupted", *filter(None, [str(interrupt)])]) + "\n")
        return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED
    except BrokenPipeError as error:  # a library that prints
        output.failed(error)
        return BROKEN_PIPE


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """No traceback for a full disk that TensorBoard's own thread meets: it reaches the main thread as an error too."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _whose(error: UserError) -> str:
    """Which of several processes an error comes from; waits where another process may be about to say it better."""
    try:
        here = launch.here()
    except UserError:  # the error may be this very one
        return ""
    if here.world_size == 1:
        return ""
    if isinstance(error, LostContactError):
        time.sleep(LOST_CONTACT_SECONDS)
    elif not here.is_main:
        time.sleep(SAME_ERROR_SECONDS)
    return f"process {here.rank} of {here.world_size}: "


def program(package: str | None, entry: str) -> str:
    """How the command of the module `entry` was started, for its help: by a name of its own, or as one of the package's
    commands."""
    started = Path(sys.argv[0]).name
    if started == "pqf":
        return f"pqf {entry.replace('_', '-')}"
    if started == "__main__.py":
        return f"python -m {package} {entry.replace('_', '-')}"
    return f"python -m {package}.{entry}"


def positive(text: str) -> int:
    """A whole number of at least 1 from a command line.

    Raises:
        ValueError: it is none.
    """
    number = int(text)
    if not 1 <= number <= 1 << 16:
        raise ValueError
    return number


def split_settings(arguments: Sequence[str], plain: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The arguments of a command that has flags of its own, and those that set keys of the settings: their names have
    dots, or are among `plain`."""
    others: list[str] = []
    keys: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if not name.startswith("--") or ("." not in name and name[2:] not in plain):
            others.append(argument)
            continue
        keys.append(argument)
        if not equals:
            keys += [value for value in [next(rest, None)] if value is not None]
    return others, keys


def settings_of(overrides: Sequence[str], read: Sequence[str], unread: Sequence[str] = ()) -> Settings:
    """The settings that a command without a settings file is given.

    Args:
        overrides: as on the command line.
        read: the keys that it reads; with a dot at the end: sections.
        unread: keys in such sections that it does not read.

    Raises:
        SettingsError: a key or value is wrong, or the command does not read it.
    """
    settings = from_command_line(overrides)
    for dotted in sorted(".".join(path) for path in settings.command_line):
        known = any(dotted == key or (key.endswith(".") and f"{dotted}.".startswith(key)) for key in read)
        if not known or dotted in unread:
            raise SettingsError(
                f"command line: {dotted} is not read by this command; of the settings it reads "
                f"{', '.join(f'{key}*' if key.endswith('.') else key for key in read)}"
            )
    return settings


def split_config(arguments: list[str], default_config: str) -> tuple[str, list[str]]:
    """The settings file that `--config` names (the last one counts), and the other arguments.

    Raises:
        SettingsError: `--config` has no value.
    """
    config, others, rest = default_config, [], iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag != "--config":
            others.append(argument)
            continue
        config = value if equals else next(rest, "")
        if not config or config.startswith("--"):
            raise SettingsError("command line: --config has no value; write --config FILE")
    return config, others
