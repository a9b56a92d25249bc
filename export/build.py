"""Checkpoint -> bundle: part after part, in a scratch folder that becomes the bundle at the end."""

from __future__ import annotations

import dataclasses
import errno
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from core.errors import AddbenchError, PreconditionError
from core.files import require_disk, sha256_file, staged_folder, write_json
from core.memory import give_memory_back, require_memory
from export.bundle import MANIFEST, SCHEMA, part_hash
from export.request import require_size
from export.source.checkpoint import ENCODERS, Checkpoint, CheckpointError
from export.source.scheduler import least_steps

if TYPE_CHECKING:
    from rich.console import Console

BATCH = 2
"""The batch of the example inputs. The graph names the axis; 1 would be traced as a constant."""


@dataclass(frozen=True)
class ExportPlan:
    """What one export makes.

    Attributes:
        request: kept in the manifest, to tell what a bundle is of.
        graphs: whether graphs are made; without, a bundle runs on torch's own modules alone.
    """

    checkpoint: Checkpoint
    dtype: str
    width: int
    height: int
    request: dict[str, Any]
    graphs: bool = True

    @property
    def name(self) -> str:
        """The name of the model with that of what is fused into it."""
        source = self.checkpoint.source
        added = (*source.get("loras", ()), *source.get("embeddings", ()))
        names = [self.checkpoint.model.name, *(entry["name"] for entry in added)]
        skip = self.checkpoint.model.clip_skip
        return "+".join([*names, f"clip-skip-{skip}"] if skip else names)


def build_bundle(plan: ExportPlan, target: Path, console: Console) -> None:
    """Make the bundle at `target`, whole or not at all. Progress goes to `console`."""
    from export.graphs import OPSET

    checkpoint, model = plan.checkpoint, plan.checkpoint.model
    with console.status("opening everything"):
        opened = open_all(plan)
    if plan.graphs:
        need = weight_bytes(plan, opened.skeletons)
        disk = int(sum(need.values()) * 1.02) + (16 << 20)
        require_disk(target, disk, f"the bundle {target.name}")
        # Beside the weights of a part: 0.6 GB of libraries, a tenth for the traced graph.
        require_memory(int(max(need.values()) * 1.1 + 0.6e9), f"exporting {model.name}")
    with _disk_errors(target), _heard_interrupt() as check, staged_folder(target) as folder:
        checkpoint.save_tokenizers(folder)
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.scheduler_config())
        parts = {}
        for part in checkpoint.parts:
            if plan.graphs:
                parts[part] = _export_part(plan, part, folder, console, opened.scale)
            else:
                parts[part] = opened.described[part]
            check()
        with console.status("hashing"):
            files: dict[str, dict[str, Any]] = {
                file.relative_to(folder).as_posix(): {
                    "sha256": sha256_file(file),
                    "bytes": file.stat().st_size,
                }
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            }
        for entry in parts.values():
            names = [name for name in (entry["graph"], entry["data"]) if name in files]
            entry["hash"] = part_hash([files[name]["sha256"] for name in names])
        manifest = {
            "schema": SCHEMA,
            "graphs": plan.graphs,
            "model": plan.name,
            "name": target.name,
            "weights": checkpoint.kind,
            "dtype": plan.dtype,
            "size": [plan.width, plan.height],
            "opset": OPSET,
            "source": checkpoint.source,
            "request": {"model": model.name} | plan.request,
            "licence": licence(checkpoint),
            "steps": max(model.steps, opened.least_steps),
            "guidance": model.guidance,
            "pipeline": pipeline_entry(checkpoint, opened),
            "parts": parts,
            "files": files,
            "versions": _versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(folder / MANIFEST, manifest)
        check()


@dataclass(frozen=True)
class Opened:
    """All that a pipeline opens, opened before the first graph is made.

    Attributes:
        skeletons: part -> its module without weights.
        scale: pixels along one side of a latent.
        channels: of the latents.
        least_steps: that the scheduler can take.
        described: part -> its entry in a manifest, read off a run without numbers.
    """

    skeletons: dict[str, Any]
    scale: int
    channels: int
    least_steps: int
    described: dict[str, dict[str, Any]]


def open_all(plan: ExportPlan) -> Opened:
    """Open every component of a checkpoint, and run all of it without weights.

    Raises:
        PreconditionError: something would fail later, or draw another image than diffusers does.
    """
    checkpoint, model = plan.checkpoint, plan.checkpoint.model
    checkpoint.require_readable()
    skeletons = {part: checkpoint.skeleton(part) for part in checkpoint.parts}
    scale, channels = check_sizes(plan, {part: m.config for part, m in skeletons.items()})
    for lora in checkpoint.loras:
        lora.check(skeletons, checkpoint.config("unet"))
    checkpoint.require_tokenizers(
        [
            module.get_input_embeddings().num_embeddings  # type: ignore[operator]
            for part, module in skeletons.items()
            if part in ENCODERS
        ]
    )
    least = least_steps(checkpoint.scheduler_config(), model.step_counts, channels)
    described = {}
    for part, module in skeletons.items():
        try:
            described[part] = describe(plan, part, module, scale)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"{checkpoint.origins[part].folder} cannot be run at {plan.width}x{plan.height}",
                reason,
                "check its config.json against those of the other components",
            ) from error
    return Opened(skeletons, scale, channels, least, described)


def describe(plan: ExportPlan, part: str, module: Any, scale: int) -> dict[str, Any]:
    """A part's entry in the manifest: its signature, by running it without weights or numbers."""
    import torch

    from export.graphs import UNBATCHED
    from export.parts import example_inputs, output_names, wrap

    model, dtype = plan.checkpoint.model, torch_dtype(plan.dtype)
    inputs = example_inputs(part, module, BATCH, plan.width, plan.height, dtype, scale=scale)
    wrapped = wrap(part, module, model).to("meta", dtype=dtype)
    with torch.no_grad():
        result = wrapped(*(tensor.to("meta") for tensor in inputs.values()))
    results = result if isinstance(result, tuple) else (result,)

    def specs(tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape if name in UNBATCHED else ("batch", *tensor.shape[1:])),
            }
            for name, tensor in tensors.items()
        ]

    return {
        "graph": f"{part}/none",
        "data": None,
        "inputs": specs(inputs),
        "outputs": specs(dict(zip(output_names(part, model), results, strict=True))),
        "weight_bytes": sum(p.numel() * p.element_size() for p in wrapped.parameters()),
        "ops": {},
    }


def licence(checkpoint: Checkpoint) -> str:
    """Return the licences of everything that is in the bundle's graphs."""
    names = [lora["name"] for lora in checkpoint.source.get("loras", ())]
    rest = f"; beside it the terms of the LoRA weights {', '.join(names)}" if names else ""
    return checkpoint.model.licence + rest


def pipeline_entry(checkpoint: Checkpoint, opened: Opened) -> dict[str, Any]:
    """The manifest's `pipeline`: the model's entry, with what the checkpoint itself decides."""
    return dataclasses.asdict(checkpoint.model) | {
        "scheduler": checkpoint.scheduler_config()["_class_name"],
        "force_zeros": checkpoint.force_zeros,
        "vae_scale": opened.scale,
        "latent_channels": opened.channels,
        "least_steps": opened.least_steps,
        "steps": max(checkpoint.model.steps, opened.least_steps),
    }


def _export_part(
    plan: ExportPlan, part: str, folder: Path, console: Console, scale: int
) -> dict[str, Any]:
    """Export one part into its folder; its manifest entry, the hash apart. Frees all it loaded."""
    from export.graphs import describe_graph, exported_graph, save_graph
    from export.parts import example_inputs, output_names, wrap

    started = time.perf_counter()
    dtype = torch_dtype(plan.dtype)
    model = plan.checkpoint.model
    with console.status(f"{part}: reading the weights"):
        module = plan.checkpoint.module(part, dtype)
    read = time.perf_counter()
    inputs = example_inputs(part, module, BATCH, plan.width, plan.height, dtype, scale=scale)
    status = console.status(f"{part}: exporting the graph")
    with (
        status,
        exported_graph(wrap(part, module, model), inputs, output_names(part, model), part) as graph,
    ):
        traced = time.perf_counter()
        status.update(f"{part}: saving")
        (folder / part).mkdir()
        save_graph(graph, folder / part)
        entry = describe_graph(graph)
    del module, inputs, graph
    give_memory_back()  # a part is freed before the next one comes
    data = folder / part / "model.onnx.data"
    entry["graph"] = f"{part}/model.onnx"
    entry["data"] = f"{part}/{data.name}" if data.exists() else None
    console.print(
        f"{part:15} {entry['weight_bytes'] / 1e6:9.1f} MB  {sum(entry['ops'].values()):5} ops"
        f"   weights {read - started:5.1f} s  graph {traced - read:5.1f} s"
        f"  save {time.perf_counter() - traced:5.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return entry


def weight_bytes(plan: ExportPlan, skeletons: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights of each part's graph."""
    from export.parts import wrap

    bytes_each = 2 if plan.dtype == "fp16" else 4
    model = plan.checkpoint.model
    return {
        part: bytes_each * sum(p.numel() for p in wrap(part, module, model).parameters())
        for part, module in skeletons.items()
    }


def check_sizes(plan: ExportPlan, configs: dict[str, Any]) -> tuple[int, int]:
    """Check that the parts and the image size fit each other.

    Args:
        configs: of the modules, with the libraries' defaults filled in.

    Returns:
        Pixels along one side of a latent, and channels of the latents.
    """
    from export.parts import context_width

    model = plan.checkpoint.model
    unet, vae = configs["unet"], configs["vae_decoder"]
    taesd = configs.get("taesd_decoder")
    scale = int(2 ** (len(vae.block_out_channels) - 1))
    require_size(model, plan.checkpoint.multiple, plan.width, plan.height)
    channels = int(unet.in_channels)
    if channels in (8, 9):
        raise PreconditionError(
            f"the UNet of {model.name} draws on a picture: in_channels is {channels}",
            "beside the latents it takes those of a picture" + (" and a mask" * (channels == 9)),
            "pass a checkpoint that draws from text alone",
        )
    encoders = [configs[part] for part in configs if part.startswith("text_encoder")]
    whole = "pass a whole checkpoint of one model"
    wanted = [
        ("the VAE's latent channels", vae.latent_channels, channels, "pass another with --vae"),
        (
            "the width of the text encoders",
            sum(encoder.hidden_size for encoder in encoders),
            context_width(unet),
            whole,
        ),
        ("the channels that the UNet gives", unet.out_channels, channels, whole),
        ("the pooled embedding", "text_time" if model.pooled else None, unet.addition_embed_type,
         whole),
        (
            "the guidance scale as an input",
            model.guidance_form == "embedding",
            unet.time_cond_proj_dim is not None,
            "pass the UNet that the model was distilled to with --unet, or another --model",
        ),
    ]  # fmt: skip
    if taesd is not None:
        other = "pass another with --taesd"
        tiny_scale = int(2 ** (len(taesd.num_decoder_blocks) - 1))
        wanted += [
            ("TAESD's latent channels", taesd.latent_channels, channels, other),
            ("TAESD's scale", tiny_scale, scale, other),
            (
                "the scale of TAESD's encoder",
                int(2 ** (len(taesd.num_encoder_blocks) - 1)),
                scale,
                other,
            ),
        ]
    if model.pooled and unet.addition_embed_type == "text_time":
        pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        wanted.append(("the width of the pooled embedding", encoders[-1].projection_dim, pooled,
                       whole))  # fmt: skip
    for what, found, takes, fix in wanted:
        if found != takes:
            why = f"{what} is {found}, and the UNet takes {takes}"
            raise PreconditionError(f"the parts of {model.name} do not fit each other", why, fix)
    return scale, channels


def torch_dtype(dtype: str) -> Any:
    import torch

    return {"fp16": torch.float16, "fp32": torch.float32}[dtype]


def _versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "tokenizers")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


@contextmanager
def _heard_interrupt() -> Iterator[Callable[[], None]]:
    """Ctrl-C ends the export, if not at once then at the next `check()`.

    An interrupt that arrives while Python finalises what torch traced is printed and dropped.
    """
    heard = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = True
        signal.default_int_handler(number, frame)

    def check() -> None:
        if heard:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored by who started us, or another's
        yield check
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written is the user's to know, not a bug."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise AddbenchError(
            f"the bundle {target.name} could not be written; nothing is left of it",
            f"the disk of {target.parent} is full" if full else str(error),
            "free some room and export again" if full else "mend that and export again",
        ) from error
