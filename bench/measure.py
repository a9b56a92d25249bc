"""Warm-up, stop rule, clock: how one cell becomes samples.

Nothing but the pipeline's call stands between the two readings of the clock. The call ends with
uint8 images in host memory, so the device is idle at both readings.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import AddbenchError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from backends.pipeline import Output, Pipeline

FEWEST_SAMPLES = 3
"""`max_time` ends a cell only once it has this many."""
LONG_CALL_S = 10.0
"""A cell whose cold call takes longer gets no further warm-up: the cold call was it."""

PROMPTS = (
    "a lighthouse at dusk, long exposure",
    "an origami pig on fire",
    "a bowl of ramen on a wooden table, top view",
    "portrait of an old sailor, oil painting",
    "a red bicycle leaning against a yellow wall",
    "the skyline of a city made of glass, in fog",
    "a fox asleep in the snow",
    "macro photograph of a dew drop on a leaf",
    "an astronaut riding a horse through a desert canyon",
    "a stained glass window showing a whale",
    "isometric drawing of a small library",
    "a thunderstorm over a field of sunflowers",
    "a cup of coffee beside an open notebook, morning light",
)
"""What the timed calls cycle through; their number is prime, so every batch size meets them all."""


@dataclass(frozen=True)
class StopRule:
    """How long a cell is sampled; times in seconds, `warmup` in calls after the cold one."""

    min_samples: int = 10
    min_time: float = 3.0
    max_time: float = 60.0
    warmup: int = 1

    def enough(self, count: int, elapsed_s: float) -> bool:
        """At least `min_samples` and `min_time`; `max_time` wins once 3 samples exist."""
        if count >= self.min_samples and elapsed_s >= self.min_time:
            return True
        return count >= FEWEST_SAMPLES and elapsed_s >= self.max_time


@dataclass
class Measurement:
    """What measuring one cell gave. Lists hold one entry per sample; nothing is dropped."""

    cold_ms: float
    image: NDArray[np.uint8]
    """Image 0 of the cold call, [height, width, 3], from the reference's prompt and seed."""
    provenance: str
    nfe: int
    warmup_calls: int = 0
    samples_ms: list[float] = field(default_factory=list)
    text_ms: list[float] = field(default_factory=list)
    unet_ms: list[list[float]] = field(default_factory=list)
    """[sample][step]"""
    decode_ms: list[float] = field(default_factory=list)
    rest_ms: list[float] = field(default_factory=list)
    other_cpu: float | None = None

    def stages_agree(self) -> bool:
        """Whether the stages add up to the whole call, to 1% or 1 ms, in the median sample.

        The median, since a call that the kernel interrupts between two readings of the clock says
        nothing about the stages.
        """
        stages = zip(
            self.samples_ms, self.text_ms, self.unet_ms, self.decode_ms, self.rest_ms, strict=True
        )
        gaps = [
            abs(text + sum(unet) + decode + rest - total)
            for total, text, unet, decode, rest in stages
        ]
        return statistics.median(gaps) <= max(0.01 * statistics.median(self.samples_ms), 1.0)


def inputs_of_call(number: int, batch: int) -> tuple[list[str], list[int]]:
    """Prompts and seeds of warm-up or timed call `number`: other ones in every call."""
    images = range(number * batch, (number + 1) * batch)
    return [PROMPTS[image % len(PROMPTS)] for image in images], [1 + image for image in images]


def timed(
    pipe: Pipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int
) -> tuple[float, Output]:
    """One call and its end-to-end milliseconds: prompt strings in, uint8 images out."""
    started = time.perf_counter_ns()
    output = pipe(prompts, steps=steps, seed=seeds)
    elapsed = (time.perf_counter_ns() - started) / 1e6
    # A modelled device states its time; only a measured one is worth our clock.
    return (elapsed if output.provenance == "measured" else output.timings.total * 1e3), output


def measure(
    pipe: Pipeline,
    batch: int,
    steps: int,
    rule: StopRule,
    *,
    reference: tuple[str, int] = (PROMPTS[0], 0),
    on_sample: Callable[[Measurement], None] = lambda _: None,
) -> Measurement:
    """Measure one cell.

    The cold call makes image 0 from `reference` (prompt, seed), so that judging the image costs no
    call of its own; the timed calls cycle through PROMPTS. `on_sample` is called between samples,
    outside the timed region.

    Raises:
        AddbenchError: what the pipeline raises, or the count of UNet evaluations changed.
    """
    prompts, seeds = inputs_of_call(0, batch)
    prompts[0], seeds[0] = reference
    cold_ms, output = timed(pipe, prompts, seeds, steps)
    result = Measurement(cold_ms, output.images[0].copy(), output.provenance, output.nfe)
    calls = 1
    if cold_ms <= LONG_CALL_S * 1e3:
        for _ in range(rule.warmup):
            timed(pipe, *inputs_of_call(calls, batch), steps)
            calls += 1
        result.warmup_calls = rule.warmup
    load = CpuShare()
    started = time.perf_counter()
    while not rule.enough(len(result.samples_ms), time.perf_counter() - started):
        sample_ms, output = timed(pipe, *inputs_of_call(calls, batch), steps)
        calls += 1
        if output.nfe != result.nfe:
            raise AddbenchError(
                f"a call took {output.nfe} UNet evaluations, the first one {result.nfe}",
                "the calls of a cell must do the same work",
                "look at the backend's pipeline",
            )
        times = output.timings
        result.samples_ms.append(sample_ms)
        result.text_ms.append(times.text * 1e3)
        result.unet_ms.append([step * 1e3 for step in times.unet])
        result.decode_ms.append(times.decode * 1e3)
        result.rest_ms.append(times.rest * 1e3)
        on_sample(result)
    result.other_cpu = load.others()
    return result


class CpuShare:
    """How much of our cores other processes used since construction.

    The busy time of the cores this process may run on, from /proc/stat, less this process's own,
    its children's and its parent's (the sweep that waits for it).
    """

    SHORTEST_S = 1.0
    """The kernel counts ticks of 10 ms: a shorter window says nothing at the 5% level."""

    def __init__(self) -> None:
        self.started, self.busy, self.own = time.perf_counter(), cores_busy_s(), tree_cpu_s()

    def others(self) -> float | None:
        """Share from 0 to 1, or None for a window too short to say."""
        elapsed = time.perf_counter() - self.started
        if elapsed < self.SHORTEST_S:
            return None
        others = (cores_busy_s() - self.busy) - (tree_cpu_s() - self.own)
        return min(1.0, max(0.0, others / (elapsed * len(os.sched_getaffinity(0)))))


def cores_busy_s() -> float:
    """Seconds that the cores this process may use were busy, stolen time included."""
    allowed = os.sched_getaffinity(0)
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in allowed:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def tree_cpu_s() -> float:
    """CPU seconds of this process, its finished children and its parent."""
    import psutil

    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    try:
        parent = psutil.Process(os.getppid()).cpu_times()
    except psutil.NoSuchProcess:
        return total
    return total + parent.user + parent.system


class PeakMemory:
    """Highest resident memory since construction, for a process that measures several cells."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        except OSError:
            self.per_cell = False
        else:
            self.per_cell = True

    def megabytes(self) -> float:
        """VmHWM in MB (10^6); of the whole process where it could not be reset."""
        if self.per_cell:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
