"""Where processes find each other that torchrun may have started again.

torchrun's agent keeps one store for all starts of a run's processes. What those before left in it, their addresses
among it, must not be taken for what the others of today say: a process that waits for one that is gone waits for ever.
Nor does anything in the environment tell the starts apart, as machines may have come later than others. So the
processes agree on a name that is new, and keep what is theirs under it.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

from .launch import Launch

POLL_SECONDS = 0.02


def store_of_this_start(launch: Launch, patience: timedelta) -> Store | None:
    """A store that holds nothing, the same one for all processes that were started together.

    None where no agent keeps one: the first process makes its own then, which ends with it.

    Args:
        launch: where this process stands among them.
        patience: how long they may take to come.

    Raises:
        DistStoreError: the store cannot be reached, or the others do not come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, launch.world_size, is_master=False, timeout=patience)
    name = _invite(store, launch.world_size, patience) if launch.is_main else _follow(store, launch.rank)
    return PrefixStore(name, store)


def _follow(store: Store, rank: int) -> str:
    """The name that the first process gives to this very one, not to an earlier one of the same rank."""
    own = secrets.token_hex(8)
    store.set(f"pqf/here/{rank}", own)
    name = store.get(f"pqf/invited/{own}").decode()
    store.set(f"pqf/came/{name}/{rank}", "")
    return name


def _invite(store: Store, world_size: int, patience: timedelta) -> str:
    """Give a new name to all that are there, until all have taken it; those that are gone do not."""
    name, invited = f"pqf/{secrets.token_hex(8)}", set()
    missing, deadline = set(range(1, world_size)), time.monotonic() + patience.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"pqf/came/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"pqf/here/{rank}"]):
                other = store.get(f"pqf/here/{rank}").decode()
                if other not in invited:
                    invited.add(other)
                    store.set(f"pqf/invited/{other}", name)
        if missing and time.monotonic() > deadline:
            raise DistStoreError(f"process {min(missing)} did not come")
        time.sleep(POLL_SECONDS if missing else 0)
    return name
