"""Costs by hand, both ways of counting against each other, and the full-size known figures."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from core.errors import AddbenchError, PreconditionError
from core.files import ROOT
from export.bundle import Bundle
from export.cost import Cost, budget_cost, part_cost, part_cost_at
from export.lower import CPU, LEGACY, lower
from export.models import PARTS, find_model
from export.source.checkpoint import Checkpoint, open_checkpoint

with (ROOT / "export" / "budget.csv").open() as file:
    BUDGET = {
        row["part"]: row
        for row in csv.DictReader(line for line in file if not line.startswith("#"))
    }


@pytest.fixture(scope="module")
def full() -> Checkpoint:
    return open_checkpoint(find_model("sdxl-turbo"), "random")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", [512, 1024])
def test_the_full_size_parts_cost_what_is_known(full: Checkpoint, part: str, size: int) -> None:
    known, cost = BUDGET[part], part_cost_at(full, part, 1, size, size)
    assert cost.flops / 1e9 == pytest.approx(float(known[f"gflop_{size}px"]), rel=0.01)
    assert cost.weight_bytes / 1e6 == pytest.approx(float(known["weights_mb"]), rel=0.02)
    assert cost.weight_bytes / 2e6 == pytest.approx(float(known["params_m"]), rel=0.01)
    assert sum(cost.by_kind.values()) == pytest.approx(cost.flops)
    for kind in cost.by_kind:
        figure = float(known[f"{kind}_{size}px"])
        assert cost.by_kind[kind] / 1e9 == pytest.approx(figure, rel=0.01)
        assert cost.operators[kind] == int(known[f"{kind}_operators"])
    moved = float(known[f"activation_mb_{size}px"])
    assert cost.activation_bytes / 1e6 == pytest.approx(moved, rel=0.01)
    assert cost.scores / 1e6 == pytest.approx(float(known[f"scores_m_{size}px"]), rel=0.01)
    listed = budget_cost(part, size)
    assert listed is not None
    assert listed.flops == pytest.approx(cost.flops, rel=0.01)


def test_other_sizes_are_not_in_the_budget() -> None:
    assert budget_cost("unet", 768) is None


def test_cost_grows_with_batch_and_weights_do_not(full: Checkpoint) -> None:
    one, four = (part_cost_at(full, "taesd_decoder", batch, 512, 512) for batch in (1, 4))
    assert four.flops == 4 * one.flops
    assert four.activation_bytes == 4 * one.activation_bytes
    assert four.weight_bytes == one.weight_bytes
    wide = part_cost_at(full, "taesd_decoder", 1, 1024, 512, dtype="fp32")
    assert wide.flops == 2 * one.flops
    assert wide.activation_bytes == 4 * one.activation_bytes


class Spelled(Checkpoint):
    """The random checkpoint with attention in plain matrix products, which are not counted."""

    def skeleton(self, part: str) -> Any:
        from diffusers.models.attention_processor import AttnProcessor

        module: Any = super().skeleton(part)
        module.set_attn_processor(AttnProcessor())
        return module


def test_a_module_with_uncounted_products_is_an_error() -> None:
    plain = open_checkpoint(find_model("tiny-sdxl"), "random")
    spelled = Spelled(**vars(plain))
    with pytest.raises(AddbenchError, match="not counted"):
        part_cost_at(spelled, "unet", 1, 64, 64)


# --- graphs


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_costs_what_its_module_does(tiny_bundle: Bundle, part: str, batch: int) -> None:
    """Two counters that share no code: ONNX shapes, and torch functions as they are called."""
    width, height = tiny_bundle.size
    traced = part_cost_at(tiny_bundle.checkpoint(), part, batch, width, height)
    counted = part_cost(tiny_bundle.parts[part].graph, batch)
    assert counted.part == part
    assert dict(counted.by_kind) == dict(traced.by_kind)
    assert counted.flops == traced.flops > 0
    # diffusers pads before it makes smaller; in the graph the padding is the convolution's own.
    padded = 0.01 if part == "vae_encoder" else 0
    assert counted.activation_bytes == pytest.approx(traced.activation_bytes, rel=padded)
    assert counted.scores == traced.scores
    # The exporter merges equal weights and adds a few constants.
    assert counted.weight_bytes == pytest.approx(traced.weight_bytes, rel=0.1)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Gone after the test, unlike tmp_path: no link to the shared bundle's weights stays behind."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_lowered_graph_costs_the_same_flops(
    tiny_bundle: Bundle, scratch: Path, part: str
) -> None:
    source = tiny_bundle.parts[part].graph
    canonical = part_cost(source, 2)
    graphs = {"cpu": CPU, "legacy": LEGACY, "fixed": replace(LEGACY, batch=2)}
    costs: dict[str, Cost] = {}
    for name, profile in graphs.items():
        lower(source, profile, scratch / name / part / "model.onnx")
        costs[name] = part_cost(scratch / name / part / "model.onnx", 2)
        assert dict(costs[name].by_kind) == dict(canonical.by_kind)
        assert costs[name].scores == canonical.scores
        # Constants of the older form come on top, the causal mask the largest: 77 x 77 in FP16.
        assert 0 <= costs[name].weight_bytes - canonical.weight_bytes < 16_000
    assert costs["cpu"].activation_bytes == 2 * canonical.activation_bytes
    # Attention spelled out moves its scores too.
    has_attention = canonical.by_kind["attention"] > 0
    assert (costs["legacy"].activation_bytes > canonical.activation_bytes) == has_attention
    assert costs["fixed"].activation_bytes == costs["legacy"].activation_bytes


def save(folder: Path, nodes: list[Any], inputs: dict[str, Any], weights: dict[str, Any]) -> Path:
    """FP16 graph with one output, y, its weights declared and never written."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT16, s) for k, s in inputs.items()],
        [onnx.ValueInfoProto(name="y")],
        [
            TensorProto(
                name=name, dims=shape, data_type=TensorProto.FLOAT16, raw_data=bytes(_size(shape))
            )
            for name, shape in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path = folder / "unet" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def _size(shape: list[int]) -> int:
    count = 2
    for dim in shape:
        count *= dim
    return count


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), depth=st.integers(1, 9), width=st.integers(1, 9))
def test_a_matrix_product_by_hand(
    tmp_path_factory: pytest.TempPathFactory, rows: int, depth: int, width: int
) -> None:
    graph = save(
        tmp_path_factory.mktemp("product"),
        [
            helper.make_node("Transpose", ["w"], ["t"]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ],
        {"x": ["batch", rows, depth]},
        {"w": [width, depth]},
    )
    cost = part_cost(graph, batch=5)
    assert cost.by_kind == {"linear": 2 * 5 * rows * depth * width, "conv": 0, "attention": 0}
    assert cost.activation_bytes == 2 * 5 * rows * (depth + width)
    assert cost.weight_bytes == 2 * depth * width


def test_a_grouped_strided_convolution_by_hand(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2, strides=[2, 2], kernel_shape=[3, 3])
    graph = save(tmp_path, [node], {"x": ["batch", 4, 9, 7]}, {"w": [6, 2, 3, 3]})
    cost = part_cost(graph, batch=2)
    assert cost.flops == cost.by_kind["conv"] == 2 * (2 * 6 * 4 * 3) * (2 * 3 * 3)
    assert cost.activation_bytes == 2 * 2 * (4 * 9 * 7 + 6 * 4 * 3)


@pytest.mark.parametrize("flat", [False, True])
def test_attention_by_hand(tmp_path: Path, flat: bool) -> None:
    """2 heads, 5 queries of 4, 7 keys, values of 3."""
    sizes = {"q": (5, 4), "k": (7, 4), "v": (7, 3)}
    inputs: dict[str, list[Any]] = {
        name: ["batch", length, 2 * size] if flat else ["batch", 2, length, size]
        for name, (length, size) in sizes.items()
    }
    heads = {"q_num_heads": 2, "kv_num_heads": 2} if flat else {}
    graph = save(tmp_path, [helper.make_node("Attention", list("qkv"), ["y"], **heads)], inputs, {})
    cost = part_cost(graph, batch=3)
    assert cost.flops == cost.by_kind["attention"] == 2 * 3 * 2 * 5 * 7 * (4 + 3)
    assert cost.activation_bytes == 2 * 3 * 2 * (5 * 4 + 7 * 4 + 7 * 3 + 5 * 3)


def test_a_graph_fixed_to_another_batch_is_refused(tmp_path: Path) -> None:
    graph = save(
        tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [2, 4]}, {"w": [4, 4]}
    )
    assert part_cost(graph, batch=2).flops == 64
    with pytest.raises(PreconditionError, match="batch"):
        part_cost(graph, batch=3)
    with pytest.raises(PreconditionError, match="no graph"):
        part_cost(tmp_path / "missing.onnx")
