"""Build Horovod from its source release for the installed torch, keep the wheel in a cache folder, and install it.

    python -m tools.build_horovod               # build (or take from the cache) and install here
    python -m tools.build_horovod --wheel-only  # the same without installing; prints the wheel's path

There are no wheels of Horovod on PyPI, and its last release asks for an older C++ than torch's headers: the source is
patched as `PATCHES` says. pip's own settings (index, certificates, proxies) are honoured. A build for GPUs is asked for
with Horovod's variables, `HOROVOD_GPU_OPERATIONS=NCCL` for one, and needs the CUDA toolkit; MPI with
`HOROVOD_WITH_MPI=1`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from src.engines.machine import available_processors

VERSION = "0.28.1"
BUILD_REQUIREMENTS = ("setuptools<81", "wheel", "packaging", "psutil", "cloudpickle", "pyyaml", "cffi", "numpy")
"""setuptools 81 has no pkg_resources any more, which Horovod's setup reads; the others are imported while it builds."""

DEFAULTS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITHOUT_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
}
NEEDS = """This build needs, beside Python with torch installed:
  - a C++20 compiler with OpenMP (GCC 10 or later): apt-get install g++
  - CMake 3.13 or later and make: apt-get install cmake make
  - Python's headers (Python.h): apt-get install python3-dev
  - PyPI, or pip set up for a mirror of it
  - about 7 minutes of one processor, 2 GB of memory, 1 GB of disk"""


class BuildError(Exception):
    """The build cannot be done here; the message says why."""


@dataclass(frozen=True)
class Patch:
    """In `file` of the source release, replace `old` by `new`."""

    file: str
    old: str
    new: str


STANDARD = ("set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)")
PATCHES = (  # torch's headers are C++20; CXXFLAGS have no effect, as CMake puts its own standard after them
    Patch("CMakeLists.txt", *STANDARD),
    Patch("horovod/torch/CMakeLists.txt", *STANDARD),
)
CPU_PATCH = Patch(  # else a torch with CUDA asks for the CUDA toolkit, which a build for CPUs has no use for
    "cmake/Modules/FindPytorch.cmake", "(torch.version.cuda is not None)", "False"
)


def for_gpu(environment: dict[str, str]) -> bool:
    """True where Horovod's own variables ask for GPU operations."""
    return any(value for name, value in environment.items() if name == "HOROVOD_GPU" or name.startswith("HOROVOD_GPU_"))


def options(environment: dict[str, str]) -> dict[str, str]:
    """Horovod's build variables: those of `environment`, and `DEFAULTS` where it does not say the opposite."""
    given = {name: value for name, value in environment.items() if name.startswith("HOROVOD_") and value}
    defaults = dict(DEFAULTS)
    if "HOROVOD_WITH_MPI" in given:
        del defaults["HOROVOD_WITHOUT_MPI"]
    return {**defaults, **given}


def processor() -> str:
    """The processor's model and features: the wheel may hold instructions that another processor lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip() in wanted}))


def key(torch_version: str, environment: dict[str, str]) -> str:
    """Name of the cache folder: readable versions, and a hash of everything a build depends on."""
    recipe = repr((PATCHES, CPU_PATCH, BUILD_REQUIREMENTS, sorted(options(environment).items())))
    libc = "-".join(platform.libc_ver())
    parts = [VERSION, sys.version, torch_version, platform.machine(), libc, processor(), recipe]
    digest = hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:12]
    python = f"{sys.implementation.name}{sys.version_info[0]}{sys.version_info[1]}"
    return f"horovod-{VERSION}-torch-{torch_version}-{python}-{digest}"


def cache_folder() -> Path:
    """Where wheels are kept: `$XDG_CACHE_HOME/pqf/wheels`, else `~/.cache/pqf/wheels`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pqf" / "wheels"


def check_tools(environment: dict[str, str]) -> None:
    """Raise `BuildError` naming every tool that is missing, before anything is downloaded."""
    missing = []
    if not shutil.which(environment.get("HOROVOD_CMAKE", "cmake")):
        missing.append("cmake")
    if not shutil.which(environment.get("CXX", "g++")):
        missing.append(environment.get("CXX", "g++"))
    if not shutil.which("make"):
        missing.append("make")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append("Python.h")
    if for_gpu(environment) and not (shutil.which("nvcc") or environment.get("CUDA_HOME")):
        missing.append("nvcc (CUDA toolkit), as HOROVOD_GPU... asks for a build for GPUs")
    if missing:
        raise BuildError(f"missing here: {', '.join(missing)}")


def build(folder: Path, environment: dict[str, str]) -> Path:
    """Download, patch and build into `folder`; returns the wheel."""
    with tempfile.TemporaryDirectory(prefix="pqf-horovod-") as name:
        work = Path(name)
        python = make_environment(work / "venv")
        run([python, "-m", "pip", "install", "--quiet", *BUILD_REQUIREMENTS], environment)
        download = [
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--dest",
            str(work),
        ]
        run([python, "-m", "pip", *download, f"horovod=={VERSION}"], environment)
        source = unpack(work / f"horovod-{VERSION}.tar.gz", work / "source")
        for patch in PATCHES if for_gpu(environment) else (*PATCHES, CPU_PATCH):
            apply(source, patch)
        # CMake 4 refuses the old policies of Horovod's third-party folders
        settings = {
            "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
            "MAKEFLAGS": f"-j{available_processors()}",
            **environment,
            **options(environment),
        }
        settings["PATH"] = os.pathsep.join([str(Path(python).parent), environment.get("PATH", "")])
        wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work / "wheel"), str(source)]
        run([python, "-m", "pip", *wheel], settings, log=folder / "build.log")
        (built,) = (work / "wheel").glob("horovod-*.whl")
        part = folder / (built.name + ".part")
        shutil.copyfile(built, part)
        return part.rename(folder / built.name)


def make_environment(folder: Path) -> str:
    """A virtual environment that also sees this Python's packages (torch), behind its own; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    place = subprocess.run([str(python), "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(place, "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
    return str(python)


def unpack(archive: Path, folder: Path) -> Path:
    """The source release's folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"horovod-{VERSION}"


def apply(source: Path, patch: Patch) -> None:
    """Raises `BuildError` where the text to replace is not there (another release than the one this was written
    for)."""
    path = source / patch.file
    text = path.read_text(encoding="utf-8")
    if patch.old not in text:
        raise BuildError(
            f"{patch.file} of Horovod {VERSION} does not contain {patch.old!r}: the source is not the expected release"
        )
    path.write_text(text.replace(patch.old, patch.new), encoding="utf-8")


def run(command: list[str], environment: dict[str, str], log: Path | None = None) -> None:
    """Run a command, its output into `log`; on failure raise `BuildError` with the lines that matter of what it
    printed."""
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if log is not None:
        log.write_text(done.stdout, encoding="utf-8")
    if done.returncode != 0:
        lines = done.stdout.splitlines()
        errors = [line.strip() for line in lines if re.search(r"error|could not", line, re.IGNORECASE)][:12]
        more = [f"all of its output: {log}"] if log is not None else []
        raise BuildError(
            "\n".join([f"`{' '.join(command)}` failed ({done.returncode}):", *errors, "...", *lines[-5:], *more])
        )


def cached_wheel(environment: dict[str, str], say: bool = True) -> Path:
    """The wheel for this Python, torch and processor, built unless the cache has it."""
    try:
        torch_version = metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise BuildError(f"torch is not installed for {sys.executable}: install requirements.txt first") from error
    folder = cache_folder() / key(torch_version, environment)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once: the second waits and finds the wheel
        wheels = list(folder.glob("horovod-*.whl"))
        if not wheels:
            check_tools(environment)
            if say:
                print(
                    f"building Horovod {VERSION} for torch {torch_version} (minutes; kept in {folder})",
                    file=sys.stderr,
                    flush=True,
                )
            wheels = [build(folder, environment)]
    return wheels[0]


def is_cached(environment: dict[str, str]) -> bool:
    """Whether the wheel for this Python, torch and processor was built before."""
    try:
        folder = cache_folder() / key(metadata.version("torch"), environment)
    except metadata.PackageNotFoundError:
        return False
    return any(folder.glob("horovod-*.whl"))


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.build_horovod", description=__doc__.split("\n")[0], epilog=NEEDS
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--wheel-only", action="store_true", help="build and print the wheel's path, but do not install it"
    )
    parser.add_argument(
        "--if-cached",
        action="store_true",
        help="install a wheel that was built before; build none, which takes minutes",
    )
    arguments = parser.parse_args(argv)
    environment = dict(os.environ)
    try:
        if arguments.if_cached and not is_cached(environment):
            print("Horovod was not built here: its tests are skipped. To build it: make horovod (minutes, once)")
            return 0
        wheel = cached_wheel(environment)
        if arguments.wheel_only:
            print(wheel)
            return 0
        run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)],
            environment,
        )
        run(
            [sys.executable, "-m", "pip", "install", "--quiet", str(wheel)], environment
        )  # what it depends on, where missing
        check = (
            "import horovod.torch as h; h.init(); assert h.size() == 1 and h.gloo_built(), 'Horovod without Gloo'; "
            "h.shutdown()"
        )
        run(
            [sys.executable, "-c", check],
            {**environment, "HOROVOD_CONTROLLER": "gloo"} if not for_gpu(environment) else environment,
        )
    except BuildError as error:
        print(f"error: Horovod {VERSION} could not be built or installed.\n{error}\n\n{NEEDS}", file=sys.stderr)
        return 1
    print(f"Horovod {VERSION} is installed, from {wheel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
