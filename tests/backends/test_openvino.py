"""OpenVINO: static shapes, compiled files, what it refuses. The contract test has its images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends import openvino
from backends.artifacts.child import compile_peak_mb
from backends.base import (
    Artifact,
    BackendError,
    Shapes,
    UnavailableError,
    UnsupportedError,
    artifact_key,
)
from backends.check.gate import GATES, gate_for, image_distance
from backends.load import load_pipeline
from backends.registry import parse_backend
from core.errors import PreconditionError
from export.bundle import Bundle

usable = parse_backend("openvino").probe().usable
needs_openvino = pytest.mark.skipif(not usable, reason="openvino is not installed")


@pytest.fixture(scope="module")
def artifact(tiny_bundle: Bundle) -> Artifact:
    return parse_backend("openvino").compile(
        tiny_bundle, "taesd_decoder", Shapes(1, *tiny_bundle.size)
    )


@needs_openvino
def test_a_compiled_part_is_one_file_for_one_batch(artifact: Artifact, tiny_bundle: Bundle) -> None:
    assert artifact.path is not None
    assert (artifact.path / openvino.BLOB).stat().st_size > 10_000
    peak = compile_peak_mb(artifact.path)
    assert peak is not None
    assert 50 < peak < 1000
    with parse_backend("openvino").load(tiny_bundle, artifact) as session:
        spec = session.inputs["latent_sample"]
        assert (spec.dtype, spec.shape[0]) == ("float32", 1)
        latents = torch.zeros([int(size) for size in spec.shape])
        first = session.run({"latent_sample": latents})["sample"]
        kept = first.clone()
        session.run({"latent_sample": latents + 1})
        assert torch.equal(first, kept), "an output must not change in the next run"


@needs_openvino
def test_other_batches_are_refused_with_the_flag(tiny_bundle: Bundle) -> None:
    with (
        load_pipeline(str(tiny_bundle.path), "openvino") as pipeline,
        pytest.raises(UnsupportedError, match="compiled for a batch of 1") as refused,
    ):
        pipeline(["a", "b"], steps=1)
    assert "--batch 2" in refused.value.next


@needs_openvino
def test_a_file_that_is_no_compiled_model_is_an_error(
    artifact: Artifact, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    assert artifact.path is not None
    shutil.copytree(artifact.path, tmp_path / "copy")
    blob = tmp_path / "copy" / openvino.BLOB
    blob.write_bytes(b"no model" * 1000)
    with pytest.raises(BackendError, match="OpenVINO failed loading"):
        parse_backend("openvino").load(tiny_bundle, replace(artifact, path=blob.parent))


def test_the_key_holds_precision_and_batch_but_not_threads(tiny_bundle: Bundle) -> None:
    def key(text: str, batch: int = 1) -> str:
        shapes = Shapes(batch, *tiny_bundle.size)
        return artifact_key(parse_backend(text), tiny_bundle, "unet", shapes)

    base = key("openvino")
    assert base == key("openvino:threads=1")
    assert len({base, key("openvino:precision=bf16"), key("openvino", batch=2)}) == 3


@needs_openvino
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_cpu_lacks_is_refused(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "cpu_flags", lambda: {"avx2", "fma"})
    assert parse_backend("openvino").probe().usable
    backend = parse_backend(f"openvino:precision={precision}")
    with pytest.raises(UnavailableError, match=f"no {precision.upper()} arithmetic") as refused:
        backend.probe().require("openvino")
    assert "FP32 is the default" in refused.value.next


@needs_openvino
def test_bf16_draws_the_image_within_the_gate_of_half_precision(tiny_bundle: Bundle) -> None:
    found = parse_backend("openvino:precision=bf16").probe()
    if not found.usable:
        pytest.skip(found.what)
    references = tiny_bundle.references()
    assert references is not None
    with load_pipeline(str(tiny_bundle.path), "openvino:precision=bf16", "taesd") as pipeline:
        image = pipeline([references.prompt], steps=1, seed=references.seed).images[0]
        assert pipeline.backend.precision(tiny_bundle) == "bf16"
    distance = image_distance(image, references.images["taesd", 1])
    gate = gate_for("fp16", "bf16", "random")
    assert gate == GATES["fp16"]
    assert distance.passes(gate)
    assert not distance.passes(GATES["fp32"]), "it did not compute in BF16"


@needs_openvino
def test_what_a_compile_needs_is_said_before_it_starts(
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    backend, shapes = parse_backend("openvino"), Shapes(1, *tiny_bundle.size)
    monkeypatch.setattr(openvino, "run_child", lambda *_, **__: pytest.fail("it has started"))
    monkeypatch.setattr(openvino, "COPIES", 1e15)
    with pytest.raises(PreconditionError, match="GB of memory") as refused:
        backend.compile(tiny_bundle, "unet", shapes)
    assert "use ort" in refused.value.next
    monkeypatch.setattr(openvino, "COPIES", 2.0)
    monkeypatch.setattr(openvino, "WORTH_SAYING", 0)
    monkeypatch.setattr(openvino, "run_child", lambda *_, **__: None)
    with pytest.raises(Exception, match="wrote nothing"):
        backend.compile(tiny_bundle, "unet", shapes)
    assert (
        "compiling tiny-sdxl unet for OpenVINO: about 270 MB of memory" in capsys.readouterr().err
    )


@needs_openvino
def test_a_damaged_graph_is_an_error_that_says_what_to_do(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    shutil.copytree(tiny_bundle.path, tmp_path / "copy")
    bundle = Bundle.open(tmp_path / "copy")
    graph = bundle.parts["taesd_decoder"].graph
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    with pytest.raises(BackendError, match="for OpenVINO failed") as failed:
        parse_backend("openvino").compile(bundle, "taesd_decoder", Shapes(1, *bundle.size))
    assert "addbench verify" in failed.value.next
