"""ONNX Runtime on an NVIDIA GPU: its CUDA execution provider.

Every part runs with fixed shapes on tensors of torch, bound by address, from a CUDA graph of its
own; all parts on one stream, so that nothing goes through the host between two of them. A node
that the provider leaves to the CPU is not run there: the part is refused, and the nodes are named.

The UNet stays whole (no `context=split`): the provider's Split with as many outputs as SDXL needs
copies a table from the host in each call, which a replayed graph would read after it was given
back.

No GPU was at hand when this was written. What ran on a CPU: the form of the graphs (on
onnxruntime's CPU provider, against torch), binding by address, the refusal, the probe. What did
not run: anything with CUDA in its name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from backends.base import (
    IN_ONE_GO,
    Artifact,
    Backend,
    BackendError,
    Capability,
    Option,
    Session,
    Shapes,
    installed,
)
from backends.nvidia.gpu import gpu_name, missing_gpu, torch_cuda, torch_on_gpu
from backends.onnxrt.providers import Placement, open_session
from backends.onnxrt.session import MODEL, TYPES, translate
from core.files import require_disk
from export.lower import Profile, lower

if TYPE_CHECKING:
    import torch

    from backends.pipeline.pipeline import Pipeline
    from export.bundle import Bundle, PartInfo, Spec

PROVIDER = "CUDAExecutionProvider"
FIRST_FOR_CUDA_13 = (1, 27)
"""onnxruntime-gpu is built for CUDA 13 from here on, for CUDA 12 before."""
MULTIHEAD = Profile(
    "cuda",
    # A kernel that is registered for an operator as of opset 7 does not serve its opset-22 version:
    # Sin and Cos of the timestep would go to the CPU (kernel_registry.cc, OperatorKernels.md).
    opset=17,
    attention="multihead",
    norms="layer",
    batch=1,  # a number: each artifact has the batch that it is compiled for
    argmax="float32",
)
SMALL = 64 * 2**20


class BoundSession(Session):
    """An onnxruntime session whose inputs and outputs are torch tensors at fixed addresses.

    Args:
        device: `cuda`; `cpu` binds host tensors in the same way, which is how this is tested.
        stream: the torch stream that the session computes on; None on the CPU.
    """

    def __init__(
        self, session: Any, info: PartInfo, device: str, stream: torch.cuda.Stream | None
    ) -> None:
        import onnxruntime

        self.session, self.device, self.stream = session, device, stream
        self.inputs = described(session.get_inputs(), info.inputs)
        self.outputs = described(session.get_outputs(), info.outputs)
        self.binding = session.io_binding()
        self.taken = self._bind(self.inputs, self.binding.bind_input)
        self.given = self._bind(self.outputs, self.binding.bind_output)
        self.options = onnxruntime.RunOptions()
        # The caller waits once, at the end of the image.
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def _bind(self, specs: Mapping[str, Spec], bind: Any) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        buffers = {}
        with torch.inference_mode(False):
            for name, spec in specs.items():
                dtype = getattr(torch, spec.dtype)
                buffer = torch.zeros([int(n) for n in spec.shape], dtype=dtype, device=self.device)
                bind(
                    name=name,
                    device_type=self.device,
                    device_id=0,
                    element_type=np.dtype(spec.dtype),
                    shape=tuple(buffer.shape),
                    buffer_ptr=buffer.data_ptr(),
                )
                buffers[name] = buffer
        return buffers

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On the session's stream, after what is under way on the current one, and before what
        comes on it. The results are copies: the buffers are the next run's."""
        if self.stream is None:
            return self._launch(inputs)
        import torch

        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self._launch(inputs)
        current.wait_stream(self.stream)
        if current != self.stream:
            for tensor in results.values():
                tensor.record_stream(current)
        return results

    def _launch(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, buffer in self.taken.items():
            buffer.copy_(inputs[name], non_blocking=True)
        try:
            self.session.run_with_iobinding(self.binding, self.options)
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise translate(error, "running the graph") from error
        return {name: buffer.clone() for name, buffer in self.given.items()}

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        self.synchronize()
        del self.binding, self.session, self.taken, self.given


def described(values: Sequence[Any], known: Sequence[Spec]) -> dict[str, Spec]:
    """The signature of the graph that was compiled: its sizes are numbers."""
    specs = {spec.name: spec for spec in known}
    return {
        value.name: replace(
            specs[value.name], dtype=TYPES[value.type], shape=tuple(map(int, value.shape))
        )
        for value in values
    }


class CudaBackend(Backend):
    name = "cuda"
    summary = "ONNX Runtime's CUDA provider, in the dtypes of the graph, a CUDA graph for each part"
    device = "cuda"
    resident = IN_ONE_GO
    option_types: ClassVar[Mapping[str, Option]] = {
        "graph": Option(True, "replay a CUDA graph for each part"),
        "nhwc": Option(True, "convolutions in channels-last layout"),
        "conv": Option(
            "exhaustive",
            "how cuDNN's convolution algorithms are chosen: all timed at load, by its heuristic, or"
            " the same for all",
            choices=("exhaustive", "heuristic", "default"),
        ),
        "tf32": Option(False, "TF32 in FP32 graphs: faster, 10 bits of 23"),
        "attention": Option(
            "multihead",
            "onnxruntime's own operator, ONNX's (opset 23: other operators may lack CUDA kernels"
            " there), or spelled out",
            choices=("multihead", "op", "matmul"),
        ),
    }

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self._stream: torch.cuda.Stream | None = None

    def probe(self) -> Capability:
        problems = package_problems()
        gpu = installed("onnxruntime-gpu")
        built_for = None if gpu is None else cuda_of(gpu)
        problems += [
            found for found in (missing_gpu(built_for), torch_on_gpu()) if found is not None
        ]
        torch_for = torch_cuda()
        if built_for is not None and torch_for not in (None, built_for):
            problems.append(
                Capability(
                    False,
                    f"torch is built for CUDA {torch_for}, onnxruntime-gpu {gpu} for {built_for}",
                    "one process cannot hold the libraries of both",
                    f"install builds of both for CUDA {built_for}",
                )
            )
        if not problems:
            return Capability(True, self.summary, version=gpu or "", devices=(gpu_name(),))
        unique = list(dict.fromkeys(problems))
        return Capability(
            False,
            "; ".join(problem.what for problem in unique),
            "; ".join(problem.why for problem in unique if problem.why),
            "; ".join(dict.fromkeys(problem.next for problem in unique)),
            version=gpu or "",
        )

    def profile(self, part: str) -> Profile:
        form = self.options["attention"]
        if form == "op":
            return replace(MULTIHEAD, name="cuda-op", opset=23, attention="op")
        return MULTIHEAD if form == "multihead" else replace(MULTIHEAD, attention="matmul")

    def precision(self, bundle: Bundle) -> str:
        return bundle.dtype

    def fingerprint(self) -> dict[str, str]:
        return {"onnxruntime-gpu": version("onnxruntime-gpu")}

    def depends_on(self, bundle: Bundle, part: str, shapes: Shapes) -> Mapping[str, str]:
        return {"attention": self.options["attention"]}

    def pipeline(self, bundle: Bundle, decoder: str, shapes: Shapes, **rest: Any) -> Pipeline:
        from backends.pipeline.captured import DevicePipeline

        return DevicePipeline(
            self, bundle, decoder, shapes, capture=False, stream=self.stream(), **rest
        )

    def stream(self) -> torch.cuda.Stream:
        """The one stream that all sessions of this backend compute on."""
        import torch

        self._stream = self._stream or torch.cuda.Stream()
        return self._stream

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        info = bundle.parts[part]
        # Weights are linked; a cache on another disk than the bundle takes a copy.
        other = info.graph.stat().st_dev != folder.stat().st_dev
        need = SMALL + (info.weight_bytes if other else 0)
        require_disk(folder, need, f"compiling {bundle.name} {part}")
        lower(info.graph, replace(self.profile(part), batch=shapes.batch), folder / MODEL)

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        stream = self.stream()
        model = artifact.folder / MODEL
        options = provider_options(self.options, stream.cuda_stream)
        try:
            session = open_session(model, PROVIDER, None, options)
        except Exception as error:
            # The provider itself refuses to capture a graph with nodes on the CPU, unnamed.
            plain = provider_options({**self.options, "graph": False}, 0)
            if "CUDA Graph" in str(error):
                session = open_session(model, PROVIDER, None, plain)
                require_on_device(session, PROVIDER, artifact.part)
            raise translate(error, f"loading {artifact.part}") from error
        if PROVIDER not in session.get_providers():
            raise BackendError(
                "onnxruntime-gpu did not load its CUDA provider",
                "a library of CUDA or cuDNN is missing or of another version; its message stands"
                " above",
                "pip install 'onnxruntime-gpu[cuda,cudnn]', in the version that is installed",
            )
        require_on_device(session, PROVIDER, artifact.part)
        return BoundSession(session, bundle.parts[artifact.part], "cuda", stream)


def package_problems() -> list[Capability]:
    """What is wrong with the installed onnxruntime packages."""
    cpu, gpu = installed("onnxruntime"), installed("onnxruntime-gpu")
    swap = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install -e '.[cuda]'"
    if cpu and gpu:
        return [
            Capability(
                False,
                "onnxruntime and onnxruntime-gpu are both installed",
                "they are the same module: whichever came last has overwritten the other's files",
                swap,
            )
        ]
    if cpu:
        return [
            Capability(
                False,
                "onnxruntime here is the build for the CPU",
                "onnxruntime-gpu is the same module, so an environment holds one of the two: this"
                " one has `ort`, another would have `cuda` (and `ort` as well)",
                swap,
            )
        ]
    if gpu is None or importlib.util.find_spec("onnxruntime") is None:
        return [
            Capability(
                False,
                "the package onnxruntime-gpu is missing",
                "",
                "pip install -e '.[cuda]'",
            )
        ]
    return []


def cuda_of(package: str) -> int:
    """Major version of the CUDA that an onnxruntime-gpu of the index is built for."""
    release = tuple(int(piece) for piece in package.split(".")[:2])
    return 13 if release >= FIRST_FOR_CUDA_13 else 12


def provider_options(options: Mapping[str, Any], stream: int) -> dict[str, str]:
    """The CUDA provider's options; `stream` is a CUDA stream's handle, 0 for the provider's own.

    Names and values: the CUDA provider's page of onnxruntime's documentation.
    """
    chosen = {
        "device_id": "0",
        "enable_cuda_graph": str(int(options["graph"])),
        "prefer_nhwc": str(int(options["nhwc"])),
        "cudnn_conv_algo_search": options["conv"].upper(),
        "cudnn_conv_use_max_workspace": "1",
        "use_tf32": str(int(options["tf32"])),
        "arena_extend_strategy": "kSameAsRequested",
    }
    return chosen | ({"user_compute_stream": str(stream)} if stream else {})


def require_on_device(session: Any, provider: str, part: str) -> None:
    """Refuse a session that has nodes elsewhere than on `provider`, and name them."""
    Placement.of(session, provider).require_whole(
        provider,
        part,
        "try cuda:attention=matmul, a newer onnxruntime-gpu, or the backend trt or"
        " torch:device=cuda",
    )
