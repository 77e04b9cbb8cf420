"""State dicts as training programs wrap them: inside a checkpoint, and with more in front of every name.

A checkpoint is looked into under the names in `WRAPPERS`. What wrappers of modules put into names (`LEADING`, nested in
any way, and `ANYWHERE`) is taken out where the names then are those of the network, and only then: a network may have a
module called `model` itself. What counters of other libraries leave beside the weights (`COUNTERS`) is left out where
the network has no such tensor. Nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import accumulate

from torch import Tensor

from ..common.errors import CheckpointError
from ..common.log import log

WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network", "module", "model_state")
ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Put before the names of a module that is compiled, sharded or recomputed, which may be any module of a network."""
LEADING = ("module", "model", "net", "network", *ANYWHERE)
"""Put before all names: by DataParallel and DDP, by the attribute of a Lightning module."""
COUNTERS = ("n_averaged", "total_ops", "total_params")
"""Of torch's AveragedModel and of thop."""
MOST_KEYS = 6

Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def unwrapped(contents: object, source: str) -> Mapping[str, Tensor]:
    """The named tensors in what a file held; a warning names others beside them, which are not read.

    Raises:
        CheckpointError: there are none under a known name.
    """
    found = _named_tensors(contents, source)
    if found is None:
        raise CheckpointError(
            f"{source} does not hold named tensors; expected a state dict or a compressed model, alone or under "
            f"{' or '.join(map(repr, WRAPPERS[:3]))}. {_described(contents)}"
        )
    return found


def _named_tensors(contents: object, source: str) -> Mapping[str, Tensor] | None:
    if not isinstance(contents, Mapping) or _is_state_dict(contents):
        return contents if isinstance(contents, Mapping) else None
    for wrapper in WRAPPERS:
        inner = contents.get(wrapper)
        found = _named_tensors(inner, source) if isinstance(inner, Mapping) else None
        if found is not None:
            others = [str(key) for key, value in contents.items() if key != wrapper and _is_state_dict(value)]
            if others:
                log.warning("%s: %r was read; other tensors in it were not: %s", source, wrapper, _some(others))
            return found
    return None


def _is_state_dict(contents: object) -> bool:
    return (
        isinstance(contents, Mapping)
        and bool(contents)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in contents.items())
    )


def _described(contents: object) -> str:
    """What a file holds instead, in a line."""
    if not isinstance(contents, Mapping):
        return f"It holds an object of type {type(contents).__name__}."
    inside = [str(key) for key, value in contents.items() if _is_state_dict(value)]
    if inside:
        return f"It has named tensors under {_some(inside)}: save those alone."
    other = [f"{str(key)[:60]!r} is of type {type(value).__name__}" for key, value in contents.items()
             if not isinstance(value, Tensor)]  # fmt: skip
    return f"In it {_some(other)}." if other else "It is empty." if not contents else "Its keys are not names."


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_KEYS]) + (f" and {len(names) - MOST_KEYS} more" if len(names) > MOST_KEYS else "")


def is_wrapped(state: Mapping[str, Tensor]) -> bool:
    """Whether a name in `state` has something in it that wrappers or counters put there."""
    return any(
        parts[0] in LEADING or parts[-1] in COUNTERS or not set(ANYWHERE).isdisjoint(parts)
        for parts in (name.split(".") for name in state)
    )


def fitted(
    state: Mapping[str, Tensor], names: Collection[str], source: str, rename: Rename = dict
) -> dict[str, Tensor]:
    """`state` under the names that a network has for it; as it is where no known wrapping explains the difference.

    Args:
        state: the tensors of a file.
        names: of the network's tensors, quantized or dense: only the layers count.
        source: the file, for messages.
        rename: applied to the names before they are compared, and to the result.

    Raises:
        CheckpointError: it holds the network more than once.
    """
    layers = {_layer(name) for name in names}
    plain = _plain_names(state)
    candidates = [dict(state), *([plain] if plain is not None and plain.keys() != state.keys() else [])]
    for tensors in candidates:
        if layers <= {_layer(name) for name in rename(tensors)}:
            return rename(_without_counters(tensors, names))
    for tensors in reversed(candidates):
        fits = [prefix for prefix in _prefixes(tensors) if layers <= _layers_below(prefix, tensors, rename)]
        if len(fits) > 1:
            raise CheckpointError(
                f"{source} holds the network {len(fits)} times, under the names {_some(fits)}; save the one you want "
                "in a file of its own"
            )
        if fits:
            return rename(_without_counters(_stripped(fits[0], tensors), names))
    return rename(state)


def unknown_prefix(state: Mapping[str, Tensor], names: Collection[str]) -> str | None:
    """What all names in `state` begin with where they would be the network's without it; None: that is not so."""
    layers = {_layer(name) for name in names}
    first = next(iter(state), "")
    for prefix in accumulate(part + "." for part in first.split(".")[:-1]):
        if all(name.startswith(prefix) for name in state) and layers <= _layers_below(prefix, state, dict):
            return prefix
    return None


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Without what may stand anywhere in a name; None where two names would become one."""
    plain = {".".join(p for p in name.split(".") if p not in ANYWHERE): tensor for name, tensor in state.items()}
    return plain if len(plain) == len(state) else None


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Everything that names begin with and that consists of known parts, the shortest first."""
    found = set()
    for name in state:
        for prefix in accumulate(part + "." for part in name.split(".")[:-1]):
            if prefix.split(".")[-2] not in LEADING:
                break
            found.add(prefix)
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _layers_below(prefix: str, state: Mapping[str, Tensor], rename: Rename) -> set[str]:
    below = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {_layer(name) for name in rename(below)}


def _stripped(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without `prefix`; names that do not begin with it stay, also where another one becomes the same."""
    below = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    others = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return {**below, **{(f"{name} (beside {prefix})" if name in below else name): others[name] for name in others}}


def _without_counters(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in COUNTERS or name in names}
