"""diffusers' own modules, eager, FP32: the reference, and what users would otherwise run."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar

from backends.base import Artifact, Backend, Capability, Option, Session, thread_count
from core.memory import require_memory
from export.lower import CANONICAL, Profile

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle


class TorchSession(Session):
    """A part's wrapper module, run eagerly."""

    def __init__(self, bundle: Bundle, part: str, module: torch.nn.Module) -> None:
        info = bundle.parts[part]
        # The same signature as the graph's, in the dtype that is computed in here.
        self.inputs, self.outputs = (
            {
                spec.name: replace(spec, dtype=spec.dtype.replace("float16", "float32"))
                for spec in specs
            }
            for specs in (info.inputs, info.outputs)
        )
        self.module = module

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        with torch.inference_mode():
            result = self.module(*(inputs[name] for name in self.inputs))
        results = result if isinstance(result, tuple) else (result,)
        return dict(zip(self.outputs, results, strict=True))

    def close(self) -> None:
        del self.module


class TorchBackend(Backend):
    name = "torch"
    summary = "diffusers' modules as they are, eager FP32 on the CPU: the reference"
    keeps_artifacts = False
    option_types: ClassVar[Mapping[str, Option]] = {
        "threads": Option("auto", "intra-op threads (auto: physical cores)"),
    }

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        thread_count(self.options["threads"])  # refused before work starts

    def probe(self) -> Capability:
        for package in ("torch", "diffusers", "transformers"):
            if importlib.util.find_spec(package) is None:
                return Capability(
                    False, f"the package {package} is missing", "", f"pip install {package}"
                )
        return Capability(True, self.summary, version=version("torch"), devices=("cpu",))

    def profile(self, part: str) -> Profile:
        return CANONICAL

    def precision(self, bundle: Bundle) -> str:
        return "fp32"

    def storage(self, bundle: Bundle) -> str:
        return "fp32"

    def fingerprint(self) -> dict[str, str]:
        return {package: version(package) for package in ("torch", "diffusers", "transformers")}

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        import torch

        from export.parts import wrap

        need = bundle.parts[artifact.part].weight_bytes * (2 if bundle.dtype == "fp16" else 1)
        require_memory(need, f"loading {bundle.name} {artifact.part}")
        torch.set_num_threads(thread_count(self.options["threads"]))
        checkpoint = bundle.checkpoint()
        with torch.inference_mode(False):  # a stage may load its part inside of it
            module = checkpoint.module(artifact.part, torch.float32)
        return TorchSession(bundle, artifact.part, wrap(artifact.part, module, checkpoint.model))
