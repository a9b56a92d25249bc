"""The two files of TAESD's own release, `taesd_encoder` and `taesd_decoder`, for `--taesd`.

Their tensors are numbered as the layers of two stacks (github.com/madebyollin/taesd, taesd.py).
diffusers' AutoencoderTiny has the same layers, but for the clamp that the decoder begins with.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from export.source.layout import CheckpointError, require_whole

if TYPE_CHECKING:
    from torch import Tensor

NUMBERED = re.compile(r"\d+\..*(weight|bias)")
NEXT = "pass taesd_decoder.pth or .safetensors of the release, with its encoder beside it"


def encoder_of(decoder: str) -> str:
    """Return the name of the file that the release has beside a decoder's."""
    return decoder.replace("_decoder", "_encoder")


def require_halves(file: Path, allow_pickle: bool) -> None:
    """Check that a file of `--taesd` can be read, and with it the other half of the release's.

    Raises:
        CheckpointError: it is torn, a pickle that was not asked for, or a half without the other.
    """
    if file.suffix != ".pth":
        require_whole(file)
    elif not allow_pickle:
        raise CheckpointError(
            f"{file} holds its weights as a pickle",
            "reading a pickle can run code that is in the file",
            "get the safetensors, or pass --allow-pickle if you trust where it is from",
        )
    numbered = all(NUMBERED.fullmatch(name) for name in read(file))
    if not numbered and file.suffix == ".pth":
        raise CheckpointError(f"{file} is no half of a TAESD", "its layers have other names", NEXT)
    other = file.with_name(encoder_of(file.name))
    if numbered and (other == file or not other.is_file()):
        raise CheckpointError(
            f"{file} is one half of a TAESD", f"{other.name} is no other half beside it", NEXT
        )


def read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of either kind."""
    if file.suffix != ".pth":
        from safetensors.torch import load_file

        return load_file(file)
    import torch

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file, or one with more than tensors
        why = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{file} cannot be read", why, "download it again") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file} is no half of a TAESD", "it holds no named tensors", NEXT)
    return tensors


def both_halves(file: Path) -> dict[str, Tensor] | None:
    """Return the tensors of both files under diffusers' names; None where they have those."""
    decoder = read(file)
    if not all(NUMBERED.fullmatch(name) for name in decoder):
        return None
    encoder = read(file.with_name(encoder_of(file.name)))
    return {f"encoder.layers.{name}": tensor for name, tensor in encoder.items()} | {
        f"decoder.layers.{int(number) - 1}.{rest}": tensor  # the clamp is its layer 0
        for name, tensor in decoder.items()
        for number, _, rest in [name.partition(".")]
    }
