"""FSDP: a large network's parameters, gradients and optimizer state in shards over processes.

torch's `fully_shard` (FSDP2) itself, not accelerate's plugin: the plugin shards every network that
accelerate prepares, and the discriminator's R1 penalty differentiates twice, which shards do not
take. The discriminator is small, and stays whole on each process (DDP).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from core.errors import PreconditionError

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Modules of diffusers' UNets that are gathered one at a time."""


def require_sharding(accelerator: Any) -> None:
    """Refuse what cannot shard: one process, or FP16, whose loss scaler does not see all shards.

    Raises:
        PreconditionError: it says which.
    """
    if accelerator.num_processes == 1:
        raise PreconditionError(
            "--shard needs several processes",
            "this is one process, and there is nothing to share",
            "start the same command by `accelerate launch --num_processes 2 -m addbench train`",
        )
    if accelerator.mixed_precision == "fp16":
        raise PreconditionError(
            "--shard does not go with FP16",
            "the loss scaler of a process sees the overflows of its own shards only",
            "use --precision bf16 or fp32",
        )


def shard(network: nn.Module, accelerator: Any) -> None:
    """Shard a network in place, block by block; it is called as before, by all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in network.modules():
        if type(module).__name__ in BLOCKS:
            fully_shard(module, mesh=mesh)
    # By default the rest stays gathered after a forward, in wait of a backward: sampling and the
    # frozen teacher have none.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


class Shards:
    """What a checkpoint keeps of a sharded network: each process writes its own part.

    A `Stateful` of torch.distributed.checkpoint, which also lets a run go on with another number
    of processes.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, average: Any) -> None:
        self.network, self.optimizer, self.average = network, optimizer, average

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        network, optimizer = get_state_dict(self.network, self.optimizer)
        average = self.average.state_dict() if self.average is not None else {}
        return {"network": network, "optimizer": optimizer, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import set_state_dict

        set_state_dict(
            self.network,
            self.optimizer,
            model_state_dict=state["network"],
            optim_state_dict=state["optimizer"],
        )
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def gather(network: Any) -> Any:
    """A plain UNet with the whole weights, on the main process; None on the others.

    Called by all processes together.
    """
    from diffusers import UNet2DConditionModel
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(network, options=options)
    if not weights:
        return None
    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(network.config)
    whole.load_state_dict(weights, assign=True)
    return whole
