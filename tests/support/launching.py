"""Real launches of several processes on this machine: with a time limit, nothing left behind, and a count of what
was."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.patience import PATIENCE

MARK = "PQF_TEST_LAUNCH"
ENGINES = ("torchrun", "horovod")
SECONDS = PATIENCE
GRACE = 300


@dataclass(frozen=True)
class Finished:
    """A launch that ended: status, what all processes printed, seconds, and processes that were still there two seconds
    later."""

    status: int
    out: str
    err: str
    seconds: float
    left: int

    @property
    def text(self) -> str:
        return self.out + self.err


def need(engine: str) -> None:
    """Skip where an optional engine is not installed."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("launches are watched through /proc, which this system does not have")
    if engine == "horovod" and importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed: make horovod")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without a launcher's variables; one thread each, and talk over the loopback interface."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "OMPI_", "TORCHELASTIC"))
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), **(extra or {})}


def command(engine: str, arguments: Sequence[str], processes: int = 2) -> list[str]:
    """What a user would type for `python ARGUMENTS` under an engine, with this Python."""
    if engine == "torchrun":
        port = str(free_port())
        start = [
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "1",
            "--nproc-per-node",
            str(processes),
            "--master-addr",
            "127.0.0.1",
        ]
        return [sys.executable, *start, "--master-port", port, *arguments]
    launcher = "from horovod.runner.launch import run_commandline; run_commandline()"
    return [
        sys.executable,
        "-c",
        launcher,
        "-np",
        str(processes),
        "--gloo",
        "--network-interfaces",
        "lo",
        sys.executable,
        *arguments,
    ]


def launch(
    engine: str, arguments: Sequence[str], extra: Mapping[str, str] | None = None, seconds: float = SECONDS
) -> Finished:
    """Run `python ARGUMENTS` in two processes under an engine; skips where the engine is not installed."""
    need(engine)
    return together([(command(engine, arguments), {}, ROOT)], extra, seconds)


def by_hand(
    each: Sequence[tuple[Sequence[str], Path]], port: int, extra: Mapping[str, str] | None = None, grace: float = GRACE
) -> Finished:
    """Processes with torchrun's variables but without torchrun, as several machines would start them: (arguments,
    folder) for each."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(each)),
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    starts = [
        ([sys.executable, *arguments], {**shared, "RANK": str(rank)}, folder)
        for rank, (arguments, folder) in enumerate(each)
    ]
    return together(starts, extra, grace=grace)


def together(
    starts: Sequence[tuple[Sequence[str], Mapping[str, str], Path]],
    extra: Mapping[str, str] | None = None,
    seconds: float = SECONDS,
    grace: float = GRACE,
) -> Finished:
    """Start all, wait for all, and kill what is left of them; the status is the highest one.

    Once one has failed, the others get `grace` seconds to end by themselves, as a cluster's scheduler would give them.
    """
    mark = uuid.uuid4().hex
    began = time.monotonic()
    running: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            for arguments, variables, folder in starts:
                env = environment({**(extra or {}), **variables, MARK: mark})
                running.append(
                    subprocess.Popen(
                        list(arguments), cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err
                    )
                )
            deadline, failed = began + seconds, False
            while any(process.poll() is None for process in running) and time.monotonic() < deadline:
                if not failed and any(process.poll() for process in running):
                    failed, deadline = True, min(deadline, time.monotonic() + grace)
                time.sleep(0.05)
            took = time.monotonic() - began
            late = [process for process in running if process.poll() is None]
            if not late:
                await_end = time.monotonic() + 2
                while marked(mark) and time.monotonic() < await_end:
                    time.sleep(0.1)
            left = len(marked(mark))
        finally:
            kill(marked(mark))
            for process in running:
                process.wait()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    assert not late or failed, f"still running after {seconds} s:\n" + "".join(texts)
    return Finished(max(abs(process.returncode) for process in running if process not in late), *texts, took, left)


@dataclass(frozen=True)
class Agent:
    """A torchrun that was started, and what it and its processes print."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def ranks(self) -> dict[int, int]:
        """The numbers of its living processes by rank."""
        found = {}
        for number in marked(self.mark):
            with contextlib.suppress(OSError):  # gone meanwhile
                variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
                found |= {int(text[5:]): number for text in variables if text.startswith(b"RANK=")}
        return found

    def wait_for(self, when: Callable[[], bool]) -> None:
        """Until it comes true, which it must before the agent ends."""
        deadline = time.monotonic() + PATIENCE
        while not when():
            assert self.process.poll() is None, f"ended before:\n{self.text}"
            assert time.monotonic() < deadline, f"took too long:\n{self.text}"
            time.sleep(0.05)

    def vanish(self) -> None:
        """End with everything that it started, at once, as a machine does that loses its power."""
        kill([self.process.pid, *marked(self.mark)])
        kill(marked(self.mark))
        self.process.wait()


@contextlib.contextmanager
def agent(arguments: Sequence[str], log: Path, extra: Mapping[str, str] | None = None) -> Iterator[Agent]:
    """`torchrun ARGUMENTS` of this Python; nothing of it is left afterwards."""
    mark = uuid.uuid4().hex
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            cwd=ROOT, env=environment({**(extra or {}), MARK: mark}), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    started = Agent(process, mark, log)
    try:
        yield started
    finally:
        started.vanish()


def marked(mark: str) -> list[int]:
    """Numbers of the living processes that inherited the mark of a launch, in whatever group or session they are
    (Linux's /proc)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill(numbers: Sequence[int]) -> None:
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
