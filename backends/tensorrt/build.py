"""Graph -> plan."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorrt as trt

from backends.base import BackendError
from backends.tensorrt import timing
from backends.tensorrt.log import Log
from backends.tensorrt.probe import release
from backends.tensorrt.request import PlanRequest

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SHOWN_ERRORS = 12


def build(request: PlanRequest, graph: Path, plan: Path, cache: Path, log: Log) -> None:
    """Build the plan of `request` from the lowered `graph`, and write it to `plan`.

    Raises:
        BackendError: the parser refused nodes, by name, or no plan came out; with TensorRT's words.
        OutOfMemoryError: the GPU's memory ran out meanwhile.
    """
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # the bindings' word for a constructor that gave nothing
        raise log.failure("TensorRT's builder does not start", "check `nvidia-smi`") from error
    network = builder.create_network(network_flags())
    parse(network, graph, log)
    loosen_attention(network)
    config = configure(builder, request, log)
    timing.attach(config, cache, log)
    with Monitor(f"TensorRT builds {request.part}") as monitor:
        config.progress_monitor = monitor
        # In a thread: the interpreter handles an interrupt only while it runs Python here.
        with ThreadPoolExecutor(1) as pool:
            try:
                future = pool.submit(builder.build_serialized_network, network, config)
                serialized = future.result()
            except KeyboardInterrupt:
                monitor.cancelled = True
                raise
    if serialized is None:
        raise log.failure(
            f"TensorRT built no plan of {request.part}",
            "try trt:attention=matmul or a lower trt:level",
        )
    timing.keep(config, cache)
    with plan.open("wb") as file:
        file.write(serialized)


def network_flags() -> int:
    """Types are what the graph says. TensorRT 11 knows nothing else and ignores the flag."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def parse(network: trt.INetworkDefinition, graph: Path, log: Log) -> None:
    """Read `graph`; its external data lies beside it, which is why it is read from the file."""
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise BackendError(
            f"TensorRT {trt.__version__} cannot read the graph {graph.name}",
            parser_errors(parser),
            "try trt:attention=matmul, or a newer TensorRT; `addbench verify` checks the bundle",
        )


def parser_errors(parser: trt.OnnxParser | trt.OnnxParserRefitter) -> str:
    """Every error with the operator and the name of its node."""
    errors = (parser.get_error(index) for index in range(parser.num_errors))
    lines = [
        f"{error.node_operator()} {error.node_name() or f'node {error.node()}'}: {error.desc()}"
        for error in errors
    ]
    more = len(lines) - SHOWN_ERRORS
    shown = lines[:SHOWN_ERRORS] + ([f"and {more} more"] if more > 0 else [])
    return "\n        ".join(shown) or "the parser gave no reason"


def loosen_attention(network: trt.INetworkDefinition) -> None:
    """Let an attention for which the GPU has no fused kernel be several kernels.

    The parser asks for one kernel or none; the VAE's single head of 512 channels has none, and
    such a build fails. The layer is of TensorRT 10.14; the published type stubs are of 10.13.
    """
    layer_type = getattr(trt, "IAttentionInputLayer", None)
    if layer_type is None:
        return
    for index in range(network.num_layers):
        layer: Any = network.get_layer(index)
        if isinstance(layer, layer_type):
            layer.attention.decomposable = True


def configure(builder: trt.Builder, request: PlanRequest, log: Log) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.builder_optimization_level = request.level
    config.clear_flag(trt.BuilderFlag.TF32)  # a row that says fp32 means it
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.refit:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if request.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request.hardware == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if request.shapes:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in request.shapes.items():
            profile.set_shape(name, *(trt.Dims(list(shape)) for shape in (least, best, most)))
        if config.add_optimization_profile(profile) < 0:
            raise log.failure(
                f"TensorRT refuses the batch range of {request.part}",
                "use trt:batch=static, a plan for each batch size",
            )
    return config


class Monitor(trt.IProgressMonitor):
    """Shows the phases of a build on stderr; `cancelled` ends it at its next step."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label, self.cancelled = label, False
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Monitor:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(
                console=Console(stderr=True), transient=True, refresh_per_second=1
            )
            self._progress.start()
        else:
            print(f"{self.label}: this takes minutes", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if self._progress:
            indent = "  " if parent_phase else f"{self.label}: "
            self._tasks[phase_name] = self._progress.add_task(
                indent + phase_name, total=num_steps or None
            )

    def step_complete(self, phase_name: str, step: int) -> bool:
        if self._progress and phase_name in self._tasks:
            self._progress.update(self._tasks[phase_name], completed=step + 1)
        return not self.cancelled

    def phase_finish(self, phase_name: str) -> None:
        if self._progress and phase_name in self._tasks:
            self._progress.remove_task(self._tasks.pop(phase_name))


def versions() -> tuple[int, int]:
    return release(str(trt.__version__))
