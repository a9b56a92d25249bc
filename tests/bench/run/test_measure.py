"""Warm-up, stop rule, clock - and that the harness adds nothing inside the timed region."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bench.run.measure
from backends.load import load_pipeline
from backends.pipeline.output import Output, Timings
from bench.commands.harness import main
from bench.harness import overhead
from bench.harness.overhead import bare_call, blocks, interleaved, ratios
from bench.rows.stats import DISTURBED_CPU
from bench.run.measure import CpuShare, PeakMemory, StopRule, inputs_of_call, measure
from core.errors import AddbenchError, PreconditionError
from export.bundle import Bundle
from export.prompts import GENERAL


class ScriptedPipe:
    """A test double of a pipeline: says how long its calls took, and remembers them."""

    def __init__(self, seconds: Sequence[float] = (), log: list[str] | None = None) -> None:
        self.seconds, self.calls = list(seconds), []  # type: ignore[var-annotated]
        self.log = [] if log is None else log
        self.extra_nfe_at = -1
        self.lost_s = 0.0

    def __call__(self, prompts: list[str], *, steps: int, seed: list[int]) -> Output:
        self.log.append("call")
        took = self.seconds[len(self.calls)] if self.seconds else 0.004
        self.calls.append((list(prompts), steps, list(seed)))
        unet = [took / (2 * steps)] * steps
        nfe = steps + (len(self.calls) - 1 == self.extra_nfe_at)
        timings = Timings(took / 4, unet, took / 8, took / 8 - self.lost_s, took)
        images = np.zeros((len(prompts), 8, 8, 3), np.uint8)
        return Output(images, timings, nfe=nfe, provenance="modelled")


def run(pipe: Any, rule: StopRule, batch: int = 1, steps: int = 1) -> bench.run.measure.Measurement:
    return measure(pipe, batch, steps, rule)


QUICK = StopRule(min_samples=4, min_time=0.0, max_time=60.0, warmup=2)


@pytest.mark.parametrize(
    ("count", "elapsed", "stop"),
    [
        (9, 100.0, True),  # max_time wins
        (2, 100.0, False),  # but not below 3 samples
        (3, 60.0, True),
        (10, 2.9, False),  # min_time
        (10, 3.0, True),
        (9, 59.0, False),
    ],
)
def test_stop_rule(count: int, elapsed: float, stop: bool) -> None:
    assert StopRule().enough(count, elapsed) is stop


@given(st.integers(0, 1000), st.floats(0, 1e4))
def test_stop_rule_never_stops_below_three(count: int, elapsed: float) -> None:
    if StopRule(min_samples=3).enough(count, elapsed):
        assert count >= 3


def test_the_harness_makes_no_call_of_its_own() -> None:
    """Counting, part 1: cold + warm-up + samples is every call there is."""
    pipe = ScriptedPipe()
    found = run(pipe, QUICK)
    assert len(found.samples_ms) == 4
    assert found.warmup_calls == 2
    assert len(pipe.calls) == 1 + 2 + 4


def test_nothing_stands_between_the_clock_and_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting, part 2: the clock is read right before and right after each call, and only then."""
    log: list[str] = []

    def clock() -> int:
        log.append("clock")
        return len(log) * 1000

    monkeypatch.setattr(bench.run.measure.time, "perf_counter_ns", clock)
    run(ScriptedPipe(log=log), QUICK)
    assert log == ["clock", "call", "clock"] * 7


def test_the_harness_is_a_few_function_calls_per_sample() -> None:
    """Counting, part 3: Python calls per sample outside of the pipeline (about 0.1 us each)."""
    seen = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    def calls_of(samples: int) -> int:
        nonlocal seen
        pipe, seen = ScriptedPipe(), 0
        sys.setprofile(count)
        try:
            run(pipe, StopRule(min_samples=samples, min_time=0.0, warmup=0))
        finally:
            sys.setprofile(None)
        return seen

    pipes_own = 12  # ScriptedPipe's, counted with the rest
    per_sample = (calls_of(103) - calls_of(3)) / 100
    assert per_sample - pipes_own < 40


def test_a_long_cold_call_is_the_warm_up() -> None:
    pipe = ScriptedPipe([11.0] + [10.5] * 20)
    found = run(pipe, StopRule(min_samples=3, min_time=0.0, warmup=5))
    assert found.warmup_calls == 0
    assert found.cold_ms == pytest.approx(11000)
    assert len(pipe.calls) == 1 + 3


def test_every_sample_is_kept_and_the_cold_one_apart() -> None:
    seconds = [9.0, 0.004, 0.004, 0.001, 0.5, 0.002, 0.003]
    found = run(ScriptedPipe(seconds), QUICK)
    assert found.cold_ms == pytest.approx(9000)
    assert found.samples_ms == pytest.approx([1, 500, 2, 3])
    assert found.provenance == "modelled"


def test_stages_of_each_sample() -> None:
    found = run(ScriptedPipe(), QUICK, steps=4)
    assert [len(unet) for unet in found.unet_ms] == [4] * 4
    assert found.stages_agree()
    assert found.nfe == 4


def test_stages_that_lose_time_are_seen() -> None:
    pipe = ScriptedPipe([0.5] * 10)
    pipe.lost_s = 0.01
    assert not run(pipe, QUICK).stages_agree()


def test_another_count_of_unet_evaluations_is_an_error() -> None:
    pipe = ScriptedPipe()
    pipe.extra_nfe_at = 4
    with pytest.raises(AddbenchError, match="2 UNet evaluations"):
        run(pipe, QUICK)


def test_prompts_cycle_and_the_cold_call_is_the_reference() -> None:
    pipe = ScriptedPipe()
    measure(pipe, 4, 1, QUICK, reference=("the reference", 0))  # type: ignore[arg-type]
    cold, *others = pipe.calls
    assert cold[0][0] == "the reference"
    assert cold[2][0] == 0
    prompts = [prompt for call in others for prompt in call[0]]
    assert len(set(prompts)) == len(GENERAL)
    seeds = [seed for call in others for seed in call[2]]
    assert len(set(seeds)) == len(seeds)


@given(st.integers(1, 64))
def test_every_batch_size_meets_every_prompt(batch: int) -> None:
    met = {prompt for call in range(len(GENERAL)) for prompt in inputs_of_call(call, batch)[0]}
    assert met == set(GENERAL)


def test_progress_is_told_between_samples() -> None:
    counts: list[int] = []
    pipe: Any = ScriptedPipe()
    measure(pipe, 1, 1, QUICK, on_sample=lambda found: counts.append(len(found.samples_ms)))
    assert counts == [1, 2, 3, 4]


def test_on_the_null_backend_time_is_what_was_scripted(tiny_bundle: Bundle) -> None:
    backend = "null:unet_ms=20,text_ms=5,decode_ms=10"
    rule = StopRule(min_samples=5, min_time=0.0, warmup=1)
    with load_pipeline(str(tiny_bundle.path), backend, "taesd") as pipe:
        found = measure(pipe, 1, 2, rule)
    scripted = 2 * 5 + 2 * 20 + 10
    assert min(found.samples_ms) >= scripted
    assert min(found.samples_ms) < scripted * 1.5
    assert found.nfe == 2
    assert min(step for unet in found.unet_ms for step in unet) >= 20
    assert found.stages_agree()
    assert found.image.shape == (64, 64, 3)


def test_the_bare_loop_makes_the_same_images(tiny_bundle: Bundle) -> None:
    """The benchmark of the overhead compares like with like."""
    prompts, seeds = inputs_of_call(3, 2)
    with load_pipeline(str(tiny_bundle.path), "ort", "taesd", batch=2) as pipe:
        ours = pipe(prompts, steps=2, seed=seeds).images
        assert np.array_equal(bare_call(pipe, pipe.bundle.scheduler(), prompts, 2, seeds), ours)
        ways = blocks(pipe, 2, 1, calls=4)
        found = interleaved(ways, repeats=2, calls=4)
    assert [len(times) for times in found.values()] == [2, 2, 2]


def test_the_overhead_is_of_the_blocks_of_one_repeat() -> None:
    found = {"bare": [10.0, 20.0, 40.0], "pipe": [10.0, 10.0, 10.0], "measured": [10.1, 20.6, 42.0]}
    added = ratios(found)
    assert list(added) == ["bare", "pipe"]
    assert added["bare"]["median"] == pytest.approx(0.03)
    assert added["bare"]["lower_quartile"] == pytest.approx(0.01)
    assert added["bare"]["upper_quartile"] == pytest.approx(0.05)


@pytest.mark.parametrize(("middle", "code"), [(10.09, 0), (10.11, 4)])
def test_the_median_judges_the_overhead_and_a_record_keeps_it(
    middle: float,
    code: int,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Around the limit in the middle of three repeats, far within it and far over it beside."""
    bare = [10.0, 10.0, 10.0]
    found = {"by hand": bare, "pipeline": bare, "measured": [9.0, middle, 12.0]}
    monkeypatch.setattr(overhead, "interleaved", lambda ways, repeats, calls: found)
    out = tmp_path / "overhead.json"
    argv = ["--model", str(tiny_bundle.path), "--backend", "null", "--repeats", "3"]
    assert main(["overhead", *argv, "--out", str(out)]) == code
    assert "(quartiles -10.00% to +20.00%)" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert (record["ms_per_call"], record["within"]) == (found, code == 0)
    assert record["added"]["pipeline"]["median"] == pytest.approx(middle / 10 - 1, abs=1e-4)
    assert (record["backend"]["name"], record["model"]) == ("null", "tiny-sdxl")
    assert record["bundle_hash"] == tiny_bundle.hash
    assert record["environment"]["machine"]


@pytest.mark.parametrize("flag", ["--calls", "--repeats"])
def test_an_overhead_of_one_is_none(flag: str) -> None:
    with pytest.raises(PreconditionError, match=f"{flag} 1 is less than 2"):
        main(["overhead", flag, "1"])


def test_own_work_is_not_others() -> None:
    share = CpuShare()
    assert share.others() is None  # too short a window to say
    until, work = time.perf_counter() + 1.2, time.process_time() + 0.2
    while time.perf_counter() < until or time.process_time() < work:
        sum(range(1000))
    found, elapsed = share.others(), time.perf_counter() - share.started
    own = bench.run.measure.tree_cpu_s() - share.own
    busy = bench.run.measure.cores_busy_s() - share.busy
    cores = len(os.sched_getaffinity(0))
    assert found is not None
    assert own > 0.1
    assert found == pytest.approx(max(0.0, busy - own) / (elapsed * cores), abs=0.05)


def test_a_kernel_that_counts_nothing_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.run.measure, "cores_busy_s", lambda: 0.0)
    share = CpuShare()
    share.started -= 2.0
    assert share.others() is None


BUSY = "while True: pass"
"""A program that works until it is killed."""


def test_a_childs_work_is_own_while_it_runs() -> None:
    """A browser's, say: what it computes is what is measured."""
    share = CpuShare()
    child = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        times = psutil.Process(child.pid).cpu_times()
        while times.user + times.system < 0.5:
            time.sleep(0.05)
            times = psutil.Process(child.pid).cpu_times()
        assert bench.run.measure.tree_cpu_s() - share.own >= 0.5
    finally:
        child.kill()
        child.wait()


def test_a_neighbour_is_noticed() -> None:
    share = CpuShare()
    start = (
        "import subprocess, sys; quiet = subprocess.DEVNULL; print(subprocess.Popen("
        f"[sys.executable, '-c', {BUSY!r}], stdout=quiet, stderr=quiet).pid)"
    )
    # Its parent has ended: it is nobody's child here.
    started = subprocess.run([sys.executable, "-c", start], capture_output=True, check=True)
    try:
        own = bench.run.measure.tree_cpu_s()
        time.sleep(1.5)
        assert bench.run.measure.tree_cpu_s() - own < 0.5
        found = share.others()
    finally:
        os.kill(int(started.stdout), signal.SIGKILL)
    assert found is not None
    assert found > DISTURBED_CPU


def test_peak_memory_is_of_this_cell() -> None:
    def hold(size: int) -> mmap.mmap:
        """Pages of its own: a heap might hand out what another test has freed."""
        block = mmap.mmap(-1, size)
        block.write(b"1" * size)
        return block

    hold(200_000_000).close()
    small = PeakMemory()
    if not small.per_cell:
        pytest.skip("this kernel does not reset VmHWM through clear_refs")
    before = small.megabytes()
    large = PeakMemory()
    block = hold(100_000_000)
    with_block = large.megabytes()
    block.close()
    # Under memory pressure the kernel drops pages of libraries meanwhile: half the block is enough.
    assert with_block - before > 50
    assert with_block - PeakMemory().megabytes() > 50


@pytest.mark.parametrize(("step_counts", "warmed_up_by"), [((), 1), ((4, 8), 4)])
def test_one_sample_is_warmed_up_by_a_short_call(
    step_counts: tuple[int, ...], warmed_up_by: int
) -> None:
    pipe = ScriptedPipe([20.0, 800.0])
    pipe.can_stage, pipe.staged = True, False  # type: ignore[attr-defined]
    pipe.bundle = SimpleNamespace(model=SimpleNamespace(step_counts=step_counts))  # type: ignore[attr-defined]
    rule = StopRule(min_samples=1, min_time=0.0, max_time=1.0, warmup=3)
    found = measure(pipe, 2, 8, rule, reference=("a pig", 7))
    assert [steps for _, steps, _ in pipe.calls] == [warmed_up_by, 8]
    assert pipe.calls[0][0] == pipe.calls[1][0]
    assert (pipe.calls[1][0][0], pipe.calls[1][2][0]) == ("a pig", 7)
    assert (found.samples_ms, found.cold_ms) == ([800e3], 20e3)
    assert (found.nfe, len(found.unet_ms[0]), found.single) == (8, 8, True)
    assert pipe.staged  # type: ignore[attr-defined]
    assert not StopRule(min_samples=1, min_time=0.1).single
