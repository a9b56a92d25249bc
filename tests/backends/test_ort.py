"""The CPU backend: what it compiles to, and what it says when it cannot."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import onnx
import pytest

from backends import base, ort
from backends.base import BackendError, Shapes, UnsupportedError
from backends.check.gate import gate_for, image_distance
from backends.load import load_pipeline
from backends.onnxrt import operators, session
from backends.registry import parse_backend
from bench.rows.fields import FLAGS
from core.errors import PreconditionError
from export.bundle import Bundle


def test_arithmetic_is_fp32_by_construction(tiny_bundle: Bundle) -> None:
    width, height = tiny_bundle.size
    artifact = parse_backend("ort").compile(tiny_bundle, "unet", Shapes(1, width, height))
    assert artifact.path is not None
    graph = onnx.load(artifact.path / "model.onnx", load_external_data=False).graph
    half = onnx.TensorProto.FLOAT16
    widened = {node.input[1] for node in graph.node if node.op_type in ("Linear", "TiledConv")}
    left = {tensor.name for tensor in graph.initializer if tensor.data_type == half}
    assert left == widened  # operators of our own widen them as they read them
    made = {name for node in graph.node for name in node.output}
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info if v.name in made}
    assert types
    assert half not in types.values()
    assert not [node.name for node in graph.node if node.op_type == "Cast"
                if any(a.name == "to" and a.i == half for a in node.attribute)]  # fmt: skip


@pytest.mark.parametrize(
    ("packages", "usable", "words"),
    [
        ({"onnxruntime": "1"}, True, ""),
        ({"onnxruntime-gpu": "1"}, True, ""),
        ({"onnxruntime": "1", "onnxruntime-gpu": "1"}, False, "same module"),
    ],
)
def test_the_clash_of_the_two_packages_is_named(
    packages: dict[str, str], usable: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        try:
            return packages[package]
        except KeyError:
            raise PackageNotFoundError(package) from None

    monkeypatch.setattr(base, "version", version)
    found = ort.OrtBackend().probe()
    assert found.usable == usable
    assert words in found.why


def test_a_compile_that_does_not_fit_is_refused_with_the_estimate(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    width, height = tiny_bundle.size
    shapes = Shapes(1, width, height)
    monkeypatch.setattr(ort.OrtBackend, "disk_need", lambda *_: 10**18)
    with pytest.raises(PreconditionError, match=r"needs 1000000000.0 GB of disk"):
        parse_backend("ort").compile(tiny_bundle, "unet", shapes)
    monkeypatch.undo()
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    monkeypatch.setattr(ort.OrtBackend, "memory_need", lambda *_: 10**18)
    with pytest.raises(PreconditionError, match=r"1000000000.0 GB of memory"):
        parse_backend("ort").compile(tiny_bundle, "unet", shapes)


def test_a_damaged_graph_is_an_error_that_says_what_to_do(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle.path, copy)
    bundle = Bundle.open(copy)
    graph = bundle.parts["taesd_decoder"].graph
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    shapes = Shapes(1, 64, 64)
    with pytest.raises(BackendError, match="compiling taesd_decoder for onnxruntime failed"):
        parse_backend("ort:convolutions=op,products=op").compile(bundle, "taesd_decoder", shapes)
    for backend in (
        "ort:convolutions=winograd",
        "ort:precision=int8",
    ):  # it is read for the estimate
        with pytest.raises(PreconditionError, match="cannot be read as a graph"):
            parse_backend(backend).compile(bundle, "taesd_decoder", shapes)
    with pytest.raises(PreconditionError, match="cannot be read as a graph"):
        Bundle.open(copy)


def test_a_plain_session_draws_the_reference_from_the_canonical_graph(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    references = tiny_bundle.references()
    assert references is not None
    with load_pipeline(str(tiny_bundle.path), "ort:graph=canonical", "taesd") as pipeline:
        assert pipeline.session("unet").inputs["sample"].dtype == "float16", "the bundle's own"
        image = pipeline([references.prompt], steps=1, seed=references.seed).images[0]
        assert not pipeline.compile_s
        effective = pipeline.backend.effective_options()
    assert image_distance(image, references.images["taesd", 1]).passes(
        gate_for("fp16", "fp32", "random")
    )
    assert not list(tmp_path.iterdir()), "it leaves nothing in the cache"
    assert (effective["graph"], effective["spin"]) == ("canonical", "always")


def test_a_plain_session_takes_no_tuning() -> None:
    assert parse_backend("ort:graph=canonical,threads=1").given["threads"] == "1"
    with pytest.raises(UnsupportedError, match="takes no option level, spin"):
        parse_backend("ort:graph=canonical,spin=never,level=basic")


def test_a_split_into_many_parts_is_written_so_that_it_loads(tmp_path: Path) -> None:
    count = 300
    names = [f"part_{n}" for n in range(count)]
    sizes = onnx.numpy_helper.from_array(np.arange(1, count + 1), "sizes")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Split", ["x", "sizes"], names, axis=0)],
        "parts",
        [
            onnx.helper.make_tensor_value_info(
                "x", onnx.TensorProto.FLOAT, [int(sum(range(1, count + 1)))]
            )
        ],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names],
        [sizes],
    )
    opset = onnx.helper.make_opsetid("", 23)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / ort.MODEL
    )
    options = ort.OrtBackend().options
    ort.write_optimised(tmp_path, tmp_path / "out", options, prepacked=False)
    parts = session.open_session(tmp_path / "out" / ort.MODEL, options).run(
        None, {"x": np.zeros(sum(range(1, count + 1)), np.float32)}
    )
    assert [len(part) for part in parts] == list(range(1, count + 1))


def test_the_operators_are_built_once_and_where_they_can_be(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    if operators.compiler() is not None:
        built = operators.library()
        stamp = built.stat().st_mtime_ns
        assert operators.library() == built
        assert built.stat().st_mtime_ns == stamp
        built.unlink()
        (tmp_path / "native" / "not-a-compiler").write_text(
            "#!/bin/sh\necho no such flag >&2\nexit 3"
        )
        (tmp_path / "native" / "not-a-compiler").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "native" / "not-a-compiler"))
        with pytest.raises(BackendError, match="(?s)cannot be built.*no such flag") as error:
            operators.library()
        advised = error.value.next.split()[-1]
        assert not operators.are_in(parse_backend(advised).options)
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = parse_backend("ort")
    assert isinstance(found, ort.OrtBackend)
    assert found.options["convolutions"] == found.options["products"] == "op"
    assert (found.options["norms"], found.options["attention"]) == ("layer", "multihead")
    assert "no C++ compiler" in found.probe().what
    assert "operators" not in found.fingerprint()
    assert found.row_flags == ("no_compiler",)
    assert set(found.row_flags) <= set(FLAGS)
    assert parse_backend("ort:graph=canonical").row_flags == ()  # it asked for no operators
    with pytest.raises(BackendError, match="(?s)no C\\+\\+ compiler.*apt install"):
        operators.library()


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("convolutions=winograd", "precision=int8,conv=int8"),
        ("products=linear", "precision=int8"),
        ("products=linear", "storage=int4"),
        ("products=linear", "graph=canonical"),
    ],
)
def test_operators_are_refused_beside_what_they_cannot_join(own: str, other: str) -> None:
    key = own.partition("=")[0]
    with pytest.raises(UnsupportedError, match=key):
        parse_backend(f"ort:{own},{other}")
    assert parse_backend(f"ort:{other}").options[key] == "op"


@pytest.mark.parametrize(("tiles", "products"), [(False, "linear"), (True, "op")])
def test_weights_of_8_bits_have_an_operator_where_there_are_no_tiles(
    tiles: bool, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "isa", lambda: "x86_64 avx2 fma f16c")
    monkeypatch.setattr(operators, "compiler", lambda: ["c++"])
    monkeypatch.setattr(operators, "may_use_tiles", lambda: tiles)
    found = parse_backend("ort:storage=int8")
    assert isinstance(found, ort.OrtBackend)
    assert found.options["products"] == products
    assert found.profile("unet").products == "op", "integers are laid out after lowering"
    assert parse_backend("ort:storage=int8,products=op").options["products"] == "op"
    monkeypatch.setattr(operators, "compiler", lambda: None)
    assert parse_backend("ort:storage=int8").options["products"] == "op"


def test_what_int8_leaves_out_is_rounded_to_bf16_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort, "isa", lambda: "x86_64 avx2 fma f16c avx512f avx512_vnni")
    monkeypatch.setattr(operators, "compiler", lambda: ["c++"])
    monkeypatch.setattr(operators, "may_use_tiles", lambda: False)
    monkeypatch.setattr(operators, "may_multiply_bf16", lambda: True)
    found = parse_backend("ort:precision=int8,rest=bf16")
    assert isinstance(found, ort.OrtBackend)
    assert found.profile("vae_decoder").arithmetic == "bf16"
    plain = parse_backend("ort:precision=int8")
    assert isinstance(plain, ort.OrtBackend)
    assert plain.profile("vae_decoder").arithmetic == "fp32"
    for others, why in (("", "precision is another"), (",storage=int8", "precision is another"),
                        (",precision=int8,attention=multihead", "attention=operator")):  # fmt: skip
        with pytest.raises(UnsupportedError, match=rf"(?s)rest=bf16.*{why}"):
            parse_backend(f"ort:rest=bf16{others}")
    monkeypatch.setattr(operators, "may_multiply_bf16", lambda: False)
    with pytest.raises(UnsupportedError, match=r"(?s)rest=bf16.*AVX-512-BF16"):
        parse_backend("ort:precision=int8,rest=bf16")


@pytest.mark.parametrize("others", ["", ",precision=int8,conv=int8", ",storage=int4"])
def test_group_norms_are_an_operator_at_any_precision(
    others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "isa", lambda: "x86_64 avx2 fma f16c")
    monkeypatch.setattr(operators, "compiler", lambda: ["c++"])
    plain = "convolutions=op,products=op,attention=multihead"
    found = parse_backend(f"ort:{plain}{others}")
    assert isinstance(found, ort.OrtBackend)
    assert found.profile("unet").norms == "operator"
    assert "operators" in found.fingerprint()
    assert operators.are_in(found.options)
    found = parse_backend(f"ort:{plain},norms=layer{others}")
    assert isinstance(found, ort.OrtBackend)
    assert found.profile("unet").norms == "layer"
    assert "operators" not in found.fingerprint()
    assert not operators.are_in(found.options)


def test_group_norms_are_onnxruntimes_where_it_has_to_do_without_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parse_backend("ort:graph=canonical").options["norms"] == "layer"
    with pytest.raises(UnsupportedError, match="takes no option norms"):
        parse_backend("ort:graph=canonical,norms=operator")
    monkeypatch.setattr(ort, "isa", lambda: "x86_64")
    assert parse_backend("ort").options["norms"] == "layer"


@pytest.mark.skipif(operators.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("part", ["unet", "vae_decoder"])
def test_every_group_norm_takes_its_silu(tiny_bundle: Bundle, part: str) -> None:
    width, height = tiny_bundle.size
    artifact = parse_backend("ort:norms=operator").compile(
        tiny_bundle, part, Shapes(1, width, height)
    )
    assert artifact.path is not None
    graph = onnx.load(artifact.path / "model.onnx", load_external_data=False).graph
    norms = [node for node in graph.node if node.op_type == "GroupNorm"]
    assert len(norms) == tiny_bundle.parts[part].ops["GroupNormalization"]
    made = {name for node in norms for name in node.output}
    assert not [node for node in graph.node if node.op_type in ("QuickGelu", "Sigmoid", "Cast")
                if made & set(node.input)]  # fmt: skip
    constants = {tensor.name for tensor in graph.initializer}
    assert constants >= {name for node in norms for name in node.input[1:]}


def test_tiles_are_for_those_who_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "may_use_tiles", lambda: False)
    with pytest.raises(UnsupportedError, match="(?s)AMX.*drop convolutions=tiles"):
        parse_backend("ort:convolutions=tiles")
    assert parse_backend("ort").options["convolutions"] != "tiles"
    monkeypatch.setattr(operators, "may_use_tiles", lambda: True)
    monkeypatch.setattr(operators, "compiler", lambda: ["c++"])
    assert parse_backend("ort").options["convolutions"] == "tiles"
    assert parse_backend("ort:storage=int4").options["convolutions"] == "tiles"


@pytest.mark.parametrize(
    ("tiles", "others"),
    [
        (True, ["products=op", "convolutions=winograd", "attention=multihead", "storage=int8"]),
        (False, ["products=op", "convolutions=op", "attention=multihead", "storage=int8"]),
    ],
    ids=["AMX", "AVX-512-BF16"],
)
def test_bf16_is_refused_where_something_would_compute_otherwise(
    tiles: bool, others: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "may_use_tiles", lambda: tiles)
    monkeypatch.setattr(operators, "may_multiply_bf16", lambda: True)
    monkeypatch.setattr(operators, "compiler", lambda: ["c++"])
    options = parse_backend("ort:precision=bf16").options
    assert options["attention"] == "operator"
    assert options["convolutions"] == ("tiles" if tiles else "winograd")
    for other in others:
        with pytest.raises(UnsupportedError, match="(?s)precision=bf16.*drop precision"):
            parse_backend(f"ort:precision=bf16,{other}")
    monkeypatch.setattr(operators, "may_multiply_bf16", lambda: False)
    with pytest.raises(UnsupportedError, match="(?s)neither AMX.*precision=int8"):
        parse_backend("ort:precision=bf16")
