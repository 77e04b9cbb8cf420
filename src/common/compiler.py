"""Whether `torch.compile` works here: it needs a compiler of the machine's own, and says so only when it is used."""

from __future__ import annotations

import torch

from .errors import SettingsError


def check_compiler(what: str, device: torch.device | str, instead: str) -> None:
    """Compile something small, and run it.

    Args:
        what: the setting that asks for it, for the message.
        device: where the network will run.
        instead: what to do without a compiler.

    Raises:
        SettingsError: that does not work.
    """
    try:
        given = torch.arange(3.0, device=device)
        found = torch.compile(lambda values: values.half().float() * 2 + 1)(given)
        assert found.tolist() == [1, 3, 5]
    except Exception as error:  # no compiler, no Triton, a Python that is too new: each has its own
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SettingsError(f"{what}: torch.compile does not work here ({said[:200]}). {instead}") from error
