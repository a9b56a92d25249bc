"""Cloud AI 100 end to end on the SDK stand-in: bundle, compile, run, images; and what goes wrong.

The stand-in computes on the CPU: it shows that everything is put together rightly, and says nothing
of a card.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from backends.__main__ import main
from backends.artifacts.cache import ENTRY
from backends.base import (
    BackendError,
    OutOfMemoryError,
    PreconditionError,
    Shapes,
    UnavailableError,
    UnsupportedError,
)
from backends.check.gate import gate_for, image_distance
from backends.cloud_ai import probe, runtimes
from backends.cloud_ai.compiler import FlagError
from backends.cloud_ai.session import DeviceLostError
from backends.load import load_pipeline
from backends.qaic import QaicBackend
from backends.registry import parse_backend
from bench.rows.cell import Cell
from bench.run.measure import StopRule, inputs_of_call
from bench.worker import Reporter, Worker
from core.files import build_root, read_json, sha256_file, write_json
from export.bundle import Bundle
from tests.doubles.cloud_ai_sdk_standin import NEW, OLD, ULTRA, make_sdk, python_modules, set_state

ORT_SESSION = onnxruntime.InferenceSession
PROMPTS = ["a small red circle", "a large blue star", "an origami pig", "a fox in the snow"]
FRESH = ("qaic", "qaicrt", "QAicApi_pb2", "standin_engine")
SMALL = "taesd_decoder"
"""The part that the failures are tried on: it is compiled and loaded in the least time."""


@pytest.fixture(scope="module")
def home(wanted: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stand-in's SDK below `home`/sdk, and a build folder that the module shares.

    `wanted` comes first: its compiles are in the cache that all tests share.
    """
    folder = tmp_path_factory.mktemp("qaic")
    make_sdk(folder / "sdk", OLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(probe.ROOT_VARIABLE, str(folder / "sdk"))
        patch.setenv("ADDBENCH_BUILD", str(folder / "build"))
        patch.syspath_prepend(str(python_modules(folder / "sdk")))
        yield folder
    for name in FRESH:
        sys.modules.pop(name, None)


@pytest.fixture
def sdk(home: Path) -> Iterator[Path]:
    """The SDK's folder, its state as it was when the test is over."""
    state = read_json(home / "sdk" / "standin.json")
    yield home / "sdk"
    write_json(home / "sdk" / "standin.json", state)
    for name in FRESH:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def wanted(tiny_bundle: Bundle) -> dict[str, Any]:
    """The CPU backend's images of PROMPTS, by decoder."""
    found = {}
    for decoder in ("vae", "taesd"):
        with load_pipeline(str(tiny_bundle.path), "ort:threads=1", decoder) as pipeline:
            found[decoder] = pipeline(PROMPTS, steps=2, seed=5).images
    return found


def compiled(bundle: Bundle, options: str = "", part: str = SMALL, batch: int = 1) -> Path:
    backend = parse_backend(f"qaic:{options}" if options else "qaic")
    artifact = backend.compile(bundle, part, Shapes(batch, *bundle.size))
    assert artifact.path is not None
    return artifact.path


def close(images: Any, others: Any) -> None:
    gate = gate_for("fp16", "fp16", "hub")
    for one, other in zip(images, others, strict=True):
        assert image_distance(one, other).passes(gate)


# --- it works


@pytest.mark.parametrize("decoder", ["taesd", "vae"])
def test_an_ultra_draws_what_the_cpu_draws(
    decoder: str, sdk: Path, tiny_bundle: Bundle, wanted: dict[str, Any]
) -> None:
    with load_pipeline(str(tiny_bundle.path), "qaic:device=0-3", decoder) as pipeline:
        out = pipeline(PROMPTS, steps=2, seed=5)
        close(out.images, wanted[decoder])
        assert out.nfe == 2 == len(out.timings.unet)
        times = out.timings
        assert times.text + sum(times.unet) + times.decode + times.rest == pytest.approx(
            times.total
        )
        devices = [set(lane.devices.values()) for lane in pipeline.lanes]
        assert devices == [{0}, {1}, {2}, {3}]
        alone = pipeline(PROMPTS[:1], steps=2, seed=5)
        assert np.array_equal(alone.images[0], out.images[0])
        many = pipeline(PROMPTS + PROMPTS[:1], steps=2, seed=5)
        assert np.array_equal(many.images[:4], out.images)
        # A timestep's buffer keeps FP32, activations travel in FP16.
        specs = pipeline.session("unet").inputs
        assert specs["sample"].dtype == "float16"
        assert specs["timestep"].dtype == "float32"
        assert specs["sample"].shape[0] == 1
        if decoder == "taesd":
            period = pipeline.period_s(lambda n: inputs_of_call(n, 4), steps=1, seconds=0.1)
            assert 0 < period < 60


@pytest.mark.parametrize(("split", "count"), [("parts", 4), ("batch", 1)])
def test_other_splits_draw_the_same(
    split: str, count: int, sdk: Path, tiny_bundle: Bundle, wanted: dict[str, Any]
) -> None:
    text = f"qaic:device=0-3,split={split}"
    with load_pipeline(str(tiny_bundle.path), text, "taesd", batch=2) as pipeline:
        images = pipeline(PROMPTS[:2], steps=2, seed=5).images
        close(images, wanted["taesd"][:2])
        assert len(set(pipeline.lanes[0].devices.values())) == count
        assert pipeline.period_s(lambda n: inputs_of_call(n, 2), steps=1, seconds=0.1) > 0
        with pytest.raises(UnsupportedError, match="compiled for a batch of 2"):
            pipeline(PROMPTS[:3], steps=1)


def test_the_low_level_runtime_gives_cores_from_program_to_program(
    sdk: Path, tiny_bundle: Bundle, wanted: dict[str, Any]
) -> None:
    with load_pipeline(str(tiny_bundle.path), "qaic:runtime=qaicrt", "taesd") as pipeline:
        images = pipeline(PROMPTS[:1], steps=2, seed=5).images
        close(images, wanted["taesd"][:1])
        active = runtimes.QaicrtRuntime.active[0]
        assert len(active) == 1, "16 cores: one program of 16 at a time"
    assert not runtimes.QaicrtRuntime.active[0]


class CpuForQaicEp:
    """SDK stand-in (a test double) of an onnxruntime that has the QAic provider."""

    def __init__(self, model: str, providers: list[tuple[str, dict[str, str]]]) -> None:
        ((name, options),) = providers
        assert name == "QAicExecutionProvider"
        pairs = (line.split(": ") for line in Path(options["config"]).read_text().splitlines())
        self.settings = dict(pairs)
        assert (Path(self.settings["aic-binary-dir"]) / "programqpc.bin").is_file()
        assert self.settings["device-id"] == options["aic_device_id"] == "2"
        assert self.settings["onnx-define-symbol"] == "batch,1"
        self.session = ORT_SESSION(model, providers=["CPUExecutionProvider"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def test_onnx_runtimes_provider_runs_the_compiled_program(
    sdk: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).half()
    with load(tiny_bundle) as session:
        expected = session.run({"latent_sample": latents})["sample"]
    backend = parse_backend("qaic:runtime=ep,device=2")
    artifact = backend.compile(tiny_bundle, SMALL, Shapes(1, *tiny_bundle.size))
    with pytest.raises(UnavailableError, match="no QAicExecutionProvider"):
        backend.load(tiny_bundle, artifact)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["QAicExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", CpuForQaicEp)
    with backend.load(tiny_bundle, artifact) as session:
        assert session.inputs["latent_sample"].dtype == "float32", "buffers of the graph's type"
        found = session.run({"latent_sample": latents.float()})["sample"]
    torch.testing.assert_close(found.half(), expected)


@pytest.mark.parametrize(("devices", "busy"), [("0-1", True), ("0", False)])
def test_a_row_has_the_period_beside_the_latency(
    devices: str, busy: bool, sdk: Path, tiny_bundle: Bundle
) -> None:
    made = Cell("tiny-sdxl", "random", "qaic", f"device={devices}", f"qaic:{devices}", "fp16",
                "fp16", "64x64", 2, "taesd", 1, tiny_bundle.scheduler_name)  # fmt: skip
    backend = parse_backend(made.backend_text)
    assert backend.device == made.device
    rule = StopRule(min_samples=3, min_time=0.05, warmup=0)
    worker = Worker(tiny_bundle, backend, [made], rule)
    worker.load()
    row = worker.run(0, Reporter(io.StringIO()))
    worker.pipe.close()
    assert row["status"] == "ok", row["error"]
    assert row["image_check"]["status"] == "ok"
    assert (row["period_ms"] is not None) == busy
    assert row["median_ms"] > 0


def test_the_command_says_presets_and_estimates(
    sdk: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compile", "--backend", "qaic", "--model", str(tiny_bundle.path)]
    assert main([*words, "--decoder", "taesd"]) == 0
    said = capsys.readouterr().out
    assert said.count("compiler-estimate: ") == 4
    of_another = "self-attention in blocks of 256 queries; the recipe is for SDXL-Turbo at 512 px"
    assert f"preset: derived ({of_another})" in said


def test_what_the_compiler_said_is_kept_beside_the_program(sdk: Path, tiny_bundle: Bundle) -> None:
    folder = compiled(tiny_bundle)
    record = read_json(folder / "compile.json")
    assert record["exit_code"] == 0
    assert record["compiler"] == "qaic-exec"
    assert record["compiler_version"] == OLD
    assert "-onnx-define-symbol=batch,1" in record["arguments"]
    assert "-m=model.onnx" in record["arguments"], "no folder of this machine"
    assert record["preset"]["follows"] == "derived"
    estimate = record["estimate"]
    assert estimate["provenance"] == "compiler-estimate"
    assert estimate["macs"] == 1000 * round(1e6 * estimate["constants_mb"])
    assert set(estimate["ddr_read_mb"]) == {"total", *(f"c{core:02}" for core in range(16))}
    assert "SDK stand-in qaic-exec" in (folder / "compiler.log").read_text()
    assert sorted(path.name for path in folder.iterdir()) == [
        "compile.json", "compiler.log", "entry.json", "qpc",
    ]  # fmt: skip


def test_the_cache_knows_arguments_batch_and_compiler(
    sdk: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(tiny_bundle)
    assert compiled(tiny_bundle) == first
    assert compiled(tiny_bundle, "device=3,split=parts") == first, "where it runs is no matter"
    others = [
        compiled(tiny_bundle, batch=2),
        compiled(tiny_bundle, "cores=2"),
        compiled(tiny_bundle, "buffers=fp32"),
    ]
    monkeypatch.setenv(probe.ROOT_VARIABLE, str(make_sdk(tmp_path / "newer", NEW)))
    others.append(compiled(tiny_bundle))
    assert len({first, *others}) == 5
    assert read_json(others[-1] / "compile.json")["compiler"] == "qaic-compile"


def test_a_cached_file_that_is_no_program_is_compiled_again(sdk: Path, tiny_bundle: Bundle) -> None:
    folder = compiled(tiny_bundle, "cores=3")
    file = folder / "qpc" / "programqpc.bin"
    file.write_bytes(b"\0" * file.stat().st_size)
    # As if it had been sealed so: size, time and hash agree, only the magic does not.
    record = read_json(folder / ENTRY)
    record["files"]["qpc/programqpc.bin"] |= {
        "mtime_ns": file.stat().st_mtime_ns,
        "sha256": sha256_file(file),
    }
    write_json(folder / ENTRY, record)
    again = compiled(tiny_bundle, "cores=3")
    assert (again / "qpc" / "programqpc.bin").read_bytes()[:4] == bytes.fromhex("7ccda100")


# --- it goes wrong


@pytest.mark.parametrize(
    ("state", "kind", "words"),
    [
        ({"unknown_flags": ["-aic-num-cores"]}, FlagError, "does not know -aic-num-cores"),
        ({"extra_symbol": "steps"}, BackendError, "onnx symbol 'steps' is not defined"),
        ({"compiler_dies": True}, OutOfMemoryError, "was killed"),
        ({"bad_magic": True}, BackendError, "is not a QPC"),
        ({"no_output": True}, BackendError, "no programqpc.bin"),
        ({"qpc_major": 3}, BackendError, "QPC of another version"),
    ],
    ids=["flag", "symbol", "killed", "magic", "nothing", "version"],
)
def test_a_failing_compiler_is_explained_and_its_words_are_kept(
    state: dict[str, Any], kind: type, words: str, sdk: Path, tiny_bundle: Bundle
) -> None:
    set_state(sdk, state)
    with pytest.raises(kind) as error:
        compiled(tiny_bundle, "cores=5")
    assert words in str(error.value)
    assert "all of it" in error.value.next
    (log,) = (build_root() / "logs").glob(f"qaic-*-{SMALL}-batch1.log")
    assert "exit code" in log.read_text()
    log.unlink()


def test_without_an_sdk_compiling_says_so(
    sdk: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(probe.ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(UnavailableError, match="no compiler"):
        compiled(tiny_bundle)


def test_a_host_with_the_compiler_alone_compiles_and_does_not_run(
    sdk: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(probe.ROOT_VARIABLE, str(make_sdk(tmp_path / "apps", runtime=False)))
    monkeypatch.setattr(probe, "pci_devices", lambda folder: ())
    backend = parse_backend("qaic")
    artifact = backend.compile(tiny_bundle, SMALL, Shapes(1, *tiny_bundle.size))
    assert artifact.path is not None
    with pytest.raises(UnavailableError, match="compiler only"):
        backend.load(tiny_bundle, artifact)


def load(bundle: Bundle, options: str = "") -> Any:
    backend = parse_backend(f"qaic:{options}" if options else "qaic")
    return backend.load(bundle, backend.compile(bundle, SMALL, Shapes(1, *bundle.size)))


@pytest.mark.parametrize(
    ("card", "kind", "words"),
    [
        ({"free": 2}, PreconditionError, "too few free cores"),
        ({"total": 14, "free": 14}, UnsupportedError, "does not fit device 0"),
    ],
)
def test_too_few_cores_are_noticed_before_loading(
    card: dict[str, Any], kind: type, words: str, sdk: Path, tiny_bundle: Bundle
) -> None:
    set_state(sdk, {"cards": [{"id": 0, **ULTRA, **card}]})
    with pytest.raises(kind) as error:
        load(tiny_bundle)
    assert words in str(error.value)
    assert "cores=" in error.value.next
    with load(tiny_bundle, "cores=2") as session:
        assert session.inputs


def test_a_busy_device_is_noticed_before_anything_is_compiled(
    sdk: Path, tiny_bundle: Bundle
) -> None:
    busy = {"id": 1, **ULTRA, "free": 12}
    set_state(sdk, {"cards": [{"id": 0, **ULTRA}, busy], "compiler_dies": True})
    with pytest.raises(PreconditionError, match="device 1 has too few free cores"):
        load_pipeline(str(tiny_bundle.path), "qaic:device=0-1,block=64", "taesd")


def test_a_standard_card_takes_its_own_presets(sdk: Path, tiny_bundle: Bundle) -> None:
    set_state(sdk, {"cards": [{"id": 0, **ULTRA, "sku": "PCIe", "total": 14, "free": 14}]})
    backend = parse_backend("qaic")
    assert backend.effective_options()["card"] == "standard"
    assert isinstance(backend, QaicBackend)
    assert backend.preset("unet", 1).cores == 14
    with load(tiny_bundle) as session:
        assert session.outputs["sample"].shape == (1, 3, 64, 64)


def test_a_device_that_resets_is_named_as_lost(sdk: Path, tiny_bundle: Bundle) -> None:
    set_state(sdk, {"reset_after": 1})
    latents = {"latent_sample": torch.zeros(1, 4, 8, 8, dtype=torch.float16)}
    with load(tiny_bundle) as session:
        session.run(latents)
        with pytest.raises(DeviceLostError) as error:
            session.run(latents)
    assert "device 0 was lost" in error.value.what
    assert "says Error" in error.value.why
    assert "went away" in error.value.why


@pytest.mark.parametrize("runtime", ["qaic", "qaicrt"])
def test_a_program_with_other_shapes_is_refused(
    runtime: str, sdk: Path, tiny_bundle: Bundle
) -> None:
    set_state(sdk, {"wrong_shape": "sample"})
    with pytest.raises(BackendError) as error:
        load(tiny_bundle, f"runtime={runtime},cores=7")
    assert "[1, 3, 64, 64]" in error.value.why
    assert "[1, 3, 64, 65]" in error.value.why


def test_a_batch_that_was_not_compiled_is_named(sdk: Path, tiny_bundle: Bundle) -> None:
    backend = parse_backend("qaic")
    artifact = backend.compile(tiny_bundle, SMALL, Shapes(2, *tiny_bundle.size))
    assert artifact.path is not None
    record = read_json(artifact.path / "compile.json")
    write_json(artifact.path / "compile.json", record | {"batch": 4})
    with pytest.raises(UnsupportedError) as error:
        backend.load(tiny_bundle, artifact)
    write_json(artifact.path / "compile.json", record)
    assert "batch 4 of taesd_decoder was not compiled" in error.value.what
    assert "--batch 2" in error.value.next


def test_a_vae_beyond_fp16_is_refused_until_it_is_scaled(
    sdk: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    record = read_json(tmp_path / "bundle" / "parity.json")
    record["parts"]["vae_decoder"]["largest_values"][0]["largest"] = 1e6
    write_json(tmp_path / "bundle" / "parity.json", record)
    bundle = Bundle.open(tmp_path / "bundle")
    with pytest.raises(PreconditionError) as error:
        compiled(bundle, part="vae_decoder")
    assert "1000000" in error.value.why
    assert "vae=scaled" in error.value.next
    folder = compiled(bundle, "vae=scaled", part="vae_decoder")
    assert read_json(folder / "compile.json")["profile"]["vae_divisor"] == 128


def test_another_companys_qaic_is_not_taken_for_the_sdks(
    sdk: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qaic.py").write_text("VERSION = 'an assistant'\n")
    sys.modules.pop("qaic", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnavailableError, match="not Qualcomm's"):
        load(tiny_bundle)
