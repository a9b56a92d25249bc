"""optimum's own pipeline, `ORTStableDiffusionXLPipeline`: exported and run as its users do.

optimum-onnx needs an older transformers than this project, so it lives in an environment of its own
(`make env-optimum`), where the worker runs too. The project's environment writes the checkpoint
that the bundle was made from as a diffusers folder; optimum exports that to FP32 graphs, which the
artifact cache keeps, and its pipeline owns the order of the parts. Noise comes from one generator
per image, as everywhere, and the stages are timed around its own methods.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from backends.artifacts.cache import ArtifactCache
from backends.artifacts.child import HOME_PYTHON, home_python, run_child, serve
from backends.base import (
    Artifact,
    Backend,
    BackendError,
    Capability,
    Option,
    Session,
    Shapes,
    UnsupportedError,
    artifact_key,
    installed,
    stage_parts,
    thread_count,
)
from backends.onnxrt.session import plain_options, translate
from backends.pipeline.output import Output, Timings
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.prompts import ImageCall
from core.amounts import bytes_text
from core.errors import PreconditionError
from core.files import ROOT, require_disk, sha256_json, write_json
from core.isa import isa
from core.memory import give_memory_back, require_memory
from export.lower import CANONICAL, Profile

if TYPE_CHECKING:
    from backends.pipeline.recipe import Recipe
    from export.bundle import Bundle

PACKAGES = ("optimum-onnx", "optimum", "transformers", "diffusers", "torch", "onnx", "onnxruntime")
IMPORTS_BYTES = 800_000_000
"""Memory of an export beside the weights: tiny-sdxl's, which has next to none, takes 770 MB."""


def environment() -> Path:
    """The folder of optimum's environment."""
    return Path(os.environ.get("ADDBENCH_OPTIMUM") or ROOT / ".venv-optimum")


@cache
def packages(folder: Path) -> dict[str, str]:
    """Versions of what is installed in the environment `folder`, without starting it."""
    sites = [str(site) for site in folder.glob("lib/python*/site-packages")]
    return {found.name.lower(): found.version for found in distributions(path=sites)}


class OptimumPipeline(Pipeline):
    """optimum's pipeline behind our call: our checks before it, our clock around its stages."""

    pipe: Any = None
    clock: Clock
    seconds = 0.0

    @property
    def load_s(self) -> float:
        return self.seconds

    def prepare(self) -> Self:
        if self.pipe is not None:
            return self
        artifact = self.backend.compile(self.bundle, "pipeline", self.shapes)
        self.artifacts["pipeline"] = artifact
        doing = f"loading {self.bundle.name} in optimum's pipeline"
        require_memory(checkpoint_bytes(self.bundle), doing)
        started = time.perf_counter()
        try:
            self.pipe = self._open(artifact)
        except Exception as error:
            raise translate(error, doing) from error
        self.seconds = time.perf_counter() - started
        self.clock = Clock(self.pipe)
        return self

    def _open(self, artifact: Artifact) -> Any:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all of it is in the artifact
        from optimum.onnxruntime import ORTStableDiffusionXLPipeline

        pipe = ORTStableDiffusionXLPipeline.from_pretrained(
            artifact.path,
            export=False,
            local_files_only=True,
            provider="CPUExecutionProvider",
            session_options=plain_options(self.backend),
            scheduler=self.bundle.scheduler(self.recipe.scheduler),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def close(self) -> None:
        self.pipe = None

    def _draw(self, call: ImageCall) -> Output:
        import torch

        self.prepare()
        self.clock.reset()
        try:
            with torch.inference_mode():
                started = time.perf_counter_ns()
                result = self.pipe(
                    prompt=call.prompts,
                    negative_prompt=call.negative,
                    width=self.shapes.width,
                    height=self.shapes.height,
                    num_inference_steps=call.steps,
                    guidance_scale=self.recipe.guidance,
                    # One per image, drawn from in our order: noise first, then ancestral steps.
                    generator=[torch.Generator("cpu").manual_seed(one) for one in call.seeds],
                    output_type="pt",  # [batch, 3, height, width] in [0, 1]
                )
                images = self.to_uint8(result.images * 2 - 1)
                ended = time.perf_counter_ns()
        except BackendError:
            raise
        except Exception as error:
            raise translate(error, "drawing with optimum's pipeline") from error
        spent, total = self.clock.spent, (ended - started) / 1e9
        text, decode = sum(spent["text"]), sum(spent["decode"])
        rest = total - text - decode - sum(spent["unet"])
        timings = Timings(text, spent["unet"], decode, rest, total)
        return Output(images, timings, nfe=self.clock.evaluations // len(call.prompts))


class Clock:
    """Seconds of optimum's pipeline in its text encoders (tokenising included), UNet and decoder.

    Attributes:
        evaluations: samples that went through the UNet since `reset`.
    """

    def __init__(self, pipe: Any) -> None:
        self.reset()
        pipe.encode_prompt = self.timed("text", pipe.encode_prompt)
        pipe.unet.forward = self.timed("unet", pipe.unet.forward)
        pipe.vae.decode = self.timed("decode", pipe.vae.decode)

    def reset(self) -> None:
        self.spent: dict[str, list[float]] = {"text": [], "unet": [], "decode": []}
        self.evaluations = 0

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if stage == "unet":
                self.evaluations += len(args[0])
            started = time.perf_counter_ns()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[stage].append((time.perf_counter_ns() - started) / 1e9)

        return run


class OptimumBackend(Backend):
    name = "optimum"
    summary = "optimum's ORTStableDiffusionXLPipeline on the CPU, FP32, in its own environment"
    resident = "optimum's pipeline loads all parts at once"
    no_pictures = "it runs optimum's pipeline of text to image"
    option_types: ClassVar[Mapping[str, Option]] = {
        "threads": Option(
            "auto", "intra-op threads of each part (auto: onnxruntime's default)", thread_count
        ),
    }

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self.interpreter = environment() / "bin" / "python"

    def probe(self) -> Capability:
        version = packages(environment()).get("optimum-onnx")
        if version is None or self.interpreter is None or not self.interpreter.exists():
            return Capability(
                False,
                "its environment is not there",
                "optimum-onnx needs an older transformers than this project, so it has one of"
                " its own",
                "make env-optimum",
            )
        return Capability(True, self.summary, version=version, devices=("cpu",))

    def profile(self, part: str) -> Profile:
        return CANONICAL

    def precision(self, bundle: Bundle) -> str:
        return "fp32"

    def storage(self, bundle: Bundle) -> str:
        return "fp32"

    def fingerprint(self) -> dict[str, str]:
        known = packages(environment())
        return {name: known[name] for name in PACKAGES if name in known} | {"isa": isa()}

    def depends_on(self, bundle: Bundle, part: str, shapes: Shapes) -> Mapping[str, str]:
        return {}

    def compile(self, bundle: Bundle, part: str, shapes: Shapes) -> Artifact:
        """Export the whole pipeline, or find it in the cache: the same artifact for every part."""
        self.probe().require(self.name)
        require_sdxl(bundle)
        started = time.perf_counter()
        key = sha256_json([artifact_key(self, bundle, "unet", shapes), bundle.hash])[:24]
        path, cached = ArtifactCache().get_or_make(
            key, f"{bundle.name} optimum pipeline", lambda folder: self._export(bundle, folder)
        )
        return Artifact(self.name, part, key, path, time.perf_counter() - started, cached)

    def _export(self, bundle: Bundle, folder: Path) -> None:
        """Write the checkpoint in the project's environment, export it in optimum's."""
        if HOME_PYTHON not in os.environ and installed("optimum-onnx"):
            raise PreconditionError(
                f"{bundle.name} is not exported by optimum yet",
                "its checkpoint is written by the project's own environment, and this is optimum's",
                f"there: addbench compile --backend optimum --model {bundle.path}",
            )
        doing = f"exporting {bundle.name} with optimum"
        graphs = checkpoint_bytes(bundle)
        # The whole checkpoint in FP32, and the UNet once more when its graph is written again.
        need = graphs + fp32_bytes(bundle, "unet") + IMPORTS_BYTES
        disk = 2 * graphs + fp32_bytes(bundle, "unet")
        require_disk(folder, disk, doing)
        require_memory(need, doing, "measure optimum on the small model: --model shapes-turbo")
        print(f"{doing}: {bytes_text(need)} of memory, {bytes_text(disk)} of disk, of which"
              f" {bytes_text(graphs)} are kept", file=sys.stderr)  # fmt: skip
        with tempfile.TemporaryDirectory(dir=folder, prefix=".checkpoint-") as checkpoint:
            job = {"bundle": str(bundle.path), "checkpoint": checkpoint, "folder": str(folder)}
            for does, python in (("write", home_python()), ("export", self.interpreter)):
                run_child(
                    "backends.optimum",
                    job | {"does": does},
                    folder,
                    doing=f"{doing} ({does})",
                    need_bytes=need,
                    advice="make env-optimum builds its environment; shapes-turbo is known to work",
                    python=python,
                )

    def pipeline(
        self,
        bundle: Bundle,
        decoder: str,
        shapes: Shapes,
        *,
        embedding_cache: int = 0,
        recipe: Recipe | None = None,
    ) -> Pipeline:
        if installed("optimum-onnx") is None:
            raise UnsupportedError(
                "optimum does not run in this environment",
                "its packages clash with the project's; its worker runs in its own",
                "addbench sweep --backend optimum, or this command with .venv-optimum/bin/python",
            )
        require_sdxl(bundle)
        if decoder != "vae":
            raise UnsupportedError(
                f"optimum's pipeline has no {decoder} decoder",
                "it exports AutoencoderKL only",
                "use --decoder vae",
            )
        made = OptimumPipeline(
            self, bundle, decoder, shapes, embedding_cache=embedding_cache, recipe=recipe
        )
        if made.recipe.guidance_mode not in ("none", "batch"):
            raise UnsupportedError(
                f"optimum's pipeline does not do guidance as {made.recipe.guidance_mode}",
                "it evaluates prompt and empty prompt as one batch",
                "use --guidance-mode batch",
            )
        return made

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        raise UnsupportedError(
            "optimum has no sessions of single parts",
            "its pipeline owns the order of the parts",
            "measure it whole: addbench sweep --backend optimum",
        )


def require_sdxl(bundle: Bundle) -> None:
    if not bundle.pooled:
        raise UnsupportedError(
            f"{bundle.name} is not an SDXL model",
            "this backend runs ORTStableDiffusionXLPipeline",
            "use --backend ort or --backend torch",
        )


def fp32_bytes(bundle: Bundle, part: str) -> int:
    return bundle.parts[part].weight_bytes * (2 if bundle.dtype == "fp16" else 1)


def checkpoint_bytes(bundle: Bundle) -> int:
    """Weights in FP32 of all that optimum exports; the VAE's encoder is about as its decoder."""
    parts = stage_parts(tuple(bundle.parts), "vae")
    return sum(fp32_bytes(bundle, part) for part in [*parts, "vae_decoder"])


# ---- child processes


def write_checkpoint(bundle: Bundle, folder: Path) -> None:
    """Write a bundle's checkpoint as a diffusers folder, in the project's environment."""
    import torch
    from safetensors.torch import save_file

    from export.source.checkpoint import tokenizer_names
    from export.source.layout import COMPONENTS

    checkpoint = bundle.checkpoint()
    # Random weights are FP16 numbers; what was read may be more.
    dtype = torch.float16 if bundle.weights == "random" else torch.float32
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": bundle.force_zeros,
        "scheduler": ["diffusers", bundle.scheduler_name],
    }
    for part in stage_parts(tuple(bundle.parts), "vae"):
        component = COMPONENTS[part]
        index[component.folder] = [component.library, component.cls]
        module: Any = checkpoint.module(part, dtype)
        if component.library == "diffusers":
            module.save_pretrained(folder / component.folder)
        else:  # transformers 5 drops a prefix that 4 looks for
            module.config.save_pretrained(folder / component.folder)
            weights = {
                name if name.startswith("text_") else f"text_model.{name}": tensor.contiguous()
                for name, tensor in module.state_dict().items()
            }
            file = folder / component.folder / "model.safetensors"
            save_file(weights, file, metadata={"format": "pt"})
            del weights
        del module
        give_memory_back()
    for name in tokenizer_names(bundle.model):
        # transformers 4's CLIPTokenizer reads no tokenizer.json, which is all that 5 writes.
        index[name] = ["transformers", "CLIPTokenizerFast"]
        shutil.copytree(bundle.path / name, folder / name)
    shutil.copytree(bundle.path / "scheduler", folder / "scheduler")
    write_json(folder / "model_index.json", index)


def export_pipeline(checkpoint: Path, folder: Path) -> None:
    """Do what `from_pretrained(..., export=True)` does, into `folder`, in optimum's environment."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from optimum.exporters.onnx import main_export

    main_export(
        model_name_or_path=str(checkpoint),
        output=folder,
        task="text-to-image",
        no_post_process=True,
        do_validation=False,
        local_files_only=True,
    )


def work(job: Mapping[str, str]) -> None:
    from export.bundle import Bundle

    if job["does"] == "write":
        write_checkpoint(Bundle.open(Path(job["bundle"])), Path(job["checkpoint"]))
    else:
        export_pipeline(Path(job["checkpoint"]), Path(job["folder"]))


if __name__ == "__main__":
    serve(work)
