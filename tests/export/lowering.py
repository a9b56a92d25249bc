"""Small ONNX models, lowered and run: what the tests of `lower` share."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from backends.onnxrt import operators
from core.isa import isa
from export.lower import Profile, lower

Arrays = dict[str, np.ndarray]
BF16 = "avx2 fma f16c avx512f avx512bw avx512_bf16"
INSTRUCTION_SETS = ("", "avx2 fma f16c", "avx2 fma f16c avx512f", BF16, "own")
"""Those that our operators are built for, on tiles in what is this CPU's own."""
needs_compiler = pytest.mark.skipif(operators.compiler() is None, reason="no C++ compiler")
needs_bf16 = pytest.mark.skipif(
    not operators.may_multiply_bf16(), reason="no AVX-512-BF16, or no C++ compiler"
)


def build_for(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the operators built for one of INSTRUCTION_SETS; skips where this CPU lacks it."""
    if flags == "own":
        return
    if not set(flags.split()) <= set(isa().split()):
        pytest.skip(f"this CPU has no {flags}")
    monkeypatch.setattr(operators, "isa", lambda: f"x86_64 {flags}")


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Arrays,
    outputs: Sequence[str] = ("y",),
    constants: Arrays | None = None,
    axes: dict[str, Sequence[str | int]] | None = None,
    values: Arrays | None = None,
) -> onnx.ModelProto:
    """An opset-23 model whose inputs look like the given arrays (or have the named `axes`), as do
    the `values` that ONNX cannot infer."""

    def info(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        shape = (axes or {}).get(name, array.shape)
        return helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), shape
        )

    graph = helper.make_graph(
        nodes,
        "test",
        [info(name, array) for name, array in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
        value_info=[info(name, array) for name, array in (values or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return inferred


def lowered(model: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        onnx.save(model, source)
        lower(source, profile, out)
        return onnx.load(out)


def session(model: onnx.ModelProto | Path, own: bool = False) -> onnxruntime.InferenceSession:
    """Unoptimised, so that what `lower` wrote is what runs; `own`: with the project's operators."""
    options = onnxruntime.SessionOptions()
    if own:
        operators.register(options)
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])


def session_of(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """Optimised, with the project's own operators."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    operators.register(options)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"]
    )


def run(model: onnx.ModelProto, inputs: Arrays) -> list[np.ndarray]:
    return session(model).run(None, inputs)


def reference(model: onnx.ModelProto, inputs: Arrays) -> list[np.ndarray]:
    return list(ReferenceEvaluator(model).run(None, inputs))


def ops(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
