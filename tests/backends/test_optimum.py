"""optimum's pipeline: what is refused, what is handed over, how it is timed; once, the real one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backends import optimum
from backends.artifacts.child import HOME_PYTHON
from backends.base import Artifact, Shapes, UnavailableError, UnsupportedError
from backends.pipeline.recipe import Recipe
from backends.registry import parse_backend
from bench.rows.store import open_run
from bench.sweep import main as sweep
from core.errors import PreconditionError
from export.bundle import Bundle
from export.source.checkpoint import tokenizer_names

usable = parse_backend("optimum").probe().usable


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in optimum's environment: a double of it with packages by name only."""
    site = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
    for name, version in {"optimum_onnx": "0.1.0", "transformers": "4.57.6"}.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: {version}\n")
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    monkeypatch.setenv("ADDBENCH_OPTIMUM", str(tmp_path / "env"))
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    monkeypatch.setattr(optimum, "installed", optimum.packages(tmp_path / "env").get)


def test_without_its_environment_the_probe_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADDBENCH_OPTIMUM", str(tmp_path))
    with pytest.raises(UnavailableError, match="environment is not there") as error:
        parse_backend("optimum").probe().require("optimum")
    assert error.value.next == "make env-optimum"


def test_versions_are_those_of_its_environment(inside: None) -> None:
    backend = parse_backend("optimum")
    assert backend.probe().version == "0.1.0"
    assert backend.fingerprint()["transformers"] == "4.57.6"
    assert backend.interpreter == optimum.environment() / "bin" / "python"


def test_in_the_projects_environment_it_is_refused_with_the_way(
    inside: None, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimum, "installed", lambda _: None)
    with pytest.raises(UnsupportedError, match="not run in this environment") as error:
        parse_backend("optimum").pipeline(tiny_bundle, "vae", Shapes(1, 64, 64))
    assert "addbench sweep --backend optimum" in error.value.next


@pytest.mark.parametrize(
    ("decoder", "mode", "words"),
    [
        ("taesd", "none", "use --decoder vae"),
        ("vae", "calls", "use --guidance-mode batch"),
        ("vae", "embedding", "use --guidance-mode batch"),
    ],
)
def test_what_its_pipeline_does_not_do_is_refused(
    inside: None, tiny_bundle: Bundle, decoder: str, mode: str, words: str
) -> None:
    recipe = Recipe(tiny_bundle.scheduler_name, 2.0, mode)
    with pytest.raises(UnsupportedError) as error:
        parse_backend("optimum").pipeline(tiny_bundle, decoder, Shapes(1, 64, 64), recipe=recipe)
    assert error.value.next == words


def test_an_export_that_does_not_fit_is_refused_before_it_starts(
    inside: None, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME_PYTHON, "python")
    monkeypatch.setattr(optimum, "run_child", lambda *_, **__: pytest.fail("it has started"))
    monkeypatch.setattr(optimum, "IMPORTS_BYTES", 10**15)
    with pytest.raises(PreconditionError, match=r"1000000.0 GB of memory") as error:
        parse_backend("optimum").compile(tiny_bundle, "unet", Shapes(1, 64, 64))
    assert "--model shapes-turbo" in error.value.next


def test_an_export_from_its_own_environment_names_the_one_that_can(
    inside: None, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(HOME_PYTHON, raising=False)
    with pytest.raises(PreconditionError, match="not exported by optimum yet") as error:
        parse_backend("optimum").compile(tiny_bundle, "unet", Shapes(1, 64, 64))
    assert "addbench compile --backend optimum" in error.value.next


def test_the_checkpoint_holds_the_weights_under_the_names_that_older_packages_know(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    optimum.write_checkpoint(tiny_bundle, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    for name in index:
        assert name.startswith(("_", "force")) or (tmp_path / name).is_dir(), name
    assert set(tokenizer_names(tiny_bundle.model)) < set(index)
    for part in ("text_encoder", "text_encoder_2", "unet"):
        module = tiny_bundle.checkpoint().module(part, torch.float32)
        (file,) = (tmp_path / part).glob("*.safetensors")
        stored = load_file(file)
        expected = module.state_dict()
        assert len(stored) == len(expected)
        for name, tensor in expected.items():
            known = [n for n in (name, f"text_model.{name}") if n in stored]
            assert len(known) == 1, name
            assert torch.equal(stored[known[0]].float(), tensor), name
        if part.startswith("text"):
            assert {name.split(".")[0] for name in stored} <= {"text_model", "text_projection"}


class Double:
    """A stand-in for optimum's pipeline: calls its parts in order and draws what it is given."""

    def __init__(self, guided: bool) -> None:
        self.copies = 2 if guided else 1
        self.unet = SimpleNamespace(forward=lambda sample, *_: (sample,))
        self.vae = SimpleNamespace(decode=lambda latents: latents)
        self.calls: list[Mapping[str, Any]] = []

    def encode_prompt(self, prompt: list[str]) -> int:
        return len(prompt)

    def __call__(self, **given: Any) -> Any:
        self.calls.append(given)
        count = self.encode_prompt(given["prompt"])
        noise = torch.cat([torch.randn(1, 3, 8, 8, generator=g) for g in given["generator"]])
        for _ in range(given["num_inference_steps"]):
            self.unet.forward(torch.cat([noise] * self.copies), 0)
        assert len(noise) == count
        return SimpleNamespace(images=self.vae.decode(noise).sigmoid())


@pytest.mark.parametrize(("mode", "each"), [("none", 1), ("batch", 2)])
def test_stages_and_evaluations_are_counted_around_its_own_methods(
    inside: None, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, mode: str, each: int
) -> None:
    artifact = Artifact("optimum", "pipeline", "key", Path("."), 1.5, False)
    monkeypatch.setattr(optimum.OptimumBackend, "compile", lambda *_: artifact)
    double = Double(guided=each == 2)
    monkeypatch.setattr(optimum.OptimumPipeline, "_open", lambda *_: double)
    recipe = Recipe(tiny_bundle.scheduler_name, 2.0 if each == 2 else 0.0, mode)
    backend = parse_backend("optimum")
    with backend.pipeline(tiny_bundle, "vae", Shapes(2, 64, 64), recipe=recipe) as pipeline:
        out = pipeline(["a", "b"], steps=3, seed=[7, 8])
        again = pipeline(["a", "b"], steps=3, seed=[7, 9])
        assert (pipeline.compile_s, pipeline.compile_cached) == (1.5, False)
    assert out.images.shape == (2, 8, 8, 3)
    assert (out.images[0] == again.images[0]).all(), "a generator for each image"
    assert (out.images[1] != again.images[1]).any()
    assert (out.nfe, len(out.timings.unet)) == (3 * each, 3)
    times = out.timings
    assert times.text + sum(times.unet) + times.decode + times.rest == pytest.approx(times.total)
    assert min(times.text, *times.unet, times.decode, times.rest) > 0
    given = double.calls[0]
    assert (given["width"], given["height"], given["guidance_scale"]) == (64, 64, recipe.guidance)


@pytest.mark.slow
@pytest.mark.skipif(not usable, reason="make env-optimum has not been run")
@pytest.mark.parametrize("model", ["tiny_bundle", "shapes_bundle"])  # the second has no vocab.json
def test_the_real_one_draws_the_reference_in_its_environment(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle: Bundle = request.getfixturevalue(model)
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    flags = ["--backend", "optimum", "--decoder", "vae", "--steps", "1,2", "--quick"]
    assert sweep(["--model", str(bundle.path), "--out", str(tmp_path), *flags]) == 0
    rows = open_run("latest", tmp_path).rows()
    assert [row["image_check"]["status"] for row in rows] == ["ok", "ok"]
    assert [row["nfe"] for row in rows] == [1, 2]
    for row in rows:
        assert row["versions"]["transformers"] < "4.58"
        assert row["load_s"] > 0
        assert row["compile_s"] > 0
        assert 300 < row["compile_peak_mb"] < 5000
        assert row["peak_memory_mb"] > 100
        assert all(row["stages_ms"][stage] for stage in ("text", "unet_first", "decode"))
