"""Each part against torch FP32, and the whole image against diffusers' own pipeline.

The images come from the pipeline class of diffusers that the checkpoint is for (`oracle.py`): what
our own order of the parts left out would show. The backend walks the chain of text encoders, UNet
and decoders on its own tensors; a process per part, tensors handed on in files, so that the peak is
one part's and never the pipeline's. The FP32 runs also watch every op's largest absolute value:
FP16 overflow is judged there, because a CPU computes FP16 graphs in FP32 and would never show it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.check.gate import QUANTISED, RANDOM_WORDS, gate_for, image_distance
from backends.check.watch import rank
from backends.pipeline.session import check_encoder
from backends.pipeline.session import encoders as picture_encoders
from backends.pipeline.start import kept_steps
from core.errors import AddbenchError, PreconditionError
from core.files import ROOT, read_json, sha256_json, write_json
from core.memory import give_memory_back
from core.process import die_with_parent
from core.table import Column, markdown_lines
from export.models import PICTURE_PARTS

if TYPE_CHECKING:
    import torch

    from backends.pipeline.pictures import Picture
    from export.bundle import Bundle, Redraw, References

SEED = 0
STEPS = (1, 2, 4)
CHEAP_BYTES = 100e6
"""A UNet of less also draws at the model's own step count, however many those are; the parts of a
bundle of less share a process."""
PEAK = "peak.json"
REFERENCE = "torch"
FP16_MAX = 65504.0
HEADROOM = 0.5
"""Beyond this fraction of the FP16 maximum an op is judged to overflow: other prompts go higher."""


ORACLE = "oracle"
"""The part of a job that draws the reference images."""
REDRAW = "redraw"
"""The part of a job that draws those from a picture, of the images that ORACLE has drawn."""
SHARES = (0.25, 0.5, 0.75)
"""Which shares of the steps run on a picture, in the reference images from one."""


# ---- one part, in a subprocess


def run_oracle(job: Mapping[str, Any]) -> None:
    """Child process: the reference images, by diffusers' own pipeline."""
    import torch
    from safetensors.torch import save_file

    from backends.check.oracle import Oracle
    from backends.pipeline.recipe import make_recipe
    from export.bundle import Bundle

    folder = Path(job["folder"])
    bundle = Bundle.open(Path(job["bundle"]))
    oracle = Oracle(bundle, make_recipe(bundle), watched=True)
    images = oracle.draw(bundle.model.prompts[0], reference_steps(bundle), SEED)
    save_file(
        {f"{decoder}-{steps}": torch.tensor(image) for (decoder, steps), image in images.items()},
        folder / "oracle.safetensors",
    )
    write_json(folder / "oracle.json", oracle.describe() | {"largest": oracle.largest})


def run_redraw(job: Mapping[str, Any]) -> None:
    """Child process: the reference images from a picture, by diffusers' own pipeline."""
    import torch
    from safetensors.torch import save_file

    from backends.check.oracle import Oracle
    from backends.pipeline.recipe import make_recipe
    from export.bundle import Bundle

    folder = Path(job["folder"])
    bundle = Bundle.open(Path(job["bundle"]))
    picture = redrawn_from(bundle, folder).picture
    pairs = [(int(steps), int(kept)) for steps, kept in job["pairs"]]
    images = Oracle(bundle, make_recipe(bundle)).redraw(
        redraw_prompt(bundle), picture, pairs, job["encoders"], SEED
    )
    save_file(
        {"-".join(map(str, key)): torch.tensor(image) for key, image in images.items()},
        folder / "redraw.safetensors",
    )


def redrawn_from(bundle: Bundle, folder: Path) -> References:
    """The reference images of which one is drawn from: those of this job, else the bundle's.

    Raises:
        PreconditionError: there are none.
    """
    from export.bundle import References

    if (folder / "oracle.safetensors").is_file():
        images = {}
        for key, image in oracle_images(folder).items():
            decoder, _, steps = key.rpartition("-")
            images[decoder, int(steps)] = image
        return References(SEED, bundle.model.prompts[0], images)
    known = bundle.references()
    if known is None:
        raise PreconditionError(
            f"{bundle.path.name} has no reference images to draw from",
            "what is drawn from is one of them",
            f"addbench parity --model {bundle.path}",
        )
    return known


def redraw_prompt(bundle: Bundle) -> str:
    """What is asked for where a picture is drawn from: another prompt than the picture's own, so
    that giving back what was given is wrong."""
    return bundle.model.prompts[1 % len(bundle.model.prompts)]


def read_redrawn(folder: Path) -> dict[Redraw, Any]:
    """What REDRAW drew."""
    from safetensors.numpy import load_file

    images = {}
    for key, image in load_file(folder / "redraw.safetensors").items():
        decoder, steps, encoder, kept = key.split("-")
        images[decoder, int(steps), encoder, int(kept)] = image
    return images


def is_small(bundle: Bundle) -> bool:
    """Whether all parts of a bundle share a process, and take seconds."""
    return sum(info.weight_bytes for info in bundle.parts.values()) < CHEAP_BYTES


def has_redrawn(bundle: Bundle, references: References) -> bool:
    """Whether the references from a picture are there that parity draws by itself."""
    return bool(references.redrawn) or not (is_small(bundle) and picture_encoders(bundle))


def redraw_pairs(bundle: Bundle) -> list[tuple[int, int]]:
    """Steps, and how many of them run on a picture, of the reference images from one."""
    pairs = (
        (steps, kept_steps(steps, share)) for steps in reference_steps(bundle) for share in SHARES
    )
    return [pair for pair in dict.fromkeys(pairs) if pair[1]]


def redraw(
    bundle: Bundle,
    pairs: Sequence[tuple[int, int]],
    names: Sequence[str],
    say: Callable[[str], None] = print,
) -> list[Redraw]:
    """Draw reference images from a picture and add them to the bundle's; what was drawn.

    Args:
        pairs: steps, and how many of them run.
        names: of the encoders.

    Raises:
        PreconditionError: the bundle has no reference images, or no such encoder.
    """
    from export.bundle import write_references

    for name in names:
        check_encoder(bundle, name)
    with tempfile.TemporaryDirectory(prefix="addbench-parity-") as scratch:
        folder = Path(scratch)
        known = redrawn_from(bundle, folder)
        job = {"folder": scratch, "bundle": str(bundle.path), "parts": [REDRAW],
               "pairs": list(pairs), "encoders": list(names), "backend": REFERENCE}  # fmt: skip
        started = time.perf_counter()
        say(f"  {REDRAW}: diffusers' pipeline draws from a picture")
        peak = spawn(job)
        images = read_redrawn(folder)
    say(f"  {REDRAW:<16} {time.perf_counter() - started:7.1f} s  {peak / 1e9:5.1f} GB")
    asked = redraw_prompt(bundle)
    before = known.redrawn if known.redraw_prompt == asked else {}
    write_references(
        bundle, replace(known, redraw_prompt=asked, redrawn={**before, **images})
    )  # fmt: skip
    return list(images)


def run_part(job: Mapping[str, Any], part: str) -> None:
    """Child process: the part on torch, then on the backend, which walks its own chain."""
    from export.bundle import Bundle

    folder = Path(job["folder"])
    bundle = Bundle.open(Path(job["bundle"]))
    found = {}
    for runtime in (REFERENCE, job["backend"]):
        found[runtime] = run_stage(bundle, part, runtime, folder)
        give_memory_back()  # one runtime's weights are gone before the other's come
    write_json(folder / f"{part}.json", {"overflow": found[REFERENCE]})


def run_stage(bundle: Bundle, part: str, runtime: str, folder: Path) -> list[dict[str, Any]]:
    """One part on one runtime: seeded inputs, and on a backend its stage of the reference image.

    Writes `part.*` and `stage.*` tensors; returns the largest values that the watch saw.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from backends.base import Shapes
    from backends.check.watch import Watch
    from backends.registry import parse_backend

    width, height = bundle.size
    decoder = part.removesuffix("_decoder") if part.endswith("_decoder") else "taesd"
    encoder = part.removesuffix("_encoder") if part in PICTURE_PARTS else None
    backend = parse_backend(runtime)
    out: dict[str, torch.Tensor] = {}
    with (
        torch.inference_mode(),
        backend.pipeline(bundle, decoder, Shapes(1, width, height)) as pipeline,
    ):
        if encoder is not None:
            pipeline.use_encoder(encoder)
        encodes_empty = pipeline.recipe.guided and not bundle.force_zeros
        watch = Watch()
        module = getattr(pipeline.session(part), "module", None)
        if module is not None:
            watch.attach(module)
        with watch:
            seeded = load_file(folder / f"{part}.inputs.safetensors")
            if part == "unet":
                seeded |= pipeline.context(seeded["encoder_hidden_states"])
            for name, tensor in pipeline.run(part, **seeded).items():
                out[f"part.{name}"] = tensor.float()
            if encoder is not None:  # what a person would pass: the drawn image
                image = to_picture(list(oracle_images(folder).values())[-1])
                latents = pipeline.encode_pictures([image], 1)
                out["part.latents of the reference image"] = latents
            elif runtime == REFERENCE:
                pass  # its images are the oracle's
            elif part.startswith("text_encoder"):
                ids = pipeline.tokenise(bundle.model.prompts[:1])[encoders(bundle).index(part)]
                for name, tensor in pipeline.run(part, input_ids=ids).items():
                    out[f"stage.{name}"] = tensor.float()
                if encodes_empty:
                    ids = pipeline.tokenise([""])[encoders(bundle).index(part)]
                    for name, tensor in pipeline.run(part, input_ids=ids).items():
                        out[f"empty.{name}"] = tensor.float()
            elif part == "unet":
                files = [tensors(folder, p, runtime) for p in encoders(bundle)]
                prompted = pipeline.join([stage(file) for file in files])
                empty = pipeline.join([stage(f, "empty") for f in files]) if encodes_empty else None
                conditioning = pipeline.with_negative(prompted, empty)
                for steps in reference_steps(bundle):
                    out[f"stage.{steps}"] = pipeline.denoise(conditioning, steps, [SEED])[0]
            else:
                for count, latents in stage(tensors(folder, "unet", runtime)).items():
                    images = pipeline.to_uint8(pipeline.decode(latents))
                    out[f"stage.{count}"] = torch.from_numpy(images)
        save_file({k: v.contiguous() for k, v in out.items()}, tensors(folder, part, runtime))
        return watch.report()


def to_picture(image: Any) -> Picture:
    """A drawn image, uint8 [height, width, 3], as what is started from."""
    from backends.pipeline.pictures import Picture

    return Picture(image, ())


def tensors(folder: Path, part: str, runtime: str) -> Path:
    """The file of what `part` gave on `runtime`."""
    return folder / f"{part}-{'reference' if runtime == REFERENCE else 'backend'}.safetensors"


def encoders(bundle: Bundle) -> list[str]:
    return [part for part in bundle.parts if part.startswith("text_encoder")]


def reference_steps(bundle: Bundle) -> Sequence[int]:
    """Step counts of the reference images."""
    model = bundle.model
    if model.step_counts:
        return model.step_counts
    own = {model.steps} if bundle.parts["unet"].weight_bytes < CHEAP_BYTES else set()
    takes = {steps for steps in STEPS if steps >= bundle.least_steps} or {bundle.least_steps}
    return sorted(takes | own)


def stage(file: Path, of: str = "stage") -> dict[str, torch.Tensor]:
    """What a part gave in its stage of the reference image; `empty`: for the empty prompt."""
    from safetensors.torch import load_file

    return {
        name.removeprefix(f"{of}."): tensor
        for name, tensor in load_file(file).items()
        if name.startswith(f"{of}.")
    }


# ---- the parent


def check(
    bundle: Bundle, backend: str = "ort", force: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run parity of `backend`, write `parity.json` and the reference images; returns the record.

    Raises:
        AddbenchError: a gate is missed or an op overflows FP16; the record is written first.
    """
    from export.bundle import write_references

    file = bundle.path / record_name(bundle, backend)
    before = bundle.references()
    if not force and file.exists() and before is not None and has_redrawn(bundle, before):
        record: dict[str, Any] = read_json(file)
        if record.get("backend") == backend and record.get("compiled") == compiled(bundle, backend):
            say(f"parity of {bundle.path.name} is on record ({file.name}); --force runs it again")
            failure = verdict(record)
            if failure:
                raise failure
            return record
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="addbench-parity-") as scratch:
        folder = Path(scratch)
        peaks = walk(bundle, backend, folder, say)
        record = compare(bundle, backend, folder, peaks)
        drawn = redrawn_from(bundle, folder)
        if (folder / "redraw.safetensors").is_file():
            redrawn, prompt = read_redrawn(folder), redraw_prompt(bundle)
            drawn = replace(drawn, redraw_prompt=prompt, redrawn=redrawn)
        elif before is not None and (before.picture == drawn.picture).all():
            drawn = replace(drawn, redraw_prompt=before.redraw_prompt, redrawn=before.redrawn)
    record["seconds"] = round(time.perf_counter() - started, 1)
    write_references(bundle, drawn)
    failure = verdict(record)
    write_json(file, record | {"ok": failure is None})
    if failure:
        raise failure
    return record


def compiled(bundle: Bundle, backend: str) -> str:
    """A hash of the bundle, the backend's version and the code that compiles.

    A record says nothing of what another of these makes.
    """
    from backends.base import Shapes, artifact_key
    from backends.registry import parse_backend

    chosen, shapes = parse_backend(backend), Shapes(1, *bundle.size)
    keys = [artifact_key(chosen, bundle, part, shapes) for part in bundle.parts]
    return sha256_json([bundle.hash, *keys])


def record_name(bundle: Bundle, backend: str) -> str:
    """Return the record's name; integer weights have theirs: the bundle's is of its export."""
    from backends.registry import parse_backend
    from export.bundle import PARITY

    storage = parse_backend(backend).storage(bundle)
    return f"parity-{storage}.json" if storage in QUANTISED else PARITY


def walk(
    bundle: Bundle, backend: str, folder: Path, say: Callable[[str], None]
) -> dict[str, float]:
    """The oracle, and every part on torch and `backend`; part -> peak memory in MB.

    Each in a process of its own, whose memory is free again before the next; those of a small
    bundle share one, since starting takes longer than all of their work.
    """
    import torch
    from safetensors.torch import save_file

    from backends.base import Shapes
    from backends.pipeline.recipe import make_recipe

    recipe = make_recipe(bundle)
    generator = torch.Generator().manual_seed(SEED)
    for part, info in bundle.parts.items():
        batch = recipe.shapes(part, Shapes(1, *bundle.size)).batch
        inputs = seeded_inputs(info.inputs, generator, batch)
        save_file(inputs, folder / f"{part}.inputs.safetensors")
    names = [ORACLE, *bundle.parts]
    small = is_small(bundle)
    asked: dict[str, Any] = {}
    if small and picture_encoders(bundle):  # of a large one they are drawn when asked for
        names.insert(1, REDRAW)
        asked = {"pairs": redraw_pairs(bundle), "encoders": picture_encoders(bundle)}
    peaks: dict[str, float] = {}
    for parts in [names] if small else [[name] for name in names]:
        job = {"folder": str(folder), "bundle": str(bundle.path), "parts": parts}
        started = time.perf_counter()
        if not small:  # minutes at SDXL's size
            doing = "diffusers' pipeline draws" if parts == [ORACLE] else f"on torch and {backend}"
            say(f"  {parts[0]}: {doing}")
        peak = spawn(job | asked | {"backend": backend})
        seconds = time.perf_counter() - started
        what = "all parts" if small else parts[0]
        say(f"  {what:<16} {seconds:7.1f} s  {peak / 1e9:5.1f} GB")
        peaks |= dict.fromkeys(parts, round(peak / 1e6))
    return peaks


def oracle_images(folder: Path) -> dict[str, Any]:
    """The reference images, uint8 [height, width, 3] by `<decoder>-<steps>`."""
    from safetensors.numpy import load_file

    return dict(load_file(folder / "oracle.safetensors"))


def seeded_inputs(
    specs: Sequence[Any], generator: torch.Generator, batch: int = 1
) -> dict[str, torch.Tensor]:
    """Inputs of a part: random token ids, normal floats, a timestep in the middle."""
    import torch

    inputs = {}
    for spec in specs:
        shape = [size if isinstance(size, int) else batch for size in spec.shape]
        if spec.name == "image":
            tensor = torch.rand(shape, generator=generator) * 2 - 1
        elif spec.name == "input_ids":
            tensor = torch.randint(1, 400, shape, generator=generator)
        elif spec.name == "timestep":
            tensor = torch.full(shape, 499.0)
        elif spec.name == "time_ids":
            tensor = torch.tensor([[512.0, 512.0, 0.0, 0.0, 512.0, 512.0]] * batch)
        else:
            tensor = torch.randn(shape, generator=generator)
        inputs[spec.name] = tensor
    return inputs


def spawn(job: Mapping[str, Any]) -> int:
    """Run `run_part` of the job's parts in a fresh process; returns its peak memory in bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "backends.check.parity"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    try:
        _, errors = process.communicate(json.dumps(job))
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        killed = process.returncode == -signal.SIGKILL
        raise AddbenchError(
            f"{', '.join(job['parts'])} died with exit code {process.returncode}, on torch or"
            f" {job['backend']}",
            "the system ran out of memory" if killed else errors.strip()[-2000:],
            "free memory" if killed else "`addbench verify` checks the bundle's files",
        )
    return int(read_json(Path(job["folder"]) / PEAK)["bytes"])


def compare(
    bundle: Bundle, backend: str, folder: Path, peaks: Mapping[str, float]
) -> dict[str, Any]:
    """The record: relative error per part output, image distances, the largest values per op."""
    from safetensors.torch import load_file

    from backends.registry import parse_backend

    chosen = parse_backend(backend)
    storage, precision = chosen.storage(bundle), chosen.precision(bundle)
    gate = gate_for(storage, precision, bundle.weights)
    parts: dict[str, Any] = {}
    images: dict[str, Any] = {}
    oracle, references = read_json(folder / "oracle.json"), oracle_images(folder)
    largest = oracle.pop("largest")
    for part in bundle.parts:
        measured = load_file(tensors(folder, part, backend))
        errors = {}
        for name, expected in load_file(tensors(folder, part, REFERENCE)).items():
            difference = (measured[name] - expected).norm() / expected.norm().clamp_min(1e-12)
            errors[name.removeprefix("part.")] = float(difference)
        for name, image in measured.items() if part.endswith("_decoder") else ():
            if name.startswith("stage."):
                key = f"{part.removesuffix('_decoder')}-{name.removeprefix('stage.')}"
                distance = image_distance(image.numpy()[0], references[key])
                images[key] = asdict(distance) | {"ok": distance.passes(gate)}
        seen = [*read_json(folder / f"{part}.json")["overflow"], *largest.get(part, ())]
        parts[part] = {
            "relative_error": errors,
            "ok": all(error <= gate.relative_error for error in errors.values()),
            "largest_values": sorted(seen, key=lambda op: -rank(op["largest"]))[:5],
            "peak_memory_mb": peaks[part],
        }
    return {
        "schema": 1,
        "bundle_hash": bundle.hash,
        "backend": backend,
        "compiled": compiled(bundle, backend),
        "storage": storage,
        "precision": precision,
        "weights": bundle.weights,
        "oracle": oracle | {"peak_memory_mb": peaks[ORACLE]},
        "gate": asdict(gate),
        "parts": parts,
        "images": images,
        "fp16_limit": HEADROOM * FP16_MAX if bundle.dtype == "fp16" else None,
    }


def verdict(record: Mapping[str, Any]) -> AddbenchError | None:
    """The error to raise when a part, an image or an op's largest value is beyond its gate."""
    limit = record["fp16_limit"]
    for part, found in record["parts"].items():
        for op in found["largest_values"]:
            if limit is not None and not op["largest"] <= limit:
                return AddbenchError(
                    f"{part} overflows FP16: {op['op']} in {op['module']} reaches"
                    f" {op['largest']:.0f}",
                    f"FP16 ends at {FP16_MAX:.0f} and the limit is {limit:.0f}, since other prompts"
                    " reach further; seen in an FP32 run",
                    "pass an FP16-safe checkpoint (--vae ... for the decoder), or --dtype fp32",
                )
    bad = [f"{part}: {found['relative_error']}" for part, found in record["parts"].items()
           if not found["ok"]]  # fmt: skip
    bad += [
        f"image {key}: PSNR {found['psnr_db']:.1f} dB, SSIM {found['ssim']:.4f}"
        for key, found in record["images"].items()
        if not found["ok"]
    ]
    if bad:
        return AddbenchError(
            f"{record['backend']} does not match torch FP32",
            "; ".join(bad) + f" (gate: {record['gate']})",
            "the numbers are in parity.json; look at the first part in the list that is off",
        )
    return None


PART_COLUMNS = (
    Column("part", lambda pair: pair[0]),
    Column("relative error", lambda pair: "; ".join(
        f"{name} {error:.1e}" for name, error in pair[1]["relative_error"].items())),
    Column("largest value", lambda pair: max(
        (op["largest"] for op in pair[1]["largest_values"]), default=None), 1),
    Column("within the gate", lambda pair: "yes" if pair[1]["ok"] else "no"),
)  # fmt: skip
IMAGE_COLUMNS = (
    Column("image (decoder-steps)", lambda pair: pair[0]),
    Column("PSNR (dB)", lambda pair: pair[1]["psnr_db"], 1),
    Column("SSIM", lambda pair: pair[1]["ssim"], 5),
    Column("within the gate", lambda pair: "yes" if pair[1]["ok"] else "no"),
)
"""What is said of each part and each image of a record, here and on the page of a run."""


def report(record: Mapping[str, Any]) -> str:
    """The record as text, with a table of its parts and one of its images."""
    lines = [
        f"storage {record['storage']}, precision {record['precision']}, weights {record['weights']}"
    ]
    if oracle := record.get("oracle"):
        lines.append(f"  images against {oracle['pipeline']} of diffusers {oracle['diffusers']}")
    for columns, name in ((PART_COLUMNS, "parts"), (IMAGE_COLUMNS, "images")):
        if record[name]:
            lines += ["", *markdown_lines(columns, list(record[name].items()))]
    if record["storage"] in QUANTISED and record["weights"] == "random":
        lines += ["", RANDOM_WORDS]
    return "\n".join(lines)


def _child() -> None:
    import resource

    die_with_parent()
    if os.getppid() == 1:
        raise SystemExit("the parent is gone")
    job = json.loads(sys.stdin.read())
    for part in job["parts"]:
        if part in (ORACLE, REDRAW):
            (run_oracle if part == ORACLE else run_redraw)(job)
            give_memory_back()
        else:
            run_part(job, part)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_json(Path(job["folder"]) / PEAK, {"bytes": peak})


if __name__ == "__main__":
    try:
        _child()
    except AddbenchError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
