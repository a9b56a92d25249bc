"""OpenVINO on the CPU.

A part is compiled for one batch and size, in a process of its own, and kept as OpenVINO exports it:
the optimised graph, most weights in FP32. Loading lays the weights out for this CPU's kernels.

Left to itself OpenVINO computes in BF16 where the CPU has it (AMX, AVX512_BF16): 8 bits of mantissa
for FP32's 24. Here FP32 is the default, and `precision=bf16` asks for what OpenVINO would do there.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from backends.artifacts.child import run_child, serve
from backends.base import (
    Artifact,
    Backend,
    Capability,
    Option,
    Session,
    Shapes,
    installed,
    thread_count,
)
from backends.onnxrt.session import MODEL, translate
from core.amounts import bytes_text
from core.files import require_disk
from core.isa import cpu_flags, isa
from core.memory import require_memory
from export.lower import CPU, Profile, lower

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle

BLOB = "model.blob"
STATIC = replace(CPU, name="openvino", batch=1)
"""The canonical operators in FP32. OpenVINO takes opset 23 and its Attention: spelt out as MatMul
and Softmax, self-attention over 4096 tokens took 3 times as long. Any `batch` but None is static:
each artifact has the one it is compiled for."""
PRECISIONS = {"fp32": ("f32", ""), "bf16": ("bf16", "avx512_bf16"), "fp16": ("f16", "avx512_fp16")}
"""Option -> OpenVINO's name, and the instructions without which it is emulated or refused."""
COPIES = 2.0
"""Peak memory of a compile in FP32 weights: the folded constants and the kernels' layout of them.
Measured: 20 GB for SDXL's UNet (10.3 GB), 1.6 for a text encoder whose embedding is in one copy."""
SMALL = 64 * 2**20
"""Fixed memory of a compile or load beside the weights (bytes)."""
WORTH_SAYING = 100e6
"""What the compile of smaller parts takes is nothing to be told of."""
SECONDS_PER_GB = 7.0
"""A compile per GB of FP32 weights on two cores (SDXL's UNet: 70 s)."""


class OpenVinoSession(Session):
    """A compiled model with static shapes, on host tensors; its file is mapped, inputs shared."""

    def __init__(self, blob: Path, options: Mapping[str, Any], bundle: Bundle, part: str) -> None:
        import numpy as np
        import openvino

        # Copy on write, since OpenVINO wants a writable array; it writes nothing.
        self.mapped = openvino.Tensor(np.memmap(blob, np.uint8, "c"), shared_memory=True)
        compiled = openvino.Core().import_model(self.mapped, "CPU", settings(options))
        self.request = compiled.create_infer_request()
        info = bundle.parts[part]
        self.inputs, self.outputs = (
            {
                spec.name: replace(
                    spec,
                    dtype=spec.dtype.replace("float16", "float32"),
                    shape=tuple(port.shape),
                )
                for spec, port in ((spec, port_of(spec.name)) for spec in specs)
            }
            for specs, port_of in ((info.inputs, compiled.input), (info.outputs, compiled.output))
        )

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        try:
            # Outputs are copied: the request's own memory is written again in the next call.
            results = self.request.infer(arrays, share_inputs=True, share_outputs=False)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise translate(error, "running the graph", "OpenVINO") from error
        return {name: torch.from_numpy(results[name]) for name in self.outputs}

    def close(self) -> None:
        del self.request
        del self.mapped  # after it: the graph reads some of its constants from there


class OpenVinoBackend(Backend):
    name = "openvino"
    summary = "OpenVINO on the CPU, FP32 arithmetic unless told otherwise"
    option_types: ClassVar[Mapping[str, Option]] = {
        "threads": Option("auto", "inference threads (auto: physical cores)", thread_count),
        "precision": Option("fp32", "of the arithmetic", choices=tuple(PRECISIONS)),
    }

    def probe(self) -> Capability:
        if importlib.util.find_spec("openvino") is None:
            return Capability(
                False, "the package openvino is missing", "", "pip install -e '.[openvino]'"
            )
        asked = self.options["precision"]
        flag = PRECISIONS[asked][1]
        if flag and flag not in cpu_flags():
            return Capability(
                False,
                f"this CPU has no {asked.upper()} arithmetic",
                f"it lacks {flag}; emulated, BF16 took 500 times as long as FP32",
                "drop precision: FP32 is the default",
            )
        version = installed("openvino") or "unknown"
        return Capability(True, self.summary, version=version, devices=("cpu",))

    def profile(self, part: str) -> Profile:
        return STATIC

    def precision(self, bundle: Bundle) -> str:
        return str(self.options["precision"])

    def fingerprint(self) -> dict[str, str]:
        return {"openvino": installed("openvino") or "none", "isa": isa()}

    def depends_on(self, bundle: Bundle, part: str, shapes: Shapes) -> Mapping[str, str]:
        return {"precision": self.options["precision"]}

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        doing = f"compiling {bundle.name} {part} for OpenVINO"
        weights, need = self._fp32_bytes(bundle, part), self.memory_need(bundle, part)
        require_disk(folder, weights + SMALL, doing)
        require_memory(need, doing, f"use ort, which compiles in {bytes_text(need * 0.6)}")
        if weights > WORTH_SAYING:
            print(
                f"{doing}: about {bytes_text(need)} of memory, {bytes_text(weights)} of disk and"
                f" {SECONDS_PER_GB * weights / 1e9:.0f} s on two cores; the result is kept",
                file=sys.stderr,
            )
        job = {
            "graph": str(bundle.parts[part].graph),
            "folder": str(folder),
            "options": self.options,
            "batch": shapes.batch,
        }
        run_child(
            "backends.openvino",
            job,
            folder,
            doing=doing,
            need_bytes=need,
            advice="`addbench verify` checks the bundle; ort takes the same graphs",
        )

    def _fp32_bytes(self, bundle: Bundle, part: str) -> int:
        return bundle.parts[part].weight_bytes * (2 if bundle.dtype == "fp16" else 1)

    def memory_need(self, bundle: Bundle, part: str) -> int:
        """Estimated peak bytes of a compile."""
        return int(COPIES * self._fp32_bytes(bundle, part)) + 4 * SMALL

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        doing = f"loading {bundle.name} {artifact.part}"
        require_memory(self._fp32_bytes(bundle, artifact.part), doing)
        try:
            return OpenVinoSession(artifact.folder / BLOB, self.options, bundle, artifact.part)
        except Exception as error:
            raise translate(error, doing, "OpenVINO") from error


def settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """What both compiling and importing are told."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[options["precision"]][0],
        "INFERENCE_NUM_THREADS": options["threads"],
        "NUM_STREAMS": 1,
    }


class FileStream(io.BytesIO):
    """A file that OpenVINO takes for the `io.BytesIO` it insists on: the export goes to disk
    piece by piece, not once more into memory (10 GB for SDXL's UNet)."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file

    def write(self, data: Any) -> int:
        return self.file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()


def export(job: Mapping[str, Any]) -> None:
    """Child process: lower the graph, have OpenVINO compile it, and write what it made."""
    import openvino

    folder = Path(job["folder"])
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lower-") as scratch:
        lowered = Path(scratch) / MODEL
        lower(Path(job["graph"]), replace(STATIC, batch=job["batch"]), lowered)
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(lowered), "CPU", settings(job["options"]))
        with (folder / BLOB).open("wb") as file:
            compiled.export_model(FileStream(file))


if __name__ == "__main__":
    serve(export)
