"""Qualcomm's Hexagon NPU, emulated on this CPU by the HTP library of `onnxruntime-qnn`.

Numerics only: FP16 as that NPU family computes it, from Qualcomm's own compiler and kernels. An
emulation has no speed, so no figure in seconds comes from it (provenance `emulated`); and it is
another chip than a Cloud AI 100, whose accuracy it says nothing about. About 1 GMAC/s: for small
models.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from backends.base import (
    Artifact,
    Backend,
    BackendError,
    Capability,
    Option,
    Session,
    Shapes,
    UnsupportedError,
    installed,
)
from backends.onnxrt import providers
from backends.onnxrt.session import MODEL, OrtSession, translate
from export.lower import Profile, lower

if TYPE_CHECKING:
    import onnx
    import torch

    from export.bundle import Bundle

PACKAGE = "onnxruntime-qnn"
HTP = Profile("htp", attention="matmul", norms="layer", batch=1)
"""Static shapes. GroupNormalization and InstanceNormalization run out of memory when the graph is
finalised; by LayerNormalization the statistics are also right beyond FP16's range, and spelt out in
FP16 they are not: 2e-4 against 0.25 relative error at a standard deviation of 300."""


def session_options(arch: str, *, fallback: bool = False) -> Any:
    """`fallback`: leave to the CPU what the provider does not take."""
    provider = providers.PROVIDERS["qnn"]
    library = providers.plugin_library(provider)
    assert library is not None  # the probe looked for it
    (device,) = providers.plugin_devices(provider.ep, library, ())
    chosen = providers.new_options(provider.ep, device, {**provider.options, "htp_arch": arch})
    chosen.log_severity_level = 4
    chosen.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(not fallback)))
    return chosen


class QnnSession(OrtSession):
    """Runs the images of a batch one after the other: the graph is static, for one image."""

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        batched = [name for name, spec in self.inputs.items() if not isinstance(spec.shape[0], int)]
        images = [
            super(QnnSession, self)._run(
                {
                    name: tensor[image : image + 1] if name in batched else tensor
                    for name, tensor in inputs.items()
                }
            )
            for image in range(inputs[batched[0]].shape[0])
        ]
        return {name: torch.cat([image[name] for image in images]) for name in self.outputs}


class QnnBackend(Backend):
    name = "qnn"
    summary = (
        "Qualcomm's Hexagon NPU emulated on this CPU, FP16: numerics, never a speed, and not a"
        " Cloud AI 100's accuracy"
    )
    provenance = "emulated"
    device = "htp-emulated"
    option_types: ClassVar[Mapping[str, Option]] = {
        "arch": Option(
            "68",
            "version of the Hexagon NPU that is emulated",
            choices=("68", "69", "73", "75", "79", "81"),
        ),
    }

    def probe(self) -> Capability:
        host = (sys.platform, platform.machine())
        if host != ("linux", "x86_64"):
            return Capability(
                False,
                f"there is no emulation on {' '.join(host)}",
                "the HTP library emulates the NPU on Linux x86-64; elsewhere it drives a real one",
                "run it on Linux x86-64",
            )
        runtime = installed("onnxruntime") or installed("onnxruntime-gpu")
        for package, found in (("onnxruntime", runtime), (PACKAGE, installed(PACKAGE))):
            if found is None:
                return Capability(
                    False,
                    f"the package {package} is missing",
                    "the emulation is a plugin of onnxruntime",
                    "pip install -e '.[cpu,qnn]'",
                )
        return Capability(
            True, self.summary, version=str(installed(PACKAGE)), devices=(self.device,)
        )

    def profile(self, part: str) -> Profile:
        return HTP

    def precision(self, bundle: Bundle) -> str:
        return "fp16"

    def fingerprint(self) -> dict[str, str]:
        packages = ("onnxruntime", "onnxruntime-gpu", PACKAGE)
        return {package: found for package in packages if (found := installed(package))}

    def compile(self, bundle: Bundle, part: str, shapes: Shapes) -> Artifact:
        return super().compile(bundle, part, replace(shapes, batch=1))  # see QnnSession

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        """Write a QNN context binary, and the graph of one node that loads it."""
        import onnxruntime

        if bundle.dtype != "fp16":
            raise UnsupportedError(
                f"{self.name} does not take {bundle.name} in {bundle.dtype}",
                "its arithmetic is FP16, and FP32 graphs run out of memory when they are finalised",
                "export the model with --dtype fp16",
            )
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lower-") as scratch:
            lowered = Path(scratch) / MODEL
            lower(bundle.parts[part].graph, self.profile(part), lowered)
            compiler = onnxruntime.ModelCompiler(
                session_options(self.options["arch"]),
                str(lowered),
                embed_compiled_data_into_model=False,
            )
            try:
                compiler.compile_to_file(str(folder / MODEL))
            except Exception as error:  # onnxruntime's errors share no base class of their own
                refused = refused_ops(lowered, self.options["arch"])
                raise BackendError(
                    f"{self.name} does not take {part}: {', '.join(refused) or 'the whole graph'}",
                    f"{'refused alone too' if refused else 'no operator fails alone'}; {error}",
                    "an operator that it refuses is for export/lower to spell in others",
                ) from error

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(
                str(artifact.folder / MODEL), session_options(self.options["arch"])
            )
        except Exception as error:
            raise translate(error, f"loading {artifact.part}") from error
        return QnnSession(session, bundle, artifact.part)


def refused_ops(lowered: Path, arch: str) -> list[str]:
    """Operators, by type and dtype, whose first node alone is not taken or cannot be finalised."""
    import onnxruntime

    refused = []
    for op, model in one_node_graphs(lowered):
        alone = lowered.with_name("one.onnx")  # beside the weights that it may refer to
        alone.write_bytes(model.SerializeToString())
        try:
            session = onnxruntime.InferenceSession(str(alone), session_options(arch, fallback=True))
        except Exception:  # whatever it raised, this operator is what raised it
            refused.append(op)
            continue
        if providers.Placement.of(session, providers.PROVIDERS["qnn"].ep).left:
            refused.append(op)
    return refused


def one_node_graphs(lowered: Path) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The first node of each op type and input dtype, as a graph; those of constants left out."""
    import onnx

    proto = onnx.load(str(lowered), load_external_data=False)
    graph = proto.graph
    types = {info.name: info for info in (*graph.input, *graph.output, *graph.value_info)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    known = set()
    for node in graph.node:
        reads = [types[name] for name in node.input if name in types and name not in constants]
        if not reads:
            continue
        dtype = onnx.helper.tensor_dtype_to_np_dtype(reads[0].type.tensor_type.elem_type)
        op = f"{node.op_type} of {dtype}"
        if op not in known:
            known.add(op)
            one = onnx.helper.make_graph(
                [node],
                op,
                reads,
                [types[name] for name in node.output if name],
                [constants[name] for name in node.input if name in constants],
            )
            yield op, onnx.helper.make_model(one, opset_imports=proto.opset_import,
                                             ir_version=proto.ir_version)  # fmt: skip
