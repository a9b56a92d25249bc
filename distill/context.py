"""What every stage of a run shares: config, device, data, folders, seeded noise."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import PreconditionError
from core.files import read_json
from distill.config import Config
from distill.data import Source, batch_indices, open_source

DONE = "stage.json"


@dataclass
class Context:
    """A run in `folder`; `base` is another run whose finished stages may be used; `shard`: large
    networks lie in shards over the processes."""

    config: Config
    folder: Path
    accelerator: Any
    base: Path | None = None
    shard: bool = False

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @functools.cached_property
    def source(self) -> Source:
        return open_source(self.config.data)

    def finished(self, stage: str) -> Path | None:
        """The output folder of a stage finished with this configuration, in the run or its base."""
        wanted = self.config.stage_hash(stage)
        for run in (self.folder, self.base):
            done = None if run is None else run / stage / DONE
            if done is not None and done.exists() and read_json(done)["config"] == wanted:
                return done.parent
        return None

    def weights(self, stage: str) -> Path:
        """Like `finished`, for a stage that must be."""
        folder = self.finished(stage)
        if folder is not None:
            return folder
        stale = (self.folder / stage / DONE).exists()
        raise PreconditionError(
            f"stage {stage} is not finished in {self.folder}",
            "its weights are from another configuration" if stale else "its weights are not there",
            f"run --stage {stage} first, or all stages without --stage",
        )

    def generator(self, stage: str, step: int) -> torch.Generator:
        """Random numbers of one step: a function of seed, stage and step alone."""
        return torch.Generator().manual_seed(self.seed(stage, step))

    def seed(self, stage: str, step: int | str) -> int:
        key = f"{self.config.seed}/{stage}/{self.config.stage(stage).seed}/{step}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:7], "big")

    def mine(self, batch: int) -> slice:
        """This process's part of a global batch."""
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        return slice(rank * batch // count, (rank + 1) * batch // count)

    def indices(self, batch: int, step: int) -> list[int]:
        """This process's pictures of one step."""
        whole = batch_indices(len(self.source.captions), batch, step, self.config.seed)
        return whole[self.mine(batch)]

    def share(self, whole: Tensor) -> Tensor:
        """This process's part of random numbers drawn for the global batch, on the device."""
        return whole[self.mine(len(whole))].to(self.device)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        return self.source.pictures(indices).to(self.device)
