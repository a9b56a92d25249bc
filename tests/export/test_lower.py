"""lower: dtype, batch, the files it writes, and whole parts in every form."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lowering import Arrays, lowered, model_of, normal, ops, run, session
from onnx import TensorProto, helper, numpy_helper

from core.errors import AddbenchError, PreconditionError
from core.files import ROOT
from export.bundle import Bundle
from export.lower import CANONICAL, CPU, LEGACY, Profile, lower
from export.models import PARTS

# --- dtype


def half_model() -> tuple[onnx.ModelProto, Arrays]:
    """FP16 in every place where it can hide: input, output, initializer, constant, attribute."""
    constant = numpy_helper.from_array(np.array(0.25, np.float16))
    fill = numpy_helper.from_array(np.array([0.5], np.float16))
    nodes = [
        helper.make_node("Cast", ["t"], ["t16"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("ConstantOfShape", ["n"], ["d"], value=fill),
        helper.make_node("Sum", ["a", "c", "d", "t16"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["f"]),
        helper.make_node("Attention", ["f4", "f4", "f4"], ["g"], softmax_precision=10),
        helper.make_node("Squeeze", ["g"], ["y"]),
    ]
    nodes.insert(6, helper.make_node("Unsqueeze", ["f", "axes"], ["f4"]))
    constants = {
        "w": normal(8, 8, dtype=np.float16, seed=1),
        "n": np.array([8]),
        "axes": np.array([0, 1]),
    }
    inputs = {"x": normal(4, 8, dtype=np.float16), "t": normal(4, 8)}
    return model_of(nodes, inputs, constants=constants), inputs


def test_float32_leaves_fp16_in_the_stored_weights_only() -> None:
    model, inputs = half_model()
    result = lowered(model, CPU)
    halves = [t.name for t in result.graph.initializer if t.data_type == TensorProto.FLOAT16]
    assert halves == ["w"]
    readers = [node for node in result.graph.node if "w" in node.input]
    assert [node.op_type for node in readers] == ["Cast"]
    for value in (*result.graph.input, *result.graph.output, *result.graph.value_info):
        if value.name != "w":
            assert value.type.tensor_type.elem_type != TensorProto.FLOAT16, value.name
    assert sum(node.op_type == "Cast" for node in result.graph.node) == 1, "idle casts are gone"
    for node in result.graph.node:
        for attribute in node.attribute:
            assert attribute.t.data_type != TensorProto.FLOAT16
            assert attribute.name != "softmax_precision" or attribute.i == TensorProto.FLOAT

    w = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64)
    f = torch.from_numpy((inputs["x"].astype(np.float64) @ w + 0.75 + inputs["t"]) @ w)
    expected = torch.nn.functional.scaled_dot_product_attention(f[None], f[None], f[None])[0]
    feeds = {name: array.astype(np.float32) for name, array in inputs.items()}
    np.testing.assert_allclose(run(result, feeds)[0], expected, rtol=1e-5, atol=1e-5)


# --- batch


def batched_model() -> tuple[onnx.ModelProto, Arrays]:
    """Reads its batch off an input, as exported graphs do, to reshape by it."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Concat", ["n", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["a"]),
        helper.make_node("Reshape", ["a", "flat"], ["b"]),
        helper.make_node("Expand", ["t", "n"], ["c"]),
        helper.make_node("Unsqueeze", ["c", "one"], ["d"]),
        helper.make_node("Mul", ["x", "d"], ["y"]),
    ]
    constants = {"rest": np.array([2, 3]), "flat": np.array([-1]), "one": np.array([1])}
    inputs = {"x": normal(3, 6), "t": normal(1)}
    return model_of(nodes, inputs, ["y", "b"], constants, {"x": ["batch", 6]}), inputs


def test_a_set_batch_is_static_everywhere_and_its_arithmetic_folded() -> None:
    model, inputs = batched_model()
    result = lowered(model, Profile("static", batch=3))
    values = (*result.graph.input, *result.graph.output, *result.graph.value_info)
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            assert dim.HasField("dim_value"), value.name
    assert {"Shape", "Concat"}.isdisjoint(ops(result))
    for found, wanted in zip(run(result, inputs), run(model, inputs), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_below_one_is_refused(batch: int) -> None:
    with pytest.raises(PreconditionError, match="batch"):
        lowered(batched_model()[0], Profile("static", batch=batch))


def test_a_batch_for_a_graph_without_the_axis_is_refused() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": normal(2, 3)})
    with pytest.raises(PreconditionError, match="batch"):
        lowered(model, Profile("static", batch=2))


# --- files


def weighty(folder: Path, side: int = 64) -> Path:
    """y = x @ w with w [side, side] FP16 in external data; a large one is a sparse file."""
    folder.mkdir(exist_ok=True)
    weight = TensorProto(
        name="w",
        data_type=TensorProto.FLOAT16,
        dims=[side, side],
        data_location=TensorProto.EXTERNAL,
    )
    weight.external_data.add(key="location", value="model.onnx.data")
    weight.external_data.add(key="offset", value="0")
    weight.external_data.add(key="length", value=str(2 * side * side))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", side])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    data = folder / "model.onnx.data"
    if side <= 1024:
        data.write_bytes(normal(side, side, dtype=np.float16).tobytes())
    else:
        with data.open("wb") as file:
            file.truncate(2 * side * side)
    return folder / "model.onnx"


@pytest.mark.parametrize("profile", [CANONICAL, CPU, replace(LEGACY, batch=2)], ids=str)
def test_the_weight_file_is_shared_not_written_again(tmp_path: Path, profile: Profile) -> None:
    graph, out = weighty(tmp_path / "bundle"), tmp_path / "low" / "model.onnx"
    lower(graph, profile, out)
    assert (out.parent / "model.onnx.data").samefile(graph.parent / "model.onnx.data")
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    x = normal(2, 64, dtype=np.float32 if profile is CPU else np.float16)
    weights = np.fromfile(graph.parent / "model.onnx.data", np.float16).reshape(64, 64)
    np.testing.assert_allclose(
        session(out).run(None, {"x": x})[0].astype(np.float32),
        x.astype(np.float32) @ weights.astype(np.float32),
        atol=2e-2,
    )


def test_across_disks_the_weight_file_is_copied(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system to write to")
    graph = weighty(tmp_path / "bundle")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        out = Path(folder) / "model.onnx"
        lower(graph, CPU, out)
        copied = Path(folder) / "model.onnx.data"
        assert copied.read_bytes() == (graph.parent / "model.onnx.data").read_bytes()
        onnx.checker.check_model(str(out), full_check=True)


def test_lowering_again_and_onto_itself_gives_the_same_files(tmp_path: Path) -> None:
    """The artifact cache is keyed by content; a lowered graph must be a function of its input."""
    graph = weighty(tmp_path / "bundle")
    first, second = tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"
    lower(graph, CPU, first)
    lower(graph, CPU, second)
    lower(graph, CPU, second)
    assert first.read_bytes() == second.read_bytes()
    lower(graph, CPU, graph)
    assert first.read_bytes() == graph.read_bytes()
    assert (graph.parent / "model.onnx.data").stat().st_size == 2 * 64 * 64


def test_lowering_reads_no_weights(tmp_path: Path) -> None:
    """2 GB of weights; peak memory, imports included, stays far below one copy of them."""
    graph = weighty(tmp_path / "bundle", side=32 * 1024)
    code = (
        "import sys; from pathlib import Path; from export.lower import LEGACY, lower;"
        "from dataclasses import replace;"
        "lower(Path(sys.argv[1]), replace(LEGACY, dtype='float32', batch=1), Path(sys.argv[2]));"
        # Not getrusage: its maximum is inherited from the process that forked this one.
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    argv = [sys.executable, "-c", code, str(graph), str(tmp_path / "low" / "model.onnx")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600 * 1024  # kB


def test_a_profile_costs_no_heavy_import() -> None:
    code = "import sys, export.lower; sys.exit(any(m in sys.modules for m in ('onnx', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_cut_weight_file_is_noticed(tmp_path: Path) -> None:
    graph = weighty(tmp_path / "bundle")
    os.truncate(graph.parent / "model.onnx.data", 2 * 64 * 64 - 1)
    with pytest.raises(PreconditionError, match="missing or too short"):
        lower(graph, CPU, tmp_path / "low" / "model.onnx")
    assert not (tmp_path / "low" / "model.onnx").exists()


def test_weights_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    graph = weighty(tmp_path / "bundle")
    shutil.move(graph.parent / "model.onnx.data", tmp_path / "model.onnx.data")
    (graph.parent / "model.onnx.data").symlink_to("../model.onnx.data")
    with pytest.raises(PreconditionError, match="outside"):
        lower(graph, CPU, tmp_path / "low" / "model.onnx")


def test_a_graph_that_is_not_canonical_is_refused(tmp_path: Path) -> None:
    graph, old = weighty(tmp_path / "bundle"), tmp_path / "low" / "model.onnx"
    lower(graph, LEGACY, old)
    with pytest.raises(PreconditionError, match="not a canonical graph"):
        lower(old, CPU, tmp_path / "again" / "model.onnx")
    with pytest.raises(PreconditionError, match="opset 11"):
        lower(graph, Profile("ancient", opset=11), tmp_path / "again" / "model.onnx")
    with pytest.raises(PreconditionError, match="no graph"):
        lower(tmp_path / "nothing.onnx", CPU, tmp_path / "again" / "model.onnx")


def test_a_graph_whose_types_clash_is_an_error_that_names_the_node(tmp_path: Path) -> None:
    """FP32 meets FP16 in a Concat, which onnxruntime refuses at load."""
    inputs = {"x": normal(2, 2), "z": normal(2, 2)}
    model = model_of([helper.make_node("Concat", ["x", "z"], ["y"], name="join", axis=0)], inputs)
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(AddbenchError, match="join"):
        lower(tmp_path / "model.onnx", CANONICAL, tmp_path / "low" / "model.onnx")


# --- whole parts

LEGACY_FP32 = replace(LEGACY, dtype="float32")


def part_inputs(graph: Path, batch: int) -> Arrays:
    """Seeded inputs with the shapes and names of a canonical graph, floats in float32."""
    rng = np.random.default_rng(3)
    made: Arrays = {}
    for each in onnx.load(graph, load_external_data=False).graph.input:
        kind = each.type.tensor_type
        shape = [dim.dim_value or batch for dim in kind.shape.dim]
        if kind.elem_type == TensorProto.INT64:
            made[each.name] = rng.integers(1, 90, shape)
        elif each.name in ("timestep", "time_ids"):
            made[each.name] = rng.integers(0, 999, shape).astype(np.float32)
        else:
            made[each.name] = rng.standard_normal(shape).astype(np.float32)
    return made


def outputs_of(graph: Path, inputs: Arrays) -> list[np.ndarray]:
    loaded = session(graph)
    dtypes = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    feeds = {
        each.name: inputs[each.name].astype(dtypes.get(each.type, inputs[each.name].dtype))
        for each in loaded.get_inputs()
    }
    return [array.astype(np.float64) for array in loaded.run(None, feeds)]


def distance(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Largest difference, in units of each output's largest value."""
    assert len(found) == len(wanted)
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True)
    )


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Gone after the test, unlike tmp_path: no link to the shared bundle's weights stays behind."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("part", PARTS)
def test_every_form_of_a_part_computes_the_same(
    tiny_bundle: Bundle, scratch: Path, part: str
) -> None:
    source = tiny_bundle.parts[part].graph
    profiles = {
        "canonical": CANONICAL,
        "cpu": CPU,
        "legacy": LEGACY,
        "legacy fp32": LEGACY_FP32,
        "legacy fp32 batch": replace(LEGACY_FP32, batch=2),
    }
    graphs = {name: scratch / name / "model.onnx" for name in profiles}
    for name, profile in profiles.items():
        lower(source, profile, graphs[name])
    inputs = part_inputs(source, batch=2)
    results = {name: outputs_of(graph, inputs) for name, graph in graphs.items()}
    assert all(np.isfinite(array).all() for arrays in results.values() for array in arrays)
    for name in ("legacy fp32", "legacy fp32 batch"):
        assert distance(results[name], results["cpu"]) < 1e-5, name
    for name in ("canonical", "legacy"):
        assert distance(results[name], results["cpu"]) < 5e-3, name

    old = onnx.load(graphs["legacy"], load_external_data=False)
    assert old.opset_import[0].version == 17
    assert old.ir_version == 8
    assert ops(old).isdisjoint({"Attention", "GroupNormalization", "LayerNormalization", "Gelu"})


@pytest.mark.parametrize("part", PARTS)
def test_a_lowered_part_passes_the_checker_from_its_files(
    tiny_bundle: Bundle, scratch: Path, part: str
) -> None:
    """onnx's checker takes no hard links, so it reads a copy."""
    linked, copied = scratch / "linked", scratch / "copied"
    lower(tiny_bundle.parts[part].graph, replace(LEGACY, batch=1), linked / "model.onnx")
    shutil.copytree(linked, copied)
    onnx.checker.check_model(str(copied / "model.onnx"), full_check=True)
    for value in onnx.load(copied / "model.onnx", load_external_data=False).graph.value_info:
        assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
