"""Frozen feature networks: what the discriminator's heads stand on, and what FID measures with.

The preset trains two of its own on training combinations only: `PictureFeatures`, a residual
network that names what stands at each place (the discriminator's), and `FidFeatures`, a plain
network of other layers and another seed that names what is in the whole picture. At scale the
discriminator stands on DINOv2 from a local folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.errors import PreconditionError


class FeatureNetwork(Protocol):
    """Pictures [batch, 3, size, size] in [-1, 1] -> feature maps and an embedding of the whole."""

    channels: Sequence[int]
    sides: Sequence[int]
    embedding: int

    def __call__(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]: ...


class Residual(nn.Module):
    """Pre-activation block; halves the side with average pooling, which keeps gradients smooth."""

    def __init__(self, inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        out: Tensor = self.skip(x) + hidden
        return functional.avg_pool2d(out, 2) if self.halve else out


class PictureFeatures(nn.Module):
    """Maps at 1/2, 1/4, 1/8 and 1/16 of the picture's side, and an embedding of 128.

    `classes` is how many words each question has (shape, colour, size; see `stages.features`);
    the answers are a training aid and not part of what the discriminator sees.
    """

    embedding = 128

    def __init__(
        self, channels: Sequence[int], size: int, classes: Sequence[int], facts: int
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.sides = tuple(size // 2 ** (level + 1) for level in range(len(channels)))
        self.stem = nn.Conv2d(3, channels[0], 4, stride=2, padding=1)
        self.levels = nn.ModuleList()
        inputs = channels[0]
        for level, width in enumerate(channels):
            blocks = [Residual(inputs, width, halve=level > 0)]
            if level > 0:
                blocks.append(Residual(width, width, halve=False))
            self.levels.append(nn.Sequential(*blocks))
            inputs = width
        self.head = nn.Linear(inputs * self.sides[-1] ** 2, self.embedding)
        self.facts = nn.Linear(self.embedding, facts)
        self.answers = nn.ModuleList(nn.Conv2d(width, sum(classes), 1) for width in channels)
        for level, width in enumerate(channels):
            self.register_buffer(f"mean{level}", torch.zeros(1, width, 1, 1))
            self.register_buffer(f"deviation{level}", torch.ones(1, width, 1, 1))

    def maps(self, pictures: Tensor) -> list[Tensor]:
        hidden = self.stem(pictures)
        maps = []
        for level in self.levels:
            hidden = level(hidden)
            maps.append(hidden)
        return maps

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """Standardised maps (per channel, over training pictures) and the embedding."""
        maps = self.maps(pictures)
        embedding = self.head(functional.silu(maps[-1]).flatten(1))
        standard = [
            (level_map.float() - self.get_buffer(f"mean{level}"))
            / self.get_buffer(f"deviation{level}")
            for level, level_map in enumerate(maps)
        ]
        return standard, embedding

    def answer(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits per place of each map, and logits of facts about the whole picture."""
        maps = self.maps(pictures)
        embedding = self.head(functional.silu(maps[-1]).flatten(1))
        places = [ask(level_map) for ask, level_map in zip(self.answers, maps, strict=True)]
        return places, self.facts(embedding)

    @torch.no_grad()
    def standardise(self, pictures: Tensor) -> None:
        """Take the maps' means and deviations from these pictures."""
        for level, level_map in enumerate(self.maps(pictures)):
            deviation, mean = torch.std_mean(level_map.float(), (0, 2, 3), keepdim=True)
            self.get_buffer(f"mean{level}").copy_(mean)
            self.get_buffer(f"deviation{level}").copy_(deviation.clamp_min(1e-3))


class FidFeatures(nn.Module):
    """A plain stack of strided ReLU layers with batch norm; pictures -> features [batch, 64]."""

    def __init__(self, channels: Sequence[int], facts: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for channel in channels:
            layers += [
                nn.Conv2d(inputs, channel, 5, stride=2, padding=2),
                nn.BatchNorm2d(channel),
                nn.ReLU(),
            ]
            inputs = channel
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.neck = nn.Sequential(nn.Linear(inputs * 16, width), nn.LayerNorm(width))
        self.facts = nn.Linear(width, facts)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.neck(self.body(pictures))

    def answer(self, pictures: Tensor) -> Tensor:
        return self.facts(self(pictures))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
TRANSFORMERS = {
    "dinov2": ("Dinov2Model", IMAGENET),
    "vit": ("ViTModel", IMAGENET),
    "clip": ("CLIPVisionModel", CLIP),
    "clip_vision_model": ("CLIPVisionModel", CLIP),
}
"""Class in transformers, and mean and deviation of its pictures, by a folder's model_type: DINOv2,
DINO (the paper's DINOv1, such as facebook/dino-vits16) and CLIP."""


class TransformerFeatures(nn.Module):
    """A vision transformer from a local transformers folder: DINOv2, DINO or CLIP.

    Token maps of four layers, and the CLS token. Pictures are resized to a multiple of the patch
    (DINOv2's is 14 pixels; the paper takes 518 for 512), and the positions interpolated.
    """

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__()
        import transformers

        kind = _model_type(folder)
        name, (mean, deviation) = TRANSFORMERS[kind]
        try:
            self.network = getattr(transformers, name).from_pretrained(
                folder, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise PreconditionError(
                f"{folder} cannot be loaded as a feature network",
                str(error),
                "download the folder again",
            ) from error
        # DINOv2 does so by itself.
        self.options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
        config = self.network.config
        self.patch = config.patch_size
        self.side = -(-size // self.patch)
        depth = config.num_hidden_layers
        self.layers = tuple(sorted({max(1, round(depth * part / 4)) for part in range(1, 5)}))
        self.channels = (config.hidden_size,) * len(self.layers)
        self.sides = (self.side,) * len(self.layers)
        self.embedding = config.hidden_size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1))

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        pixels = (pictures / 2 + 0.5 - self.get_buffer("mean")) / self.get_buffer("deviation")
        pixels = functional.interpolate(
            pixels, (self.side * self.patch,) * 2, mode="bicubic", antialias=True
        )
        out = self.network(pixel_values=pixels, output_hidden_states=True, **self.options)
        maps = []
        for layer in self.layers:
            tokens = functional.layer_norm(out.hidden_states[layer], (self.embedding,))
            tokens = tokens[:, -(self.side**2) :].transpose(1, 2)
            maps.append(tokens.unflatten(2, (self.side, self.side)))
        return maps, out.last_hidden_state[:, 0]


def _model_type(folder: Path) -> str:
    from core.files import read_json

    config = folder / "config.json"
    kind = read_json(config).get("model_type") if config.exists() else None
    if kind not in TRANSFORMERS:
        raise PreconditionError(
            f"{folder} is not the folder of a feature network",
            f"its model_type is {kind!r}" if config.exists() else "it has no config.json",
            f"pass a folder of {', '.join(sorted(TRANSFORMERS))} in transformers format as"
            " networks.features, e.g. of facebook/dinov2-small",
        )
    return str(kind)


def load_features(folder: Path, name: str) -> nn.Module:
    """`pictures` or `fid` from the features stage's weights, frozen.

    Raises:
        PreconditionError: the files are not there.
    """
    from safetensors.torch import load_file

    from core.files import read_json

    if not (folder / f"{name}.safetensors").exists():
        raise PreconditionError(
            f"there is no feature network {name!r} in {folder}",
            f"{name}.safetensors is missing",
            "run `addbench train --stage features`, or --stage fid",
        )
    settings = read_json(folder / f"{name}.json")
    network: nn.Module = (PictureFeatures if name == "pictures" else FidFeatures)(**settings)
    network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return network.eval().requires_grad_(False)
