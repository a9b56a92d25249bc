"""Q, K and V of a self-attention as one matrix product.

At 512 pixels a UNet's self-attentions have 1024 or 256 tokens: a product for each of the three has
too few tiles to keep a large GPU's multiprocessors busy (SDXL: 20 tiles of 128 x 128 for 132 of
them), and 210 small kernels become 70.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def fuse_projections(unet: nn.Module) -> int:
    """Fuse every self-attention of `unet`, a diffusers UNet, which is changed in place.

    Those that are no plain attention, or whose projections are no plain products (a LoRA's), are
    left as they are.

    Returns:
        How many were fused.
    """
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    blocks: list[Any] = [block for block in unet.modules() if is_plain(block)]
    for block in blocks:
        block.fuse_projections()
        block.to_qkv.requires_grad_(False)
        del block.to_q, block.to_k, block.to_v  # their copies in `to_qkv` are used
        block.set_processor(FusedAttnProcessor2_0())
    return len(blocks)


def is_plain(block: Any) -> bool:
    """Whether `block` is a self-attention as diffusers' fused processor computes it."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    if type(block) is not Attention or block.is_cross_attention:
        return False
    if type(block.processor) is not AttnProcessor2_0 or block.added_kv_proj_dim is not None:
        return False
    return all(type(getattr(block, name)) is nn.Linear for name in ("to_q", "to_k", "to_v"))
