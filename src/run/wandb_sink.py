"""A run's figures to Weights & Biases, beside TensorBoard (`wandb_project`).

Everything is kept in the folder of the run, `<output_path>/wandb/`, whether or not the service can be reached; its
package sends it meanwhile, or `wandb sync` later. Nothing that goes wrong there ends a run: it is said once.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from ..common.errors import SettingsError, said
from ..common.log import note
from ..common.paths import write_text

FOLDER = "wandb"
RUN_ID = "run_id.txt"
"""What says, in that folder, under which number the service knows the run: a run that resumes goes on with it."""
STEP = "step"
"""What figures are drawn over: the package's own count could not go back to the checkpoint that a run resumes from."""
INSTALL = "pip install 'pqf[wandb]', or pip install wandb"
START_SECONDS, END_SECONDS = 30.0, 60.0
"""How long the service is waited for."""


def check_wandb(project: str | None) -> None:
    """Check, without loading it, that the package is there where a project is named.

    Raises:
        SettingsError: it is not, or a project cannot be called so.
    """
    if project is None:
        return
    if not all(project.split("/")) or project.count("/") > 1:
        raise SettingsError(f"wandb_project: {project!r} is no project's name; expected PROJECT, or ENTITY/PROJECT")
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder of that name that is no package, as its own files make one
        raise SettingsError(
            f"wandb_project: Weights & Biases needs the package wandb, which is not installed: {INSTALL}"
        )


class WandbSink:
    """What the first process of a run sends to Weights & Biases."""

    def __init__(self, output: Path, project: str, config: Mapping[str, Any]) -> None:
        """Begin, or go on with what an earlier process of this run began.

        Args:
            output: folder of the run.
            project: PROJECT or ENTITY/PROJECT.
            config: the settings of the run.

        Raises:
            RunError: the folder cannot be written.
        """
        self._output, self._works = output, True
        self._run: Any = None
        number = output / FOLDER / RUN_ID
        if not number.exists():
            write_text(number, secrets.token_hex(4))
        entity, _, name = project.rpartition("/")
        about = {
            "entity": entity or None,
            "project": name,
            "name": output.name,
            "id": number.read_text(encoding="utf-8").strip(),
            "resume": "allow",
            "dir": str(output),
            "config": dict(config),
        }
        self._guarded(lambda _: self._begin(about))

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of one step, by tag."""
        self._guarded(lambda run: run.log({**figures, STEP: step}))

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table."""
        data = [list(row) for row in rows]
        self._guarded(lambda run: run.log({name: _package().Table(columns=list(header), data=data)}))

    def finish(self, results: Mapping[str, Any]) -> None:
        """The results of a run that ended."""
        self._guarded(lambda run: run.summary.update(dict(results)))
        self._end(0)

    def close(self) -> None:
        """End, where the run did not get to its results."""
        self._end(1)

    def _begin(self, about: Mapping[str, Any]) -> None:
        """Start the package's run: where it is told to, or can, at the service, else in the folder only."""
        wandb = _package()
        given = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            init_timeout=START_SECONDS,
        )
        mode = wandb.setup(given).settings.mode
        try:
            if mode == "online" and not wandb.login(prompt=False):
                raise SettingsError("nobody is logged in: wandb login")
            self._run = wandb.init(**about, settings=given)
        except Exception as error:  # of the network, the service, or its package
            note(f"wandb_project: Weights & Biases is not reached ({said(error)}); {self._kept()}")
            self._run = wandb.init(**about, mode="offline", settings=given)
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def _end(self, status: int) -> None:
        """Wait, but not for ever, until everything was sent."""
        run, self._run, self._works = self._run, None, False
        if run is None:
            return
        failed: list[Exception] = []

        def finish() -> None:
            try:
                run.finish(exit_code=status)
            except Exception as error:
                failed.append(error)

        ending = Thread(target=finish, daemon=True)
        ending.start()
        ending.join(END_SECONDS)
        if ending.is_alive() or failed:
            why = said(failed[0]) if failed else f"that takes more than {END_SECONDS:g} seconds"
            note(f"wandb_project: not everything was sent ({why}); {self._kept()}")

    def _kept(self) -> str:
        return f"figures are kept in {self._output / FOLDER}, and sent by: wandb sync FOLDER"

    def _guarded(self, action: Callable[[Any], object]) -> None:
        """Do something with the package's run; what goes wrong is said, and nothing more is sent."""
        if not self._works:
            return
        try:
            action(self._run)
        except Exception as error:  # of the network, the disk, or the package: figures are not worth a training
            self._works = False
            note(f"wandb_project: no more figures go to Weights & Biases: {said(error)}")


def _package() -> Any:
    import wandb

    return wandb
