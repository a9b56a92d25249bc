"""The `cuda` backend as far as a machine without a GPU can tell.

Its graphs run on onnxruntime's CPU provider, bound by address as they are on a GPU; the probe and
the refusal are real. `FakeGpu` and the patched packages are doubles of what is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from backends import cuda
from backends.base import BackendError, OutOfMemoryError, Shapes, UnsupportedError
from backends.check.parity import seeded_inputs
from backends.cuda import BoundSession, open_session, provider_options, require_on_device
from backends.nvidia import gpu as nvidia
from backends.nvidia.driver import Gpu, NoGpu
from backends.registry import parse_backend
from core.errors import PreconditionError
from export.bundle import Bundle
from export.lower import lower

HOST = "CPUExecutionProvider"
BATCH = 2


@dataclass
class Lowered:
    """A part as `cuda` compiles it: the file, and a session that is bound to host tensors."""

    file: Path
    session: Any
    bound: BoundSession


@pytest.fixture(scope="module")
def parts(tiny_bundle: Bundle) -> Iterator[dict[str, Lowered]]:
    made = {}
    with tempfile.TemporaryDirectory(dir=tiny_bundle.path.parent) as scratch:
        for part, info in tiny_bundle.parts.items():
            file = Path(scratch) / part / "model.onnx"
            lower(info.graph, replace(parse_backend("cuda").profile(part), batch=BATCH), file)
            session = open_session(file, HOST, None, {})
            made[part] = Lowered(file, session, BoundSession(session, info, "cpu", None))
        yield made


def given(bundle: Bundle, part: str, bound: BoundSession) -> dict[str, torch.Tensor]:
    seeded = seeded_inputs(bundle.parts[part].inputs, torch.Generator().manual_seed(1))
    return {
        name: (tensor if name == "timestep" else tensor.repeat(BATCH, *[1] * (tensor.ndim - 1))).to(
            bound.taken[name].dtype
        )
        for name, tensor in seeded.items()
    }


def test_bound_parts_compute_what_torch_does(
    parts: dict[str, Lowered], tiny_bundle: Bundle
) -> None:
    torch_backend = parse_backend("torch:threads=1")
    shapes = Shapes(BATCH, *tiny_bundle.size)
    for part, lowered in parts.items():
        inputs = given(tiny_bundle, part, lowered.bound)
        exact = torch_backend.load(tiny_bundle, torch_backend.compile(tiny_bundle, part, shapes))
        wanted = exact.run(
            {name: tensor.to(getattr(torch, exact.inputs[name].dtype))
             for name, tensor in inputs.items()}
        )  # fmt: skip
        found = lowered.bound.run(inputs)
        again = lowered.bound.run(inputs)
        for name, tensor in wanted.items():
            error = float((found[name].float() - tensor).norm() / tensor.norm())
            assert error < 2e-3, (part, name)
            assert torch.equal(found[name], again[name])
            assert found[name].data_ptr() != lowered.bound.given[name].data_ptr(), "a copy"


def test_shapes_are_static(parts: dict[str, Lowered]) -> None:
    for lowered in parts.values():
        for spec in (*lowered.bound.inputs.values(), *lowered.bound.outputs.values()):
            assert all(isinstance(size, int) for size in spec.shape)
            assert spec.shape[0] == (1 if spec.name == "timestep" else BATCH)


def test_the_graphs_keep_to_operators_with_cuda_kernels(parts: dict[str, Lowered]) -> None:
    """Attention is one operator, the pooled index compares floats, and no version is so new that a
    kernel registered for an older one does not serve it."""
    fused = {"text_encoder": 2, "text_encoder_2": 3, "unet": 22, "vae_decoder": 1, "vae_encoder": 1}
    for part, lowered in parts.items():
        model = onnx.load(lowered.file, load_external_data=False)
        ops = [node.op_type for node in model.graph.node]
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        assert opsets[""] == 17
        assert ops.count("MultiHeadAttention") == fused.get(part, 0)
        assert not {"Attention", "GroupNormalization", "Shape", "Softmax"} & set(ops)
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        for node in model.graph.node:
            if node.op_type == "ArgMax":
                assert types[node.input[0]] == onnx.TensorProto.FLOAT


def test_nodes_elsewhere_are_refused_by_name(parts: dict[str, Lowered]) -> None:
    session = parts["text_encoder_2"].session
    require_on_device(session, HOST, "text_encoder_2")
    with pytest.raises(UnsupportedError) as caught:
        require_on_device(session, cuda.PROVIDER, "text_encoder_2")
    assert "text_encoder_2 does not run wholly on CUDAExecutionProvider" in caught.value.what
    for words in ("1 ArgMax", "3 MultiHeadAttention", "more", HOST):
        assert words in caught.value.why
    assert "Gather node_embedding" in caught.value.why


def test_another_batch_is_refused(parts: dict[str, Lowered], tiny_bundle: Bundle) -> None:
    bound = parts["taesd_decoder"].bound
    inputs = given(tiny_bundle, "taesd_decoder", bound)
    with pytest.raises((BackendError, RuntimeError)):
        bound.run({name: tensor[:1].repeat(3, 1, 1, 1) for name, tensor in inputs.items()})


def test_provider_options() -> None:
    options = parse_backend("cuda:conv=heuristic,nhwc=0").options
    found = provider_options(options, 1234)
    assert found["cudnn_conv_algo_search"] == "HEURISTIC"
    assert found["enable_cuda_graph"] == "1"
    assert found["prefer_nhwc"] == found["use_tf32"] == "0"
    assert found["user_compute_stream"] == "1234"
    assert "user_compute_stream" not in provider_options(options, 0)
    with pytest.raises(PreconditionError, match="is not a value"):
        parse_backend("cuda:conv=fast")


# ---- the probe


def machine(
    patch: pytest.MonkeyPatch,
    packages: dict[str, str],
    gpu: Gpu | NoGpu,
    torch_for: int | None = 13,
) -> None:
    """A double of what is installed."""
    for module in (cuda, nvidia):
        patch.setattr(module, "installed", packages.get)
    patch.setattr(nvidia, "find_gpu", lambda: gpu)
    for module in (cuda, nvidia):
        patch.setattr(module, "torch_cuda", lambda: torch_for)


FAKE_GPU = Gpu("NVIDIA Double 1", (9, 0), (13, 0), 80 * 10**9)
NONE = NoGpu("there is no NVIDIA driver", "get one")


@pytest.mark.parametrize(
    ("packages", "gpu", "torch_for", "what", "next_step"),
    [
        ({"onnxruntime": "1.31.1"}, NONE, None, "build for the CPU", "pip uninstall"),
        ({}, FAKE_GPU, 13, "onnxruntime-gpu is missing", "[cuda]"),
        ({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}, FAKE_GPU, 13,
         "both installed", "pip uninstall -y onnxruntime onnxruntime-gpu"),
        ({"onnxruntime-gpu": "1.31.1"}, NONE, 13, "no NVIDIA GPU", "get one"),
        ({"onnxruntime-gpu": "1.31.1"}, replace(FAKE_GPU, cuda=(12, 4)), 12, "too old", "r580"),
        ({"onnxruntime-gpu": "1.31.1", "torch": "2.13.0+cpu"}, FAKE_GPU, None,
         "torch 2.13.0+cpu is built for the CPU", "pip install torch"),
        ({"onnxruntime-gpu": "1.26.0", "torch": "2.13.0"}, FAKE_GPU, 13,
         "torch is built for CUDA 13, onnxruntime-gpu 1.26.0 for 12", "builds of both"),
    ],
)  # fmt: skip
def test_the_probe_names_what_is_missing(
    packages: dict[str, str],
    gpu: Gpu | NoGpu,
    torch_for: int | None,
    what: str,
    next_step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, packages, gpu, torch_for)
    found = parse_backend("cuda").probe()
    assert not found.usable
    assert what in found.what
    assert next_step in found.next


def test_the_probe_is_content_with_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"onnxruntime-gpu": "1.31.1", "torch": "2.13.0"}, FAKE_GPU)
    found = parse_backend("cuda").probe()
    assert found.usable
    on_torch = parse_backend("torch:device=cuda").probe()
    assert on_torch.usable
    assert on_torch.devices == ("NVIDIA Double 1",)


def test_torch_says_why_it_cannot_use_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"torch": "2.13.0+cpu"}, FAKE_GPU, None)
    found = parse_backend("torch:device=cuda").probe()
    assert not found.usable
    assert "built for the CPU only" in found.what


def test_the_installed_torch_is_read_without_importing_it() -> None:
    built_for = torch.version.cuda
    assert nvidia.torch_cuda() == (None if built_for is None else int(built_for.split(".")[0]))


@pytest.mark.parametrize(
    ("text", "ran_out"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("BFCArena: Failed to allocate memory for requested buffer of size 8", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_device_memory_that_ran_out_is_told_from_other_errors(text: str, ran_out: bool) -> None:
    with pytest.raises(OutOfMemoryError if ran_out else RuntimeError), nvidia.memory_errors("here"):
        raise RuntimeError(text)
