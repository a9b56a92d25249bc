"""Seeded weights of a sane scale, for timing and testing an architecture without its checkpoint."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

RESIDUAL_GAIN = 0.2
"""Gain of a layer that ends a residual branch: n of them add n * 0.04 to a variance of 1, so 70
transformer blocks (210 branches, at most 30 in a row between two projections) stay of order one."""

RESIDUAL_ENDS = (".out_proj", ".fc2", ".to_out.0", ".ff.net.2", ".proj_out", ".conv2", ".conv.4")
CHUNK = 1 << 22
"""Numbers drawn at a time: bounds the FP32 scratch memory to 16 MB a thread."""
DEVICE_CHUNK = 1 << 26
"""The same on a GPU, which wants larger pieces: 256 MB."""


def fill_random(module: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Give every parameter of `module` (on the meta device) values, in place, in `dtype`.

    Each tensor has a generator of its own, seeded with its name, so values depend neither on the
    order nor on the dtype asked for. They are rounded to FP16 always, as the weights of a
    published FP16 checkpoint are: an FP16 bundle and its FP32 reference hold the same numbers.
    """
    jobs = []
    for path, owner in module.named_modules():
        for name, meta in list(owner.named_parameters(recurse=False)):
            parameter = nn.Parameter(torch.empty(meta.shape, dtype=dtype), requires_grad=False)
            owner.register_parameter(name, parameter)
            jobs.append((parameter.data, f"{path}.{name}", *_scale(owner, f"{path}.{name}")))
    local = threading.local()

    def fill(job: tuple[torch.Tensor, str, float, float]) -> None:
        if not hasattr(local, "numbers"):  # kept: freed pieces of this size fragment the heap
            local.numbers = np.empty(CHUNK, np.float32)
            local.half = torch.empty(CHUNK, dtype=torch.float16)
        tensor, name, mean, deviation = job
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), CHUNK):
            piece = flat[start : start + CHUNK]
            numbers = local.numbers[: piece.numel()]
            generator.standard_normal(dtype=np.float32, out=numbers)
            numbers *= np.float32(deviation)
            numbers += np.float32(mean)
            half = local.half[: piece.numel()]
            half.copy_(torch.from_numpy(numbers))
            piece.copy_(half)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(fill, jobs):  # numpy draws outside the interpreter's lock
            pass


def draw_in_place(module: nn.Module, seed: int) -> None:
    """Give every parameter of `module` values where it lies, on any device, in its own dtype.

    Of the same distribution as those of `fill_random`, and rounded to FP16 as those are, but other
    numbers: they come from torch's generator of that device. Seconds for SDXL's 5 GB on a GPU.
    """
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            mean, deviation = _scale(owner, f"{path}.{name}")
            digest = hashlib.sha256(f"{seed} {path}.{name}".encode()).digest()
            generator = torch.Generator(parameter.device)
            generator.manual_seed(int.from_bytes(digest[:8], "little"))
            flat = parameter.data.view(-1)
            for piece in flat.split(DEVICE_CHUNK):
                numbers = torch.randn(len(piece), generator=generator, device=piece.device)
                piece.copy_(numbers.mul_(deviation).add_(mean).half())


def _scale(owner: nn.Module, name: str) -> tuple[float, float]:
    """Mean and standard deviation of one parameter.

    Norms and biases are not exactly 1 and 0: a graph pass may drop or merge equal constants, which
    no trained checkpoint has.
    """
    module, _, kind = name.rpartition(".")
    if isinstance(owner, nn.LayerNorm | nn.GroupNorm):
        return (1.0, 0.1) if kind == "weight" else (0.0, 0.1)
    if isinstance(owner, nn.Embedding):
        return 0.0, 0.7  # token + position: variance 1
    if kind == "bias":
        # The tiny autoencoder draws in [0, 1]: its last convolution (the one with a bias and no
        # residual branch behind it) is centred on grey.
        is_image = module.startswith("decoder.layers.") and module.count(".") == 2
        is_image = is_image and isinstance(owner, nn.Conv2d) and owner.out_channels == 3
        return (0.5 if is_image else 0.0), 0.02
    fan_in = owner.get_parameter("weight")[0].numel()
    gain = RESIDUAL_GAIN if module.endswith(RESIDUAL_ENDS) else 1.0
    return 0.0, gain * fan_in**-0.5
