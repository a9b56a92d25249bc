"""Any provider of onnxruntime: how one is named and refused, what it leaves to the CPU, and how far
from FP32 those are that can be used here.

CPUExecutionProvider and AzureExecutionProvider are built into onnxruntime's own package: the first
takes every node, the second, for models behind an address, none. The plugins need their packages,
and WebGPU a device of Vulkan (Mesa 25's software one, or a browser's SwiftShader).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from backends.__main__ import main as backends_main
from backends.base import BackendError, OptionError, Shapes, UnsupportedError, artifact_key
from backends.check.gate import GATES, image_distance
from backends.check.parity import seeded_inputs
from backends.ep import PLACEMENT, EpBackend
from backends.load import load_pipeline
from backends.onnxrt import providers, vulkan
from backends.onnxrt.providers import HOST, PROVIDERS, find_provider
from backends.registry import parse_backend
from bench.rows.fields import FLAGS
from core.errors import EXIT_OK, PreconditionError
from export.bundle import Bundle

NOTHING = "ep:provider=azure"
"""Built into onnxruntime's own package, and takes nothing."""
PLUGINS = ["openvino", "webgpu", "qnn"]
PART = "taesd_decoder"


def plugin(name: str) -> str:
    """`ep:provider=name`, or a skip that says why it cannot be used here."""
    text = f"ep:provider={name}"
    if not (probe := parse_backend(text).probe()).usable:
        pytest.skip(f"{probe.what}: {probe.why}")
    return text


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, that all tests of this file share."""
    folder = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDBENCH_BUILD", str(folder))
        yield folder


def shapes(bundle: Bundle) -> Shapes:
    return Shapes(1, *bundle.size)


# ---- how it is named


@pytest.mark.parametrize(
    ("name", "near", "how"),
    [
        ("webgp", "webgpu", "pip install onnxruntime-ep-webgpu"),
        ("opnvino", "openvino", "pip install onnxruntime-ep-openvino"),
        ("tensorrt-rtx", "nv-tensorrt-rtx", "pip install onnxruntime-ep-nv-tensorrt-rtx"),
        ("MIGraphXProvider", "migraphx", "pip install onnxruntime-migraphx"),
    ],
)
def test_an_unknown_provider_is_refused_with_the_nearest_and_how_to_get_it(
    name: str, near: str, how: str
) -> None:
    with pytest.raises(OptionError) as caught:
        parse_backend(f"ep:provider={name}")
    assert name in caught.value.what
    assert near in caught.value.why
    assert how in caught.value.next
    assert "library=PATH" in caught.value.next


def test_a_provider_has_its_name_and_onnxruntimes() -> None:
    for provider in PROVIDERS.values():
        assert find_provider(provider.name) is find_provider(provider.ep) is provider
    assert find_provider("xnnpack").ep == "XnnpackExecutionProvider"  # not in our list
    with pytest.raises(OptionError, match="no execution provider called 'tpu'"):
        find_provider("tpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ep:name=Mine", "has no library"),
        ("ep:provider=cpu,library=x.so", "a provider or a library"),
        ("ep:attention=op,opset=17", "does not go with attention=op"),
        ("ep:norms=op,attention=matmul,opset=20", "opset=20 does not go"),
        ("ep:norms=layer,attention=matmul,opset=16", "opset=16 does not go"),
        ("ep:opset=24", "not an opset"),
        ("ep:opset=new", "not an opset"),
        ("ep:fallback=maybe", "not a value"),
        ("ep:speed=1", "no option 'speed'"),
        ("ep:set.=1", "no option 'set.'"),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, words: str) -> None:
    with pytest.raises(PreconditionError, match=words):
        parse_backend(text)


def test_the_form_of_the_graph_can_be_chosen() -> None:
    form = parse_backend("ep:opset=19,attention=multihead,norms=decomposed,batch=fixed").profile("")
    assert (form.opset, form.attention, form.norms) == (19, "multihead", "decomposed")
    assert (form.batch, form.dtype) == (1, "float32")
    assert parse_backend("ep:provider=cuda").profile("").dtype == "as-is"
    assert parse_backend("ep:provider=cuda,precision=fp32").profile("").dtype == "float32"
    assert parse_backend("ep:precision=graph").profile("").dtype == "as-is"
    assert parse_backend("ep:provider=webgpu,attention=op").profile("").opset == 23
    for opset, attention, norms in ((21, "matmul", "op"), (17, "matmul", "layer"),
                                    (16, "matmul", "decomposed")):  # fmt: skip
        form = parse_backend(f"ep:opset={opset}").profile("")
        assert (form.opset, form.attention, form.norms) == (opset, attention, norms)


# ---- what is here


def test_where_it_is_missing_it_says_how_to_get_it() -> None:
    for name in PROVIDERS:
        if not (probe := parse_backend(f"ep:provider={name}").probe()).usable:
            assert probe.what
            assert probe.next, name
    migraphx = parse_backend("ep:provider=migraphx")
    assert "pip install onnxruntime-migraphx" in migraphx.probe().next
    assert migraphx.device == "unknown"
    lines = EpBackend().lacks()
    assert [line.partition(":")[0] for line in lines] == [f"provider={name}" for name in PROVIDERS]
    assert lines[0].endswith(", cpu")
    assert all("next: " in line for line in lines if "not installed" in line)


def test_a_wrong_library_is_no_plugin(tmp_path: Path) -> None:
    missing = parse_backend(f"ep:library={tmp_path / 'none.so'},name=Mine").probe()
    assert "no library at" in missing.what
    text = tmp_path / "text.so"
    text.write_text("not a library")
    import onnxruntime.capi

    folder = Path(onnxruntime.capi.__file__).parent
    other = next(folder.glob("libonnxruntime_providers_shared.*"), None)
    for library in filter(None, (text, other)):
        probe = parse_backend(f"ep:library={library},name=Mine").probe()
        assert not probe.usable
        assert f"does not load {library.name}" in probe.what
        assert probe.why
        assert "a plugin for onnxruntime" in probe.next


def test_a_device_that_is_not_there_is_refused() -> None:
    assert "no device gpu" in parse_backend("ep:device=gpu").probe().what


@pytest.mark.parametrize(
    ("lacks", "software", "words"),
    [
        (["shaderStorageImageArrayDynamicIndexing"], True, "no device of Vulkan"),
        ([], True, ""),
        ([], False, ""),
    ],
)
def test_webgpu_on_a_software_device_is_labelled(
    lacks: list[str], software: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The label comes from the Vulkan driver, not from onnxruntime's device: where the machine has
    a GPU without a driver, that is the GPU, and the software device computes."""
    device = vulkan.VulkanDevice("a device", software, tuple(lacks))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("backends.ep.vulkan_devices", lambda: (device,))
    backend = EpBackend({"provider": "webgpu"})
    if words:
        with pytest.raises(PreconditionError, match=words) as caught:
            backend._software(None)
        assert "Mesa 25" in caught.value.next
        assert lacks[0] in caught.value.why
    else:
        assert backend._software(None) == ("a device" if software else "")


# ---- what it leaves to the CPU


def test_what_falls_back_is_counted_and_shown(
    tiny_bundle: Bundle,
    build: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EpBackend, "parts", lambda *_: (PART,))
    backend = parse_backend(NOTHING)
    assert backend.row_flags == ()
    artifact = backend.compile(tiny_bundle, PART, shapes(tiny_bundle))
    assert backend.row_flags == ("cpu_fallback",)
    assert set(backend.row_flags) <= set(FLAGS)
    graph = onnx.load(artifact.folder / "model.onnx", load_external_data=False).graph
    record = json.loads((artifact.folder / PLACEMENT).read_text())
    convolutions = sum(node.op_type == "Conv" for node in graph.node)
    assert record["left"]["Conv"] == convolutions > 0
    assert record["taken"] == {}
    command = ["parts", "--backend", NOTHING, "--model", str(tiny_bundle.path)]
    assert backends_main(command) == EXIT_OK
    said = capsys.readouterr().out
    assert f"0 nodes on the provider, {sum(record['left'].values())} nodes (" in said
    assert f"{convolutions} Conv" in said
    for _ in range(2):
        backend.load(tiny_bundle, artifact).close()
    told = capsys.readouterr().err
    assert told.count(f"ep: {PART}: 0 nodes on the provider") == 1, "once, not with every load"


def test_without_fallback_it_is_refused_also_out_of_the_cache(
    tiny_bundle: Bundle, build: Path
) -> None:
    kept = parse_backend(NOTHING).compile(tiny_bundle, PART, shapes(tiny_bundle))
    assert kept.path is not None
    strict = parse_backend(f"{NOTHING},fallback=no")
    with pytest.raises(UnsupportedError) as caught:
        strict.compile(tiny_bundle, PART, shapes(tiny_bundle))
    assert caught.value.what == f"{PART} does not run wholly on AzureExecutionProvider"
    assert HOST in caught.value.why
    assert "Conv" in caught.value.why
    assert "fallback=no" in caught.value.next
    assert artifact_key(strict, tiny_bundle, PART, shapes(tiny_bundle)) == kept.key
    whole = parse_backend("ep:fallback=no")
    whole.compile(tiny_bundle, PART, shapes(tiny_bundle))
    assert whole.row_flags == ()


def test_an_option_of_the_providers_own_reaches_it_and_is_in_the_key(
    tiny_bundle: Bundle, build: Path
) -> None:
    backend = parse_backend("ep:set.use_arena=0,set.other=2")
    assert isinstance(backend, EpBackend)
    assert backend.own_options() == {"use_arena": "0", "other": "2"}
    keys = {
        artifact_key(parse_backend(text), tiny_bundle, PART, shapes(tiny_bundle))
        for text in ("ep", "ep:set.use_arena=0", "ep:set.use_arena=1", "ep:opset=21")
    }
    assert len(keys) == 4


def test_what_the_provider_gives_no_context_for_is_refused(
    tiny_bundle: Bundle, build: Path
) -> None:
    with pytest.raises(BackendError, match=f"compiling {PART}|compiling .*{PART}"):
        parse_backend("ep:context=yes").compile(tiny_bundle, PART, shapes(tiny_bundle))


def test_the_precision_is_that_of_the_arithmetic(tiny_bundle: Bundle) -> None:
    assert tiny_bundle.dtype == "fp16"
    precisions = {
        text: parse_backend(f"ep:{text}").precision(tiny_bundle)
        for text in ("provider=cpu", "precision=graph", "provider=cuda", "provider=webgpu",
                     "provider=cuda,precision=fp32", "provider=webgpu,precision=graph")
    }  # fmt: skip
    assert list(precisions.values()) == ["fp32", "fp32", "fp16", "fp32", "fp32", "fp16"]


def test_a_fixed_batch_says_so(tiny_bundle: Bundle, build: Path) -> None:
    with load_pipeline(str(tiny_bundle.path), "ep:batch=fixed", "taesd", batch=2) as pipeline:
        assert pipeline(["a", "b"], steps=1).images.shape[0] == 2
        with pytest.raises(UnsupportedError, match="compiled for a batch of 2"):
            pipeline(["a"], steps=1)


# ---- plugins, held against FP32


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_computes_what_torch_does(name: str, tiny_bundle: Bundle, build: Path) -> None:
    text = plugin(name)
    backend = parse_backend(text)
    artifact = backend.compile(tiny_bundle, PART, shapes(tiny_bundle))
    inputs = seeded_inputs(tiny_bundle.parts[PART].inputs, torch.Generator().manual_seed(0))
    reference = parse_backend("torch")
    with (
        backend.load(tiny_bundle, artifact) as session,
        reference.load(
            tiny_bundle, reference.compile(tiny_bundle, PART, shapes(tiny_bundle))
        ) as exact,
    ):
        (result,) = session.run(cast_for(session, inputs)).values()
        (expected,) = exact.run(inputs).values()
    error = float((result.float() - expected).norm() / expected.norm())
    assert error < GATES[backend.precision(tiny_bundle)].relative_error, error
    graph = onnx.load(artifact.folder / "model.onnx", load_external_data=False).graph
    assert isinstance(backend, EpBackend)
    assert ("EPContext" in {node.op_type for node in graph.node}) == backend.keeps_context
    assert backend.keeps_context == (PROVIDERS[name].context and backend.target.device is not None)


def cast_for(session: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: inputs[name].to(getattr(torch, spec.dtype)) for name, spec in session.inputs.items()
    }


@pytest.mark.parametrize("name", ["openvino", "webgpu"])
def test_an_image_of_a_plugin_is_the_references(
    name: str, tiny_bundle: Bundle, build: Path
) -> None:
    references = tiny_bundle.references()
    assert references is not None
    with load_pipeline(str(tiny_bundle.path), plugin(name), "taesd") as pipeline:
        out = pipeline([references.prompt], steps=1, seed=references.seed)
        software = bool(pipeline.backend.target.software)  # type: ignore[attr-defined]
        assert (pipeline.backend.device == "webgpu-emulated") == software
    distance = image_distance(out.images[0], references.images["taesd", 1])
    assert distance.passes(GATES["fp32"]), distance
    assert out.provenance == ("emulated" if software else "measured")


def test_a_plugin_leaves_what_it_has_no_kernel_for(tiny_bundle: Bundle, build: Path) -> None:
    """WebGPU has kernels of Sin and Cos as opset 7 has them, and none as opset 22 does."""
    text = plugin("webgpu")
    whole, part = parse_backend(text), parse_backend(f"{text},opset=23")
    assert isinstance(whole, EpBackend)
    assert isinstance(part, EpBackend)
    left = {
        backend.form.opset: backend.placement(
            backend.compile(tiny_bundle, "unet", shapes(tiny_bundle))
        ).left
        for backend in (whole, part)
    }
    assert {"Sin", "Cos"} <= left[23].keys()
    assert not {"Sin", "Cos"} & left[17].keys()


def test_a_plugin_is_taken_by_its_library_too(tiny_bundle: Bundle, build: Path) -> None:
    for name in PLUGINS:
        provider = PROVIDERS[name]
        library = providers.plugin_library(provider)
        if library is None or not parse_backend(f"ep:provider={name}").probe().usable:
            continue
        backend = parse_backend(f"ep:library={library},name={provider.ep}")
        probe = backend.probe()
        assert probe.usable, probe
        assert backend.device == parse_backend(f"ep:provider={name}").device
        other = parse_backend(f"ep:provider={name},device=99").probe()
        assert "no device 99" in other.what
        assert "it offers 0: " in other.why
        return
    pytest.skip("no plugin can be used here")
