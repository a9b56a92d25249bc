"""The distance to the hardware's limit: FLOPs and bytes of each part against a device's ceilings.

A floor is the time that direct algorithms need: every multiply-add done once at the peak, or every
byte moved once at full bandwidth, whichever takes longer. Algorithms that do fewer multiply-adds
(Winograd convolutions), or do those of a precision on faster units of another (FP32 by parts on
BF16's), can go below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machine.ceilings import Ceilings
from bench.rows.cell import Cell
from core.process import run_apart
from core.table import Column, draw
from export.models import CONTEXT_PART, PARTS, PICTURE_PARTS

if TYPE_CHECKING:
    from export.cost import Cost
    from export.source.checkpoint import Checkpoint

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
STAGES = {
    "text": ("text_encoder", "text_encoder_2", CONTEXT_PART),
    "encode": PICTURE_PARTS,
    "unet_step": ("unet",),
    "decode": ("vae_decoder", "taesd_decoder"),
}
WINOGRAD = 4.0
"""Multiply-adds of a direct 3x3 convolution for one of Winograd's F(4x4), the fewest in use."""
BY_PARTS = {"fp32": 16 / 3}
"""How many times as fast as its own units a product can be on those of another precision: three
products of BF16, each 16 times as fast."""
ERROR = 0.05
"""The relative error of a ceiling, and of the time of a stage."""
SPLIT_UNET = "unet of context"
"""The name in a survey's costs of what is left of the UNet for every step where CONTEXT_PART is
split off."""


@dataclass(frozen=True)
class Floor:
    """The least milliseconds of one evaluation, and which ceiling sets them."""

    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        return max(self.compute_ms, self.memory_ms)

    @property
    def bound(self) -> str:
        return "compute" if self.compute_ms >= self.memory_ms else "memory"


def moved_bytes(cost: Cost, graph_dtype: str, precision: str) -> float:
    """Bytes that one evaluation moves at least, weights and activations, as they are computed with.

    `cost` counts them in the dtype of the graph; a CPU that stores FP16 computes with FP32 weights.
    """
    return (cost.weight_bytes + cost.activation_bytes) * BYTES[precision] / BYTES[graph_dtype]


def floor(cost: Cost, ceilings: Ceilings, graph_dtype: str, precision: str) -> Floor | None:
    """The floor of one evaluation, or None where the device has no figure for that dtype."""
    peaks = ceilings.tflops.get(precision)
    if peaks is None:
        return None
    conv = cost.by_kind["conv"]
    compute_s = (cost.flops - conv) / (peaks["matmul"] * 1e12) + conv / (peaks["conv"] * 1e12)
    memory_s = moved_bytes(cost, graph_dtype, precision) / (ceilings.gb_per_s * 1e9)
    return Floor(1e3 * compute_s, 1e3 * memory_s)


def least_ms(cost: Cost, ceilings: Ceilings, precision: str) -> float:
    """What is left of a floor by the cleverest algorithm and the fastest unit, nothing moved."""
    peaks, conv = ceilings.tflops[precision], cost.by_kind["conv"]
    products_s = (cost.flops - conv) / (peaks["matmul"] * 1e12)
    conv_s = conv / (WINOGRAD * peaks["conv"] * 1e12)
    return 1e3 * (products_s + conv_s) / BY_PARTS.get(precision, 1.0)


def survey(bundle: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    """What rows are judged by: the ceilings of this machine's devices that cells run on, and the
    cost of each part at each batch.

    `split` names the backends whose UNet is split: theirs is counted apart, in both halves.
    """
    import torch

    from backends.registry import parse_backend
    from bench.machine.ceilings import measure, measure_gpu
    from export.bundle import Bundle
    from export.cost import part_cost

    opened = Bundle.open(bundle)
    backends = {cell.backend_text: parse_backend(cell.backend_text) for cell in cells}
    split = sorted(text for text, one in backends.items() if CONTEXT_PART in one.parts(opened))
    counted = {name: (part.graph, "inline") for name, part in opened.parts.items()}
    if split:
        unet = opened.parts["unet"].graph
        counted |= {CONTEXT_PART: (unet, "output"), SPLIT_UNET: (unet, "input")}
    costs = {
        name: {
            str(batch): asdict(part_cost(graph, batch, form))
            for batch in sorted({batch_of(name, cell) for cell in cells})
        }
        for name, (graph, form) in counted.items()
    }
    probes: dict[str, Callable[[Sequence[str]], Ceilings]] = {"cpu": measure}
    # ONNX Runtime and TensorRT may use a GPU beside a torch that was built without.
    if torch.cuda.is_available():
        probes["cuda"] = measure_gpu
    found = []
    for device, probe in probes.items():
        dtypes = {cell.precision for cell in cells if cell.device == device}
        if dtypes:
            found.append(probe(sorted(dtypes)).columns())
    return {"ceilings": found, "graph_dtype": opened.dtype, "costs": costs, "split": split}


def ceilings_of(surveyed: Mapping[str, Any]) -> dict[str, Ceilings]:
    """Ceilings by device. Runs of before a GPU was measured hold those of the CPU alone."""
    kept = surveyed["ceilings"]
    found = [Ceilings.of(each) for each in ([kept] if isinstance(kept, dict) else kept)]
    return {ceilings.device: ceilings for ceilings in found}


def batch_of(part: str, cell: Cell) -> int:
    """Return the batch of an evaluation: guidance as one batch gives the UNet two inputs each."""
    doubled = part in ("unet", SPLIT_UNET) and cell.guidance_mode == "batch"
    return 2 * cell.batch if doubled else cell.batch


def evaluations_of(part: str, cell: Cell) -> int:
    """Return a part's evaluations in its stage: guidance as two calls asks the UNet twice.

    The context is asked twice by guidance in any case. The text encoders count once, though some
    models encode the empty prompt too: a floor. A negative prompt is encoded beside the prompt.
    """
    if part.startswith("text_encoder"):
        return 2 if cell.negative else 1
    asked_twice = {"unet": ("calls",), SPLIT_UNET: ("calls",), CONTEXT_PART: ("batch", "calls")}
    return 2 if cell.guidance_mode in asked_twice.get(part, ()) else 1


@dataclass(frozen=True)
class StageWork:
    """What one stage does: FLOPs, bytes at least, floor in ms. Of the UNet: at one timestep.

    `least_ms`: what no algorithm that is known here goes below, under the same ceilings.
    """

    flops: float
    moved: float
    floor_ms: float
    least_ms: float = 0.0


def stage_work(cell: Cell, surveyed: Mapping[str, Any]) -> dict[str, StageWork]:
    """Work of `text`, `unet_step` and `decode` of a cell, and of `encode` where it starts from a
    picture; empty where no ceiling is known."""
    from export.cost import Cost

    ceilings, graph_dtype = ceilings_of(surveyed).get(cell.device), surveyed["graph_dtype"]
    if ceilings is None or cell.precision not in ceilings.tflops:
        return {}
    split = cell.backend_text in surveyed.get("split", ())
    unused = {{"vae": "taesd_decoder", "taesd": "vae_decoder"}[cell.decoder], *PICTURE_PARTS}
    unused.discard(f"{cell.encoder}_encoder")
    if not split:
        unused.add(CONTEXT_PART)
    found = {}
    for stage, names in STAGES.items():
        if stage == "encode" and not cell.encoder:
            continue
        run = [SPLIT_UNET if split and part == "unet" else part for part in names]
        costs = [
            Cost(**surveyed["costs"][part][str(batch_of(part, cell))])
            for part in run
            if part in surveyed["costs"] and part not in unused
            for _ in range(evaluations_of(part, cell))
        ]
        floors = [floor(cost, ceilings, graph_dtype, cell.precision) for cost in costs]
        found[stage] = StageWork(
            sum(cost.flops for cost in costs),
            sum(moved_bytes(cost, graph_dtype, cell.precision) for cost in costs),
            sum(each.ms for each in floors if each is not None),
            sum(least_ms(cost, ceilings, cell.precision) for cost in costs),
        )
    return found


def call_work(cell: Cell, works: Mapping[str, StageWork]) -> StageWork:
    """What one pipeline call does, of what its stages do."""
    calls = {"text": 1, "encode": 1, "unet_step": cell.kept, "decode": 1}

    def total(name: str) -> float:
        return sum(calls[stage] * getattr(work, name) for stage, work in works.items())

    return StageWork(total("flops"), total("moved"), total("floor_ms"), total("least_ms"))


def call_floor_s(cell: Cell, surveyed: Mapping[str, Any]) -> float | None:
    """The floor of one pipeline call in seconds, or None where it is not known."""
    work = stage_work(cell, surveyed)
    return call_work(cell, work).floor_ms / 1e3 or None


def of_row(
    row: Mapping[str, Any], cell: Cell, surveyed: Mapping[str, Any]
) -> dict[str, dict[str, float]] | None:
    """A row's `roofline`: stage -> achieved rates, floor and the fraction of it reached.

    Where a whole image is one graph there are no stages, and `image` stands for them all.
    """
    works = stage_work(cell, surveyed)
    if not any((row.get("stages_ms") or {}).values()):
        if not row.get("median_ms") or not works:
            return None
        return {"image": achieved(call_work(cell, works), row["median_ms"])}
    # At one step there is no later step: the first one is the UNet's time.
    times = dict(row["stages_ms"])
    times["unet_step"] = times["unet_step"] or times["unet_first"]
    return {
        stage: achieved(work, times[stage]) for stage, work in works.items() if times.get(stage)
    } or None


def achieved(work: StageWork, ms: float) -> dict[str, float]:
    """Rates reached in `ms`, the floor, and the fraction of it."""
    return {
        "tflops": round(work.flops / ms / 1e9, 5),
        "gb_per_s": round(work.moved / ms / 1e6, 4),
        "floor_ms": round(work.floor_ms, 4),
        "fraction": round(work.floor_ms / ms, 4),
    }


def share_of_floor(fraction: float | None) -> float | None:
    """A fraction as a share that can be shown: None where it is none, for nothing passes a floor.

    A stage that is faster than direct algorithms has a lower floor than the one that is known.
    """
    if fraction is None or fraction > 1 + ERROR:
        return None
    return min(fraction, 1.0)


FIRST = "first_ceilings"
"""The key of the first look's ceilings in a survey whose ceilings were measured again."""


def beaten(rows: Sequence[Mapping[str, Any]], surveyed: Mapping[str, Any]) -> dict[str, float]:
    """Ceilings that rows of the run show to be too low: `cpu bf16` -> by which factor, at least.

    A stage that was faster than every algorithm that is known here was held against a ceiling
    that something had disturbed while it was measured.
    """
    factors: dict[str, float] = {}
    if not surveyed.get("costs"):
        return factors  # ceilings alone say nothing of what a stage does
    for row in rows:
        if row["status"] != "ok" or not row["roofline"]:
            continue
        cell = Cell.of(row)
        works = stage_work(cell, surveyed)
        works = {**works, "image": call_work(cell, works)} if works else {}
        for stage, figures in row["roofline"].items():
            work = works.get(stage)
            if work is None or not work.floor_ms:
                continue
            factor = figures["fraction"] * work.least_ms / work.floor_ms
            if factor > 1 + ERROR:
                name = f"{cell.device} {cell.precision}"
                factors[name] = max(factor, factors.get(name, 0.0))
    return factors


def measured_again(surveyed: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The survey with another look at these ceilings, the better of both: see `beaten`."""
    better = []
    for ceilings in ceilings_of(surveyed).values():
        dtypes = [name.split()[1] for name in names if name.split()[0] == ceilings.device]
        if not dtypes:
            better.append(ceilings.columns())
            continue
        again = run_apart(look_again, ceilings.device, dtypes)
        tflops = {
            name: kinds
            if name not in again.tflops
            else {kind: max(rate, again.tflops[name][kind]) for kind, rate in kinds.items()}
            for name, kinds in ceilings.tflops.items()
        }
        most = max(ceilings.gb_per_s, again.gb_per_s)
        better.append(replace(ceilings, tflops=tflops, gb_per_s=most).columns())
    first = surveyed.get(FIRST, surveyed["ceilings"])
    return {**surveyed, "ceilings": better, FIRST: first}


def under(
    rows: Sequence[dict[str, Any]], surveyed: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The rows held against the ceilings of their run's header.

    They are already, but for those that were written before a ceiling was measured again.
    """
    if not surveyed or FIRST not in surveyed:
        return list(rows)
    return [
        {**row, "roofline": of_row(row, Cell.of(row), surveyed)} if row["roofline"] else row
        for row in rows
    ]


def look_again(device: str, dtypes: Sequence[str]) -> Ceilings:
    """The ceilings of one of this machine's devices, in a process of its own."""
    from bench.machine.ceilings import measure, measure_gpu

    return measure_gpu(dtypes) if device == "cuda" else measure(dtypes)


def beaten_text(factors: Mapping[str, float]) -> str:
    """What is said beside figures that a ceiling is part of; "" where none is beaten."""
    if not factors:
        return ""
    named = ", ".join(
        f"{name} (by a factor of {factor:.1f} or more)" for name, factor in factors.items()
    )
    return (
        f"Ceilings that were measured too low, as stages of this run show: {named}. Something"
        " disturbed them; no share of them is shown. Measure the run again on a calm machine."
    )


def survey_apart(bundle: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    """`survey` in a process of its own: the parent of a sweep stays small."""
    return run_apart(survey, bundle, cells)


# ---- a model against a device


def roofline(
    checkpoint: Checkpoint,
    size: tuple[int, int],
    dtype: str,
    batch: int,
    ceilings: Ceilings | None,
    step_counts: Sequence[int],
) -> dict[str, Any]:
    """FLOPs and bytes of a model's parts and images, with their floors where ceilings are given."""
    from export.cost import part_cost_at

    precision = dtype if ceilings is None or dtype in ceilings.tflops else "fp32"
    entries = [
        entry(part_cost_at(checkpoint, part, batch, *size, dtype), ceilings, dtype, precision)
        for part in PARTS
        if part in checkpoint.parts
    ]
    return {
        "size": "{}x{}".format(*size),
        "batch": batch,
        "storage": dtype,
        "precision": precision,
        "ceilings": ceilings.columns() if ceilings else None,
        "parts": entries,
        "pipelines": pipelines(entries, checkpoint, step_counts),
    }


def published(name: str) -> Ceilings:
    """The published peaks of a known card."""
    from core.devices import find_device

    device = find_device(name)
    peak = device.fp16_tflops_dense
    return Ceilings(
        device.name, {"fp16": {"matmul": peak, "conv": peak}}, device.memory_gb_per_s, "published"
    )


def entry(cost: Cost, ceilings: Ceilings | None, storage: str, precision: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "part": cost.part,
        "gflop": round(cost.flops / 1e9, 3),
        **{f"gflop_{kind}": round(flops / 1e9, 3) for kind, flops in cost.by_kind.items()},
        "weight_mb": round(cost.weight_bytes / 1e6, 1),
        "activation_mb": round(cost.activation_bytes / 1e6, 1),
    }
    least = floor(cost, ceilings, storage, precision) if ceilings else None
    if least is not None:
        found |= {"floor_ms": round(least.ms, 5), "bound": least.bound}
    return found


def pipelines(
    entries: Sequence[Mapping[str, Any]], checkpoint: Checkpoint, step_counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Whole images at each step count with each decoder: UNet evaluations, GFLOP, and the floor if
    there is one.

    The timesteps are the scheduler's own; with guidance each takes two evaluations.
    """
    import diffusers

    model, config = checkpoint.model, checkpoint.scheduler_config()
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    each_step = 2 if model.guidance_form == "free" and model.guidance > 1 else 1
    by_part = {each["part"]: each for each in entries}
    found = []
    for decoder in ("vae", "taesd"):
        if f"{decoder}_decoder" not in by_part:
            continue
        for steps in step_counts:
            scheduler.set_timesteps(steps)
            nfe = each_step * len(scheduler.timesteps)
            calls = {part: 1 for part in by_part if part.startswith("text")}
            calls |= {"unet": nfe, f"{decoder}_decoder": 1}
            line: dict[str, Any] = {"decoder": decoder, "steps": steps, "nfe": nfe}
            for key in ("gflop", "floor_ms"):
                if all(key in by_part[part] for part in calls):
                    total = sum(n * by_part[part][key] for part, n in calls.items())
                    line[key] = round(total, 5)
            found.append(line)
    return found


def show(report: Mapping[str, Any]) -> None:
    ceilings = report["ceilings"]
    title = f"{report['model']}, {report['size']}, batch {report['batch']}, {report['storage']}"
    if ceilings:
        peaks = ", ".join(
            f"{dtype} {kind} {rate:.3g} TFLOP/s"
            for dtype, kinds in ceilings["tflops"].items()
            for kind, rate in kinds.items()
        )
        title += (
            f"\n{ceilings['device']} ({ceilings['provenance']}): {peaks},"
            f" {ceilings['gb_per_s']:.3g} GB/s;"
            f" floors of direct algorithms in {report['precision']}"
        )
    for rows, above in ((report["parts"], title), (report["pipelines"], "")):
        draw([figure(key, rows) for key in rows[0]], rows, above)


def figure(key: str, rows: Sequence[Mapping[str, Any]]) -> Column:
    """A column of the report; of fractions, three digits of the largest, as far as it has them."""
    header = key.replace("_ms", " (ms)").replace("_mb", " (MB)")
    fractions = [abs(row[key]) for row in rows if isinstance(row.get(key), float) and row[key]]
    if not fractions:
        return Column(header, lambda row: row.get(key))
    stored = max(len(f"{value:.5f}".rstrip("0").partition(".")[2]) for value in fractions)
    digits = max(1, min(stored, 2 - math.floor(math.log10(max(fractions)))))
    return Column(header, lambda row: row.get(key), digits)
