"""Is the device what it says, does it count right, and what can it do at most?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.gpu.job import GpuJob, Result

QUICK_S = 0.1
SIDE = 512
TOLERANCE = 2e-3
"""The tolerance of an FP16 product of SIDE terms, accumulated in FP32, against FP64: rounding the
inputs and the result costs some 5e-4."""


def check(job: GpuJob, _: Mapping[str, Result]) -> Result:
    """Facts, small checks with a known answer, and the ceilings by dtype and kind."""
    import torch

    checks = {name: outcome(make, job.device) for name, make in CHECKS.items()}
    failed = [name for name, found in checks.items() if found["status"] == "failed"]
    return {
        "status": "failed" if failed else "ok",
        "device": facts(job.device),
        "torch": torch.__version__,
        "checks": checks,
        "ceilings": ceilings(job),
    }


def facts(device: str) -> dict[str, Any]:
    import torch

    if device != "cuda":
        return {"name": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "free_gb": round(torch.cuda.mem_get_info()[0] / 1e9, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def ceilings(job: GpuJob) -> dict[str, Any]:
    from bench.machine.ceilings import Ceilings, copy_rate, measure_dtype, measure_gpu

    seconds = QUICK_S if job.quick else None
    if job.device == "cuda":
        return measure_gpu(["fp16", "fp32"], seconds).columns()
    tflops = {"fp32": measure_dtype("fp32", seconds)}
    return Ceilings("cpu", tflops, copy_rate(seconds), "measured").columns()


def outcome(make: Callable[[str], float | None], device: str) -> dict[str, Any]:
    """`ok` below TOLERANCE, `skipped` for None."""
    error = make(device)
    if error is None:
        return {"status": "skipped", "error": None}
    return {"status": "ok" if error <= TOLERANCE else "failed", "error": error}


def copies(device: str) -> float:
    """Bytes there and back again, through pinned memory on a GPU."""
    import torch

    source = torch.arange(1 << 20, dtype=torch.int32)
    source = source.pin_memory() if device == "cuda" else source
    back = source.to(device, non_blocking=True).to("cpu")
    return float((back != source).sum())


def product(device: str) -> float:
    """A matrix product in FP16 against FP64, the largest relative error of a row."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIDE, SIDE, generator=generator).half() for _ in range(2))
    exact = left.double() @ right.double()
    found = (left.to(device) @ right.to(device)).cpu().double()
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())


def convolution(device: str) -> float:
    """A 3x3 convolution in FP16, channels-last, against FP64."""
    import torch
    from torch.nn.functional import conv2d

    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 64, 16, 16, generator=generator).half()
    weight = torch.randn(64, 64, 3, 3, generator=generator).half()
    exact = conv2d(image.double(), weight.double(), padding=1)
    layout = torch.channels_last
    found = conv2d(
        image.to(device, memory_format=layout),
        weight.to(device, memory_format=layout),
        padding=1,
    )
    return float((found.cpu().double() - exact).norm() / exact.norm())


def captured(device: str) -> float | None:
    """A captured graph reads its inputs anew in every replay."""
    if device != "cuda":
        return None
    import torch

    given = torch.ones(1 << 16, device=device)
    taken = torch.empty_like(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        taken.copy_(given * 2 + 1)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            taken.copy_(given * 2 + 1)
        given.fill_(20.0)
        graph.replay()
    stream.synchronize()
    return float((taken - 41).abs().max())


CHECKS: Mapping[str, Callable[[str], float | None]] = {
    "copies": copies,
    "FP16 product": product,
    "FP16 convolution": convolution,
    "captured graph": captured,
}
