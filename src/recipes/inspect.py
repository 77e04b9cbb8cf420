"""Shows what a model file holds: text for the terminal and a page with figures."""

from __future__ import annotations

from pathlib import Path

from ..common.errors import SettingsError
from ..common.hub import find_model
from ..common.log import log
from ..common.paths import write_text
from ..model_files.inspected import lines
from ..model_files.inspection import examine
from ..model_files.inspection_page import page


def inspect(
    source: str,
    *,
    against: str | None = None,
    html: str | None = None,
    arch: str | None = None,
) -> int:
    """Print what a model file holds.

    Args:
        source: `.pth` or `.safetensors`: published, packed or dense.
        against: the dense network it came from; adds the signal-to-quantization-noise ratio of every quantized layer.
        html: also write a page with figures there.
        arch: name of the architecture, where the file does not tell.

    Returns:
        The exit status.

    Raises:
        SettingsError: a file is not there, or `html` does not end in .html.
        CheckpointError: a file cannot be read, or the two networks differ.
        RunError: the page cannot be written.
    """
    path = find_model(source, "the model to inspect")
    dense = find_model(against, "--against") if against is not None else None
    if html is not None and Path(html).suffix not in (".html", ".htm"):
        raise SettingsError(f"--html {html}: expected a name that ends in .html")
    found = examine(path, dense, arch)
    if html is not None:
        write_text(Path(html).expanduser(), page(found))
    for line in lines(found):
        log.info("%s", line)
    if html is not None:
        log.info("page with figures: %s", html)
    return 0
