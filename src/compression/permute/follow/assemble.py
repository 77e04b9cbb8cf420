"""Groups from channels: the places of every channel, equal blocks as one group, whole blocks as channels of a group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..channels import ChannelGroup, Places
from .components import Channels, Slot, exchangeable
from .graph import Nodes

Footprint = tuple[tuple[int, int], ...]


@dataclass
class _Block:
    """A set of exchangeable channels: for each slot (by number) its positions (channels, r)."""

    width: int
    positions: dict[int, Nodes]

    @property
    def footprint(self) -> tuple[int, Footprint]:
        """What two blocks of one group have in common."""
        return self.width, tuple((slot, at.shape[1]) for slot, at in self.positions.items())


def groups_of(channels: Channels) -> tuple[list[ChannelGroup], list[str]]:
    """All groups in the network's order, and what was left out because its places do not match."""
    index = _Index(channels.slots)
    merged: dict[tuple[int, Footprint], list[_Block]] = {}
    skipped: list[str] = []
    for members in exchangeable(channels):
        block = index.block(members[:, None])
        if block is None:
            skipped.append(_names(channels.slots, index.slots_of(int(members[0]))))
        else:
            merged.setdefault(block.footprint, []).append(block)
    groups = [(blocks, "") for blocks in merged.values()]
    groups += [([block], " (whole blocks)") for block in whole_blocks(channels, index)]
    taken: dict[str, int] = defaultdict(int)
    return [_group(blocks, suffix, channels.slots, taken) for blocks, suffix in groups], skipped


class _Index:
    """Where each channel stands, slot by slot."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._positions: list[Nodes] = []
        self._starts: list[Nodes] = []
        self._held: list[Nodes] = []
        by_channel: dict[int, list[int]] = defaultdict(list)
        for number, slot in enumerate(slots):
            order = np.lexsort((np.arange(slot.channel.size), slot.role, slot.channel))
            held, starts = np.unique(slot.channel[order], return_index=True)
            self._positions.append(order)
            self._held.append(held)
            self._starts.append(np.append(starts, order.size))
            for channel in held.tolist():
                by_channel[channel].append(number)
        self._by_channel = by_channel

    def slots_of(self, channel: int) -> list[int]:
        """Numbers of the slots that hold a channel."""
        return self._by_channel.get(channel, [])

    def positions(self, slot: int, members: Nodes) -> Nodes | None:
        """Positions of members (n, m), of m channels each, in a slot: (n, r). Those with the same role stand in the
        same order for all; None: members have different numbers of positions."""
        held, starts = self._held[slot], self._starts[slot]
        at = np.minimum(np.searchsorted(held, members), held.size - 1)
        counts = np.where(held[at] == members, starts[at + 1] - starts[at], 0)
        if (counts != counts[0]).any():
            return None
        flat = counts.reshape(-1)
        ends = np.cumsum(flat)
        within = np.arange(int(ends[-1])) - np.repeat(ends - flat, flat)
        return self._positions[slot][np.repeat(starts[at].reshape(-1), flat) + within].reshape(len(members), -1)

    def block(self, members: Nodes) -> _Block | None:
        """The places of members (n, m), each of them m channels that move as one; None: they do not match."""
        found = {}
        for slot in sorted({slot for channel in members[0].tolist() for slot in self.slots_of(channel)}):
            positions = self.positions(slot, members)
            if positions is None:
                return None
            found[slot] = positions
        return _Block(len(members), found) if found else None


def whole_blocks(channels: Channels, index: _Index) -> list[_Block]:
    """Blocks (of grouped convolutions, heads of attention) that may be exchanged as wholes.

    A block is an owner with all channels it owns. Owners whose channels another one owns as well are part of that one;
    where two owners share channels and neither holds the other, neither can be moved.
    """
    owned: dict[int, list[int]] = defaultdict(list)
    for owner, channel in zip(channels.owners.tolist(), channels.owned.tolist(), strict=True):
        owned[owner].append(channel)
    parts = {owner: set(held) for owner, held in owned.items()}
    owners_of: dict[int, list[int]] = defaultdict(list)
    for owner, held in owned.items():
        for channel in held:
            owners_of[channel].append(owner)
    blocked: set[int] = set()
    inside: dict[int, int] = {}
    for owner in owned:
        rivals = {rival for channel in owned[owner] for rival in owners_of[channel]} - {owner}
        for rival in rivals:
            if parts[owner] < parts[rival] or (parts[owner] == parts[rival] and owner > rival):
                inside[owner] = rival
            elif not (parts[rival] <= parts[owner]):
                blocked.add(owner)
    for owner in inside:
        rival = owner
        while rival in inside:
            rival = inside[rival]
        parts[rival].add(owner)
        if owner in blocked:
            blocked.add(rival)
    free = [owner for owner in owned if owner not in blocked and owner not in inside and owner not in owners_of]
    kinds: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for owner in sorted(free, key=lambda one: min(int(channels.first[part]) for part in parts[one])):
        held = sorted(parts[owner], key=lambda part: (int(channels.signature[part]), int(channels.first[part])))
        key = (int(channels.signature[owner]), *(int(channels.signature[part]) for part in held))
        kinds[key].append([owner, *held])
    blocks = [index.block(np.array(members)) for members in kinds.values() if len(members) > 1]
    return [_outermost(block, channels.slots) for block in blocks if block is not None]


def _outermost(block: _Block, slots: Sequence[Slot]) -> _Block:
    """Where whole rows of a weight move, what is counted within those rows moves along."""
    axes = {number: {axis for axis, n in enumerate(slots[number].shape) if n > 1} for number in block.positions}
    kept = {
        number: at
        for number, at in block.positions.items()
        if not any(slots[other].tensor == slots[number].tensor and axes[other] < axes[number] for other in axes)
    }
    return _Block(block.width, kept)


def _group(blocks: list[_Block], suffix: str, slots: Sequence[Slot], taken: dict[str, int]) -> ChannelGroup:
    places = tuple(
        Places(
            tensor=slots[number].tensor,
            shape=slots[number].shape,
            positions=torch.from_numpy(np.concatenate([block.positions[number] for block in blocks])),
            reads=slots[number].reads,
        )
        for number in blocks[0].positions
    )
    label = _names(slots, list(blocks[0].positions)) + suffix
    taken[label] += 1
    if taken[label] > 1:
        label += f" #{taken[label]}"
    return ChannelGroup(label=label, places=places, n_blocks=len(blocks))


def _names(slots: Sequence[Slot], numbers: Sequence[int]) -> str:
    """`a.conv, a.norm -> b.conv`: two of those that give the channels, one of those that read them."""

    def shortened(reads: bool, most: int) -> str:
        tensors = [slots[number].tensor for number in numbers if slots[number].reads == reads]
        modules = list(dict.fromkeys(tensor.rpartition(".")[0] or tensor for tensor in tensors))
        return ", ".join([*modules[:most], *(["..."] if len(modules) > most else [])])

    return " -> ".join(filter(None, (shortened(False, 2), shortened(True, 1))))
