"""Models on the Hugging Face hub: fetched into its cache, and sent there. Everything else of the hub is its package's.

`hf:OWNER/NAME` stands where a model file can; `hf:OWNER/NAME/FILE` names another file of it than `model.safetensors`,
and `@REVISION` at the end a branch, tag or commit.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RunError, SettingsError, said
from .paths import find

HUB = "hf:"
"""What the name of something on the hub begins with."""
MODEL_FILE = "model.safetensors"
"""The file of a model that is meant where none is named."""
INSTALL = "pip install 'pqf[hub]', or pip install huggingface-hub"
EXPECTED = "expected hf:OWNER/NAME or hf:OWNER/NAME/FILE, and @REVISION at the end for another than the newest"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?", re.ASCII)


class NoHubFileError(SettingsError):
    """The model is there, as far as can be seen, and a file of it is not."""


@dataclass(frozen=True)
class HubAccess:
    """How the hub is asked; the defaults are those of its package.

    Attributes:
        revision: branch, tag or commit; None: the newest of the main branch.
        token: to log in with; None: the one that `hf auth login` left.
        cache: folder that keeps what was fetched.
        offline: take what the cache holds, and ask nobody.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache: str | Path | None = None
    offline: bool = False


def on_hub(path: str | Path) -> bool:
    """Whether it is the name of something on the Hugging Face hub instead of a file or folder."""
    return str(path).startswith(HUB)


def find_model(path: str | Path, what: str, advice: str = "") -> Path:
    """A model file: a name on the hub is fetched, anything else is looked for as `paths.find` does.

    Args:
        path: the file, or `hf:OWNER/NAME`.
        what: the key or argument that names it, for messages.
        advice: what to do where a file is not there.

    Raises:
        SettingsError: it is not there, or cannot be fetched.
    """
    return fetched(str(path), what) if on_hub(path) else find(path, what, advice)


def fetched(name: str, what: str) -> Path:
    """The file that `hf:OWNER/NAME` means, in the hub's cache. Raises SettingsError as `fetch`, or it is no name."""
    parts = _NAME.fullmatch(name)
    if parts is None or ".." in name:
        raise SettingsError(f"{what}: {name} is no name of a model on the Hugging Face hub; {EXPECTED}")
    repository, file, revision = parts[1], parts[2].lstrip("/"), parts[3]
    return fetch(repository, file or MODEL_FILE, what, HubAccess(revision))


def fetch(repository: str, file: str, what: str, access: HubAccess) -> Path:
    """A file of a model on the hub, from its cache where that has the newest one or the hub cannot be reached.

    Args:
        repository: OWNER/NAME.
        file: its name there.
        what: the key or argument that names the model, for messages.
        access: how the hub is asked.

    Raises:
        NoHubFileError: the model has no such file, or the hub cannot be reached and the cache does not hold it.
        SettingsError: there is no such model or revision, or it cannot be fetched.
    """
    hub = _package(f"{what}: {repository} is on the Hugging Face hub, which")
    unreachable = None
    try:
        if not (access.offline or hub.constants.HF_HUB_OFFLINE):
            unreachable = _why_unreachable(hub, repository, file, access)
        found = hub.hf_hub_download(
            repository,
            file,
            revision=access.revision,
            token=access.token,
            cache_dir=access.cache,
            local_files_only=access.offline or unreachable is not None,
        )
    except Exception as error:  # of the hub, the network or the disk, by whatever library asks it
        if isinstance(error, MemoryError):
            raise
        missing = (hub.errors.EntryNotFoundError, hub.errors.OfflineModeIsEnabled)
        kind = NoHubFileError if isinstance(error, missing) else SettingsError
        raise kind(_refusal(hub, error, repository, file, what, access, unreachable)) from error
    return Path(found)


def _why_unreachable(hub: Any, repository: str, file: str, access: HubAccess) -> BaseException | None:
    """Why the hub does not answer; None: it does. Asked once: the package itself would go on asking for half a minute.

    Raises:
        Exception: what it answers is that it has no such file.
    """
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file, revision=access.revision), token=access.token)
    except hub.errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise
        return error
    except (hub.errors.HFValidationError, MemoryError):
        raise
    except Exception as error:  # each library of networks has its own
        return error
    return None


def send(
    repository: str,
    fill: Callable[[Path], None],
    *,
    message: str,
    private: bool | None,
    access: HubAccess,
    as_request: bool,
) -> str:
    """Make the repository of a model on the hub, where it is not there, and send it the files of a folder.

    Args:
        repository: OWNER/NAME, or NAME of the user's own.
        fill: writes the files into an empty folder.
        message: what the commit is called.
        private: whether a new repository is private; None: as the owner's are.
        access: how the hub is asked; its revision is the branch.
        as_request: open a pull request instead.

    Returns:
        The address of the commit.

    Raises:
        SettingsError: the package is not installed, or there can be no such repository.
        RunError: the hub cannot be reached, or refuses.
    """
    hub = _package("sending a model to the Hugging Face hub")
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        try:
            api = hub.HfApi(token=access.token)
            made = api.create_repo(repository, private=private, exist_ok=True).repo_id
            sent = api.upload_folder(
                repo_id=made,
                folder_path=folder,
                commit_message=message,
                revision=access.revision,
                create_pr=as_request or None,
            )
        except hub.errors.HFValidationError as error:
            raise SettingsError(
                f"push_to_hub: {repository!r} is no name of a model on the hub: {said(error)}"
            ) from error
        except Exception as error:
            raise RunError(
                f"push_to_hub: {repository} was not sent: {said(_of_the_system(error))}. Log in with: hf auth login; "
                "what save_pretrained writes can be sent later"
            ) from error
    return str(sent.commit_url)


def _package(who: str) -> Any:
    """The package `huggingface_hub`. Raises SettingsError: it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise SettingsError(f"{who} needs the package huggingface-hub, which is not installed: {INSTALL}") from error
    return huggingface_hub


def _refusal(
    hub: Any,
    error: Exception,
    repository: str,
    file: str,
    what: str,
    access: HubAccess,
    unreachable: BaseException | None,
) -> str:
    """Why a file was not fetched, in a line."""
    errors = hub.errors
    where = f"{what}: {repository}@{access.revision}" if access.revision else f"{what}: {repository}"
    if isinstance(error, errors.HFValidationError):
        return f"{where} is no name of a model on the Hugging Face hub: {said(error)}"
    if isinstance(error, errors.GatedRepoError):
        return f"{where}: its owner gives it to those who ask; ask on its page, then log in with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{where}: the Hugging Face hub has no such model, or it is private; check the name, or log in with: "
            "hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{where}: the model has no such branch, tag or commit"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if unreachable is not None:
            why = f"the hub cannot be reached ({said(_of_the_system(unreachable))})"
        else:
            why = f"{'local_files_only' if access.offline else 'HF_HUB_OFFLINE'} is set"
        cache = access.cache or hub.constants.HF_HUB_CACHE
        return (
            f"{where}: {file} is not in the cache {cache}, and {why}; fetch it where there is a network, or name a file"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"{where} holds no file {file}; name the one that it holds: hf:{repository}/FILE"
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else said(error)
    return f"{where}: {file} cannot be fetched: {reason}"


def _of_the_system(error: BaseException) -> BaseException:
    """The system's own error that `error` comes from, which says it in fewer words; where there is none, `error`."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return next((one for one in reversed(chain) if isinstance(one, OSError) and one.errno), error)
