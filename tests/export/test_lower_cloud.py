"""What compilers for FP16 accelerators ask of `lower`: blocks, exporter's norms, FP16's range."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import Arrays, lowered, model_of, normal, ops, reference, run, session
from onnx import TensorProto, helper, numpy_helper
from test_lower import distance, outputs_of, part_inputs
from test_lower_nodes import attention_cases

from core.errors import PreconditionError
from export.__main__ import main as export_main
from export.bundle import Bundle, find_bundle
from export.lower import CPU, Profile, lower
from export.models import PARTS

RECIPE = Profile(
    "recipe",
    opset=16,
    attention="matmul",
    attention_block=16,
    norms="instance",
    dtype="float32",
    constants="fp16-range",
)
HALF_MAX = 65504.0


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Gone after the test, unlike tmp_path: no link to the shared bundle's weights stays behind."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# --- attention in blocks


@given(attention_cases(), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_blocks_of_queries_change_nothing(case: tuple[onnx.ModelProto, Arrays], block: int) -> None:
    model, inputs = case
    result = lowered(model, Profile("blocked", attention="matmul", attention_block=block))
    np.testing.assert_allclose(run(result, inputs)[0], reference(model, inputs)[0], atol=2e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "block", "softmaxes"),
    [(8, 8, 4, 2), (9, 9, 4, 3), (4, 4, 4, 1), (8, 8, 0, 1), (8, 5, 4, 1)],
    ids=["even", "uneven", "whole", "off", "cross-attention"],
)
def test_only_self_attention_is_cut(queries: int, keys: int, block: int, softmaxes: int) -> None:
    inputs = {"q": normal(1, 2, queries, 4), "k": normal(1, 2, keys, 4), "v": normal(1, 2, keys, 4)}
    model = model_of([helper.make_node("Attention", list("qkv"), ["y"])], inputs)
    result = lowered(model, Profile("blocked", attention="matmul", attention_block=block))
    assert sum(node.op_type == "Softmax" for node in result.graph.node) == softmaxes
    np.testing.assert_allclose(run(result, inputs)[0], reference(model, inputs)[0], atol=2e-6)


def test_a_negative_block_is_refused() -> None:
    inputs = {name: normal(1, 1, 4, 4) for name in "qkv"}
    model = model_of([helper.make_node("Attention", list("qkv"), ["y"])], inputs)
    with pytest.raises(PreconditionError, match="negative"):
        lowered(model, Profile("blocked", attention="matmul", attention_block=-1))


# --- norms as torch's exporter wrote them


def norm_model(op: str, dtype: Any = np.float32, **attributes: Any) -> tuple[Any, Arrays]:
    inputs = {"x": normal(2, 6, 5, 4, dtype=dtype) * dtype(3) + dtype(1)}
    width = 6 if op == "GroupNormalization" else 4
    constants = {"s": normal(width, dtype=dtype, seed=1), "b": normal(width, dtype=dtype, seed=2)}
    node = helper.make_node(op, ["x", "s", "b"], ["y"], **attributes)
    return model_of([node], inputs, constants=constants), inputs


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("op", "attributes", "pattern"),
    [
        (
            "GroupNormalization",
            {"num_groups": 3, "epsilon": 1e-3},
            ["Reshape", "InstanceNormalization", "Reshape", "Unsqueeze", "Unsqueeze", "Mul", "Add"],
        ),
        (
            "LayerNormalization",
            {"axis": -1, "epsilon": 1e-3},
            ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"],
        ),
    ],
)
def test_norms_take_the_old_exporters_form(
    op: str, attributes: dict[str, Any], pattern: list[str], dtype: Any
) -> None:
    model, inputs = norm_model(op, dtype, **attributes)
    result = lowered(model, Profile("instance", opset=16, norms="instance"))
    assert [node.op_type for node in result.graph.node] == pattern
    assert result.opset_import[0].version == 16
    tolerance = 2e-6 if dtype == np.float32 else 1e-2
    wanted = reference(model, inputs)[0].astype(np.float32)
    found = run(result, inputs)[0].astype(np.float32)
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


# --- constants within FP16


def test_constants_beyond_fp16_are_clipped_wherever_they_are() -> None:
    huge = numpy_helper.from_array(np.array([1e30], np.float32))
    nodes = [
        helper.make_node("Constant", [], ["c"], value=huge),
        helper.make_node("Constant", [], ["d"], value_float=-1e30),
        helper.make_node("Sum", ["x", "w", "c", "d", "fine"], ["y"]),
    ]
    constants = {
        "w": np.array([-3.4e38, 7.0, np.inf], np.float32),
        "fine": np.array([HALF_MAX, -HALF_MAX, 1e-9], np.float32),
    }
    model = model_of(nodes, {"x": normal(3)}, constants=constants)
    result = lowered(model, Profile("half", constants="fp16-range"))
    found = {each.name: numpy_helper.to_array(each) for each in result.graph.initializer}
    np.testing.assert_array_equal(found["w"], np.array([-HALF_MAX, 7, HALF_MAX], np.float32))
    np.testing.assert_array_equal(found["fine"], constants["fine"])
    made = [node for node in result.graph.node if node.op_type == "Constant"]
    values = [numpy_helper.to_array(a.t).item() if a.t.dims else a.f for n in made
              for a in n.attribute]  # fmt: skip
    assert sorted(values) == [-HALF_MAX, HALF_MAX]


def test_weights_on_disk_that_fit_stay_there(tmp_path: Path) -> None:
    weight = normal(64, 64)
    weight[0, 0], beyond = 65504.0, weight.copy()
    beyond[3, 4] = 1e6
    data = weight.tobytes() + beyond.tobytes()
    (tmp_path / "model.onnx.data").write_bytes(data)
    tensors = []
    for place, name in enumerate(("fits", "does_not")):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[64, 64])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.onnx.data"), ("offset", place * weight.nbytes),
                           ("length", weight.nbytes)):  # fmt: skip
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    nodes = [
        helper.make_node("MatMul", ["x", "fits"], ["a"]),
        helper.make_node("MatMul", ["a", "does_not"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 64]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    out = tmp_path / "low" / "model.onnx"
    lower(tmp_path / "model.onnx", Profile("half", constants="fp16-range"), out)
    kept = {
        tensor.name: tensor.data_location
        for tensor in onnx.load(out, load_external_data=False).graph.initializer
    }
    assert kept == {"fits": TensorProto.EXTERNAL, "does_not": TensorProto.DEFAULT}
    assert (out.parent / "model.onnx.data").samefile(tmp_path / "model.onnx.data")
    x = normal(2, 64)
    wanted = x @ weight @ np.minimum(beyond, HALF_MAX)
    np.testing.assert_allclose(session(out).run(None, {"x": x})[0], wanted, rtol=1e-4)


# --- the VAE's last block


def inflated(source: Path, folder: Path, factor: float) -> Path:
    """A copy of a VAE decoder whose last block's values are `factor` times larger."""
    shutil.copytree(source.parent, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    pattern = re.compile(r"decoder\.up_blocks\.(2\.upsamplers|3\.resnets\.\d\.conv2).*")
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    for tensor in model.graph.initializer:
        if not pattern.fullmatch(tensor.name):
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            where = {each.key: each.value for each in tensor.external_data}
            offset, length = int(where["offset"]), int(where["length"])
            array = np.frombuffer(bytes(content[offset : offset + length]), np.float16)
            content[offset : offset + length] = (array * np.float16(factor)).tobytes()
        else:
            array = numpy_helper.to_array(tensor) * np.float16(factor)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    data.unlink()
    data.write_bytes(content)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def largest_value(graph: Path, inputs: Arrays) -> float:
    """The largest absolute value of any float value inside the graph."""
    model = onnx.load(graph, load_external_data=False)
    known = {value.name: value for value in model.graph.value_info}
    inside = {name for node in model.graph.node for name in node.output if name in known}
    model.graph.output.extend(
        known[name]
        for name in sorted(inside)
        if known[name].type.tensor_type.elem_type == TensorProto.FLOAT
    )
    onnx.save(model, graph.with_name("open.onnx"))
    return max(float(np.abs(a).max()) for a in outputs_of(graph.with_name("open.onnx"), inputs))


def test_the_scaled_vae_draws_the_same_and_stays_within_fp16(
    tiny_bundle: Bundle, scratch: Path
) -> None:
    # Random weights reach about 1 in there: 2**15 takes them far beyond 65504.
    source = inflated(tiny_bundle.parts["vae_decoder"].graph, scratch / "large", 2.0**15)
    plain, scaled = scratch / "plain" / "model.onnx", scratch / "scaled" / "model.onnx"
    recipe = replace(RECIPE, batch=1)
    lower(source, recipe, plain)
    lower(source, replace(recipe, vae_divisor=128), scaled)
    inputs = part_inputs(source, batch=1)
    assert distance(outputs_of(scaled, inputs), outputs_of(plain, inputs)) < 1e-5
    before, after = largest_value(plain, inputs), largest_value(scaled, inputs)
    assert before > HALF_MAX / 2 > after


def test_the_vae_pass_is_exact_for_a_vae_that_did_not_need_it(
    tiny_bundle: Bundle, scratch: Path
) -> None:
    source = tiny_bundle.parts["vae_decoder"].graph
    plain, scaled = scratch / "plain" / "model.onnx", scratch / "scaled" / "model.onnx"
    lower(source, CPU, plain)
    lower(source, replace(CPU, vae_divisor=128), scaled)
    inputs = part_inputs(source, batch=1)
    assert distance(outputs_of(scaled, inputs), outputs_of(plain, inputs)) < 1e-5


@pytest.mark.parametrize("part", ["taesd_decoder", "text_encoder"])
def test_a_part_without_that_block_is_refused(
    part: str, tiny_bundle: Bundle, scratch: Path
) -> None:
    profile = replace(CPU, vae_divisor=128)
    with pytest.raises(PreconditionError, match="does not fit"):
        lower(tiny_bundle.parts[part].graph, profile, scratch / "model.onnx")


# --- whole parts


@pytest.mark.parametrize("part", PARTS)
def test_the_recipes_form_of_a_part_computes_the_same(
    part: str, tiny_bundle: Bundle, scratch: Path
) -> None:
    source = tiny_bundle.parts[part].graph
    cpu, form = scratch / "cpu" / "model.onnx", scratch / "form" / "model.onnx"
    lower(source, CPU, cpu)
    lower(source, RECIPE, form)
    inputs = part_inputs(source, batch=2)
    assert distance(outputs_of(form, inputs), outputs_of(cpu, inputs)) < 2e-5
    made = onnx.load(form, load_external_data=False)
    assert made.opset_import[0].version == 16
    assert ops(made).isdisjoint({"Attention", "GroupNormalization", "LayerNormalization", "Gelu"})
    for tensor in made.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.data_location != TensorProto.EXTERNAL:
            assert np.abs(numpy_helper.to_array(tensor)).max(initial=0) <= HALF_MAX


# --- full size: minutes and 13 GB; `python -m pytest -m slow tests/export/test_lower_cloud.py`

FULL = replace(RECIPE, attention_block=256)
"""What the Cloud AI backend asks of the UNet for one image of 512 px."""


def full_outputs(graph: Path, inputs: Arrays) -> list[np.ndarray]:
    """One run in a process of its own, whose memory is free again afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_folded, graph, inputs).result()


def run_folded(graph: Path, inputs: Arrays) -> list[np.ndarray]:
    """Constants folded, so that weights are widened once, at load; nothing else is optimised."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    made = onnxruntime.InferenceSession(str(graph), options, ["CPUExecutionProvider"])
    return [array.astype(np.float64) for array in made.run(None, inputs)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "profiles"),
    [("unet", [FULL]), ("vae_decoder", [RECIPE, replace(RECIPE, vae_divisor=128)])],
)
def test_full_size_parts_keep_their_numbers(
    part: str, profiles: list[Profile], scratch: Path
) -> None:
    """SDXL-Turbo's parts as the CPU runs them against the form that is compiled for the card."""
    try:
        bundle = find_bundle("sdxl-turbo")
    except PreconditionError:
        assert export_main(["--model", "sdxl-turbo", "--weights", "random", "--no-parity"]) == 0
        bundle = find_bundle("sdxl-turbo")
    source = bundle.parts[part].graph
    inputs = part_inputs(source, batch=1)
    lower(source, CPU, scratch / "cpu" / "model.onnx")
    wanted = full_outputs(scratch / "cpu" / "model.onnx", inputs)
    for number, profile in enumerate(profiles):
        graph = scratch / str(number) / "model.onnx"
        lower(source, profile, graph)
        assert distance(full_outputs(graph, inputs), wanted) < 1e-4
    if part == "unet":
        made = onnx.load(graph, load_external_data=False)
        # 64 latents a side: self-attention over 1024 tokens in 10 blocks, over 256 in 60; each has
        # a cross-attention too. 1024 queries are 4 blocks of 256, 256 queries are one.
        softmaxes = sum(node.op_type == "Softmax" for node in made.graph.node)
        assert softmaxes == 10 * (4 + 1) + 60 * (1 + 1)
