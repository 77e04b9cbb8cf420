"""Errors whose message is written for the person who runs the command.

Everything below the entry modules raises one of these for bad input; `command.run` prints the message without a
traceback and leaves with `status`. Any other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad usage or bad input: the message says what, where, what was expected and what to do."""

    status = 2


class SettingsError(UserError):
    """A settings file or a command-line flag cannot be used."""


class DataError(UserError):
    """The images or labels cannot be used."""


class CheckpointError(UserError):
    """A model file cannot be used."""


class GroupError(UserError):
    """A permutation group does not fit the network."""


class PlanError(UserError):
    """A layer cannot be quantized with the settings given for it."""


class RunError(UserError):
    """The run itself cannot continue (disk full, loss no longer a number): not the user's input, so status 1."""

    status = 1


class LostContactError(RunError):
    """Another process of this run went away. Its own message says why; this one follows only if nobody ends this
    process first."""


def said(error: BaseException) -> str:
    """What an exception says, in one short line."""
    return " ".join(str(error).split())[:200].rstrip(". ") or type(error).__name__
