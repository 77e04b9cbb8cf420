"""Show what a model file holds, layer by layer: python -m src.inspect FILE."""

from __future__ import annotations

import sys

if __name__ == "inspect":
    # Python was started in this folder, or with it on the path: what is wanted is the standard library's module of this
    # name
    import importlib.util
    import sysconfig
    from pathlib import Path

    _spec = importlib.util.spec_from_file_location("inspect", Path(sysconfig.get_path("stdlib")) / "inspect.py")
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["inspect"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["inspect"])
else:
    import argparse

    from .common.callable_module import make_callable
    from .run import command

    make_callable(__name__)


PURPOSE = """Show what a model file (.pth or .safetensors: published, packed or dense) holds: a table of its layers with
type, shape, block length d, centroids k, codes, bits, share, distinct blocks used and entropy of the codes, and the
totals. The file is checked as it is when it is loaded: shapes, codes below k, finite values, the checksum of packed
files."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog=command.program(__package__, "inspect"), description=PURPOSE)
    parser.add_argument("file", metavar="FILE", help="the model file")
    parser.add_argument(
        "--against",
        metavar="DENSE",
        help="the dense network it came from: adds each layer's signal-to-quantization-noise ratio",
    )
    parser.add_argument(
        "--html", metavar="PAGE", help="also write a page with figures, which needs nothing else to be shown"
    )
    parser.add_argument(
        "--arch",
        metavar="NAME",
        help="the architecture (default: what the file says, or the first that its tensors fit)",
    )
    options = parser.parse_args(argv)

    def job() -> int:
        """Torch takes seconds to load: only when the command line is known to be good."""
        from . import recipes

        return recipes.inspect(options.file, against=options.against, html=options.html, arch=options.arch)

    return command.guarded(job)


if __name__ == "__main__":
    sys.exit(main())
