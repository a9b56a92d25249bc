"""What the machine at hand can do at most: matrix products, convolutions, copies.

Each probe grows its problem until one call takes 0.3 s, then repeats it until 2 s are over; the
best call counts, since everything that disturbs makes a call slower, never faster. A disturbance
that lasts is seen by a second look after all else was probed: where the two differ, there is a
third, and the best of all counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GROW_UNTIL_S = 0.3
STOP_AFTER_S = 2.0
FLOATS = ("fp32", "fp16", "bf16")
AGREE = 0.10
"""How far two looks at a ceiling may differ, as a share of the better; else there is a third."""
GPU_LARGEST = 16
"""Largest scale on a GPU: 8192 x 8192 matrices, a millisecond's work, are as fast as it gets."""
NATIVE_FLAGS = {
    "bf16": ("amx_bf16", "avx512_bf16"),
    "fp16": ("amx_fp16",),
    "int8": ("avx2", "asimddp"),
}
"""CPU flags, one of which a dtype needs: emulated it runs hundreds of times slower than FP32."""


@dataclass(frozen=True)
class Ceilings:
    """Peaks of one device.

    Attributes:
        tflops: dtype -> kind (`matmul`, `conv`) -> TFLOP/s of direct algorithms.
        gb_per_s: memory traffic, reads and writes together.
        provenance: `measured` here, or `published` by the maker.
    """

    device: str
    tflops: dict[str, dict[str, float]]
    gb_per_s: float
    provenance: str

    def columns(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, columns: dict[str, Any]) -> Ceilings:
        return cls(**columns)


def native_dtypes() -> list[str]:
    """Dtypes that this CPU computes without emulating them; FP32 always."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return ["fp32", *(name for name, needs in NATIVE_FLAGS.items() if flags & set(needs))]


def measure(dtypes: Sequence[str] | None = None) -> Ceilings:
    """Measure the CPU on its physical cores: about 5 s a dtype (those it computes natively)."""
    import torch

    from backends.base import physical_cores

    torch.set_num_threads(physical_cores())
    with torch.inference_mode():
        native = native_dtypes()
        probed = [name for name in dtypes or native if name in native]
        return looked_at("cpu", probed, 256)


def measure_gpu(dtypes: Sequence[str], stop_after_s: float | None = None) -> Ceilings:
    """Measure the GPU that torch uses now; `stop_after_s` (STOP_AFTER_S) for each probe.

    Dtypes without a probe on a GPU (INT8, FP8) are left out.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # as what is held against it: the best algorithm there is
    with torch.inference_mode(), torch.device("cuda"):
        probed = [name for name in dtypes if name in FLOATS]
        return looked_at("cuda", probed, GPU_LARGEST, stop_after_s)


def looked_at(
    device: str, dtypes: Sequence[str], largest: int, stop_after_s: float | None = None
) -> Ceilings:
    """The best of two looks at every ceiling, and of a third where the two differ.

    Args:
        stop_after_s: of all looks at one ceiling together, without the third.
    """
    each_s = (STOP_AFTER_S if stop_after_s is None else stop_after_s) / 2

    def look() -> Ceilings:
        tflops = {name: measure_dtype(name, each_s, largest) for name in dtypes}
        return Ceilings(device, tflops, copy_rate(each_s), "measured")

    looks = [look(), look()]
    if not agree(*looks):
        looks.append(look())
    tflops = {
        name: {
            kind: max(each.tflops[name][kind] for each in looks) for kind in looks[0].tflops[name]
        }
        for name in dtypes
    }
    return Ceilings(device, tflops, max(each.gb_per_s for each in looks), "measured")


def agree(first: Ceilings, second: Ceilings) -> bool:
    """Whether two looks say the same of every ceiling."""
    pairs = [
        (rate, second.tflops[name][kind])
        for name, kinds in first.tflops.items()
        for kind, rate in kinds.items()
    ]
    pairs.append((first.gb_per_s, second.gb_per_s))
    return all(min(pair) >= (1 - AGREE) * max(pair) for pair in pairs)


def measure_dtype(
    name: str, stop_after_s: float | None = None, largest: int = 256
) -> dict[str, float]:
    """TFLOP/s by kind, on torch's default device."""
    import torch

    if name == "int8":
        # Torch has no INT8 convolution; one over its windows is a product of matrices.
        rate = best_rate(integer_matmul, largest, stop_after_s) / 1e12
        return {"matmul": rate, "conv": rate}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]

    def matmul(scale: int) -> tuple[Callable[[], Any], float]:
        """[n, n] x [n, n], n = 512 * scale: 2 n^3 FLOPs."""
        n = 512 * scale
        left, right = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        out = torch.empty(n, n, dtype=dtype)
        return lambda: torch.mm(left, right, out=out), 2.0 * n**3

    def conv(scale: int) -> tuple[Callable[[], Any], float]:
        """3x3, 320 -> 320 channels on [scale, 320, 64, 64], as in SDXL's first UNet block."""
        image = torch.randn(scale, 320, 64, 64).to(dtype).to(memory_format=torch.channels_last)
        layer = torch.nn.Conv2d(320, 320, 3, padding=1, dtype=dtype)
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return lambda: layer(image), 2.0 * scale * 320 * 320 * 9 * 64 * 64

    return {
        kind: best_rate(make, most, stop_after_s) / 1e12
        for kind, make, most in (("matmul", matmul, largest), ("conv", conv, 4 * largest))
    }


def integer_matmul(scale: int) -> tuple[Callable[[], Any], float]:
    """int8 [n, n] x int8 [n, n] -> int32, n = 512 * scale: 2 n^3 operations."""
    import torch

    n = 512 * scale
    left, right = (torch.randint(-63, 64, (n, n), dtype=torch.int8) for _ in range(2))
    out = torch.empty(n, n, dtype=torch.int32)
    return lambda: torch._int_mm(left, right, out=out), 2.0 * n**3


def copy_rate(stop_after_s: float | None = None) -> float:
    """GB/s of a copy, bytes read and bytes written both counted."""
    import torch

    def copy(scale: int) -> tuple[Callable[[], Any], float]:
        source = torch.ones(scale * 2**22)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2.0 * source.numel() * source.element_size()

    # Past 4 GiB a buffer says nothing new, whatever the time.
    return best_rate(copy, 128, stop_after_s) / 1e9


def best_rate(
    make: Callable[[int], tuple[Callable[[], Any], float]],
    largest: int = 256,
    stop_after_s: float | None = None,
) -> float:
    """Units of work per second: the problem doubles until it is long enough, the best call wins."""
    stop_after_s = STOP_AFTER_S if stop_after_s is None else stop_after_s
    scale, started = 1, time.perf_counter()
    best = 0.0
    call, work = make(scale)
    call()
    wait()
    while True:
        begun = time.perf_counter()
        call()
        wait()
        seconds = time.perf_counter() - begun
        best = max(best, work / seconds)
        if time.perf_counter() - started > stop_after_s:
            return best
        if seconds < GROW_UNTIL_S and scale < largest:
            scale *= 2
            call, work = make(scale)
            call()
            wait()


def wait() -> None:
    """Wait for the device, where there is one that works on its own."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
