"""A compressed network as a model of the Hugging Face hub: in a folder, or as OWNER/NAME there.

The folder holds `model.safetensors` (packed: everything that rebuilds the network), `config.json` (what is known of it,
for programs) and `README.md` (the same for people).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__
from .api import load
from .architectures.architecture import Architecture
from .architectures.named import canonical, find, is_code
from .common.errors import CheckpointError, SettingsError
from .common.hub import MODEL_FILE, HubAccess, NoHubFileError, fetch, on_hub, send
from .common.log import note
from .common.paths import write_text
from .compression.quantize.layers import QuantizedLayer
from .model_files.card import MARK, About, card
from .model_files.decoding import Decode, check_decode, set_decode
from .model_files.inspection import examine_model
from .model_files.kept_info import info_of, keep_info
from .model_files.metadata import ModelInfo
from .model_files.open_model_file import architecture_of, build_network, read_model_file
from .model_files.packed import save_packed
from .model_files.pth import compressed_state
from .model_files.size import model_size

CONFIG, CARD = "config.json", "README.md"


class PQFModel(nn.Module):
    """A compressed network, with what is known of it, that is saved for the hub and loaded from there.

    It computes what the network computes, and its parameters are the network's: it is evaluated and fine-tuned like it.

    Attributes:
        network: from `pqf.compress`, `pqf.load` or a file.
        arch: the name by which commands build the network; None: it has none.
        task: `classification` or `detection`; empty: not known.
        license: of the starting weights, such as `cc-by-nc-4.0`; empty: not known.
        base_model: what it was made of, OWNER/NAME on the hub; empty: not known.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        arch: str | None = None,
        metric: Mapping[str, float] | None = None,
        task: str = "",
        license: str = "",
        base_model: str = "",
    ) -> None:
        """Take a compressed network.

        Args:
            network: of the class, on any device.
            arch, task, license, base_model: as the attributes; None or empty: what is known of the network.
            metric: what was measured on it as it is, by name; None: what its file says.

        Raises:
            SettingsError: the network is not compressed.
        """
        super().__init__()
        if not any(isinstance(module, QuantizedLayer) for module in network.modules()):
            raise SettingsError("PQFModel: the network is not compressed; make it smaller with pqf.compress first")
        self.network = network
        self.training = network.training
        self.arch = arch or info_of(network).arch
        known = _named(self.arch)
        self.task = task or (known.task if known is not None else "")
        self.license = license or (known.licence if known is not None else "")
        self.base_model = base_model
        self.metric = metric or info_of(network).metric

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the network gives for these inputs."""
        return self.network(*inputs, **named)

    @property
    def metric(self) -> Mapping[str, float] | None:
        """What was measured on the network, by name; None once it has been trained on, until it is set again."""
        return self._metric if self._measured == _digest(self.network) else None

    @metric.setter
    def metric(self, metric: Mapping[str, float] | None) -> None:
        self._metric, self._measured = metric, _digest(self.network)

    def save_pretrained(self, save_directory: str | PathLike[str], *, name: str = "") -> None:
        """Write the network, `config.json` and a page about it (`README.md`, which stays if somebody else wrote it).

        Args:
            save_directory: a folder, which is made where it is not there.
            name: of the model on the hub, for the page.

        Raises:
            RunError: it cannot be written; a file that was there is unchanged.
            CheckpointError: a tensor cannot be stored.
        """
        folder = Path(save_directory).expanduser()
        info = replace(info_of(self.network), arch=self.arch, metric=self.metric, producer=f"pqf {__version__}")
        save_packed(self.network, folder / MODEL_FILE, info)
        write_text(folder / CONFIG, json.dumps(self._config(info), indent=1, ensure_ascii=False) + "\n")
        page = folder / CARD
        if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
            note(f"{page} stays as it is: it was not written by pqf")
            return
        about = About(task=self.task, licence=self.license, base_model=self.base_model, name=name)
        write_text(page, card(examine_model(self.network, info), about))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        arch: str | None = None,
        into: nn.Module | None = None,
        decode: Decode = "kept",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> PQFModel:
        """The model of a folder, or of the hub.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or OWNER/NAME.
            arch: the name of its architecture, where the file does not say it. Code is run only if it is named here:
                `package.module:callable`.
            into: instead, the dense network that it was made of, of any values; it is filled in place.
            decode: how weights are decoded in evaluation, see `pqf.load`.
            revision: branch, tag or commit on the hub; None: the newest of its main branch.
            token: to log in to the hub with; None: the one that `hf auth login` left.
            cache_dir: folder that keeps what was fetched; None: the hub's own.
            local_files_only: take what is in that folder, and ask nobody.

        Returns: it, in evaluation mode, on the CPU (`into`: where that is).

        Raises:
            SettingsError: it is not there, or cannot be fetched.
            CheckpointError: a file cannot be read, or the network cannot be built or does not fit.
        """
        access = HubAccess(revision, token, None if cache_dir is None else Path(cache_dir), local_files_only)
        files = _files(str(pretrained_model_name_or_path), access)
        config = _read_config(files.get(CONFIG))
        if into is None:
            check_decode(decode, "cpu")
            network = set_decode(_network(files[MODEL_FILE], arch), decode)
        else:
            network = load(files[MODEL_FILE], into, decode=decode)
        known = (config.get(key) for key in ("task", "license", "base_model"))
        task, licence, base_model = (value if isinstance(value, str) else "" for value in known)
        return cls(network, arch=arch, task=task, license=licence, base_model=base_model)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "A compressed model",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Send what `save_pretrained` writes to the hub; the page there is written anew.

        Args:
            repo_id: OWNER/NAME; it is made where it is not there.
            commit_message: what the commit is called.
            private: whether a new repository is private; None: as the owner's are.
            token: to log in with; None: the one that `hf auth login` left.
            branch: that receives it; None: the main one.
            create_pr: open a pull request instead.

        Returns: the address of the commit.

        Raises:
            SettingsError: the package huggingface-hub is not installed, or there can be no such repository.
            RunError: the hub cannot be reached, or refuses.
        """
        return send(
            repo_id,
            lambda folder: self.save_pretrained(folder, name=repo_id),
            message=commit_message,
            private=private,
            access=HubAccess(revision=branch, token=token),
            as_request=create_pr,
        )

    def _config(self, info: ModelInfo) -> dict[str, Any]:
        """What is known of the model, for programs."""
        size = model_size(self.network)
        entries = {
            "library_name": "pqf",
            "architecture": self.arch,
            "num_classes": info.num_classes,
            "task": self.task,
            "license": self.license,
            "base_model": self.base_model,
            "bits": size.bits,
            "dense_bits": size.original,
            "measured": info.metric,
        }
        return {key: value for key, value in entries.items() if value not in (None, "")}


def _named(arch: str | None) -> Architecture | None:
    """What is known of an architecture by its name, where no user's code is needed for that."""
    if arch is None or is_code(arch):
        return None
    try:
        return find(arch)
    except SettingsError:  # of a package that is not installed here
        return None


def _digest(network: nn.Module) -> str:
    """Of everything that a file holds of a network."""
    digest = hashlib.sha256()
    for name, tensor in compressed_state(network).items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _files(name: str, access: HubAccess) -> dict[str, Path]:
    """The files of a model by name: of a folder, or fetched."""
    folder, what = Path(name).expanduser(), "from_pretrained"
    if on_hub(name):
        raise SettingsError(f"{what}: {name}: write OWNER/NAME, and revision= for another than the newest")
    if folder.is_dir():
        if not (folder / MODEL_FILE).is_file():
            raise SettingsError(
                f"{what}: {folder.absolute()} holds no {MODEL_FILE}; expected what save_pretrained writes"
            )
        return {file: folder / file for file in (MODEL_FILE, CONFIG)}
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SettingsError(f"{what}: there is no folder {folder.absolute()}, and a name on the hub is OWNER/NAME")
    found = {MODEL_FILE: fetch(name, MODEL_FILE, what, access)}
    with suppress(NoHubFileError):  # a model whose owner sent nothing but the file
        found[CONFIG] = fetch(name, CONFIG, what, access)
    return found


def _read_config(path: Path | None) -> dict[str, Any]:
    """What `config.json` says; nothing where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: it is not JSON") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} cannot be read: expected a table of what is known of the model")
    return found


def _network(file: Path, arch: str | None) -> nn.Module:
    """The network of a packed file, built without code that nobody named."""
    read = read_model_file(file)
    if read.packed is None:
        raise CheckpointError(f"{file} is not a packed model; give the dense network that it was made of: into=")
    said = read.packed.info.arch
    if arch is None and said is None:
        raise CheckpointError(
            f"{file} does not say which network it is of; name it (arch='package.module:callable'), or give the dense "
            "network that it was made of (into=)"
        )
    if said is not None and is_code(said) and said != arch:
        raise CheckpointError(
            f"{file} is of a network that {said[:200]!r} builds. Code that a file names is not run: look at it, then "
            "name it yourself (arch=), or give the dense network that it was made of (into=)"
        )
    architecture = architecture_of(read.packed, said=arch)
    if arch is not None and canonical(arch) != architecture.name:
        raise CheckpointError(f"{file} holds a {architecture.name}, and arch= says {arch}; leave that out")
    network = build_network(read, architecture)
    keep_info(network, replace(read.packed.info, arch=architecture.name))
    return network
