"""The UNet in two graphs: together they are the whole, and nothing is computed twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import Arrays, lowered, model_of, normal, ops, session
from onnx import helper

from core.errors import PreconditionError
from core.files import read_json, write_json
from export.bundle import Bundle
from export.cost import part_cost
from export.graphs import exported_graph, save_graph
from export.lower import CPU, LEGACY, Profile, lower
from export.lower.context import PROMPT, weight_bytes
from export.models import CONTEXT_PART, TINY_LCM, TINY_SD, Model
from export.parts import example_inputs, output_names, wrap
from export.source.checkpoint import ARCHITECTURES, open_checkpoint

PLAIN = Profile("plain")


def halves(whole: Sequence[onnx.ModelProto | Path], inputs: Arrays) -> list[list[np.ndarray]]:
    """What the whole gives, and what the two halves give one after the other.

    Args:
        whole: the graph inline, the one that gives the context, the one that takes it.
    """
    inline, giving, taking = (session(each) for each in whole)
    names = [value.name for value in giving.get_outputs()]
    assert [value.name for value in giving.get_inputs()] == [PROMPT]
    made = dict(zip(names, giving.run(None, {PROMPT: inputs[PROMPT]}), strict=True))
    taken = [value.name for value in taking.get_inputs()]
    assert set(taken) - inputs.keys() == made.keys()
    feeds = {name: (inputs | made)[name] for name in taken}
    return [list(inline.run(None, dict(inputs))), list(taking.run(None, feeds))]


def in_files(graph: Path, folder: Path, profile: Profile) -> list[Path]:
    made = []
    for form in ("inline", "output", "input"):
        made.append(folder / form / "model.onnx")
        lower(graph, replace(profile, context=form), made[-1])  # type: ignore[arg-type]
    return made


# ---- small graphs


def attentions(
    sizes: Sequence[tuple[int, int]], batch: int = 2, width: int = 6
) -> tuple[onnx.ModelProto, Arrays]:
    """A chain of cross-attentions of (heads, head size) each, as exported ones look."""
    nodes, constants = [], {}
    inputs = {"sample": normal(batch, 5, width), PROMPT: normal(batch, 7, width, seed=1)}
    last = "sample"
    for place, (heads, size) in enumerate(sizes):
        for name, source in (("q", last), ("k", PROMPT), ("v", PROMPT)):
            constants[f"{name}{place}"] = normal(width, heads * size, seed=3 * place + len(name))
            constants[f"split{place}"] = np.array([0, -1, heads, size])
            nodes += [
                helper.make_node("MatMul", [source, f"{name}{place}"], [f"{name}{place}/m"]),
                helper.make_node(
                    "Reshape", [f"{name}{place}/m", f"split{place}"], [f"{name}{place}/r"]
                ),
                helper.make_node(
                    "Transpose", [f"{name}{place}/r"], [f"{name}{place}/t"], perm=[0, 2, 1, 3]
                ),
            ]
        constants[f"join{place}"] = np.array([0, 5, heads * size])
        constants[f"out{place}"] = normal(heads * size, width, seed=place)
        nodes += [
            helper.make_node(
                "Attention", [f"{name}{place}/t" for name in "qkv"], [f"a{place}"]
            ),
            helper.make_node("Transpose", [f"a{place}"], [f"b{place}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"b{place}", f"join{place}"], [f"c{place}"]),
            helper.make_node("MatMul", [f"c{place}", f"out{place}"], [f"y{place}"]),
        ]  # fmt: skip
        last = f"y{place}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    axes = {"sample": ["batch", 5, width], PROMPT: ["batch", 7, width]}
    return model_of(nodes, inputs, ["y"], constants, axes), inputs


@settings(max_examples=12)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    static=st.booleans(),
)
def test_the_halves_are_the_whole(sizes: list[tuple[int, int]], batch: int, static: bool) -> None:
    model, inputs = attentions(sizes, batch)
    profile = replace(PLAIN, batch=batch if static else None)
    forms = [
        lowered(model, replace(profile, context=form)) for form in ("inline", "output", "input")
    ]
    whole, both = halves(forms, inputs)
    np.testing.assert_array_equal(whole[0], both[0])
    _, giving, taking = forms
    # One tensor for all heads of one size, whatever their number.
    expected = {size: 2 * sum(h for h, s in sizes if s == size) for _, size in sizes}
    shapes = [value.type.tensor_type.shape.dim for value in giving.graph.output]
    assert {dims[3].dim_value: dims[1].dim_value for dims in shapes} == expected
    assert len(shapes) == len(expected)
    assert sum(node.op_type == "MatMul" for node in giving.graph.node) == 2 * len(sizes)
    assert sum(node.op_type == "MatMul" for node in taking.graph.node) == 2 * len(sizes)


def test_what_hangs_on_constants_serves_both_and_shape_arithmetic_stays() -> None:
    """A weight that both read through a Cast; the prompt's batch read off by the rest."""
    nodes = [
        helper.make_node("Cast", ["w16"], ["w"], to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", [PROMPT, "w"], ["k"]),
        helper.make_node("Softmax", ["k"], ["p"]),
        helper.make_node("Shape", [PROMPT], ["n"], start=0, end=1),
        helper.make_node("Concat", ["n", "rest"], ["shape"], axis=0),
        helper.make_node("Expand", ["sample", "shape"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["t"]),
        helper.make_node("Add", ["t", "p"], ["y"]),
    ]
    constants = {"w16": normal(4, 4, dtype=np.float16), "rest": np.array([3, 4])}
    inputs = {"sample": normal(1, 3, 4), PROMPT: normal(2, 3, 4, seed=1)}
    axes = {"sample": [1, 3, 4], PROMPT: ["batch", 3, 4]}
    model = model_of(nodes, inputs, ["y"], constants, axes)
    forms = [lowered(model, replace(PLAIN, context=form)) for form in ("inline", "output", "input")]
    _, giving, taking = forms
    assert {"Cast", "MatMul", "Softmax"} <= ops(giving)
    assert "Expand" not in ops(giving)
    assert {"Shape", "Expand"} <= ops(taking)
    assert "Softmax" not in ops(taking)
    assert PROMPT in [value.name for value in taking.graph.input], "beside the context"
    np.testing.assert_array_equal(*(each[0] for each in halves(forms, inputs)))


def test_a_graph_without_a_prompt_of_its_own_is_refused(tiny_bundle: Bundle) -> None:
    for form in ("input", "output"):
        profile = replace(PLAIN, context=form)  # type: ignore[arg-type]
        with pytest.raises(PreconditionError, match="cannot be split at its prompt"):
            lower(tiny_bundle.parts["vae_decoder"].graph, profile, Path("nowhere.onnx"))
    mixed = model_of(
        [helper.make_node("Add", ["sample", PROMPT], ["y"])],
        {"sample": normal(2, 3), PROMPT: normal(2, 3)},
    )
    with pytest.raises(PreconditionError, match="nothing in it depends on"):
        lowered(mixed, replace(PLAIN, context="output"))


# ---- whole UNets


@pytest.mark.parametrize(
    "profile",
    [CPU, LEGACY, replace(CPU, batch=2)],
    ids=["cpu", "legacy", "static"],
)
def test_tiny_sdxl_in_halves(tiny_bundle: Bundle, profile: Profile, tmp_path: Path) -> None:
    info = tiny_bundle.parts["unet"]
    found = in_files(info.graph, tmp_path, profile)
    dtype = np.float32 if profile.dtype == "float32" else np.float16
    inputs = {
        spec.name: normal(*(n if isinstance(n, int) else 2 for n in spec.shape), seed=place)
        .astype(dtype if spec.dtype == "float16" else spec.dtype)
        for place, spec in enumerate(info.inputs)
    }  # fmt: skip
    whole, both = halves(found, inputs)
    np.testing.assert_array_equal(whole[0], both[0])
    outputs = session(found[1]).get_outputs()
    assert [value.name for value in outputs] == ["context"], "all heads have one size"


@pytest.mark.parametrize("model", [TINY_SD, TINY_LCM], ids=lambda model: model.name)
def test_other_unets_in_halves(model: Model, tmp_path: Path) -> None:
    """Their own forms of one block each way: an export of the whole takes four times as long."""
    config = read_json(ARCHITECTURES / model.architecture / "unet" / "config.json")
    config |= {"down_block_types": ["CrossAttnDownBlock2D"], "block_out_channels": [16],
               "up_block_types": ["CrossAttnUpBlock2D"], "layers_per_block": 1}  # fmt: skip
    write_json(tmp_path / "unet" / "config.json", config)
    small = replace(model, architecture=str(tmp_path), like=(model.architecture, *model.like))
    module = open_checkpoint(small, "random").module("unet", torch.float32)
    given = example_inputs("unet", module, 2, 64, 32, torch.float32)
    wrapped = wrap("unet", module, model)
    with exported_graph(wrapped, given, output_names("unet", model), "unet") as graph:
        save_graph(graph, tmp_path / "unet")
    found = in_files(tmp_path / "unet" / "model.onnx", tmp_path, CPU)
    whole, both = halves(found, {name: tensor.numpy() for name, tensor in given.items()})
    np.testing.assert_array_equal(whole[0], both[0])
    with torch.inference_mode():
        expected = wrapped(*given.values()).numpy()
    np.testing.assert_allclose(both[0], expected, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_halves_cost_what_the_whole_does(tiny_bundle: Bundle, batch: int) -> None:
    info = tiny_bundle.parts["unet"]
    whole, giving, taking = (
        part_cost(info.graph, batch, form) for form in ("inline", "output", "input")
    )
    assert giving.flops + taking.flops == whole.flops
    assert [giving.part, taking.part] == [CONTEXT_PART, "unet"]
    assert giving.by_kind == {"linear": giving.flops, "conv": 0, "attention": 0}
    assert giving.flops == context_flops(info.graph, batch)
    assert giving.weight_bytes + taking.weight_bytes >= whole.weight_bytes
    sides: Mapping[str, int] = {"output": giving.weight_bytes, "input": taking.weight_bytes}
    assert {form: weight_bytes(info.graph, form) for form in sides} == sides


def context_flops(graph: Path, batch: int) -> float:
    """2 x 77 tokens x width x outputs of every product that reads the prompt itself."""
    proto = onnx.load(graph, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.initializer}
    read = [shapes[node.input[1]] for node in proto.node if PROMPT in node.input]
    return float(sum(2 * batch * 77 * width * outputs for width, outputs in read))
