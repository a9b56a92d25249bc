"""The execution providers of onnxruntime: where each comes from, the form of graph that suits it,
and what a session left to the CPU.

A provider is built into the installed onnxruntime, or is a plugin: a library that is registered at
run time and offers devices. PROVIDERS lists those whose packages and form are written down; any
other one that the build has, or that a library registers, runs in the form GENERAL.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from backends.base import BackendError, OptionError, UnsupportedError
from core.amounts import count_text
from export.lower import CPU, Profile

HOST = "CPUExecutionProvider"
"""The provider that takes whatever no other does."""
SUFFIX = "ExecutionProvider"
GENERAL = Profile("ep", opset=17, attention="matmul", norms="layer", batch=1)
"""What most compilers take: operators of 2022, attention spelt out, static shapes (any `batch` but
None is static: each artifact has the one that it is compiled for). A kernel registered as of opset
7 does not serve opset 22's version of an operator: Sin and Cos would go to the CPU."""
SHOWN = 12
"""Nodes that a refusal names; it counts the rest."""


@dataclass(frozen=True)
class Provider:
    """An execution provider, as `ep:provider=` names it.

    Attributes:
        ep: onnxruntime's name of it.
        package: the package on PyPI that brings it as a plugin; "" where there is none.
        build: the build of onnxruntime that has it built in, which takes the place of another.
        where: what else it needs, in words.
        profile: the form of graph that suits it.
        precision: of the arithmetic: `fp32`, or that of the `graph`.
        context: whether its plugin gives what it compiled back (EPContext), to be kept. The build
            onnxruntime-openvino 1.24 does too, and then does not load it.
        options: of its own, unless others are given.
        environment: variables that its library reads.
        emulated: what computes for it where its device is the host's CPU; "" where that CPU is
            what it is for.
        device: the name of its devices in rows; "" for what onnxruntime says.
    """

    name: str
    ep: str
    package: str = ""
    build: str = ""
    where: str = ""
    profile: Profile = GENERAL
    precision: Literal["fp32", "graph"] = "graph"
    context: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    emulated: str = ""
    device: str = ""

    @property
    def module(self) -> str:
        """The module that its package installs."""
        return self.package.replace("-", "_")

    @property
    def how(self) -> str:
        """What brings it here, in words."""
        ways = [f"pip install {self.package}"] if self.package else []
        if self.build == "onnxruntime":
            ways.append("pip install onnxruntime")
        elif self.build:
            ways.append(
                f"in an environment of its own, pip install {self.build} in place of onnxruntime"
                " (the two are the same module)"
            )
        return "; or, ".join(ways) or "install an onnxruntime that was built with it"


LISTED = (
    Provider("cpu", HOST, build="onnxruntime", profile=replace(CPU, name="ep-cpu"),
             precision="fp32"),
    Provider(
        "openvino", "OpenVINOExecutionProvider", "onnxruntime-ep-openvino", "onnxruntime-openvino",
        "a device of Intel's, its CPUs among them; the build takes any x86-64 CPU",
        replace(CPU, name="ep-openvino", opset=17, attention="matmul", norms="layer", batch=1),
        precision="fp32", context=True,
    ),
    Provider(
        "webgpu", "WebGpuExecutionProvider", "onnxruntime-ep-webgpu",
        where="a GPU with Vulkan, Direct3D 12 or Metal, or a software device of Vulkan",
        profile=replace(GENERAL, argmax="float32"), precision="fp32",
        # Without it a software device is none: onnxruntime looks for GPUs.
        environment={"ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"},
        emulated="webgpu-emulated",
    ),
    Provider(
        "qnn", "QNNExecutionProvider", "onnxruntime-qnn",
        where="a Hexagon NPU; on Linux x86-64 its emulation, which computes FP16",
        profile=replace(GENERAL, opset=23), context=True, options={"backend_type": "htp"},
        emulated="htp-emulated",
    ),
    Provider("cuda", "CUDAExecutionProvider", build="onnxruntime-gpu",
             where="an NVIDIA GPU; the backend cuda replays a CUDA graph for each part",
             profile=replace(GENERAL, attention="multihead"), device="cuda"),
    Provider("tensorrt", "TensorrtExecutionProvider", build="onnxruntime-gpu",
             where="an NVIDIA GPU and TensorRT's libraries; the backend trt needs no onnxruntime",
             device="cuda"),
    Provider("nv-tensorrt-rtx", "NvTensorRTRTXExecutionProvider", "onnxruntime-ep-nv-tensorrt-rtx",
             where="an NVIDIA RTX GPU, Ampere or later", context=True, device="cuda"),
    Provider("migraphx", "MIGraphXExecutionProvider", build="onnxruntime-migraphx",
             where="an AMD GPU and ROCm (the plugin's package on PyPI is an empty placeholder)"),
    Provider("directml", "DmlExecutionProvider", build="onnxruntime-directml", where="Windows"),
    Provider("coreml", "CoreMLExecutionProvider", build="onnxruntime", where="macOS"),
    Provider("mlx", "MLXExecutionProvider", "onnxruntime-ep-mlx", where="macOS on Apple silicon"),
    Provider("vitisai", "VitisAIExecutionProvider",
             where="an AMD NPU and the onnxruntime of AMD's Ryzen AI software"),
    Provider("cann", "CANNExecutionProvider", build="onnxruntime-cann", where="a Huawei Ascend"),
)  # fmt: skip
PROVIDERS = {provider.name: provider for provider in LISTED}


def find_provider(name: str) -> Provider:
    """Return the provider of this name: one of PROVIDERS, or any that the build knows of.

    Raises:
        OptionError: there is none; it names the nearest, and how to get it.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    built = {}
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        built = {ep.removesuffix(SUFFIX).lower(): ep for ep in onnxruntime.get_all_providers()}
    short = name.removesuffix(SUFFIX).lower()
    by_ep = {provider.ep.removesuffix(SUFFIX).lower(): provider for provider in PROVIDERS.values()}
    if short in by_ep:
        return by_ep[short]
    if short in built:
        return Provider(short, built[short])
    near = difflib.get_close_matches(short, {**PROVIDERS, **built}, 3, 0.5)
    raise OptionError(
        f"there is no execution provider called {name!r}",
        f"the nearest: {', '.join(near)}" if near else f"there are: {', '.join(PROVIDERS)}",
        "; ".join(
            [
                *(
                    f"provider={each}: {PROVIDERS[each].how}" if each in PROVIDERS
                    else f"provider={each}"
                    for each in near
                ),
                "or give a plugin's own library: ep:library=PATH,name=NAME",
            ]
        ),
    )  # fmt: skip


# ---- plugins


def plugin_library(provider: Provider) -> Path | None:
    """Return the library that the provider's package brings; None where it is not installed."""
    if not provider.package or importlib.util.find_spec(provider.module) is None:
        return None
    return Path(importlib.import_module(provider.module).get_library_path()).resolve()


@cache
def plugin_devices(
    ep: str, library: Path, environment: tuple[tuple[str, str], ...]
) -> tuple[Any, ...]:
    """Register `library` under the name `ep`, once a process; return the devices it offers.

    Args:
        environment: variables that the library reads, set where nobody has set them.

    Raises:
        BackendError: it is no plugin for this onnxruntime.
    """
    import onnxruntime

    for name, value in environment:
        os.environ.setdefault(name, value)
    before = {device.ep_name for device in onnxruntime.get_ep_devices()}
    try:
        with quiet_registration():
            onnxruntime.register_execution_provider_library(ep, str(library))
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise BackendError(
            f"onnxruntime does not load {library.name}",
            str(error)[:500],
            "give the library of a plugin for"
            f" onnxruntime {onnxruntime.__version__}, or install its package again",
        ) from error
    return tuple(each for each in onnxruntime.get_ep_devices() if each.ep_name not in before)


@contextlib.contextmanager
def quiet_registration() -> Iterator[None]:
    """A block in which onnxruntime's own logger, which has no other handle, says errors alone."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)


def kind(device: Any) -> str:
    """`cpu`, `gpu` or `npu`."""
    return str(device.device.type).rpartition(".")[2].lower()


def device_text(device: Any) -> str:
    """What a device calls itself: `gpu NVIDIA GeForce RTX 4090`."""
    names = {**dict(device.device.metadata), **dict(device.ep_metadata)}
    named = next((names[key] for key in ("FULL_DEVICE_NAME", "Description") if names.get(key)), "")
    return f"{kind(device)} {named or f'{device.device.vendor} {device.device.device_id:#06x}'}"


def pick_device(devices: Sequence[Any], asked: str) -> Any:
    """Return the device that `asked` means: a number, a kind, or `auto` for a GPU before an NPU
    before the CPU.

    Raises:
        UnsupportedError: there is none such; it lists what there is.
    """
    if asked == "auto":
        return min(devices, key=lambda each: ("gpu", "npu", "cpu").index(kind(each)))
    if asked.isdigit() and int(asked) < len(devices):
        return devices[int(asked)]
    for device in devices:
        if kind(device) == asked:
            return device
    offered = "; ".join(f"{number}: {device_text(each)}" for number, each in enumerate(devices))
    raise UnsupportedError(
        f"the provider has no device {asked}", f"it offers {offered}", "use ep:...,device=0"
    )


# ---- sessions


def open_session(
    model: Path, ep: str, device: Any, options: Mapping[str, str], threads: int = 0
) -> Any:
    """Open a session on a provider that records which provider each node went to.

    Args:
        device: a plugin's; None for a provider that is built in.
    """
    import onnxruntime

    chosen = new_options(ep, device, options)
    chosen.intra_op_num_threads = threads
    # Otherwise it prints and goes on with the CPU when a provider fails.
    providers = [(ep, dict(options))] if device is None else None
    return onnxruntime.InferenceSession(str(model), chosen, providers, enable_fallback=0)


def new_options(ep: str, device: Any, options: Mapping[str, str]) -> Any:
    """Return session options with a plugin's device, or with none for what is built in."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.log_severity_level = 3
    chosen.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if device is not None:
        chosen.add_provider_for_devices([device], dict(options))
    elif ep == "CUDAExecutionProvider":
        onnxruntime.preload_dlls()  # CUDA and cuDNN from where pip put them
    return chosen


@dataclass(frozen=True)
class Placement:
    """Where the nodes of one part went.

    Attributes:
        taken: operators that the provider took, with how many; `EPContext` is a piece of the graph
            that it compiled.
        left: those that it left to the CPU.
        names: of nodes that were left, as many as a refusal names.
    """

    taken: Mapping[str, int]
    left: Mapping[str, int]
    names: tuple[str, ...]

    @classmethod
    def of(cls, session: Any, ep: str) -> Placement:
        """Return that of an open session that keeps record of it."""
        nodes = [
            (group.ep_name == ep, node)
            for group in session.get_provider_graph_assignment_info()
            for node in group.get_nodes()
        ]
        taken, left = (
            dict(sorted(Counter(node.op_type for own, node in nodes if own == side).items()))
            for side in (True, False)
        )
        names = [f"{node.op_type} {node.name or '(no name)'}" for own, node in nodes if not own]
        return cls(taken, left, tuple(names[:SHOWN]))

    @property
    def left_count(self) -> int:
        return sum(self.left.values())

    def require_whole(self, ep: str, part: str, advice: str) -> None:
        """Refuse `part` where nodes of it are left to the CPU, and name them.

        Args:
            advice: what to try, beside running it elsewhere.
        """
        if not self.left:
            return
        more = self.left_count - len(self.names)
        raise UnsupportedError(
            f"{part} does not run wholly on {ep}",
            f"{self.left_text} are left to {HOST}: {', '.join(self.names)}"
            + (f", and {more} more" if more else ""),
            advice,
        )

    @property
    def left_text(self) -> str:
        """`4 nodes (2 Cos, 2 Sin)`."""
        ops = ", ".join(f"{count} {op}" for op, count in self.left.items())
        return f"{count_text(self.left_count, 'node')} ({ops})"

    @property
    def text(self) -> str:
        """What a person should know of it, in one line."""
        count = sum(self.taken.values())
        pieces = self.taken.get("EPContext", 0)
        compiled = count_text(pieces, "compiled piece")
        own = compiled if pieces == count and count else count_text(count, "node")
        if not self.left:
            return f"{own} on the provider, none left to the CPU"
        return f"{own} on the provider, {self.left_text} left to the CPU"
