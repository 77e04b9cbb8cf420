"""All commands under one name: `pqf train-resnet ...`, or `python -m src train-resnet ...` in a checkout."""

from __future__ import annotations

import difflib
import importlib
import sys

from .common import output

COMMANDS = {
    "train-resnet": "compress and fine-tune a ResNet",
    "train-maskrcnn": "compress and fine-tune a Mask R-CNN",
    "evaluate-resnet": "size and accuracy of a ResNet",
    "evaluate-maskrcnn": "size, box AP and mask AP of a Mask R-CNN",
    "compress": "compress any network, without training or data",
    "convert": "turn a model file into another form",
    "inspect": "show what a model file holds",
}


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pqf COMMAND [ARGUMENTS]",
            "",
            "Permute, quantize and fine-tune: vision networks 20 to 40 times smaller.",
            "",
            *lines,
            "",
            "pqf COMMAND --help says what a command takes.",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit status, 2 where there is none of that name."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        output.out(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, 1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        output.err(f"error: pqf: unknown command {name!r}; {advice}\n")
        return 2
    entry = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    return int(entry.main(rest))


if __name__ == "__main__":
    sys.exit(main())
