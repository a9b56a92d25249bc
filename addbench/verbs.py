"""Every verb of `addbench`: a file with `parser()` and `main(argv)`, and a line here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

from core.cli import missing_package


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        name: as it is typed; the second word of two picks what the first alone does not do.
        module: what it is; imported when the verb is asked for.
        help: one line.
        needs: packages that it cannot do without, as they are imported.
    """

    name: str
    module: str
    help: str
    needs: tuple[str, ...] = ()

    def load(self) -> ModuleType:
        """Import the verb's module.

        Raises:
            PreconditionError: a package that it needs is missing.
        """
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise missing_package(f"addbench {self.name}", error) from error

    @property
    def missing(self) -> list[str]:
        """The packages that it needs and that are not installed here. Imports nothing."""
        return [name for name in self.needs if find_spec(name) is None]


TORCH = ("torch", "diffusers", "transformers")
GROUPS: dict[str, tuple[Verb, ...]] = {
    "make": (
        Verb(
            "export",
            "export.__main__",
            "a checkpoint becomes a bundle of ONNX graphs",
            (*TORCH, "onnx", "onnxscript"),
        ),
        Verb(
            "export web",
            "serve.site",
            "a bundle becomes a static folder that draws in the browser",
            (*TORCH, "onnx", "onnxscript", "starlette"),
        ),
        Verb(
            "export triton",
            "serve.triton.repository",
            "a bundle becomes a model repository of NVIDIA's Triton",
            TORCH,
        ),
        Verb("verify", "export.verify", "hash a bundle's files against its manifest"),
        Verb("image", "backends.commands.image", "one image of a prompt, as a PNG", TORCH),
        Verb(
            "serve",
            "serve.__main__",
            "a page that draws as one types, and an image API",
            (*TORCH, "starlette", "uvicorn", "websockets", "prometheus_client"),
        ),
        Verb("train", "distill.train", "train a small few-step model from nothing", TORCH),
    ),
    "measure": (
        Verb("sweep", "bench.sweep", "a model over backends, steps, batches and decoders", TORCH),
        Verb("ab", "bench.commands.ab", "is one revision slower than another, in turns", TORCH),
        Verb(
            "versus",
            "bench.commands.versus",
            "how many times faster is one cell than another",
            TORCH,
        ),
        Verb(
            "load",
            "bench.commands.load",
            "a pipeline or a server under load, by MLPerf's generator",
            (*TORCH, "mlperf_loadgen"),
        ),
        Verb(
            "fleet",
            "bench.commands.fleet",
            "the machines that a sweep can be over, and what they do",
        ),
        Verb("gpu-check", "bench.commands.gpu_check", "what a GPU gives, in ten minutes", TORCH),
    ),
    "look": (
        Verb(
            "show",
            "bench.commands.show",
            "a run as a table, a plot, a page or a file",
            ("pandas", "matplotlib"),
        ),
        Verb("gallery", "bench.commands.gallery", "pictures by prompt and steps", TORCH),
    ),
    "judge": (
        Verb(
            "choose",
            "bench.commands.choose",
            "what to take within limits, and how sure that is",
            ("scipy", "matplotlib"),
        ),
        Verb(
            "compare",
            "bench.commands.compare",
            "did it become slower from one run to the other",
            ("scipy",),
        ),
        Verb("gates", "bench.commands.gates", "what a change must not alter unseen", TORCH),
        Verb(
            "claims",
            "bench.commands.claims",
            "published figures against ours and physics",
            ("torch",),
        ),
    ),
    "bound": (
        Verb(
            "roofline",
            "bench.commands.roofline",
            "FLOPs and bytes of a model, and their floor",
            ("torch", "diffusers"),
        ),
        Verb(
            "cards",
            "bench.commands.cards",
            "what a Cloud AI 100 would do, by a model of it",
            ("scipy",),
        ),
        Verb(
            "frontier",
            "bench.commands.frontier",
            "quality against latency of few-step methods",
            ("torch", "matplotlib"),
        ),
    ),
    "keep": (
        Verb(
            "publish",
            "bench.commands.publish",
            "runs into results/, and the pages drawn anew",
            ("pandas", "matplotlib"),
        ),
        Verb(
            "compile",
            "backends.commands.compile",
            "a model's parts into the artifact cache",
            ("torch", "onnx"),
        ),
        Verb("cache", "backends.commands.cache", "look after the compiled artifacts"),
        Verb("parity", "backends.commands.parity", "hold a bundle to torch in FP32", TORCH),
        Verb("backends", "backends.commands.backends", "which are usable here, and why not"),
    ),
}
"""Verbs by what they are for, in the order of work."""
TOOLKIT = (
    Verb("noise", "bench.commands.noise", "how often the rules of compare and ab are wrong",
         ("numpy", "scipy")),
    Verb("harness", "bench.commands.harness", "what the harness and the cache cost", TORCH),
    Verb("calibrate", "backends.commands.calibrate", "record tensors for INT8 and FP8", TORCH),
    Verb("evaluate", "distill.evaluate", "judge a trained model's pictures", TORCH),
    Verb("ablate", "distill.ablate", "train with one choice changed at a time", TORCH),
    Verb("completion", "addbench.completion", "completion of verbs and flags for a shell",
         ("argcomplete",)),
)  # fmt: skip
"""Verbs about the toolkit itself."""
VERBS = {verb.name: verb for group in (*GROUPS.values(), TOOLKIT) for verb in group}
