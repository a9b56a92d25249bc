"""The graphs of the tiny bundle: what they take and give, what they are made of, and what not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from core.files import ROOT, sha256_file
from export.bundle import Bundle, Spec
from export.graphs import OPSET, describe_graph, exported_graph, save_graph
from export.models import MODELS, PARTS
from export.parts import example_inputs, output_names, wrap
from export.source.checkpoint import open_checkpoint

TINY = open_checkpoint(MODELS["tiny-sdxl"], "random")

SIGNATURES = {
    "text_encoder": (
        [Spec("input_ids", "int64", ("batch", 77))],
        [Spec("hidden_states", "float16", ("batch", 77, 32))],
    ),
    "text_encoder_2": (
        [Spec("input_ids", "int64", ("batch", 77))],
        [
            Spec("hidden_states", "float16", ("batch", 77, 48)),
            Spec("text_embeds", "float16", ("batch", 48)),
        ],
    ),
    "unet": (
        [
            Spec("sample", "float16", ("batch", 4, 8, 8)),
            Spec("timestep", "float32", (1,)),
            Spec("encoder_hidden_states", "float16", ("batch", 77, 80)),
            Spec("text_embeds", "float16", ("batch", 48)),
            Spec("time_ids", "float32", ("batch", 6)),
        ],
        [Spec("out_sample", "float16", ("batch", 4, 8, 8))],
    ),
    "vae_decoder": (
        [Spec("latent_sample", "float16", ("batch", 4, 8, 8))],
        [Spec("sample", "float16", ("batch", 3, 64, 64))],
    ),
    "taesd_decoder": (
        [Spec("latent_sample", "float16", ("batch", 4, 8, 8))],
        [Spec("sample", "float16", ("batch", 3, 64, 64))],
    ),
    "vae_encoder": (
        [Spec("image", "float16", ("batch", 3, 64, 64))],
        [Spec("latent_sample", "float16", ("batch", 4, 8, 8))],
    ),
    "taesd_encoder": (
        [Spec("image", "float16", ("batch", 3, 64, 64))],
        [Spec("latent_sample", "float16", ("batch", 4, 8, 8))],
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_inputs_and_outputs_are_the_agreed_ones(tiny_bundle: Bundle, part: str) -> None:
    info = tiny_bundle.parts[part]
    assert (list(info.inputs), list(info.outputs)) == SIGNATURES[part]
    graph = onnx.load(info.graph, load_external_data=False)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", OPSET)]
    assert [i.name for i in graph.graph.input] == [spec.name for spec in info.inputs]


def test_attention_stays_one_op(tiny_bundle: Bundle) -> None:
    counts = {part: info.ops.get("Attention", 0) for part, info in tiny_bundle.parts.items()}
    blocks = (1 + 2) * 1 + (1 + 2) * 2 + 2  # down and up, by level, and those between
    assert counts == {
        "text_encoder": 2,  # of 3 layers: it stops at the penultimate state
        "text_encoder_2": 3,  # the pooled embedding needs all
        "unet": 2 * blocks,  # self- and cross-attention
        "vae_decoder": 1,
        "taesd_decoder": 0,
        "vae_encoder": 1,
        "taesd_encoder": 0,
    }
    for info in tiny_bundle.parts.values():
        assert "Softmax" not in info.ops
        assert info.ops.get("LayerNormalization", 0) + info.ops.get("GroupNormalization", 0) or (
            info.name.startswith("taesd")
        )


@pytest.mark.parametrize("part", PARTS)
def test_graphs_hold_no_path_of_this_machine(tiny_bundle: Bundle, part: str) -> None:
    content = tiny_bundle.parts[part].graph.read_bytes()
    for word in (str(ROOT), str(Path.home()), "site-packages", ".py", "Traceback", "stack_trace"):
        assert word.encode() not in content
    graph = onnx.load(tiny_bundle.parts[part].graph, load_external_data=False)
    assert graph.producer_name == "addbench"
    assert not graph.metadata_props
    assert not any(node.doc_string or node.metadata_props for node in graph.graph.node)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_computes_what_the_wrapper_does(tiny_bundle: Bundle, part: str, batch: int) -> None:
    ort = pytest.importorskip("onnxruntime", reason="the CPU backend's package is not installed")
    module = TINY.module(part, torch.float32)
    inputs = example_inputs(part, module, batch, 64, 64, torch.float16, seed=3)
    with torch.no_grad():
        outputs = wrap(part, module, TINY.model)(
            *(x.float() if x.dtype == torch.float16 else x for x in inputs.values())
        )
    expected = outputs if isinstance(outputs, tuple) else (outputs,)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        tiny_bundle.parts[part].graph, options, providers=["CPUExecutionProvider"]
    )
    got = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    for ours, reference in zip(got, expected, strict=True):
        assert ours.dtype == np.float16
        assert ours.shape == tuple(reference.shape)
        # FP16 has 11 bits: half a unit in the last place of the largest value, and some rounding
        # on the way (the inputs are the same numbers in both).
        bound = 2e-3 * float(reference.abs().max())
        assert float(np.abs(ours.astype(np.float32) - reference.numpy()).max()) < bound


def test_an_export_is_the_same_bytes_each_time(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for part in ("text_encoder_2", "taesd_decoder", "taesd_encoder"):
        module = TINY.module(part, torch.float16)
        inputs = example_inputs(part, module, 2, 64, 64, torch.float16)
        names = output_names(part, TINY.model)
        with exported_graph(wrap(part, module, TINY.model), inputs, names, part) as graph:
            save_graph(graph, tmp_path)
        info = tiny_bundle.parts[part]
        assert info.data is not None
        assert sha256_file(tmp_path / "model.onnx") == sha256_file(info.graph)
        assert sha256_file(tmp_path / "model.onnx.data") == sha256_file(info.data)


def test_fp32_graphs_are_fp32_throughout(tmp_path: Path) -> None:
    module = TINY.module("vae_decoder", torch.float32)
    inputs = example_inputs("vae_decoder", module, 2, 64, 64, torch.float32)
    wrapper = wrap("vae_decoder", module, TINY.model)
    with exported_graph(wrapper, inputs, ("sample",), "vae_decoder") as graph:
        entry = describe_graph(graph)
        save_graph(graph, tmp_path)
    assert entry["outputs"] == [
        {"name": "sample", "dtype": "float32", "shape": ["batch", 3, 64, 64]}
    ]
    assert entry["weight_bytes"] >= 4 * sum(p.numel() for p in wrapper.parameters())
    saved = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert onnx.TensorProto.FLOAT16 not in {t.data_type for t in saved.graph.initializer}


def test_the_weights_are_freed_after_an_export() -> None:
    """The exporter's caches would keep every part's weights until the process ends."""
    import gc
    import weakref

    module = TINY.module("taesd_decoder", torch.float16)
    alive = [weakref.ref(parameter) for parameter in module.parameters()]
    inputs = example_inputs("taesd_decoder", module, 2, 64, 64, torch.float16)
    wrapper = wrap("taesd_decoder", module, TINY.model)
    with exported_graph(wrapper, inputs, ("sample",), "taesd_decoder") as graph:
        assert describe_graph(graph)["weight_bytes"]
    del module, wrapper, inputs, graph
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


@pytest.mark.slow
def test_the_full_first_text_encoder_has_11_attention_nodes() -> None:
    checkpoint = open_checkpoint(MODELS["sdxl-turbo"], "random")
    module = checkpoint.module("text_encoder", torch.float16)
    inputs = example_inputs("text_encoder", module, 2, 512, 512, torch.float16)
    wrapper = wrap("text_encoder", module, checkpoint.model)
    with exported_graph(wrapper, inputs, ("hidden_states",), "text_encoder") as graph:
        assert describe_graph(graph)["ops"]["Attention"] == 11
