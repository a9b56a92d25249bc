"""The one table of a row's columns: what each holds, means, and where it counts.

A new column is one line of FIELDS. Everything else follows from it: the check of what is read, the
cell's key, the columns of parquet, what an emulated row may hold, and the tables of columns in
results/README.md, which `addbench publish` writes and its --check holds to this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from bench.rows.kinds import NUMBER, TEXT, TRUTH, WHOLE, Kind, ListOf, MapOf, Record, numbers

SCHEMA = 1

OK = "ok"
STATUSES = {
    OK: "measured (or emulated), and the image is the reference's or there is no reference",
    "failed": "an error was raised",
    "crashed": "the worker died; the error names the signal or exit code",
    "timeout": "loading, or the cell, took longer than `--timeout`; the worker was killed",
    "oom": "host or device memory ran out",
    "non_finite": "the image holds NaN or infinity",
    "mismatch": "image 0 is not the reference image; the figures are kept, and are those of a wrong"
    " program",
    "unavailable": "the backend cannot be used on this machine",
    "skipped": "refused before it began: a combination the backend does not do, or not enough"
    " memory or disk",
}
"""What may become of a cell, and what each means."""
FLAGS = {
    "single_sample": "calls take minutes (`addbench versus`): one sample, and `cold_ms` is that of"
    " a call of one step (or as few as the model takes) that warmed it up. Image 0 is the sample's."
    " The spread of its steps is in `stages_samples_ms`",
    "unstable": "the samples leave the median open by more than 2.5% to either side: half the width"
    " of its 95% interval by order statistics (older rows: a coefficient of variation above 2.5%)",
    "under_sampled": "fewer samples than `min_samples`: `max_time` ended the cell",
    "disturbed": "other processes used more than 5% of the cores this one may run on, or of the"
    " GPU's time",
    "throttled": "the GPU's clock fell below 75% of the highest it can be set to",
    "stage_gap": "the stages do not add up to the call, by more than 1% and 1 ms in the median"
    " sample",
    "below_gate": "image 0 is below the gate of pixels, and the judge finds as many of the row's"
    " own captions right as in torch FP32: the row is ok by that (`--quality`)",
    "no_compiler": "the operators that the backend builds for this CPU could not be built: it ran"
    " without them, slower. `addbench backends` says why",
    "cpu_fallback": "nodes that the execution provider does not take ran on the CPU."
    " `addbench backends parts` counts them part by part",
    "process_peak": "the kernel does not reset peaks: `peak_memory_mb` is that of the whole process"
    " so far",
}
"""What a reader should know before trusting a row, in the order in which tables say it."""
MODELLED = "modelled"
"""Provenance of a device that is not here: its row needs no samples."""
EMULATED = "emulated"
"""Provenance of numerics without a speed: a row of it holds no time, and no figure of one."""

# ---- a column

ALWAYS: Final = "always"


@dataclass(frozen=True)
class Field:
    """One column of a row.

    Attributes:
        part: of results/README.md, and what fills it: the sweep (`identity`, `context`), the cell,
            or the worker (`figure`, `judgement`, `circumstance`).
        null: whether it may be null.
        empty: what a cell that never ran has; of those that the worker fills.
        since: the day from which rows have it. A row without it means `older`, or of what the
            worker fills `empty`.
        emulated: whether a row of numerics without a speed may hold it.
        least: of a whole number.
    """

    name: str
    part: Literal["identity", "cell", "figure", "judgement", "circumstance", "context"]
    kind: Kind
    doc: str
    null: bool = True
    empty: Any = None
    since: str = ALWAYS
    older: Any = None
    emulated: bool = False
    least: int | None = None

    @property
    def key(self) -> bool:
        """Whether it tells cells apart."""
        return self.part == "cell"

    @property
    def filled(self) -> bool:
        """Whether the worker fills it."""
        return self.part in ("figure", "judgement", "circumstance")

    @property
    def text(self) -> str:
        """What results/README.md says of it."""
        if self.since == ALWAYS or not self.key:
            return self.doc
        return f"{self.doc}. A row from before {self.since} may lack it and means `{self.older}`"

    @property
    def types(self) -> tuple[type, ...]:
        """The types a reader takes for its value."""
        return (*self.kind.types, type(None)) if self.null else self.kind.types


def identity(name: str, kind: Kind, doc: str, **more: Any) -> Field:
    return Field(name, "identity", kind, doc, null=False, **more)


def key(name: str, kind: Kind, doc: str, **more: Any) -> Field:
    return Field(name, "cell", kind, doc, null=False, **more)


def figure(name: str, kind: Kind, doc: str, **more: Any) -> Field:
    return Field(name, "figure", kind, doc, **more)


def judgement(name: str, kind: Kind, doc: str, **more: Any) -> Field:
    return Field(name, "judgement", kind, doc, **more)


def circumstance(name: str, kind: Kind, doc: str, **more: Any) -> Field:
    return Field(name, "circumstance", kind, doc, **more)


def context(name: str, kind: Kind, doc: str) -> Field:
    return Field(name, "context", kind, doc)


DAY_ONE = "2026-11-22"
"""The day of the first rows. What came later that day the earliest rows lack."""

PICTURES = "2026-11-30"
"""The day from which images start from pictures too."""

RANGE = numbers("low_ms", "mid_ms", "high_ms")
PACE = Record({"latency": RANGE, "period": RANGE})
MODEL = Record({
    "version": WHOLE, "split": TEXT, "tdp_w": NUMBER, "floor_ms": NUMBER,
    "stages": Record(dict.fromkeys(("text", "unet_step", "decode", "rest"), RANGE)),
    "period": RANGE,
    "switching": PACE,
    "switching_each": PACE,
})  # fmt: skip
STAGES = numbers("text", "encode", "unet_first", "unet_step", "decode", "rest", "load")
EACH_CALL = ListOf(NUMBER)
STAGES_SAMPLES = Record({
    "text": EACH_CALL, "encode": EACH_CALL, "unet": ListOf(EACH_CALL), "decode": EACH_CALL,
    "rest": EACH_CALL, "load": EACH_CALL,
})  # fmt: skip
ROOFLINE = MapOf(numbers("tflops", "gb_per_s", "floor_ms", "fraction"))
ACCELERATOR = numbers("clock_mhz", "clock_lowest_mhz", "clock_limit_mhz", "temperature_c",
                      "power_w", "peak_memory_mb", "other_use")  # fmt: skip
IMAGE_CHECK = Record({"status": TEXT, "psnr_db": NUMBER, "ssim": NUMBER})
ERROR = Record(dict.fromkeys(("type", "what", "why", "next"), TEXT))

# ---- the columns, in their order in a row: a new one goes before `time_utc`, or to its part

FIELDS: tuple[Field, ...] = (
    identity("schema", WHOLE, "1; a reader refuses any other by name"),
    identity("row", TEXT, "random id of this row"),
    identity("run", TEXT, "name of the run's folder: UTC time and a random end"),
    identity("round", WHOLE, "from 0", least=0),
    identity("status", TEXT, "see below"),
    identity("provenance", TEXT,
         "`measured`; `modelled`: of a card that was not here, no sample was taken; `emulated`: "
         "numerics of a device that the CPU emulates, from one call, with {emulated} and no "
         "other figure, least of all a time; others (`compiler-estimate`, `modelled`, "
         "`published`) are never mixed with it unlabelled"),
    key("model", TEXT, "name of the bundle's model"),
    key("weights", TEXT,
         "`hub`, `folder` or `random`; `none`: modelled from the architecture, without a "
         "bundle. Latency does not depend on the values; images do"),
    key("backend", TEXT, "a name from `addbench backends`"),
    key("options", TEXT,
         "the backend options that were given, `key=value,...` sorted by key; empty if none"),
    key("device", TEXT, "where the sessions run"),
    key("precision", TEXT, "dtype of the arithmetic"),
    key("storage", TEXT, "dtype of the stored weights"),
    key("size", TEXT, "`<width>x<height>` in pixels"),
    key("batch", WHOLE, "images per call", least=1),
    key("decoder", TEXT, "`vae` or `taesd`"),
    key("steps", WHOLE, "denoising steps asked for", least=1),
    key("scheduler", TEXT, "diffusers class"),
    key("guidance", NUMBER, "its scale; 0 for none", since=DAY_ONE, older=0.0),
    key("guidance_mode", TEXT,
         "`none`; `batch` or `calls`: two UNet evaluations a step, as one batch of two or one "
         "after the other; `embedding`: the scale is an input of the UNet",
         since=DAY_ONE, older="none"),
    key("low_memory", TRUTH,
         "a call loads each part when it needs it and releases it after (`--low-memory`): "
         "`median_ms` and all samples hold that time, which `stages_ms` gives as `load`, and "
         "`peak_memory_mb` is that of the largest part",
         since=DAY_ONE, older=False),
    key("encoder", TEXT,
         "of the picture that the images start from: `vae` or `taesd`; empty where they start from"
         " noise", since=PICTURES, older=""),
    key("strength", NUMBER,
         "the share of `steps` that run on that picture, the last ones; 1 without one",
         since=PICTURES, older=1.0),
    key("scenario", TEXT,
         "of `addbench load`: `single-stream`, `offline`, `server 20/s` or `typists 4`, with "
         "`over http` behind it where a server was asked. `samples_ms` are then the requests' "
         "times: from being sent to their picture; in `offline`, where all are sent at once, from "
         "being begun; of typists from the key. Empty where the harness makes one call after the "
         "other",
         since=PICTURES, older=""),
    key("negative", TEXT,
         "the prompt that guidance leads away from (`--negative`); empty for what the model has "
         "where none is given, zeros or the empty prompt",
         since=PICTURES, older=""),
    figure("samples_ms", ListOf(NUMBER),
         "every timed call, in order: prompt strings in, uint8 images in host memory out. Empty "
         "if none was made",
         null=False, empty=[]),
    figure("cold_ms", NUMBER, "this cell's first call in its process, apart from the samples"),
    figure("process_cold", TRUTH, "that call was the process's first"),
    figure("median_ms", NUMBER,
         "of the samples; of a modelled row the time under its central assumptions"),
    figure("low_ms", NUMBER,
         "of a modelled row: 8 of 10 draws of the model's assumptions and of its fit's errors "
         "lie between it and `high_ms`, all parts resident. Else null",
         since=DAY_ONE),
    figure("high_ms", NUMBER, "the upper end of that range", since=DAY_ONE),
    figure("mean_ms", NUMBER, "of the samples"),
    figure("min_ms", NUMBER, "of the samples"),
    figure("max_ms", NUMBER, "of the samples"),
    figure("sd_ms", NUMBER, "standard deviation of the samples (n - 1); null for one sample"),
    figure("cv", NUMBER, "`sd_ms / mean_ms`, a fraction"),
    figure("p90_ms", NUMBER,
         "smallest sample with 90% of all at or below it; null for fewer than 64 samples"),
    figure("p99_ms", NUMBER, "the same for 99%; null for fewer than 662"),
    figure("images_per_s", NUMBER,
         "batch over median: calls one after the other; with a `scenario` the pictures a second "
         "that came"),
    figure("period_ms", NUMBER,
         "between the ends of two calls while calls are always in flight and the whole card is "
         "busy; null where calls are only made one after the other",
         since=DAY_ONE),
    figure("stages_ms", STAGES,
         "medians: `text` (tokenise and encode; with `ort:context=split` also the context, "
         "which depends on the prompt alone and is made once a call), `encode` (of the picture "
         "that is started from; else null or not there), `unet_first` (first UNet "
         "step), `unet_step` (all later ones; null at 1 step), `decode`, `rest` (scheduler, "
         "noise, conversion to uint8), `load` (loading and releasing parts, which no other "
         "stage holds: in low memory; else null or not there)"),
    figure("stages_samples_ms", STAGES_SAMPLES,
         "per sample: `text`, `encode`, `decode`, `rest`, `load` as lists, `unet` as a list of "
         "lists, `[sample][step]`"),
    figure("stages_from", TEXT,
         "`same_call`: stages were timed in the calls that are the samples; `separate`: in "
         "others"),
    figure("nfe", WHOLE, "UNet evaluations per image, counted as they happened", emulated=True),
    figure("warmup_calls", WHOLE,
         "calls between the cold one and the samples; 0 if the cold call took over 10 s"),
    figure("load_s", NUMBER,
         "seconds, of the worker process this cell was measured in. In low memory nothing is "
         "loaded before the first call"),
    figure("compile_s", NUMBER, "seconds, of the same process; a cached compile is the look-up"),
    figure("compile_cached", TRUTH,
         "every part came from the artifact cache; null where the backend keeps nothing "
         "compiled"),
    figure("compile_peak_mb", NUMBER,
         "highest resident memory of the processes that compiled the cell's artifacts, whenever "
         "that was, in 10^6 bytes; null where none was started for it",
         since=DAY_ONE),
    figure("peak_memory_mb", NUMBER,
         "highest resident memory of the worker during this cell, in 10^6 bytes. Holds Python, "
         "its libraries (scikit-image for the image check too) and the loaded weights, not the "
         "peak of compiling or loading. Null where other processes compute (`web`)"),
    figure("energy_j", NUMBER,
         "joules of one call: a GPU's own counter (the card without its host), the sensors of "
         "the Cloud AI 100 cards that a row's devices are on (all SoCs of each, used or not; "
         "their power five times a second, integrated), or the CPU packages' (RAPL) where the "
         "kernel lets it be read, over the samples and the moments between them; of a modelled "
         "row at the TDP. Null for less than a second, or where nothing can be read"),
    figure("accelerator", ACCELERATOR,
         "of the GPU, read through NVML between the samples, or of Cloud AI 100 cards, of which "
         "power and temperature are read: `clock_mhz` (median), `clock_lowest_mhz`, "
         "`clock_limit_mhz`, `temperature_c` (highest), `power_w` (mean), `peak_memory_mb` "
         "(10^6 bytes), `other_use` (others' share of its time, 0 to 1); each null where "
         "nothing tells. Null on a CPU",
         since=DAY_ONE),
    figure("modelled", MODEL,
         "of a modelled row: `version` of the model of the card (none is 1): rows of an older one "
         "than this checkout's are superseded, and tables say so; `split` over the card's SoCs; "
         "`tdp_w`, at which `energy_j` of such "
         "a row is counted, over `period_ms`; `floor_ms` (all parts at the peak, or their "
         "weights once at full bandwidth); `stages` and `period` with `low_ms`, `mid_ms`, "
         "`high_ms`; `switching`: `latency` and `period` where a turn of a pipeline switches "
         "programs once, `switching_each` where it does at each of them. Else null",
         since=DAY_ONE),
    figure("frames", numbers("count", "per_s", "encode_ms", "unet_ms", "decode_ms", "rest_ms"),
         "with `--frames`, of cells from a picture at batch 1: so many pictures in a row with one "
         "prompt, encoded once, and one seed; frames a second, and the medians of a frame's "
         "stages. Else null",
         since=PICTURES),
    figure("roofline", ROOFLINE,
         "per stage (`text`, `encode`, `unet_step`, `decode`): achieved `tflops` and `gb_per_s`, "
         "`floor_ms` (direct algorithms at the ceilings in the header) and the `fraction` of it "
         "that was reached; where a whole image is one graph, `image` for all of them; null "
         "without ceilings (`--quick`, `--no-roofline`, a scripted device)"),
    judgement("flags", ListOf(TEXT), "see below", null=False, empty=[]),
    judgement("image_check", IMAGE_CHECK,
         "`status` (`ok`, `mismatch`, `no_reference`), `psnr_db` (100 for equal images) and "
         "`ssim` of the cold call's image 0, made from the reference's prompt and seed, against "
         "torch FP32. The gate is parity's, by storage and precision; with `--quality` a picture "
         "below it is held against the judge (flag `below_gate`)",
         emulated=True),
    judgement("quality", MapOf(NUMBER),
         "with `--quality`, in the first round: of the cell's own pictures of `captions` "
         "held-out captions the share with every attribute right (`all`; `all_1` to `all_3` by "
         "number of objects) and with each one right (`background`, `count`, `shape`, `colour`, "
         "`size`, `position`), and `fid_shapes`, the FID of as many pictures over this "
         "project's own network, comparable only over as many captions and the same network "
         "(`fid_network`, of newer rows); null for fewer than 512. Of a cell from pictures: drawn "
         "ones, of which another shape (`reshape`) or colour (`recolour`) is asked for: captions "
         "right, objects that kept their place to 4 px of 64 (`kept_place`), and how far they "
         "moved (`shift_px`, `shift_p90_px`). Else null",
         since=DAY_ONE, emulated=True),
    circumstance("artifacts", MapOf(TEXT),
         "part -> cache key of what was compiled for it",
         empty={}, emulated=True),
    circumstance("versions", MapOf(TEXT),
         "package -> version in the worker's environment, where the backend has one of its own; of "
         "`web` the browser, and in its words where in it the page computed: device, adapter, "
         "threads, whether it is isolated. Null for the header's",
         since=DAY_ONE),
    circumstance("load_avg", NUMBER, "the kernel's one-minute average when the cell began"),
    circumstance("other_cpu", NUMBER,
         "other processes' share of our cores while sampling, 0 to 1; null for less than a "
         "second"),
    circumstance("cpu_freq_mhz", NUMBER, "mean over the cores when the cell ended"),
    circumstance("error", ERROR, "`type`, `what`, `why`, `next`; null if none", emulated=True),
    context("time_utc", TEXT, "when the cell began"),
    context("git_commit", TEXT, "the checkout that measured"),
    context("git_dirty", TRUTH, "whether it held uncommitted changes"),
    context("bundle_hash", TEXT, "content of the bundle: graphs, weights, tokenizers, scheduler"),
)  # fmt: skip

# ---- what follows from them

COLUMNS = tuple(field.name for field in FIELDS)
BY_NAME = {field.name: field for field in FIELDS}
KEY_COLUMNS = tuple(field.name for field in FIELDS if field.key)
"""What tells cells apart; `cell.Cell` has these fields."""
FIGURES: dict[str, Any] = {field.name: field.empty for field in FIELDS if field.filled}
"""What a worker fills in, with the values of a cell that never ran."""
NUMERICS = tuple(field.name for field in FIELDS if field.emulated)
"""What of FIGURES an emulated row may hold."""
LATER: dict[str, Any] = {
    field.name: field.older for field in FIELDS if field.key and field.since != ALWAYS
}
"""Key columns that rows written before they existed lack, with what those rows mean."""
UNSAID: dict[str, Any] = {
    name: older for name, older in LATER.items() if BY_NAME[name].since > DAY_ONE
}
"""Key columns that a header's plan leaves out where they mean what older rows mean: headers that
were published before they existed stay as they are."""
OLDER: dict[str, Any] = LATER | {
    field.name: field.empty for field in FIELDS if field.filled and field.since != ALWAYS
}
"""All columns that older rows lack, with what those rows mean."""
CONTEXT = tuple(field.name for field in FIELDS if field.part == "context")
LEAST = {field.name: field.least for field in FIELDS if field.least is not None}
