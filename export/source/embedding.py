"""Learned vectors of a token (textual inversion), put into a text encoder and its tokenizer.

A token of several vectors is several tokens, `<x> <x>_1 <x>_2`, as diffusers names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.source.layout import CheckpointError, require_whole

if TYPE_CHECKING:
    from torch import Tensor, nn

OF_ENCODER = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""How files for SDXL name the vectors of its two encoders."""
NAMELESS = ("emb_params", *OF_ENCODER)
"""Keys that are no token."""


@dataclass(frozen=True)
class Embedding:
    """The vectors of one token by part, each [count, width]."""

    token: str
    vectors: dict[str, Tensor]

    def tokens(self, part: str) -> list[str]:
        """Return the names of the vectors of a part; empty where it has none."""
        count = len(self.vectors.get(part, ()))
        return [f"{self.token}_{i}" if i else self.token for i in range(count)]


def read_embedding(
    file: Path, token: str | None, widths: Sequence[int], allow_pickle: bool
) -> Embedding:
    """Read the vectors of a file and find the text encoder that they are for by their width.

    Args:
        widths: of the text encoders, in order.
    """
    tensors = _load(file, allow_pickle)
    keys = [key for key in tensors if key not in NAMELESS]
    token = token or (keys[0] if keys else file.stem)
    vectors = {}
    for key, tensor in tensors.items():
        rows = tensor.reshape(-1, tensor.shape[-1])
        fitting = [i for i, width in enumerate(widths) if width == rows.shape[1]]
        part = OF_ENCODER.get(key) or (
            ("text_encoder", "text_encoder_2")[fitting[0]] if len(fitting) == 1 else ""
        )
        place = ("text_encoder", "text_encoder_2")[: len(widths)]
        if part not in place or widths[place.index(part)] != rows.shape[1] or part in vectors:
            raise CheckpointError(
                f"{file.name} does not fit this model's text encoders",
                f"{key} is {rows.shape[1]} wide; the encoders are {', '.join(map(str, widths))}",
                "pass an embedding that was made for this model",
            )
        vectors[part] = rows
    return Embedding(token, vectors)


def _load(file: Path, allow_pickle: bool) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        require_whole(file)
        return dict(load_file(file))
    if not allow_pickle:
        raise CheckpointError(
            f"{file} is a pickle",
            "reading a pickle can run code that is in the file",
            "get the safetensors, or pass --allow-pickle if you trust where it is from",
        )
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if "string_to_param" in content:  # as the first web UIs save them
            return {str(content.get("name") or file.stem): content["string_to_param"]["*"].detach()}
        return dict(content)
    except Exception as error:  # a pickle fails in any way
        raise CheckpointError(
            f"{file} cannot be read as an embedding", " ".join(str(error).split())[:300],
            "pass a .safetensors file",
        ) from error  # fmt: skip


def extend(module: nn.Module, rows: Tensor | None, count: int) -> None:
    """Give a text encoder `count` rows of token embeddings, the last of them `rows`."""
    import torch

    table: Any = module.get_input_embeddings()  # type: ignore[operator]
    old = table.weight.data
    if old.device.type == "meta":
        weight = torch.empty(count, old.shape[1], device="meta", dtype=old.dtype)
    else:
        new = old[:0] if rows is None else rows.to(old.dtype)
        weight = torch.cat([old[: count - len(new)], new])
    module.set_input_embeddings(torch.nn.Embedding.from_pretrained(weight))  # type: ignore[operator]
