"""Where the time of an image goes: by part against its floor, and by kernel.

A part's time is that of its own captured graph, replayed: what it computes, without what it costs
to launch. The kernels are those of the whole image as it is measured, one captured graph too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.check.parity import SEED, seeded_inputs
from bench.gpu.job import GpuJob, Result
from bench.gpu.parity import opened

if TYPE_CHECKING:
    from backends.pipeline.pipeline import Pipeline
    from export.bundle import Bundle

CALLS = 5
REPLAYS = 20
KERNELS = 25
NAME = 100
"""Characters of a kernel's name that are kept: templates go on for thousands."""


def check(job: GpuJob, results: Mapping[str, Result]) -> Result:
    """Milliseconds of each part beside its floor, and of each kernel of whole images."""
    from export.bundle import Bundle

    bundle = Bundle.open(Path(job.bundle))
    dtype = "fp16" if job.device == "cuda" else "fp32"
    parts: dict[str, Any] = {}
    images: dict[str, Any] = {}
    for decoder in job.decoders:
        with opened(job, bundle, decoder, "graph", dtype) as pipe:
            for part in pipe.parts:
                if part not in parts:
                    parts[part] = part_time(pipe, part, job)
            for steps in sorted({min(job.steps), max(job.steps)}):
                images[f"{decoder}-{steps}"] = kernels(pipe, steps, job)
    ceilings = results.get("sanity", {}).get("ceilings")
    for part, found in parts.items():
        found |= floor_of(bundle, part, job.batch, dtype, ceilings, found["ms"])
    return {"status": "ok", "batch": job.batch, "dtype": dtype, "parts": parts, "images": images}


# ---- by part


def part_time(pipe: Pipeline, part: str, job: GpuJob) -> dict[str, Any]:
    """Median milliseconds of `part` on seeded inputs at `job.batch`."""
    import statistics

    import torch

    generator = torch.Generator().manual_seed(SEED)
    given = {
        name: tensor if name == "timestep" else tensor.repeat(job.batch, *[1] * (tensor.ndim - 1))
        for name, tensor in seeded_inputs(pipe.bundle.parts[part].inputs, generator).items()
    }
    given = {name: tensor.to(job.device) for name, tensor in given.items()}
    times = []
    with torch.inference_mode():
        once = replayed(lambda: pipe.run(part, **given), job.device)
        for _ in range(REPLAYS if job.device == "cuda" else 3):
            started = time.perf_counter()
            once()
            times.append((time.perf_counter() - started) * 1e3)
    return {"ms": statistics.median(times)}


def replayed(work: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`work` as a captured graph whose replay is waited for; on the CPU as it is."""
    import torch

    if device != "cuda":
        work()
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # weights and inputs are made there
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            kept = work()

    def once(_: Any = kept) -> None:
        graph.replay()
        torch.cuda.synchronize()

    return once


def floor_of(
    bundle: Bundle,
    part: str,
    batch: int,
    dtype: str,
    ceilings: Mapping[str, Any] | None,
    milliseconds: float,
) -> dict[str, Any]:
    """GFLOP, what bounds the part, its floor by the ceilings measured here, and the share of it."""
    from bench.limits.floors import floor
    from bench.machine.ceilings import Ceilings
    from export.cost import part_cost_at

    cost = part_cost_at(bundle.checkpoint(), part, batch, *bundle.size, dtype)
    found: dict[str, Any] = {"gflop": round(cost.flops / 1e9, 2)}
    least = floor(cost, Ceilings.of(dict(ceilings)), dtype, dtype) if ceilings else None
    if least is not None:
        share = round(least.ms / milliseconds, 4)
        found |= {"floor_ms": round(least.ms, 4), "bound": least.bound, "fraction": share}
    return found


# ---- by kernel


def kernels(pipe: Pipeline, steps: int, job: GpuJob) -> dict[str, Any]:
    """The kernels (on the CPU: torch's ops) of whole images by their time, per call."""
    from torch.profiler import ProfilerActivity, profile

    def call() -> float:
        started = time.perf_counter()
        pipe([pipe.bundle.model.prompts[0]] * job.batch, steps=steps, seed=SEED)
        return (time.perf_counter() - started) * 1e3

    calls = CALLS if job.device == "cuda" else 1
    for _ in range(2):
        call()
    plain = min(call() for _ in range(calls))  # the profiler slows the host down
    activities = [ProfilerActivity.CPU]
    if job.device == "cuda":
        activities = [ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        for _ in range(calls):
            call()
    times = by_name(seen.events(), job.device)
    ranked = sorted(times.items(), key=lambda item: -item[1][0])
    total = sum(spent for spent, _ in times.values()) / calls
    return {
        "call_ms": round(plain, 4),
        "kernels_ms": round(total, 4),
        "launched": sum(count for _, count in times.values()) // calls,
        "top": [
            {
                "name": name[:NAME],
                "ms": round(spent / calls, 5),
                "share": round(spent / calls / total, 4) if total else None,
                "count": count / calls,
            }
            for name, (spent, count) in ranked[:KERNELS]
        ],
    }


def by_name(events: Any, device: str) -> dict[str, tuple[float, int]]:
    """name -> (milliseconds, how often), of the kernels on a GPU, or of the ops on a CPU."""
    from torch._C._autograd import DeviceType

    cuda = device == "cuda"
    found: dict[str, tuple[float, int]] = {}
    for event in events:
        if cuda and event.device_type != DeviceType.CUDA:
            continue
        micros = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        spent, count = found.get(event.name, (0.0, 0))
        found[event.name] = (spent + micros / 1e3, count + 1)
    return found
