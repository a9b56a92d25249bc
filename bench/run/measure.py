"""Warm-up, stop rule, clock: how one cell becomes samples.

Nothing but the pipeline's call stands between the two readings of the clock. The call ends with
uint8 images in host memory, so the device is idle at both readings.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.rows.fields import EMULATED
from core.errors import AddbenchError
from core.machine import package
from export.prompts import GENERAL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from backends.pipeline.output import Output, Timings
    from backends.pipeline.pipeline import Pipeline

FEWEST_SAMPLES = 3
"""`max_time` ends a cell only once it has this many."""
LONG_CALL_S = 10.0
"""A cell whose cold call takes longer gets no further warm-up: the cold call was it."""
STAGE_CALLS = 3
"""Timed calls for the stages of a device that samples are not to wait for in between."""


@dataclass(frozen=True)
class StopRule:
    """How long a cell is sampled; times in seconds, `warmup` in calls after the cold one.

    `quality`: of how many held-out captions the pictures are judged after it (0: none); `frames`:
    how many pictures in a row are started from after it (0: none).
    """

    min_samples: int = 10
    min_time: float = 3.0
    max_time: float = 60.0
    warmup: int = 1
    quality: int = 0
    frames: int = 0

    def columns(self) -> dict[str, Any]:
        """Return the columns for headers and workers; what came later is left out where it is not
        asked for, as before it was."""
        later = ("quality", "frames")
        return {name: value for name, value in vars(self).items() if value or name not in later}

    def of_round(self, round_: int) -> StopRule:
        """Pictures do not change from round to round: they are judged in the first."""
        return self if round_ == 0 else replace(self, quality=0)

    def enough(self, count: int, elapsed_s: float) -> bool:
        """Whether `min_samples` and `min_time` are reached; `max_time` wins after 3 samples."""
        if count >= self.min_samples and elapsed_s >= self.min_time:
            return True
        return count >= FEWEST_SAMPLES and elapsed_s >= self.max_time

    @property
    def single(self) -> bool:
        """One sample, however short: for calls of minutes, which a short call warms up."""
        return self.min_samples == 1 and self.min_time == 0


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
    encode_ms: list[float] = field(default_factory=list)
    """Empty where the images start from noise."""
    rest_ms: list[float] = field(default_factory=list)
    load_ms: list[float] = field(default_factory=list)
    """Loading and releasing parts within the call: zeros but for low memory."""
    stages_from: str | None = "same_call"
    """`separate`: the stages were timed in calls of their own; None: there are no stages."""
    other_cpu: float | None = None
    single: bool = False
    """The only sample there is to be; the cold call was one of fewer steps."""

    def stages_agree(self) -> bool:
        """Whether the stages add up to the whole call, to 1% or 1 ms, in the median sample.

        The median, since a call that the kernel interrupts between two readings of the clock says
        nothing about the stages.
        """
        if self.stages_from != "same_call":
            return True
        if not self.samples_ms:
            return True
        encode = self.encode_ms or [0.0] * len(self.text_ms)
        others = (self.text_ms, encode, self.decode_ms, self.rest_ms, self.load_ms)
        gaps = [
            abs(sum(unet) + sum(stages) - total)
            for total, unet, *stages in zip(self.samples_ms, self.unet_ms, *others, strict=True)
        ]
        return statistics.median(gaps) <= max(0.01 * statistics.median(self.samples_ms), 1.0)


def inputs_of_call(
    number: int, batch: int, prompts: Sequence[str] = GENERAL
) -> tuple[list[str], list[int]]:
    """Prompts and seeds of warm-up or timed call `number`: other ones in every call."""
    images = range(number * batch, (number + 1) * batch)
    return [prompts[image % len(prompts)] for image in images], [1 + image for image in images]


def timed(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    start: Mapping[str, Any],
) -> tuple[float, Output]:
    """One call and its end-to-end milliseconds: prompt strings, and what `start` holds, in, uint8
    images out."""
    started = time.perf_counter_ns()
    output = pipe(prompts, steps=steps, seed=seeds, **start)
    elapsed = (time.perf_counter_ns() - started) / 1e6
    # A modelled device states its time; only a measured one is worth our clock, where it is near.
    ours = output.provenance == "measured" and not output.own_clock
    return (elapsed if ours else output.timings.total * 1e3), output


def measure(
    pipe: Pipeline,
    batch: int,
    steps: int,
    rule: StopRule,
    *,
    prompts: Sequence[str] = GENERAL,
    reference: tuple[str, int] | None = None,
    on_sample: Callable[[Measurement], None] = lambda _: None,
    accepts: Callable[[Measurement], bool] = lambda _: True,
    start: Mapping[str, Any] | None = None,
) -> Measurement:
    """Measure one cell.

    `accepts`: whether the image of the cold call is one to sample the time of.

    `start`: of every call, `images` and `strength` where it starts from a picture, `negative` where
    guidance leads away from a prompt.

    The cold call makes image 0 from `reference` (prompt, seed; None: the first prompt and seed 0),
    so that judging the image costs no call of its own; the timed calls cycle through `prompts`.
    `on_sample` is called between samples, outside the timed region.

    Raises:
        AddbenchError: what the pipeline raises, or the count of UNet evaluations changed.
    """
    asked, seeds = inputs_of_call(0, batch, prompts)
    asked[0], seeds[0] = reference or (prompts[0], 0)
    start = start or {}
    if rule.single:
        return one_sample(pipe, asked, seeds, steps, on_sample, start)
    cold_ms, output = timed(pipe, asked, seeds, steps, start)
    result = Measurement(cold_ms, output.images[0].copy(), output.provenance, output.nfe)
    # Where there is no speed to sample, or the image is wrong, the image is all it gives.
    if output.provenance == EMULATED or not accepts(result):
        return result
    calls = 1
    if cold_ms <= LONG_CALL_S * 1e3:
        for _ in range(rule.warmup):
            timed(pipe, *inputs_of_call(calls, batch, prompts), steps, start)
            calls += 1
        result.warmup_calls = rule.warmup
    load = CpuShare()
    started = time.perf_counter()
    while not rule.enough(len(result.samples_ms), time.perf_counter() - started):
        sample_ms, output = timed(pipe, *inputs_of_call(calls, batch, prompts), steps, start)
        calls += 1
        if output.nfe != result.nfe:
            raise AddbenchError(
                f"a call took {output.nfe} UNet evaluations, the first one {result.nfe}",
                "the calls of a cell must do the same work",
                "look at the backend's pipeline",
            )
        result.samples_ms.append(sample_ms)
        note_stages(result, output.timings)
        on_sample(result)
    result.other_cpu = load.others()
    if not result.text_ms:
        time_stages(pipe, result, calls, batch, steps, prompts, start)
    return result


def one_sample(
    pipe: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    on_sample: Callable[[Measurement], None],
    start: Mapping[str, Any],
) -> Measurement:
    """A single call of `steps` after one of as few as the model takes; it makes image 0.

    Its stages are its own on every device that has some: beside minutes, waits between them are
    nothing.
    """
    pipe.staged = pipe.can_stage
    fewest = steps if "images" in start else min(pipe.bundle.model.step_counts, default=1)
    cold_ms, _ = timed(pipe, prompts, seeds, min(fewest, steps), start)
    load = CpuShare()
    sample_ms, output = timed(pipe, prompts, seeds, steps, start)
    result = Measurement(cold_ms, output.images[0].copy(), output.provenance, output.nfe)
    result.single = True
    if output.provenance != EMULATED:
        result.samples_ms.append(sample_ms)
        note_stages(result, output.timings)
        result.stages_from = "same_call" if result.text_ms else None
        on_sample(result)
        result.other_cpu = load.others()
    return result


def note_stages(result: Measurement, times: Timings) -> None:
    """Keep the stages of one call, if it timed any."""
    if times.text is None or times.decode is None or times.rest is None:
        return
    result.text_ms.append(times.text * 1e3)
    result.unet_ms.append([step * 1e3 for step in times.unet])
    result.decode_ms.append(times.decode * 1e3)
    if times.encode is not None:
        result.encode_ms.append(times.encode * 1e3)
    result.rest_ms.append(times.rest * 1e3)
    result.load_ms.append(times.load * 1e3)


def time_stages(
    pipe: Pipeline,
    result: Measurement,
    calls: int,
    batch: int,
    steps: int,
    prompts: Sequence[str],
    start: Mapping[str, Any],
) -> None:
    """The stages of an asynchronous device, in calls of their own: they wait after each stage."""
    result.stages_from = "separate" if pipe.can_stage else None
    if not pipe.can_stage:
        return
    pipe.staged = True
    try:
        for number in range(calls, calls + STAGE_CALLS + 1):
            _, output = timed(pipe, *inputs_of_call(number, batch, prompts), steps, start)
            if number > calls:  # the first one warms up
                note_stages(result, output.timings)
    finally:
        pipe.staged = False


def frame_rate(
    pipe: Pipeline, prompt: str, steps: int, count: int, start: Mapping[str, Any]
) -> dict[str, float | None]:
    """Frames a second of `count` pictures in a row, and where the time of one went, in medians.

    From the end of the first one, which encodes the prompt and warms up, to that of the last.
    """
    pictures, ended, timed_frames = start["images"], list[int](), []
    source = (pictures[0] for _ in range(count + 1))
    told = {name: value for name, value in start.items() if name != "images"}
    for output in pipe.frames(source, prompt, steps=steps, **told):
        ended.append(time.perf_counter_ns())
        timed_frames.append(output.timings)
    times = timed_frames[1:]

    def median_ms(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(1e3 * statistics.median(known), 4) if known else None

    return {
        "count": count,
        "per_s": round(1e9 * count / (ended[-1] - ended[0]), 4),
        "encode_ms": median_ms([each.encode for each in times]),
        "unet_ms": median_ms([sum(each.unet) or None for each in times]),
        "decode_ms": median_ms([each.decode for each in times]),
        "rest_ms": median_ms([each.rest for each in times]),
    }


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
        """Share from 0 to 1; None for a window too short to say, or where the kernel counts
        nothing (gVisor's /proc/stat holds zeros)."""
        elapsed = time.perf_counter() - self.started
        busy = cores_busy_s()
        if elapsed < self.SHORTEST_S or busy == 0:
            return None
        others = (busy - self.busy) - (tree_cpu_s() - self.own)
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
    """CPU seconds of this process, its children, finished or not, and its parent."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    psutil = package("psutil")  # not in every environment that a worker runs in
    for child in psutil.Process().children(recursive=True) if psutil else ():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    try:
        # Behind the name in brackets, which may hold anything: state is the first, see proc(5).
        fields = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return total
    return total + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
