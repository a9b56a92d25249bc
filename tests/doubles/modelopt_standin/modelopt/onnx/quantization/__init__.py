"""A test double of `modelopt.onnx.quantization.quantize`, for machines without nvidia-modelopt.

What it does, it does as modelopt 0.47 was seen to with the arguments that are accepted here: names
are patterns of a name's start, weights get a scale per channel and keep their dtype behind a Q/DQ
pair, scales of FP8 are those of INT8 times 448/127, sizes of one are left out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ACCEPTED = {
    "calibration_method": "max",
    "calibration_eps": ["cpu"],
    "op_types_to_quantize": ["Conv", "MatMul"],
    "use_external_data_format": True,
    "high_precision_dtype": "fp32",
    "passes": [],
    "log_level": "WARNING",
}
STORED = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def quantize(
    onnx_path: str,
    quantize_mode: str,
    calibration_data_reader: Any,
    nodes_to_quantize: list[str],
    output_path: str,
    **rest: Any,
) -> None:
    assert rest == ACCEPTED, rest
    failure = os.environ.get("MODELOPT_DOUBLE_FAILS")
    if failure == "raise":
        raise RuntimeError("the double was told to fail")
    model = onnx.load(onnx_path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    chosen = [
        node
        for node in model.graph.node
        if any(re.match(pattern, node.name) for pattern in nodes_to_quantize)
    ]
    if failure == "nothing":
        chosen = []
    ranges = largest(onnx_path, model, calibration_data_reader, {n.input[0] for n in chosen})
    wider = 448 / 127 if quantize_mode == "fp8" else 1.0
    made: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node in chosen:
            weight = numpy_helper.to_array(stored[node.input[1]])
            axis = 0 if node.op_type == "Conv" else 1
            others = tuple(a for a in range(weight.ndim) if a != axis)
            scales = (np.float32(ranges[node.input[0]] / 127), abs(weight).max(others) / 127)
            for index, scale in enumerate(scales):
                name = node.input[index]
                if name not in made:
                    array = np.asarray(scale * wider, np.float32)
                    zero = np.zeros(array.shape, np.int8).tobytes()
                    model.graph.initializer.extend([
                        numpy_helper.from_array(array, f"{name}_scale"),
                        helper.make_tensor(
                            f"{name}_zero", STORED[quantize_mode], array.shape, zero, raw=True
                        ),
                    ])  # fmt: skip
                    inputs = [f"{name}_scale", f"{name}_zero"]
                    attributes = {"axis": axis} if index else {}
                    nodes += [
                        helper.make_node("QuantizeLinear", [name, *inputs], [f"{name}_q"],
                                         **attributes),
                        helper.make_node("DequantizeLinear", [f"{name}_q", *inputs],
                                         [f"{name}_dq"], **attributes),
                    ]  # fmt: skip
                    made[name] = f"{name}_dq"
                node.input[index] = made[name]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    data = Path(output_path).name + "_data"
    onnx.save(model, output_path, save_as_external_data=True, location=data)


def largest(path: str, model: onnx.ModelProto, reader: Any, names: set[str]) -> dict[str, float]:
    """Largest absolute value of each tensor over the samples."""
    watched = onnx.load(path, load_external_data=False)
    known = {value.name for value in watched.graph.input}
    inner = sorted(names - known)
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in inner)
    beside = Path(path).with_name("watched.onnx")
    beside.write_bytes(watched.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(beside), options)
    found = dict.fromkeys(names, 0.0)
    reader.rewind()
    while (sample := reader.get_next()) is not None:
        values = dict(zip(inner, session.run(inner, sample), strict=True)) if inner else {}
        for name in names:
            value = values.get(name, sample.get(name))
            found[name] = max(found[name], float(abs(value).max()))
    return found
