"""The child process that measures: one JSON job on stdin, JSON lines on stdout.

Job (protocol 1): `protocol`, `parent` (its pid), `bundle` (folder), `backend` (as on the command
line), `cells` (key columns; same group), `rule` (StopRule's fields).

Lines, each with an `event`:
    loaded                    compile and load are done
    begin     cell            cell number `cell` of the job starts
    sample    cell, count     progress, at most once a second; with `captions`, `count` of so many
                              have a picture to be judged
    row       cell, result    the cell is done: status, figures, error
    refused   result          compile or load failed, for every cell of the job
A worker that reports `oom`, `failed` or `skipped` ends there: what ran out or broke may have left
something behind, and the next cells deserve a fresh process. Whatever libraries print goes to
stderr, which the parent sends to a log file.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bench.machine import environment
from bench.machine.power import Gauge, source_of
from bench.rows import stats
from bench.rows.cell import Cell
from bench.rows.fields import MODELLED, OK
from bench.rows.store import now_utc
from bench.run.measure import (
    Measurement,
    PeakMemory,
    StopRule,
    frame_rate,
    inputs_of_call,
    measure,
)
from bench.run.pictures import start_of
from bench.run.quality import judge_accepts, measure_quality
from core.errors import AddbenchError, PreconditionError
from core.machine import package
from core.process import die_with_parent, take_stdout

if TYPE_CHECKING:
    from backends.base import Backend
    from backends.pipeline.pipeline import Pipeline
    from export.bundle import Bundle

PROTOCOL = 1
IMAGE_ONLY = StopRule(min_samples=0, min_time=0.0, warmup=0)
"""The rule for a device whose figures are modelled: the cold call, which makes the image."""
LAST_STATUSES = ("oom", "failed", "skipped")
"""After one of these the worker ends."""
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory",
             "failed to allocate memory")  # fmt: skip


class Reporter:
    """Writes the protocol's lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last = time.monotonic()

    def __call__(self, event: str, **fields: Any) -> None:
        self.stream.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
        self.stream.flush()
        self.last = time.monotonic()

    def progress(self, cell: int, measurement: Measurement) -> None:
        if time.monotonic() - self.last >= 1.0:
            self("sample", cell=cell, count=len(measurement.samples_ms))

    def judging(self, cell: int, count: int, captions: int) -> None:
        if time.monotonic() - self.last >= 1.0:
            self("sample", cell=cell, count=count, captions=captions)


def failure(error: BaseException) -> dict[str, Any]:
    """Status and error of a row that an exception ended."""
    from backends.base import NonFiniteError, OutOfMemoryError

    text = str(error).lower()
    if isinstance(error, OutOfMemoryError | MemoryError) or any(hint in text for hint in NO_MEMORY):
        status = "oom"
    elif isinstance(error, NonFiniteError):
        status = "non_finite"
    elif isinstance(error, PreconditionError):
        status = "skipped"  # refused before it started, with the nearest thing that works
    else:
        status = "failed"
    if isinstance(error, AddbenchError):
        return {"status": status, "error": error.as_dict()}
    what = f"{type(error).__name__}: {error}"
    words = {
        "type": type(error).__name__,
        "what": what[:2000],
        "why": "a library raised it",
        "next": "its traceback is in the logs of the run folder",
    }
    return {"status": status, "error": words}


class Worker:
    """One pipeline, and the cells that it can serve."""

    def __init__(
        self, bundle: Bundle, backend: Backend, cells: Sequence[Cell], rule: StopRule
    ) -> None:
        # Its import costs 75 MB: before the first cell, so that every cell's peak holds it.
        package("skimage.metrics")

        from backends.base import Shapes
        from backends.pipeline.recipe import Recipe

        self.bundle, self.backend, self.cells, self.rule = bundle, backend, cells, rule
        self.references = bundle.references()
        self.source = source_of(backend.device)  # before the device holds anything of ours
        cell = cells[0]  # what all of them share
        width, height = (int(side) for side in cell.size.split("x"))
        self.pipe: Pipeline = backend.pipeline(
            bundle,
            cell.decoder,
            Shapes(cell.batch, width, height),
            embedding_cache=0,
            recipe=Recipe(cell.scheduler, cell.guidance, cell.guidance_mode),
        )
        if cell.encoder:
            self.pipe.use_encoder(cell.encoder)
        self.start = start_of(bundle, cell)
        if cell.low_memory:
            self.pipe.use_low_memory()

    def load(self) -> dict[str, Any]:
        """Compile and load; the columns that all cells of this process share."""
        from backends.artifacts.child import compile_peak_mb, home_python

        self.pipe.prepare()
        artifacts = self.pipe.artifacts
        peaks = [compile_peak_mb(found.path) for found in artifacts.values() if found.path]
        elsewhere = home_python() != Path(sys.executable)
        return {
            "load_s": round(self.pipe.load_s, 4),
            "compile_s": round(self.pipe.compile_s, 4),
            "compile_cached": self.pipe.compile_cached,
            "compile_peak_mb": max((peak for peak in peaks if peak is not None), default=None),
            "artifacts": {part: found.key for part, found in artifacts.items()},
            "versions": environment.versions() if elsewhere else self.pipe.versions,
        }

    def run(self, number: int, report: Reporter) -> dict[str, Any]:
        """Measure cell `number`; status and figures of its row."""
        cell = self.cells[number]
        known, reference = self.references, None
        if known:  # what is drawn from a picture is asked for by another prompt than its own
            of_picture = bool(cell.encoder and known.redraw_prompt)
            reference = (known.redraw_prompt if of_picture else known.prompt, known.seed)
        prompts = self.bundle.model.prompts
        started = {"time_utc": now_utc(), "load_avg": environment.load_average()}
        memory, gauge = PeakMemory(), Gauge(self.source)
        refused = False

        def on_sample(so_far: Measurement) -> None:
            gauge.sampled(len(so_far.samples_ms))
            report.progress(number, so_far)

        def accepts(so_far: Measurement) -> bool:
            """Whether the image is right, or what it shows is judged after it."""
            nonlocal refused
            refused = self.judge(cell, so_far)["status"] != OK and not self.rule.quality
            return not refused

        try:
            measured = measure(
                self.pipe,
                cell.batch,
                cell.steps,
                IMAGE_ONLY if self.backend.provenance == MODELLED else self.rule,
                prompts=prompts,
                reference=reference,
                on_sample=on_sample,
                accepts=accepts,
                start=self.start,
            )
            period_s = (
                None
                if self.start or refused
                else self.pipe.period_s(
                    lambda call: inputs_of_call(call, cell.batch, prompts),
                    cell.steps,
                    self.rule.min_time,
                )
            )
        except Exception as error:  # any library may raise anything: it becomes the cell's row
            traceback.print_exc()
            return failure(error) | started | {"peak_memory_mb": round(memory.megabytes(), 1)}
        wanted = 0 if refused else self.rule.min_samples
        result = figures(measured, cell.batch, wanted) | {
            "period_ms": None if period_s is None else rounded(1e3 * period_s),
            "process_cold": number == 0,
            "peak_memory_mb": None if self.backend.elsewhere else round(memory.megabytes(), 1),
            "cpu_freq_mhz": environment.cpu_freq_mhz(),
        }
        read = gauge.columns()
        flags = [*result["flags"], *read.pop("flags"), *self.backend.row_flags]
        if not memory.per_cell:
            flags.append("process_peak")
        result |= read | {"flags": list(dict.fromkeys(flags))}
        result |= started | self.judge(cell, measured)
        if self.rule.frames and cell.encoder and cell.batch == 1 and result["status"] == OK:
            try:
                result["frames"] = frame_rate(
                    self.pipe, prompts[0], cell.steps, self.rule.frames, self.start
                )
            except Exception as error:
                traceback.print_exc()
                return result | failure(error)
        if self.rule.quality and result["status"] in (OK, "mismatch"):
            try:
                root = self.bundle.checkpoint().root
                result["quality"] = measure_quality(
                    self.pipe,
                    cell,
                    self.rule.quality,
                    root / "fid",
                    lambda count: report.judging(number, count, self.rule.quality),
                )
            except Exception as error:
                traceback.print_exc()
                return result | failure(error)
            if result["status"] == "mismatch" and judge_accepts(result["quality"], root, cell):
                result["flags"].append("below_gate")
                result |= {"status": OK, "error": None}
        return result

    def judge(self, cell: Cell, measured: Measurement) -> dict[str, Any]:
        """Image 0 against the bundle's reference: a fast wrong image is a failed cell.

        References are of the model's own recipe; how guidance is computed changes no image. From
        a picture they are of some counts of steps (`backends.check.parity`).
        """
        from backends.check.gate import gate_for, image_distance
        from backends.pipeline.recipe import make_recipe

        own, reference = make_recipe(self.bundle), None
        recipe = (cell.scheduler, cell.guidance, cell.negative)
        if self.references and recipe == (own.scheduler, own.guidance, ""):
            reference = (
                self.references.redrawn.get((cell.decoder, cell.steps, cell.encoder, cell.kept))
                if cell.encoder
                else self.references.images.get((cell.decoder, cell.steps))
            )
        if reference is None:
            check = {"status": "no_reference", "psnr_db": None, "ssim": None}
            return {"status": OK, "image_check": check}
        distance = image_distance(measured.image, reference)
        gate = gate_for(cell.storage, cell.precision, cell.weights)
        good = distance.passes(gate)
        found: dict[str, Any] = {
            "psnr_db": round(distance.psnr_db, 2),
            "ssim": round(distance.ssim, 5),
        }
        if good:
            return {"status": OK, "image_check": {"status": "ok", **found}}
        error = {
            "type": "Mismatch",
            "what": f"image 0 differs from torch FP32: PSNR {distance.psnr_db:.1f} dB, SSIM"
            f" {distance.ssim:.4f}",
            "why": f"the gate is {gate.psnr_db:g} dB and {gate.ssim:g}",
            "next": f"`addbench parity --model {cell.model} --weights {cell.weights} --dtype"
            f" {self.bundle.dtype} --backend {cell.backend_text}` names the part",
        }
        check = {"status": "mismatch", **found}
        return {"status": "mismatch", "image_check": check, "error": error}


def figures(measured: Measurement, batch: int, wanted: int) -> dict[str, Any]:
    """A row's figures from the raw samples, in milliseconds."""
    summary = stats.summarise(measured.samples_ms, batch)
    flags = stats.flags_of(measured.samples_ms, wanted, measured.other_cpu)
    if not measured.stages_agree():
        flags.append("stage_gap")
    if measured.single:
        flags.append("single_sample")
    later = [step for unet in measured.unet_ms for step in unet[1:]]
    loading = measured.load_ms if any(measured.load_ms) else None  # there is none of resident parts
    medians = {
        "text": stats.median_or_none(measured.text_ms),
        "unet_first": stats.median_or_none([unet[0] for unet in measured.unet_ms]),
        "unet_step": stats.median_or_none(later),
        "decode": stats.median_or_none(measured.decode_ms),
        **({"encode": stats.median_or_none(measured.encode_ms)} if measured.encode_ms else {}),
        "rest": stats.median_or_none(measured.rest_ms),
        "load": stats.median_or_none(loading or []),
    }
    samples = {
        "text": measured.text_ms,
        **({"encode": measured.encode_ms} if measured.encode_ms else {}),
        "unet": measured.unet_ms,
        "decode": measured.decode_ms,
        "rest": measured.rest_ms,
        "load": loading,
    }
    return {
        "provenance": measured.provenance,
        **{name: rounded(value, 6 if name == "cv" else 4) for name, value in vars(summary).items()},
        "samples_ms": rounded(measured.samples_ms),
        "cold_ms": rounded(measured.cold_ms),
        "stages_ms": rounded(medians) if measured.stages_from else None,
        "stages_samples_ms": rounded(samples) if measured.stages_from else None,
        "stages_from": measured.stages_from,
        "nfe": measured.nfe,
        "warmup_calls": measured.warmup_calls,
        "flags": flags,
        "other_cpu": rounded(measured.other_cpu),
    }


def rounded(value: Any, digits: int = 4) -> Any:
    """4 digits of a millisecond are a tenth of a microsecond: as much as the clock is worth."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return value


def serve(job: Mapping[str, Any], report: Reporter) -> None:
    try:
        from backends.registry import parse_backend
        from export.bundle import Bundle

        cells = [Cell.of(columns) for columns in job["cells"]]
        backend = parse_backend(job["backend"])
        bundle = Bundle.open(Path(job["bundle"]))
        worker = Worker(bundle, backend, cells, StopRule(**job["rule"]))
        shared = worker.load()
    except Exception as error:
        traceback.print_exc()
        report("refused", result=failure(error))
        return
    report("loaded", shared=shared)
    for number in range(len(cells)):
        report("begin", cell=number)
        result = shared | worker.run(number, report)
        report("row", cell=number, result=result)
        if result["status"] in LAST_STATUSES:
            return
    worker.pipe.close()


def main() -> int:
    die_with_parent()
    stream = take_stdout()
    text = sys.stdin.read()
    if not text:
        return 1
    job = json.loads(text)
    die_with_parent(job["parent"])
    if job["protocol"] != PROTOCOL:
        print(f"protocol {job['protocol']!r} is not {PROTOCOL}", file=sys.stderr)
        return 2
    serve(job, Reporter(stream))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
