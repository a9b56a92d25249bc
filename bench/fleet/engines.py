"""Which engine an address is of. An engine's package is imported when it is asked for."""

from __future__ import annotations

import importlib

from bench.fleet.protocol import Fleet
from core.errors import PreconditionError

LOCAL = "local"
SLURM = "slurm"


def fleet_at(address: str) -> Fleet:
    """The fleet at an address: of a Ray cluster, `slurm:PARTITION`, or `local`.

    Raises:
        PreconditionError: the engine is not installed, or there is none at that address.
    """
    engine = SLURM if address.partition(":")[0] in (SLURM, LOCAL) else "ray"
    try:
        module = importlib.import_module(f"bench.fleet.{engine}")
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "submitit"):
            raise
        raise PreconditionError(
            f"--fleet {address} needs the package {error.name}, which is not installed",
            f"it moves the work to the machines; addbench has it as the extra {engine}",
            f"pip install -e '.[{engine}]' in the checkout, on every machine",
        ) from error
    fleet: Fleet = module.open_fleet(address)
    return fleet
