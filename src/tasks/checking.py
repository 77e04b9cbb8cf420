"""Which images can be used, found out by all processes together: each looks at its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..common.log import log
from ..engines.engine import Engine
from .images import BadFiles, ImageFolderIndex, check_images, some
from .places import describe


def unreadable(engine: Engine, index: ImageFolderIndex, how: str, resize: int) -> BadFiles:
    """The images that cannot be used, in their order, with the reasons.

    Args:
        engine: the processes.
        index: of the images, the same on all processes.
        how: `quick`, `full` or `none`.
        resize: what the short side is brought to.
    """

    def check(share: slice) -> BadFiles:
        own = replace(index, paths=index.paths[share], labels=index.labels[share])
        return check_images(own, how, engine.is_main, resize=resize, part=part_name(engine))

    return check_together(engine, index.paths, check)


def check_together(engine: Engine, paths: Sequence[str], check: Callable[[slice], BadFiles]) -> BadFiles:
    """The unreadable ones of `paths`, in their order, each process looking at its share.

    Args:
        engine: the processes.
        paths: the same on all processes.
        check: finds the unreadable ones in a slice of them.
    """
    bad = dict(engine.gather(check(slice(engine.rank, None, engine.world_size))))
    return [(path, bad[path]) for path in paths if path in bad] if bad else []


def part_name(engine: Engine) -> str:
    """Of the part of the images that this process looks at."""
    return f"{engine.rank}of{engine.world_size}"


def warn_of_skipped(bad: BadFiles, folder: Path | str, is_main: bool) -> None:
    """One line in the log about the files that are left out."""
    if bad and is_main:
        names = some(describe(path) for path, _ in bad)
        log.warning("skipped %s unreadable images of %s: %s", f"{len(bad):,}", folder, names)
