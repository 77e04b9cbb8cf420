"""Where files are looked for, and how they are written."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import RunError, SettingsError

PACKAGE = Path(__file__).resolve().parent.parent
BINARY_TEMPORARY_SUFFIX = ".part"
HALF_WRITTEN = f".*{BINARY_TEMPORARY_SUFFIX}"
SHOWN = 100
"""Bytes of a name that temporary names and messages repeat: names may have 255, on some file systems 143."""


def candidates(path: str | Path) -> list[Path]:
    """Absolute places a relative path may mean: from the current folder, then from the package's own folder (`src/`).

    An installed package carries `config/` and `compressed_models/` inside itself, so that `../config/x.yaml` works
    there too.
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        return [path]
    bases = [Path.cwd(), PACKAGE]
    if (PACKAGE / "config").is_dir():
        bases.append(PACKAGE / "bundled")  # bundled/../config is the config folder inside the package
    found: list[Path] = []
    for base in bases:
        place = Path(os.path.normpath(base / path))
        if place not in found:
            found.append(place)
    return found


def find(path: str | Path, what: str, advice: str = "") -> Path:
    """The first existing candidate of `path`.

    Raises:
        SettingsError: nothing exists at any candidate; the message lists every absolute path tried.
    """
    tried = candidates(path)
    for place in tried:
        if _exists(place):
            return place
    listing = "\n".join(f"  tried {place}" for place in tried)
    raise SettingsError(f"{what}: {path} does not exist.\n{listing}" + (f"\n  {advice}" if advice else ""))


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a zero byte
        return False


def check_name(path: Path) -> None:
    """Check that a file or folder can be called so, whether it is there or not.

    Raises:
        SettingsError: the name is too long, or holds what no name can hold.
    """
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if _exists(folder))
        below = path.absolute().parts[len(there.absolute().parts) :]
        for part in below:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                os.lstat(there / part)
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.lstat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        name = ascii(str(path))[1:-1]
        shown = name if len(name) <= SHOWN else f"{name[: SHOWN // 2]}...{name[-SHOWN // 2 :]}"
        raise SettingsError(f"no file can be called {shown}: {reason}. Choose another name.") from error


def temporary_name(name: str) -> str:
    """A name for the file that becomes `name`, hidden, found by `remove_half_written`, and never too long itself."""
    start = os.fsencode(name)[:SHOWN].decode("utf-8", "ignore")
    return f".{start}.{secrets.token_hex(4)}{BINARY_TEMPORARY_SUFFIX}"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    A reader sees the old file or the new one, never a half of either; on any failure the old file stays and the
    temporary one is removed.

    Raises:
        SettingsError: no file can be called so.
        RunError: the disk is full or the folder cannot be written; the message says what was kept.
    """
    check_name(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / temporary_name(path.name)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        temporary = None
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its zip writer
        reason = _disk_reason(error, path)
        kept = f"the previous {path.name} is unchanged" if _exists(path) else "nothing was left behind"
        raise RunError(
            f"cannot write {path}: {reason}; {kept}. Free some space or choose another output_path."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder beside `path`, flush it to the disk, then rename it to `path`.

    A reader never sees a half. A folder that is there is moved aside, with the two names changing one after the other,
    and removed; on any failure it stays, and the new one is removed.

    Raises:
        SettingsError: no folder can be called so.
        RunError: the disk is full or the folder cannot be written; the message says what was kept.
    """
    check_name(path)
    temporary = path.parent / temporary_name(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write(temporary)
        for entry in temporary.rglob("*"):
            if entry.is_file():
                with open(entry, "rb") as written:
                    os.fsync(written.fileno())
        _exchange(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = _disk_reason(error, path)
        kept = f"the previous {path.name} is unchanged" if _exists(path) else "nothing was left behind"
        raise RunError(f"cannot write {path}: {reason}; {kept}. Free some space or choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`; what was there is removed."""
    if not _exists(path):
        os.rename(new, path)
        return
    old = path.parent / temporary_name(path.name)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def remove_half_written(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`, files and folders."""
    for stray in folder.glob(HALF_WRITTEN):
        if stray.is_dir() and not stray.is_symlink():
            shutil.rmtree(stray, ignore_errors=True)
        else:
            stray.unlink(missing_ok=True)


def holds_something(path: Path) -> bool:
    """Whether there is a file at `path`, or a folder with more in it than writers that were killed left; a folder that
    nobody may look into counts as one."""
    if not path.is_dir():
        return path.exists()
    try:
        names = os.listdir(path)
    except OSError:
        return True
    return any(not fnmatchcase(name, HALF_WRITTEN) for name in names)


def _disk_reason(error: Exception, path: Path) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the disk"
    if isinstance(error, RuntimeError | shutil.Error):  # which hold an errno in their text only
        try:
            status = os.statvfs(path.parent)
            if status.f_bavail * status.f_frsize < 1 << 20:
                return "no space left on the disk"
        except OSError:
            pass
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
