"""Engines by name. To add one: a class with (launch, device) as arguments, which is an `engine.Engine`, in a file, and
its entry here.

The fact `start` says how a run is started for it, `launchers` how its processes recognise that, `reads` which settings
of several processes it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..common.registry import Entry, Registry


@dataclass(frozen=True)
class Launcher:
    """The environment variables of one launcher.

    Attributes:
        name: the engine that understands it, and what else tells it apart.
        rank, world_size, local_rank, local_size: variables that hold this process's number, the number of processes,
            and the same on this machine.
        variables: variables that only this launcher sets all of.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str
    variables: tuple[str, ...]


TORCHRUN = Launcher(
    name="torchrun",
    rank="RANK",
    world_size="WORLD_SIZE",
    local_rank="LOCAL_RANK",
    local_size="LOCAL_WORLD_SIZE",
    # RANK alone may be anybody's; the address makes it torch's convention, which SLURM scripts follow too
    variables=("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
HOROVOD = Launcher(
    name="horovod",
    rank="HOROVOD_RANK",
    world_size="HOROVOD_SIZE",
    local_rank="HOROVOD_LOCAL_RANK",
    local_size="HOROVOD_LOCAL_SIZE",
    variables=("HOROVOD_RANK", "HOROVOD_SIZE"),
)
HOROVOD_MPI = Launcher(
    name="horovod (MPI)",
    rank="OMPI_COMM_WORLD_RANK",
    world_size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    variables=("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)

OF_SEVERAL = ("scale_learning_rate", "sync_batch_norm")

ENGINES: Registry[Any] = Registry(
    "engine",
    {
        "single": Entry(".engines.single:SingleProcess", "one process", {"start": "python -m ...", "reads": ()}),
        "torchrun": Entry(
            ".engines.torchrun:TorchRun",
            "torch.distributed",
            {"start": "torchrun --nproc-per-node N -m ...", "launchers": (TORCHRUN,), "reads": OF_SEVERAL},
        ),
        "horovod": Entry(
            ".engines.horovod:Horovod",
            "Horovod",
            {"start": "horovodrun -np N python -m ...", "launchers": (HOROVOD, HOROVOD_MPI), "reads": OF_SEVERAL},
        ),
    },
)
