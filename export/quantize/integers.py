"""Numbers to integers and back, as the kernels have them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def quantise_columns(weight: Floats, bits: int) -> tuple[NDArray[np.int8], Floats]:
    """[K, N] -> int8 [K, N] in +-(2**(bits-1) - 1), and the scale [N] of each column."""
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(axis=0) / np.float32(largest)
    scale[scale == 0] = 1.0  # a column of zeros: any scale will do
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def quantise_blocks(weight: Floats, bits: int, block: int) -> tuple[Bytes, Floats]:
    """[K, N] -> uint8 [N, blocks, block * bits / 8] and scales [N, blocks], blocks along K.

    The layout of onnxruntime's MatMulNBits: the last block is filled with zeros, the lower half of
    a byte comes first, and the middle of the range (8 or 128) means 0. The number of a block that
    is furthest from 0 becomes the range's lower end, which has one step more than the upper.
    """
    depth, columns = weight.shape
    blocks, middle = -(-depth // block), 2 ** (bits - 1)
    padded = np.zeros((columns, blocks * block), np.float32)
    padded[:, :depth] = weight.T
    parts = padded.reshape(columns, blocks, block)
    furthest = np.abs(parts).argmax(axis=2)[..., None]
    scale = np.take_along_axis(parts, furthest, 2)[..., 0] / np.float32(-middle)
    scale[scale == 0] = 1.0
    levels = np.rint(parts / scale[..., None]) + middle
    numbers = np.clip(levels, 0, 2 * middle - 1).astype(np.uint8)
    if bits == 4:
        numbers = numbers[..., ::2] | (numbers[..., 1::2] << 4)
    return np.ascontiguousarray(numbers), scale.astype(np.float32)


def restore_blocks(numbers: Bytes, scales: Floats, bits: int, depth: int) -> Floats:
    """What `quantise_blocks` made, as float32 [K, N]."""
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*scales.shape, -1)
    restored = (numbers.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return np.ascontiguousarray(restored.reshape(len(restored), -1)[:, :depth].T)


def round_activations(values: Floats, low: float, high: float) -> Floats:
    """`values` after DynamicQuantizeLinear over a tensor from `low` to `high`, and back.

    The arithmetic of the operator: a range that holds 0, 255 steps, ties to even.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255 or 1.0)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    rounded: Floats = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
    return rounded.astype(np.float32)


def approximation(weight: Floats, bits: int, block: int) -> Floats:
    """`weight` [K, N] as it is after quantisation; `block` 0: by columns."""
    if block:
        return restore_blocks(*quantise_blocks(weight, bits, block), bits, len(weight))
    numbers, scale = quantise_columns(weight, bits)
    return numbers * scale
