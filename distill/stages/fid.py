"""Stage `fid`: the network that FID measures with, on training combinations only.

Of another architecture and another seed than the discriminator's, so that a student cannot please
it by pleasing the network that it was trained against. It answers which objects a whole picture
holds, and where.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.features import FidFeatures
from distill.loop import Trainer
from distill.stages.features import (
    FACTS,
    Answers,
    drawn_source,
    fact_labels,
    fact_loss,
    recall,
    save_network,
)


class FidTrainer(Trainer):
    name = "fid"

    def setup(self) -> None:
        self.source = drawn_source(self)
        self.learn("fid", Answers(FidFeatures(self.config.networks.fid_channels, FACTS)))

    def step(self, step: int) -> dict[str, Tensor]:
        context = self.context
        indices = context.indices(self.settings.batch, step)
        wanted = fact_labels(
            [self.source.scenes[i] for i in indices], [self.source.layouts[i] for i in indices]
        )
        answers = self.networks["fid"](context.pictures(indices))
        loss = fact_loss(answers, torch.from_numpy(wanted).to(context.device))
        self.update("fid", loss)
        return {"facts": loss}

    @torch.no_grad()
    def grid(self) -> tuple[NDArray[np.uint8] | None, dict[str, float]]:
        """No pictures; the share of kinds recalled on training pictures."""
        return None, {"recall": recall(self, self.plain("fid"))}

    def write(self, folder: Path) -> None:
        settings = {"channels": list(self.config.networks.fid_channels), "facts": FACTS}
        save_network(self.plain("fid").network, folder, "fid", settings)
