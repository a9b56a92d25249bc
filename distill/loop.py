"""One stage from start or checkpoint to its weights: the loop that all stages share."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.errors import AddbenchError, PreconditionError
from core.files import staged_folder, write_json
from core.git import revision
from distill import checkpointing
from distill.context import DONE, Context
from distill.log import TrainingLog
from distill.sharding import Shards, shard

GRIDS = 8
"""Sample grids over a stage; one at the end of a short one."""
SKIPS = 20
"""Overflowing FP16 steps in a row after which the loss is called not finite: the scale of 2^16 is
then below one."""
AGREE_EVERY = 10
"""Steps between processes agreeing on the clock."""


class Trainer(ABC):
    """What a stage is: networks that learn, a step, pictures to look at, weights to write."""

    name: ClassVar[str]

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = context.config
        self.settings = context.config.stage(self.name)
        self.networks: dict[str, Any] = {}
        """Those that learn, as prepared by accelerate."""
        self.optimizers: dict[str, Any] = {}
        self.averages: dict[str, Any] = {}
        self.shards: dict[str, Shards] = {}
        """Those networks that lie in shards over the processes."""
        self.skipped: dict[str, int] = {}
        """Steps in a row that FP16's loss scaler left out."""
        self.progress = 0.0
        """Share of the stage that is done, set before each step."""

    @abstractmethod
    def setup(self) -> None:
        """Build and load everything; `learn` each network that is to learn."""

    @abstractmethod
    def step(self, step: int) -> dict[str, Tensor]:
        """One iteration, optimizers included; each loss is the mean over this process's part."""

    def collect(self) -> None:
        """Gather what `write` needs of other processes. Called on all, the averages in place."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the finished weights, on the main process. The averages are in the networks."""

    def grid(self) -> tuple[NDArray[np.uint8] | None, dict[str, float]]:
        """Sample pictures [n, size, size, 3], and figures of quality if there are any."""
        return None, {}

    def learn(
        self, name: str, network: nn.Module, rate: float | None = None, *, sharded: bool = False
    ) -> Any:
        """Prepare a network and its optimizer; returns the prepared network."""
        accelerator = self.context.accelerator
        network = network.to(self.context.device).train()
        if sharded:
            shard(network, accelerator)
        given = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            given,
            lr=rate or self.settings.learning_rate,
            betas=(0.0, 0.99) if name == "discriminator" else (0.9, 0.99),
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        self.networks[name], self.optimizers[name] = (
            (network, optimizer) if sharded else accelerator.prepare(network, optimizer)
        )
        for group in self.optimizers[name].param_groups:
            group.setdefault("initial_lr", group["lr"])
        if self.settings.ema and name != "discriminator":
            from diffusers.training_utils import EMAModel

            average = EMAModel(network.parameters(), decay=self.settings.ema, use_ema_warmup=True,
                               inv_gamma=1.0, power=0.75)  # fmt: skip
            if not sharded:
                accelerator.register_for_checkpointing(average)
            self.averages[name] = average
        if sharded:
            self.shards[name] = Shards(network, optimizer, self.averages.get(name))
        return self.networks[name]

    def plain(self, name: str) -> Any:
        """A learning network without accelerate's wrapper."""
        return self.context.accelerator.unwrap_model(self.networks[name])

    def update(self, name: str, loss: Tensor) -> None:
        """Backward and one optimizer step.

        Raises:
            FloatingPointError: a gradient is not finite, with FP16 `SKIPS` times in a row; the
                weights are left as they were.
        """
        accelerator, optimizer = self.context.accelerator, self.optimizers[name]
        accelerator.backward(loss)
        given = [
            parameter for parameter in self.networks[name].parameters() if parameter.requires_grad
        ]
        norm = accelerator.clip_grad_norm_(given, self.settings.clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        finite = math.isfinite(float(norm))
        # With FP16 the scaler leaves out a step that overflows and halves its scale; where that
        # does not help, no scale would.
        self.skipped[name] = 0 if finite else self.skipped.get(name, 0) + 1
        if not finite and (accelerator.scaler is None or self.skipped[name] >= SKIPS):
            raise FloatingPointError(name)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if name in self.averages:
            self.averages[name].step(self.plain(name).parameters())

    def set_rates(self, progress: float) -> None:
        """Linear warm-up, then a cosine to a hundredth. `progress` in [0, 1]."""
        self.progress = progress
        warmup = self.settings.warmup
        if progress < warmup:
            factor = (progress + 1e-3) / (warmup + 1e-3)
        else:
            factor = 0.01 + 0.99 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor


class averaged:
    """The running averages stand in the networks inside the block."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        for name, average in self.trainer.averages.items():
            parameters = list(self.trainer.plain(name).parameters())
            average.store(parameters)
            average.copy_to(parameters)
        for network in self.trainer.networks.values():
            network.eval()

    def __exit__(self, *_: object) -> None:
        for name, average in self.trainer.averages.items():
            average.restore(self.trainer.plain(name).parameters())
        for network in self.trainer.networks.values():
            network.train()


def run_stage(
    trainer: Trainer, minutes: float | None = None, checkpoint_seconds: float = 120.0
) -> Path:
    """Train a stage to its end and write its weights below the run's folder.

    Args:
        minutes: a budget; the learning rate's schedule then ends when the first of iterations and
            minutes does.
        checkpoint_seconds: time between checkpoints.

    Raises:
        PreconditionError: a checkpoint of another configuration is there.
        AddbenchError: the loss is not finite, or the disk is full; the last checkpoint stays.
    """
    context = trainer.context
    accelerator = context.accelerator
    batch, processes = trainer.settings.batch, accelerator.num_processes
    if batch % processes:
        raise PreconditionError(
            f"a batch of {batch} cannot be shared by {processes} processes",
            "each takes an equal part of it",
            f"set the stage's batch to a multiple of {processes}",
        )
    config = context.config.stage_hash(trainer.name)
    checkpoints = context.folder / trainer.name / "checkpoints"
    torch.manual_seed(context.seed(trainer.name, "start"))
    trainer.setup()
    state = checkpointing.resume(accelerator, checkpoints, config, trainer.shards)
    state = state or checkpointing.State(0, 0.0, config)
    total, step = trainer.settings.iterations, state.step
    clock = _Clock(accelerator, state.seconds, minutes)
    log = TrainingLog(context, trainer.name, step, total)
    saved_at = clock.seconds

    def save() -> None:
        reached = checkpointing.State(step, clock.seconds, config, bool(trainer.shards))
        checkpointing.save(accelerator, checkpoints, reached, trainer.shards)

    grids_wanted = GRIDS if total >= 200 else 1
    grids = int(clock.progress(step, total) * grids_wanted)
    while clock.progress(step, total) < 1:
        trainer.set_rates(clock.progress(step, total))
        try:
            losses = trainer.step(step)
        except FloatingPointError as error:
            log.close()
            kept = checkpointing.latest(checkpoints)
            raise AddbenchError(
                f"stage {trainer.name} stopped at step {step}: the loss is not finite",
                f"the gradient of the {error} has NaN or infinity in it, and was not applied",
                f"the last good state is {kept or 'the start: nothing was saved yet'}; lower the"
                " learning rate in another --run, or look at the log for where it began to grow",
            ) from error
        step += 1
        clock.tick(step)
        log.losses(step, clock, {name: _mean(accelerator, value) for name, value in losses.items()})
        if clock.seconds - saved_at >= checkpoint_seconds:
            save()
            saved_at = clock.seconds
        if int(clock.progress(step, total) * grids_wanted) > grids:
            grids = int(clock.progress(step, total) * grids_wanted)
            with averaged(trainer):
                log.grid(step, *trainer.grid())
    log.close()
    save()
    done = {
        "config": config,
        "steps": step,
        "seconds": round(clock.seconds, 1),
        "minutes": minutes,
        "git_revision": revision(),
    }
    return _finish(trainer, done)


def _finish(trainer: Trainer, done: dict[str, Any]) -> Path:
    """Weights and `stage.json` beside the checkpoints, each file whole or not there."""
    context = trainer.context
    folder = context.folder / trainer.name
    with averaged(trainer):
        trainer.collect()
        if context.accelerator.is_main_process:
            kept = "the stage's last checkpoint is intact"
            with checkpointing.writing(f"the weights of stage {trainer.name}", folder, kept):
                with staged_folder(folder / "weights") as scratch:
                    trainer.write(scratch)
                write_json(folder / DONE, done)
    context.accelerator.wait_for_everyone()
    return folder / "weights"


class _Clock:
    """Seconds spent in a stage over all resumes, the same on every process."""

    def __init__(self, accelerator: Any, spent: float, minutes: float | None) -> None:
        self.accelerator, self.spent, self.minutes = accelerator, spent, minutes
        self.started = time.monotonic()
        self.seconds = spent

    def tick(self, step: int) -> None:
        now = self.spent + time.monotonic() - self.started
        if self.accelerator.num_processes == 1:
            self.seconds = now
        elif step % AGREE_EVERY == 0:
            from accelerate.utils import broadcast

            value = torch.tensor([now], dtype=torch.float64, device=self.accelerator.device)
            self.seconds = float(broadcast(value))

    def progress(self, step: int, total: int) -> float:
        """Share of the stage that is done; by the clock too when there is a budget."""
        by_clock = self.seconds / (self.minutes * 60) if self.minutes else 0.0
        return min(1.0, max(step / total, by_clock))


def _mean(accelerator: Any, value: Tensor) -> float:
    """Mean over processes."""
    return float(accelerator.reduce(value.detach().float(), "mean"))
