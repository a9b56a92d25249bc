"""diffusers' own modules in torch: the FP32 reference on a CPU, and the fast way on a GPU.

On the CPU, eager FP32 is what every other backend is held against. On an NVIDIA GPU it runs in
FP16, with convolutions in channels-last layout, and in four modes:

    eager            op by op, as most people run it
    compile          each part through torch.compile
    graph            the whole image as one CUDA graph (backends/pipeline/captured.py)
    compiled-graph   both

All but eager take a self-attention's Q, K and V as one product (backends/pytorch/selfattention.py).

No GPU was at hand when this was written: what ran on the CPU is the arithmetic of all modes (the
graph's code path uncaptured); that a capture works, and any speed, is for `addbench
gpu-check` to say.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from backends.base import (
    IN_ONE_GO,
    Artifact,
    Backend,
    Capability,
    Option,
    Session,
    Shapes,
    UnsupportedError,
    thread_count,
    yes_or_auto,
)
from backends.nvidia.gpu import architecture, gpu_name, memory_errors, torch_on_gpu
from core.memory import require_memory
from export.lower import CANONICAL, Profile

if TYPE_CHECKING:
    import torch

    from backends.pipeline.pipeline import Pipeline
    from export.bundle import Bundle, Spec

MODES = ("eager", "compile", "graph", "compiled-graph")
DTYPES = {"fp32": "float32", "fp16": "float16"}
ALWAYS_FLOAT32 = ("timestep", "time_ids")
"""UNet inputs whose values FP16 cannot hold: float32 in every bundle."""


class TorchSession(Session):
    """A part's wrapper module. Launches on torch's current stream and does not wait."""

    cyclic = True  # transformers' first text encoder refers to itself

    def __init__(
        self, bundle: Bundle, part: str, module: torch.nn.Module, backend: TorchBackend
    ) -> None:
        dtype = DTYPES[backend.dtype]

        def computed(spec: Spec) -> Spec:
            """Return the graph's own input in the dtype that is computed in here."""
            fixed = spec.dtype == "int64" or spec.name in ALWAYS_FLOAT32
            return spec if fixed else replace(spec, dtype=dtype)

        info = bundle.parts[part]
        self.inputs = {spec.name: computed(spec) for spec in info.inputs}
        self.outputs = {spec.name: computed(spec) for spec in info.outputs}
        self.device = backend.device
        self.module = module
        self.runs: Any = module
        self.channels_last = backend.channels_last
        self.projections: Any = None

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        arguments = [inputs[name] for name in self.inputs]
        if self.channels_last:
            arguments = [
                one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one
                for one in arguments
            ]
        with torch.inference_mode(), memory_errors("in torch"):
            result = self.runs(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        return dict(zip(self.outputs, results, strict=True))

    def holding(self, prompt: torch.Tensor) -> AbstractContextManager[None]:
        if self.projections is None:
            return nullcontext()
        held: AbstractContextManager[None] = self.projections.holding(prompt)
        return held

    def synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def close(self) -> None:
        del self.module, self.runs, self.projections


class TorchBackend(Backend):
    name = "torch"
    summary = "diffusers' modules: eager FP32 on the CPU (the reference), FP16 on an NVIDIA GPU"
    keeps_artifacts = False
    option_types: ClassVar[Mapping[str, Option]] = {
        "threads": Option("auto", "intra-op threads (auto: physical cores)", thread_count),
        "device": Option("cpu", "what it runs on", choices=("cpu", "cuda")),
        "mode": Option(
            "eager",
            "op by op, torch.compile, one CUDA graph for the whole image (on the CPU: the same code"
            " uncaptured), or both",
            choices=MODES,
        ),
        "dtype": Option(
            "auto",
            "of weights and arithmetic (auto: fp16 on a GPU, else fp32)",
            choices=("auto", *DTYPES),
        ),
        "channels_last": Option(
            "auto", "layout of convolutions (auto: on a GPU)", yes_or_auto, ("auto", "0", "1")
        ),
        "autotune": Option(False, "torch.compile tries kernels out: minutes, once"),
        "streams": Option(True, "text encoders beside each other, on a GPU's two streams"),
    }

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self.device = self.options["device"]
        if self.in_one_go:
            self.resident = IN_ONE_GO
        elif self.compiles:
            self.resident = "torch.compile would compile a part again in every call"

    # ---- options, resolved

    @property
    def dtype(self) -> str:
        """fp32 or fp16."""
        asked: str = self.options["dtype"]
        return asked if asked != "auto" else ("fp16" if self.device == "cuda" else "fp32")

    @property
    def channels_last(self) -> bool:
        asked: bool | None = self.options["channels_last"]
        return self.device == "cuda" if asked is None else asked

    @property
    def mode(self) -> str:
        """How the modules are run: one of MODES."""
        return str(self.options["mode"])

    @property
    def compiles(self) -> bool:
        return "compile" in self.mode

    @property
    def in_one_go(self) -> bool:
        """Whether a call does not wait between its stages."""
        return self.device == "cuda" or "graph" in self.mode

    def effective_options(self) -> dict[str, str]:
        return super().effective_options() | {
            "dtype": self.dtype,
            "channels_last": str(int(self.channels_last)),
        }

    # ---- what a backend says of itself

    def probe(self) -> Capability:
        for package in ("torch", "diffusers", "transformers"):
            if importlib.util.find_spec(package) is None:
                return Capability(
                    False, f"the package {package} is missing", "", f"pip install {package}"
                )
        if self.compiles and shutil.which(os.environ.get("CXX") or "g++") is None:
            return Capability(
                False,
                f"torch:mode={self.mode} has no C++ compiler",
                "torch.compile writes C++ and has it compiled, and there is no g++",
                "apt install g++, or use torch:mode=eager",
            )
        if self.device == "cuda":
            missing = torch_on_gpu()
            if missing is not None:
                return missing
        devices = (gpu_name(),) if self.device == "cuda" else ("cpu",)
        return Capability(True, self.summary, version=version("torch"), devices=devices)

    def profile(self, part: str) -> Profile:
        return CANONICAL

    def precision(self, bundle: Bundle) -> str:
        return self.dtype

    def storage(self, bundle: Bundle) -> str:
        return self.dtype

    def fingerprint(self) -> dict[str, str]:
        found = {package: version(package) for package in ("torch", "diffusers", "transformers")}
        return found | ({"compute_capability": architecture()} if self.device == "cuda" else {})

    # ---- loading

    def pipeline(self, bundle: Bundle, decoder: str, shapes: Shapes, **rest: Any) -> Pipeline:
        if not self.in_one_go:
            return super().pipeline(bundle, decoder, shapes, **rest)
        from backends.pipeline.captured import DevicePipeline

        return DevicePipeline(
            self,
            bundle,
            decoder,
            shapes,
            capture="graph" in self.mode,
            parallel_text=self.options["streams"],
            **rest,
        )

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        import torch

        from export.parts import wrap

        part, dtype = artifact.part, getattr(torch, DTYPES[self.dtype])
        checkpoint = bundle.checkpoint()
        if part in ("vae_decoder", "vae_encoder") and self.dtype == "fp16":
            require_safe_vae(checkpoint.config(part), bundle, part)
        if bundle.has_graphs or self.device == "cpu":  # loaded into the host's memory first
            factor = (4 if self.dtype == "fp32" else 2) / (4 if bundle.dtype == "fp32" else 2)
            need = int(bundle.parts[part].weight_bytes * factor)
            require_memory(need, f"loading {bundle.name} {part}")
        torch.set_num_threads(self.options["threads"])
        set_cuda_math(self.dtype)
        doing = f"loading {bundle.name} {part}"
        with torch.inference_mode(False), memory_errors(doing):  # a stage may load inside of it
            module = checkpoint.module(part, dtype, self.device)
            if self.channels_last and not part.startswith("text_encoder"):
                module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            session = TorchSession(bundle, part, wrap(part, module, checkpoint.model), self)
            if part == "unet" and self.in_one_go:
                from backends.pytorch.crossattention import PromptProjections

                session.projections = PromptProjections(session.module)
                if self.mode != "eager":
                    from backends.pytorch.selfattention import fuse_projections

                    fuse_projections(session.module)
        if self.compiles:
            mode = "max-autotune-no-cudagraphs" if self.options["autotune"] else None
            session.runs = torch.compile(session.module, dynamic=False, mode=mode)
        return session


def set_cuda_math(dtype: str) -> None:
    """The reference computes true FP32: convolutions would use TF32 by default, 10 bits of 23.

    In FP16, cuDNN tries its algorithms for each shape: they are few and fixed.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = dtype == "fp16"


def require_safe_vae(config: Mapping[str, Any], bundle: Bundle, part: str = "vae_decoder") -> None:
    """Refuse a VAE that overflows in FP16, by its own word (diffusers' `force_upcast`)."""
    if config.get("force_upcast", True):
        raise UnsupportedError(
            f"the VAE of {bundle.name} does not run in FP16",
            "its config says force_upcast: its activations go beyond 65504",
            "export with an FP16-safe one (--vae madebyollin/sdxl-vae-fp16-fix for SDXL), or use"
            f" the taesd {part.removeprefix('vae_')} or torch:dtype=fp32",
        )
