"""Stage `features`: the discriminator's feature network, on training combinations only.

It answers, at each place of each of its maps, which shape, colour and size stands there, and which
objects the whole picture holds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from core.errors import PreconditionError
from core.files import write_json
from distill.data import ScenePool
from distill.features import FidFeatures, PictureFeatures
from distill.loop import Trainer
from distill.shapes import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    EXTENT,
    SHAPES,
    SIZES,
    Layout,
    Scene,
)

QUESTIONS = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SIZES))
"""Choices at each place: nothing, or which shape, which colour, which size."""
KINDS = len(SHAPES) * len(COLOURS) * len(SIZES)
FACTS = KINDS + 9 * (len(SHAPES) + len(COLOURS)) + len(BACKGROUNDS)
"""Which kinds of object; which shape and colour in which ninth of the picture; background."""


def place_labels(items: list[Scene], layouts: list[Layout], side: int) -> NDArray[np.int64]:
    """[n, 3, side, side]: what covers the middle of each place; 0 nothing."""
    step = CANVAS / side
    grid = (np.arange(side) + 0.5) * step
    labels = np.zeros((len(items), 3, side, side), np.int64)
    for index, (scene, (centres, radii)) in enumerate(zip(items, layouts, strict=True)):
        for item, centre, radius in zip(scene.objects, centres, radii, strict=True):
            reach = max(radius * EXTENT[item.shape], step * 0.75)
            inside = np.hypot(grid[None] - centre[0], grid[:, None] - centre[1]) <= reach
            answers = (SHAPES.index(item.shape), list(COLOURS).index(item.colour),
                     SIZES.index(item.size))  # fmt: skip
            for question, word in enumerate(answers):
                labels[index, question][inside] = word + 1
    return labels


def fact_labels(items: list[Scene], layouts: list[Layout]) -> NDArray[np.float32]:
    """[n, FACTS] of 0 and 1."""
    labels = np.zeros((len(items), FACTS), np.float32)
    for row, scene, (centres, _) in zip(labels, items, layouts, strict=True):
        for item, (x, y) in zip(scene.objects, centres, strict=True):
            shape, colour = SHAPES.index(item.shape), list(COLOURS).index(item.colour)
            row[(shape * len(COLOURS) + colour) * len(SIZES) + SIZES.index(item.size)] = 1
            ninth = min(2, int(y * 3 / CANVAS)) * 3 + min(2, int(x * 3 / CANVAS))
            start = KINDS + ninth * (len(SHAPES) + len(COLOURS))
            row[start + shape] = row[start + len(SHAPES) + colour] = 1
        row[FACTS - len(BACKGROUNDS) + list(BACKGROUNDS).index(scene.background)] = 1
    return labels


def feature_settings(channels: tuple[int, ...], size: int) -> dict[str, Any]:
    return {"channels": list(channels), "size": size, "classes": list(QUESTIONS), "facts": FACTS}


class Answers(nn.Module):
    """A network's training questions as a forward, so that data parallelism sees it."""

    def __init__(self, network: PictureFeatures | FidFeatures) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network.answer(x)


def drawn_source(trainer: Trainer) -> ScenePool:
    """The pool of drawn pictures, which alone knows what stands where."""
    source = trainer.context.source
    if not isinstance(source, ScenePool):
        raise PreconditionError(
            f"the {trainer.name} stage learns from drawn shapes only",
            f"data.kind is {trainer.config.data.kind}, which says nothing of what stands where",
            f"leave `{trainer.name}` out of stages; set networks.features to a DINOv2 folder",
        )
    return source


class FeaturesTrainer(Trainer):
    name = "features"

    def setup(self) -> None:
        self.source = drawn_source(self)
        networks, size = self.config.networks, self.config.data.size
        self.described = feature_settings(networks.feature_channels, size)
        self.learn("features", Answers(PictureFeatures(**self.described)))

    def step(self, step: int) -> dict[str, Tensor]:
        context, batch = self.context, self.settings.batch
        generator = context.generator(self.name, step)
        indices = context.indices(batch, step)
        pictures = context.pictures(indices)
        # Half of the pictures get noise, of random strength: the student's are never clean.
        strength = (torch.rand((batch, 1, 1, 1), generator=generator) - 0.5).clamp_min(0) * 0.6
        drawn = torch.randn((batch, *pictures.shape[1:]), generator=generator)
        pictures = pictures + context.share(strength * drawn)
        places, facts = self.networks["features"](pictures)
        items = [self.source.scenes[i] for i in indices]
        layouts = [self.source.layouts[i] for i in indices]
        wanted = torch.from_numpy(fact_labels(items, layouts)).to(context.device)
        where = torch.stack([self._where(answer, items, layouts) for answer in places]).mean()
        what = fact_loss(facts, wanted)
        self.update("features", where + what)
        return {"places": where, "facts": what}

    def _where(self, answer: Tensor, items: list[Scene], layouts: list[Layout]) -> Tensor:
        labels = torch.from_numpy(place_labels(items, layouts, answer.shape[-1])).to(answer.device)
        pieces = answer.float().split(QUESTIONS, 1)
        losses = [
            # Most places are empty: weigh them less.
            functional.cross_entropy(
                piece, labels[:, question], piece.new_tensor([0.2] + [1.0] * (piece.shape[1] - 1))
            )
            for question, piece in enumerate(pieces)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def grid(self) -> tuple[NDArray[np.uint8] | None, dict[str, float]]:
        """No pictures; the share of kinds recalled on training pictures."""
        return None, {"recall": recall(self, lambda x: self.plain("features")(x)[1])}

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        network = self.plain("features").network
        network.standardise(self.context.pictures(range(min(512, len(self.source.captions)))))
        save_network(network, folder, "pictures", self.described)


def recall(trainer: Trainer, answer: Callable[[Tensor], Tensor]) -> float:
    """Share of the kinds of object in 256 training pictures that a network names."""
    source = drawn_source(trainer)
    indices = list(range(min(256, len(source.captions))))
    wanted = fact_labels([source.scenes[i] for i in indices], [source.layouts[i] for i in indices])
    said = (answer(trainer.context.pictures(indices))[:, :KINDS] > 0).cpu().numpy()
    return float(said[wanted[:, :KINDS] > 0].mean())


def save_network(network: nn.Module, folder: Path, name: str, settings: dict[str, Any]) -> None:
    """`name.safetensors` and the settings to build it again, as `load_features` reads them."""
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, folder / f"{name}.safetensors")
    write_json(folder / f"{name}.json", settings)


def fact_loss(answer: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy, summed over facts: each of them is rare."""
    loss = functional.binary_cross_entropy_with_logits(answer.float(), wanted, reduction="none")
    return loss.sum(1).mean() / 10
