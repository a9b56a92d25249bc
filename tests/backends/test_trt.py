"""The `trt` backend against a test double of TensorRT and of the GPU (tests/doubles).

What these tests show is our own logic: what is asked of the API, in which order, with which
lifetimes; that the right image comes out of it. They say nothing of a GPU's speed or kernels.
"""

from __future__ import annotations

import _thread
import hashlib
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends.base import BackendError, OutOfMemoryError, Shapes, UnsupportedError, artifact_key
from backends.check.gate import gate_for, image_distance
from backends.load import load_pipeline
from backends.pipeline.pipeline import Pipeline
from backends.registry import parse_backend
from core.errors import PreconditionError
from core.files import ROOT
from export.bundle import Bundle

sys.path.insert(0, str(ROOT / "tests" / "doubles"))
import gpu_double
import tensorrt_double as double

SMALL_PART = "taesd_decoder"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> gpu_double.World:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    return double.install(monkeypatch)


def shapes(bundle: Bundle, batch: int = 1) -> Shapes:
    return Shapes(batch, *bundle.size)


def compiled(bundle: Bundle, text: str = "trt", part: str = SMALL_PART, batch: int = 1) -> Path:
    artifact = parse_backend(text).compile(bundle, part, shapes(bundle, batch))
    assert artifact.path is not None
    return artifact.path


def latents(batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"latent_sample": torch.randn(batch, 4, 8, 8, generator=generator).half()}


# ---- images


@pytest.fixture(scope="module")
def pipelines(
    tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Pipeline]]:
    """A pipeline for each order; both decoders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDBENCH_BUILD", str(tmp_path_factory.mktemp("build")))
        double.install(patch)
        path = str(tiny_bundle.path)
        made = {
            "vae": load_pipeline(path, "trt:graph=part", "vae"),
            "range": load_pipeline(path, "trt:batch=1-4,graph=none", "taesd"),
            "image": load_pipeline(path, "trt:batch=1-4", "taesd"),
        }
        yield made
        for pipeline in made.values():
            pipeline.close()


def test_images_are_the_references(pipelines: dict[str, Pipeline], tiny_bundle: Bundle) -> None:
    references = tiny_bundle.references()
    assert references is not None
    gate = gate_for("fp16", "fp16", "random")
    for name, decoder in (("vae", "vae"), ("range", "taesd"), ("image", "taesd")):
        for steps in (1, 2):
            out = pipelines[name]([references.prompt], steps=steps, seed=references.seed)
            distance = image_distance(out.images[0], references.images[decoder, steps])
            assert distance.passes(gate), (name, steps, distance)
            assert out.nfe == steps


def test_an_image_from_a_picture_is_one_graph_too(
    pipelines: dict[str, Pipeline], tiny_bundle: Bundle
) -> None:
    references = tiny_bundle.references()
    assert references is not None
    picture = references.images["vae", 4]
    draw: dict[str, Any] = {"steps": 4, "seed": 9, "images": picture, "strength": 0.5}
    with load_pipeline(str(tiny_bundle.path), "torch", "taesd", encoder="vae") as torch_fp32:
        expected = torch_fp32("a fox", **draw).images[0]
    whole = pipelines["image"]
    before = whole("a fox", steps=4, seed=9).images
    whole.use_encoder("vae")
    first, again = (whole("a fox", **draw) for _ in range(2))
    for out in (first, again):
        assert out.timings.text is None, "in one go, the encoder included"
        assert out.nfe == 2
        assert image_distance(out.images[0], expected).passes(gate_for("fp16", "fp16", "random"))
    assert np.array_equal(whole("a fox", steps=4, seed=9).images, before), "from noise as before"
    whole.encoder = None


def test_a_range_takes_its_batches_and_no_other(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["range"]
    together = pipeline(["a fox", "a hen", "a cow"], steps=1, seed=[5, 6, 7]).images
    alone = pipeline(["a hen"], steps=1, seed=6).images
    assert image_distance(together[1], alone[0]).psnr_db > 40
    with pytest.raises(UnsupportedError, match="it takes 1 to 4"):
        pipeline(["a fox"] * 5, steps=1)
    with pytest.raises(UnsupportedError, match="compiled for a batch of 1"):
        pipelines["vae"](["a fox"] * 2, steps=1)


def test_a_part_is_replayed_from_its_graph_and_results_stay(
    pipelines: dict[str, Pipeline],
) -> None:
    session = pipelines["vae"].session("unet")
    inputs = {
        name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
        for name, spec in session.inputs.items()
    }
    first = session.run(inputs)["out_sample"]
    before, executions = gpu_double.WORLD.replays, gpu_double.WORLD.executions
    kept = first.clone()
    second = session.run(inputs | {"timestep": torch.tensor([999.0])})["out_sample"]
    assert gpu_double.WORLD.replays == before + 1
    assert gpu_double.WORLD.executions == executions
    assert torch.equal(first, kept)  # not the buffer that the second run wrote to
    assert not torch.equal(first, second)


def test_a_caller_may_capture_sessions_into_a_graph_of_its_own(
    world: gpu_double.World, tiny_bundle: Bundle
) -> None:
    backend = parse_backend("trt:graph=part")
    artifact = backend.compile(tiny_bundle, SMALL_PART, shapes(tiny_bundle))
    with backend.load(tiny_bundle, artifact) as session:
        expected = session.run(latents())["sample"]
        binding = session.binding(1)  # type: ignore[attr-defined]
        addresses = [t.data_ptr() for t in (*binding.inputs.values(), *binding.outputs.values())]
        device = gpu_double.DeviceDouble()
        replay = device.capture(lambda: session.enqueue(latents()) and None)  # type: ignore[attr-defined]
        binding.outputs["sample"].zero_()
        binding.inputs["latent_sample"].copy_(latents()["latent_sample"])
        replay()
        assert torch.equal(binding.outputs["sample"], expected)
        assert addresses == [
            t.data_ptr() for t in (*binding.inputs.values(), *binding.outputs.values())
        ]
        assert device.synchronized == 0


def test_inputs_that_do_not_fit_are_refused(world: gpu_double.World, tiny_bundle: Bundle) -> None:
    backend = parse_backend("trt")
    artifact = backend.compile(tiny_bundle, SMALL_PART, shapes(tiny_bundle))
    with backend.load(tiny_bundle, artifact) as session:
        for wrong in (torch.zeros(1, 4, 8, 9).half(), torch.zeros(1, 4, 8, 8)):
            with pytest.raises(BackendError, match="the input latent_sample is"):
                session.run({"latent_sample": wrong})
        with torch.inference_mode():
            session.run(latents())
        session.run(latents())  # the buffers are not inference tensors


def test_what_runs_side_by_side_shares_no_memory(
    pipelines: dict[str, Pipeline], tiny_bundle: Bundle
) -> None:
    """The text encoders, on two streams unless an option says otherwise."""
    pipeline = pipelines["image"]
    assert pipeline.parallel_text  # type: ignore[attr-defined]
    first, second, unet, decoder = (
        pipeline.session(part)._scratch  # type: ignore[attr-defined]
        for part in ("text_encoder", "text_encoder_2", "unet", "taesd_decoder")
    )
    assert first is not second
    assert unet is decoder
    assert unet not in (first, second)
    one_stream = parse_backend("trt:streams=0")
    made = one_stream.pipeline(tiny_bundle, "taesd", shapes(tiny_bundle))
    assert not made.parallel_text  # type: ignore[attr-defined]


def test_activation_memory_is_shared_by_what_runs_in_turn(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["vae"]
    pipeline("a fox", steps=1)
    blocks = {
        part: pipeline.session(part).binding(1)._block.data_ptr()  # type: ignore[attr-defined]
        for part in pipeline.parts
    }
    assert blocks["unet"] == blocks["vae_decoder"]
    assert len({blocks["unet"], blocks["text_encoder"], blocks["text_encoder_2"]}) == 3


# ---- building


@pytest.mark.parametrize(
    ("version", "opset", "attention", "norms"),
    [
        ("10.3.0.26", 20, "matmul", "decomposed"),
        ("10.9.0.34", 21, "matmul", "op"),
        ("11.1.0.106", 23, "op", "op"),
    ],
)
def test_the_graph_is_what_each_release_reads(
    version: str,
    opset: int,
    attention: str,
    norms: str,
    world: gpu_double.World,
    tiny_bundle: Bundle,
) -> None:
    double.set_version(version)
    backend = parse_backend("trt")
    profile = backend.profile("vae_decoder")
    assert (profile.opset, profile.attention, profile.norms) == (opset, attention, norms)
    assert profile.dtype == "as-is"
    artifact = backend.compile(tiny_bundle, "vae_decoder", shapes(tiny_bundle))
    with backend.load(tiny_bundle, artifact) as session:
        assert session.inputs["latent_sample"].dtype == "float16"
        assert session.inputs["latent_sample"].shape == (1, 4, 8, 8)
        assert session.run(latents())["sample"].shape == (1, 3, 64, 64)


def test_the_unet_keeps_fp32_where_the_graph_says_so(
    pipelines: dict[str, Pipeline],
) -> None:
    dtypes = {n: spec.dtype for n, spec in pipelines["vae"].session("unet").inputs.items()}
    assert dtypes == {
        "sample": "float16",
        "timestep": "float32",
        "context": "float16",
        "text_embeds": "float16",
        "time_ids": "float32",
    }


def test_a_plan_lies_beside_its_log_and_its_record(
    world: gpu_double.World, tiny_bundle: Bundle
) -> None:
    folder = compiled(tiny_bundle, "trt:level=5,workspace=2")
    assert {"model.plan", "build.log", "plan.json"} <= {f.name for f in folder.iterdir()}
    log = (folder / "build.log").read_text()
    assert "[INFO] Local timing cache in use" in log
    assert "tactic" not in log  # verbose messages would be gigabytes
    record = json.loads((folder / "plan.json").read_text())
    assert record["fingerprint"] == {
        "tensorrt": "10.14.1.48",
        "gpu": "Test Double 9000",
        "compute_capability": "9.0",
    }
    assert record["request"]["level"] == 5
    assert record["request"]["workspace_bytes"] == 2 * 2**30
    assert record["request"]["profile"]["batch"] == 1


def test_what_a_plan_depends_on_is_in_its_key(world: gpu_double.World, tiny_bundle: Bundle) -> None:
    def key(text: str = "trt", batch: int = 1) -> str:

        return artifact_key(
            parse_backend(text), tiny_bundle, SMALL_PART, shapes(tiny_bundle, batch)
        )

    base = key()
    assert key("trt:graph=none") == key("trt:streams=0") == base
    others = [
        key(batch=2),
        *(key(f"trt:{o}") for o in ("level=4", "refit=1", "batch=1-4", "workspace=1")),
    ]
    assert key("trt:batch=1-4", batch=1) == key("trt:batch=1-4", batch=2)
    world.gpu = gpu_double.Gpu("Other", (9, 0), (13, 0), 2**33)
    others.append(key())
    double.set_version("10.14.2.1")
    others.append(key())
    assert len({base, *others}) == 1 + len(others)


def test_the_timing_cache_is_kept_merged_and_survives_damage(
    world: gpu_double.World, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    compiled(tiny_bundle)
    (cache,) = (tmp_path / "timing").glob("*.cache")
    assert "10.14.1.48" in cache.name
    assert world.known_timings == 0
    compiled(tiny_bundle, "trt:level=4")  # the same graph: its kernels are known
    assert world.known_timings == 1
    first = set(json.loads(cache.read_bytes())[1])
    compiled(tiny_bundle, part="text_encoder")
    assert first < set(json.loads(cache.read_bytes())[1])
    cache.write_bytes(b"\xff" * 100)
    folder = compiled(tiny_bundle, "trt:level=1")
    assert "is not used" in (folder / "build.log").read_text()
    assert set(json.loads(cache.read_bytes())[1]) == first


def test_a_timing_written_by_another_process_meanwhile_is_kept(
    world: gpu_double.World, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(tiny_bundle)
    (cache,) = (tmp_path / "timing").glob("*.cache")
    build = double.Builder.build_serialized_network

    def meanwhile(self: double.Builder, network: object, config: object) -> object:
        owner, entries = json.loads(cache.read_bytes())
        cache.write_bytes(json.dumps([owner, entries | {"theirs": 2.0}]).encode())
        return build(self, network, config)  # type: ignore[arg-type]

    monkeypatch.setattr(double.Builder, "build_serialized_network", meanwhile)
    compiled(tiny_bundle, part="text_encoder")
    assert len(json.loads(cache.read_bytes())[1]) == 3


def test_a_stripped_plan_holds_no_weights_and_is_refitted_at_load(
    world: gpu_double.World, tiny_bundle: Bundle
) -> None:
    images = {}
    for text in ("trt", "trt:refit=1"):
        backend = parse_backend(text)
        artifact = backend.compile(tiny_bundle, SMALL_PART, shapes(tiny_bundle))
        with backend.load(tiny_bundle, artifact) as session:
            images[text] = session.run(latents())["sample"]
        images[text + " bytes"] = (artifact.path / "model.plan").stat().st_size  # type: ignore[operator]
    assert torch.equal(images["trt"], images["trt:refit=1"])
    weights = tiny_bundle.parts[SMALL_PART].weight_bytes
    assert images["trt bytes"] - images["trt:refit=1 bytes"] > weights / 2


def test_nothing_is_left_of_the_lowered_graph(
    world: gpu_double.World, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """A hard link to the weights would keep other readers from opening the bundle."""
    compiled(tiny_bundle, "trt:refit=1")
    assert not list(tmp_path.glob(".lowered-*"))
    data = tiny_bundle.parts[SMALL_PART].data
    assert data is not None
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.samefile(data)]


def test_an_attention_without_a_fused_kernel_does_not_fail_the_build(
    world: gpu_double.World, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL's VAE has a head of 512 channels; the tiny one's is made to look like it."""
    wide = double.AttentionInputLayer.__init__

    def make_wide(self: double.AttentionInputLayer, node: object, head_size: int) -> None:
        wide(self, node, head_size=512)  # type: ignore[arg-type]

    monkeypatch.setattr(double.AttentionInputLayer, "__init__", make_wide)
    compiled(tiny_bundle, part="vae_decoder")
    double.set_version("10.13.3.9")  # no such layer there: the graph spells attention out
    compiled(tiny_bundle, part="vae_decoder")


def test_a_terminal_sees_the_phases_of_a_build(
    world: gpu_double.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backends.tensorrt.build import Monitor

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Monitor("TensorRT builds unet") as monitor:
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Tactics", "Building Engine", 0)
        assert monitor.step_complete("Building Engine", 0)
        assert monitor.step_complete("a phase that was not announced", 0)
        shown = [task.description for task in monitor._progress.tasks]  # type: ignore[union-attr]
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Building Engine")
    assert shown == ["TensorRT builds unet: Building Engine", "  Tactics"]


def test_a_gpu_that_does_not_start_is_an_error_of_ours(
    world: gpu_double.World, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = parse_backend("trt")
    artifact = backend.compile(tiny_bundle, SMALL_PART, shapes(tiny_bundle))

    def nothing(self: object, logger: double.ILogger) -> None:
        logger.log(double.Severity.ERROR, "CUDA initialization failure with error: 999")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(double.Runtime, "__init__", nothing)
    with pytest.raises(BackendError, match=r"(?s)runtime does not start.*error: 999"):
        backend.load(tiny_bundle, artifact)
    monkeypatch.setattr(double.Builder, "__init__", nothing)
    with pytest.raises(BackendError, match=r"(?s)builder does not start.*error: 999"):
        compiled(tiny_bundle, part="text_encoder")


def test_an_interrupt_ends_a_build_at_its_next_step(
    world: gpu_double.World, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def endless(self: double.Builder, network: object, config: double.IBuilderConfig) -> None:
        monitor = config.progress_monitor
        assert monitor is not None
        monitor.phase_start("Building Engine", None, 0)  # type: ignore[arg-type]
        _thread.interrupt_main()  # what Ctrl-C does, once Python has the signal
        deadline = time.monotonic() + 20
        while monitor.step_complete("Building Engine", 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if time.monotonic() < deadline:
            ended.set()

    monkeypatch.setattr(double.Builder, "build_serialized_network", endless)
    with pytest.raises(KeyboardInterrupt):
        compiled(tiny_bundle)
    assert ended.is_set()
    assert not list((tmp_path / "cache").glob("*/model.plan"))
    assert not list(tmp_path.glob(".lowered-*"))


# ---- failures


def test_a_refused_node_is_named_with_its_operator(
    world: gpu_double.World, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    world.unsupported = {"Relu", "Resize"}
    with pytest.raises(BackendError) as caught:
        compiled(tiny_bundle)
    assert "cannot read the graph" in caught.value.what
    assert "Relu node_" in caught.value.why
    assert "Resize node_" in caught.value.why
    assert "No importer registered for op: Relu" in caught.value.why
    (log,) = (tmp_path / "logs").glob("trt-*.log")
    assert str(log) in caught.value.next
    assert "ModelImporter" in log.read_text()
    assert not list((tmp_path / "cache").glob("*/model.plan"))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 9 bytes.)", OutOfMemoryError),
        ("Cuda Runtime (out of memory)", OutOfMemoryError),
        ("Error Code 10: Internal Error (no implementation for node /conv_7)", BackendError),
    ],
)
def test_a_failed_build_says_what_tensorrt_said(
    words: str, error: type[BackendError], world: gpu_double.World, tiny_bundle: Bundle
) -> None:
    world.build_error = words
    with pytest.raises(error) as caught:
        compiled(tiny_bundle)
    assert type(caught.value) is error
    assert words in caught.value.why
    assert SMALL_PART in caught.value.what


def test_weights_that_do_not_fit_the_gpu_are_out_of_memory(
    world: gpu_double.World, tiny_bundle: Bundle
) -> None:
    backend = parse_backend("trt")
    artifact = backend.compile(tiny_bundle, SMALL_PART, shapes(tiny_bundle))
    world.gpu = gpu_double.Gpu(world.gpu.name, (9, 0), (13, 0), 10)
    with pytest.raises(OutOfMemoryError):
        backend.load(tiny_bundle, artifact)
    assert world.builds == 1  # not taken for a stale plan


def test_a_plan_of_another_gpu_is_built_again(
    world: gpu_double.World, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = parse_backend("trt")
    artifact = backend.compile(tiny_bundle, SMALL_PART, shapes(tiny_bundle))
    assert artifact.path is not None
    plan = artifact.path / "model.plan"
    record = json.loads((artifact.path / "entry.json").read_text())
    # The cache's key names GPU and version, so only a copied cache has such a plan: make one.
    foreign = plan.read_bytes().replace(b"Test Double 9000", b"Test Double 1000")
    plan.write_bytes(foreign)
    record["files"]["model.plan"]["sha256"] = hashlib.sha256(foreign).hexdigest()
    (artifact.path / "entry.json").write_text(json.dumps(record))
    with backend.load(tiny_bundle, artifact) as session:
        assert session.run(latents())["sample"].isfinite().all()
    assert world.builds == 2
    assert "not compatible" in capsys.readouterr().err
    again = backend.compile(tiny_bundle, SMALL_PART, shapes(tiny_bundle))
    assert again.cached


def test_a_damaged_plan_is_built_again(world: gpu_double.World, tiny_bundle: Bundle) -> None:
    folder = compiled(tiny_bundle)
    plan = folder / "model.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    compiled(tiny_bundle)
    assert world.builds == 2


def test_two_builds_of_one_plan_are_one(world: gpu_double.World, tiny_bundle: Bundle) -> None:
    done: list[Path] = []
    threads = [
        threading.Thread(target=lambda: done.append(compiled(tiny_bundle))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(done)) == 1
    assert len(done) == 3
    assert world.builds == 1


@pytest.mark.parametrize("text", ["batch=4-1", "batch=0-2", "batch=many", "workspace=0"])
def test_bad_options_are_refused_before_work(text: str) -> None:
    with pytest.raises(PreconditionError, match="next:"):
        parse_backend(f"trt:{text}")


def test_attention_as_an_operator_needs_its_release(
    world: gpu_double.World, tiny_bundle: Bundle
) -> None:
    double.set_version("10.13.3.9")
    with pytest.raises(PreconditionError, match=r"needs TensorRT 10\.14"):
        compiled(tiny_bundle, "trt:attention=op", "text_encoder")
    assert parse_backend("trt:attention=matmul").profile("unet").attention == "matmul"
