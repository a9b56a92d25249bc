"""A dry run: all that a person with the SDK needs, in one folder, to compile and time the parts.

    cloud-ai-100.sh   checks, compile commands, runner commands; runs as it is
    manifest.json     the same as data: arguments in both dialects, presets, expected files
    onnx/, buffers/   the lowered graphs and buffer types, where there is a bundle
    qpc/, logs/       what the script leaves

Without a bundle the script is whole, and its check says how to make the graphs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.artifacts.portable import lower_apart
from backends.base import check_decoder, stage_parts
from backends.cloud_ai import qpc
from backends.cloud_ai.compiler import half_buffers, io_list
from backends.cloud_ai.presets import DEVIATIONS, Preset, preset_for
from backends.cloud_ai.script import script
from backends.cloud_ai.spec import DIALECTS, CompileSpec
from backends.pipeline.session import check_encoder
from core.amounts import bytes_text
from core.errors import PreconditionError
from core.files import build_root, require_disk, write_atomic, write_json
from export.bundle import MANIFEST, Bundle, find_bundle
from export.models import DECODERS, MODELS, PARTS

if TYPE_CHECKING:
    from backends.qaic import QaicBackend

SCRIPT, RECORD = "cloud-ai-100.sh", "manifest.json"
ITERATIONS = 100
HALF = {
    "text_encoder": ["hidden_states"],
    "text_encoder_2": ["hidden_states", "text_embeds"],
    "unet": ["sample", "encoder_hidden_states", "text_embeds", "out_sample"],
    "vae_decoder": ["latent_sample", "sample"],
    "taesd_decoder": ["latent_sample", "sample"],
    "vae_encoder": ["image", "latent_sample"],
    "taesd_encoder": ["image", "latent_sample"],
}
"""FP16 buffers of an SDXL model's parts, for a dry run without a bundle."""


@dataclass(frozen=True)
class CompileJob:
    """One program: `name` is that of its folders."""

    name: str
    part: str
    batch: int
    spec: CompileSpec
    preset: Preset
    buffers: list[str]

    def columns(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "part": self.part,
            "batch": self.batch,
            "preset": asdict(self.preset),
            "arguments": {one.name: self.spec.arguments(one) for one in DIALECTS.values()},
            "fp16_buffers": self.buffers,
            "expected_files": self.expected(),
        }

    def expected(self) -> list[str]:
        """What compiling leaves, and what a run on device 0 leaves."""
        return [
            f"{self.spec.binary_dir}/{qpc.FILE}",
            f"logs/compile-{self.name}.log",
            f"logs/run-{self.name}-device0.log",
        ]


def write(
    backend: QaicBackend,
    model: str,
    weights: str | None,
    dtype: str | None,
    decoders: Sequence[str],
    batches: Sequence[int],
    folder: Path | None = None,
    encoders: Sequence[str] = (),
) -> list[str]:
    """Write the folder; return what to print: where it is, and the commands.

    Raises:
        PreconditionError: no such model, a batch without a preset, or a bundle that was asked for
            by path or kind is not there.
    """
    bundle = bundle_or_none(model, weights, dtype)
    name = bundle.path.name if bundle else model
    folder = folder or build_root() / "cloud-ai-100" / f"{name}-{backend.card}"
    jobs = make_jobs(backend, model, bundle, decoders, batches, encoders)
    for stale in ("onnx", "buffers"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    for job in jobs:
        if job.spec.io_list is not None:
            write_atomic(folder / job.spec.io_list, io_list(job.buffers))
    if bundle is not None:
        write_graphs(backend, bundle, jobs, folder)
    export = f"addbench export --model {model} --dtype fp32"
    missing = ("this dry run was made without a bundle", f"{export}, then the dry run again")
    if bundle is not None:
        missing = ("the dry run wrote it", "copy the whole folder again")
    text = script(name, backend.card, [(job.name, job.spec) for job in jobs], missing, ITERATIONS)
    write_atomic(folder / SCRIPT, text)
    os.chmod(folder / SCRIPT, 0o755)
    record = {
        "schema": 1,
        "model": model,
        "bundle": None if bundle is None else {"name": name, "hash": bundle.hash},
        "card": backend.card,
        "deviations": DEVIATIONS,
        "programs": [job.columns() for job in jobs],
        "script": SCRIPT,
    }
    write_json(folder / RECORD, record)
    dialect = backend.found.sdk.dialect
    lines = [f"wrote {folder / SCRIPT} and {RECORD} beside it"]
    if bundle is None:
        lines.append(f"there is no bundle of {model}: the graphs are missing ({export})")
    for one in [dialect] if dialect else DIALECTS.values():
        lines.append(f"# {one.name}, in {folder}")
        lines += [shlex.join(job.spec.command(one, backend.found.sdk.root)) for job in jobs]
    runner = backend.found.sdk.root / "exec" / "qaic-runner"
    lines.append("# qaic-runner")
    lines += [shlex.join(run_command(runner, job)) for job in jobs]
    lines.append(f"presets: {DEVIATIONS}")
    lines += [f"  {job.name:<24} {job.preset.follows}: {job.preset.note}" for job in jobs]
    return lines


def run_command(runner: Path, job: CompileJob) -> list[str]:
    """Time one program on device 0, one inference after the other."""
    activations = ["-t", str(job.spec.binary_dir), "-a", "1", "-S", "1"]
    return [str(runner), *activations, "-n", str(ITERATIONS), "-d", "0"]


def bundle_or_none(model: str, weights: str | None, dtype: str | None) -> Bundle | None:
    """The bundle, or None for a known model that was not exported here."""
    try:
        return find_bundle(model, weights, dtype)
    except PreconditionError:
        known = model in MODELS and weights is None and dtype is None
        if not known or Path(model, MANIFEST).is_file():
            raise
        if MODELS[model].pooled:
            return None
        raise


def make_jobs(
    backend: QaicBackend,
    model: str,
    bundle: Bundle | None,
    decoders: Sequence[str],
    batches: Sequence[int],
    encoders: Sequence[str] = (),
) -> list[CompileJob]:
    parts = tuple(bundle.parts) if bundle else PARTS
    entry = bundle.model if bundle else MODELS[model]
    size = bundle.size if bundle else (entry.size, entry.size)
    for decoder in decoders:
        if bundle is not None:
            check_decoder(bundle, decoder)
        elif decoder not in DECODERS:
            raise PreconditionError(
                f"there is no decoder called {decoder!r}",
                f"decoders: {', '.join(DECODERS)}",
                f"use --decoder {DECODERS[0]}",
            )
    for encoder in encoders:
        if bundle is not None:
            check_encoder(bundle, encoder)
    wanted = {part for decoder in decoders for part in stage_parts(parts, decoder)}
    wanted |= {f"{encoder}_encoder" for encoder in encoders}
    jobs = []
    for batch in batches:
        for part in (part for part in parts if part in wanted):
            name = f"{part}-batch{batch}"
            own = backend.spec(part, batch, Path("qpc") / name, Path("onnx") / name)
            info = bundle.parts[part] if bundle else None
            buffers = half_buffers((*info.inputs, *info.outputs)) if info else HALF[part]
            spec = CompileSpec(
                **{
                    **vars(own),
                    "binary_dir": Path("qpc") / name,
                    "io_list": Path("buffers") / f"{name}.yaml" if own.io_list else None,
                }
            )
            chosen = preset_for(backend.preset(part, batch), entry.name, size)
            jobs.append(CompileJob(name, part, batch, spec, chosen, buffers))
    return jobs


def write_graphs(
    backend: QaicBackend, bundle: Bundle, jobs: Sequence[CompileJob], folder: Path
) -> None:
    """Lower every graph into the folder, with weights of its own."""
    need = sum(bundle.parts[job.part].weight_bytes for job in jobs)
    require_disk(folder, need, f"the graphs of {bundle.path.name}")
    print(f"writing {bytes_text(need)} of graphs into {folder}", file=sys.stderr, flush=True)
    for job in jobs:
        form = backend.form(job.part, job.batch)
        lower_apart(bundle.parts[job.part].graph, form, folder / job.spec.model)
