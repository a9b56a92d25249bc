"""The bundle's folder: opened, verified, doctored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from folders import edit_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.cli import run
from core.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, AddbenchError, PreconditionError
from core.files import ROOT
from export.__main__ import main
from export.bundle import Bundle, References, find_bundle, write_references
from export.models import find_model


@pytest.fixture
def copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that the test may change."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))


def test_the_manifest_says_what_the_bundle_is(tiny_bundle: Bundle) -> None:
    assert (tiny_bundle.name, tiny_bundle.weights, tiny_bundle.dtype) == (
        "tiny-sdxl",
        "random",
        "fp16",
    )
    assert tiny_bundle.size == (64, 64)
    assert (tiny_bundle.vae_scale, tiny_bundle.latent_channels, tiny_bundle.pooled) == (8, 4, True)
    assert (tiny_bundle.steps, tiny_bundle.guidance) == (1, 0.0)
    assert tiny_bundle.licence
    manifest = tiny_bundle.manifest
    assert manifest["opset"] == 23
    assert manifest["source"]["kind"] == "random"
    assert manifest["source"]["seed"] == 0
    assert {"torch", "diffusers", "transformers", "onnx", "python"} <= manifest["versions"].keys()
    total = sum(info.weight_bytes for info in tiny_bundle.parts.values())
    assert total < 4_000_000
    for info in tiny_bundle.parts.values():
        assert info.graph.is_file()
        assert info.data is not None
        assert info.data.stat().st_size <= info.weight_bytes


def test_what_a_pipeline_needs_comes_out_of_it(tiny_bundle: Bundle) -> None:
    scheduler = tiny_bundle.scheduler()
    assert type(scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999.0]
    assert tiny_bundle.scheduler() is not scheduler
    ids = [tokenizer("a red circle")["input_ids"] for tokenizer in tiny_bundle.tokenizers()]
    assert ids[0] == ids[1]
    checkpoint = tiny_bundle.checkpoint()
    assert checkpoint.source == tiny_bundle.manifest["source"]
    assert checkpoint.model == tiny_bundle.model


def test_a_copy_is_the_same_bundle(tiny_bundle: Bundle, copy: Path) -> None:
    moved = Bundle.open(copy)
    assert moved.hash == tiny_bundle.hash
    assert moved.verify() == []
    assert find_bundle(str(copy)).path == copy


def test_weights_by_path_or_id_find_what_export_called_them(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    for kind, weights in (("folder", str(copy)), ("hub", "org/name@main")):
        target = tmp_path / f"tiny-sdxl-{kind}-fp16"
        target.symlink_to(copy)
        assert find_bundle("tiny-sdxl", weights).path == target


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12, deadline=None
)
@given(data=st.data())
def test_one_flipped_bit_is_found(copy: Path, data: st.DataObject) -> None:
    bundle = Bundle.open(copy)
    name = data.draw(st.sampled_from(sorted(bundle.manifest["files"])))
    content = bytearray((copy / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    before = (copy / name).read_bytes()
    (copy / name).write_bytes(content)
    problems = bundle.verify()
    (copy / name).write_bytes(before)
    assert [problem for problem in problems if problem.startswith(f"{name}:")]
    assert bundle.verify() == []


def test_verify_is_a_command(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, ["verify", str(copy)]) == EXIT_OK
    data = copy / "unet" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    assert run(main, ["verify", str(copy)]) == EXIT_FAILED
    assert "unet/model.onnx.data" in capsys.readouterr().out
    assert run(main, ["verify", str(copy.parent)]) == EXIT_USAGE


def _remove(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_remove, _cut])
@pytest.mark.parametrize(
    "name", ["unet/model.onnx", "unet/model.onnx.data", "tokenizer/vocab.json"]
)
def test_a_bundle_that_is_not_whole_is_refused(copy: Path, name: str, damage: object) -> None:
    assert callable(damage)
    damage(copy / name)
    with pytest.raises(PreconditionError, match=name) as caught:
        Bundle.open(copy)
    assert "--force" in caught.value.next


def test_a_foreign_or_torn_manifest_is_told(copy: Path) -> None:
    edit_json(copy / "manifest.json", schema=99)
    with pytest.raises(PreconditionError, match="schema 99"):
        Bundle.open(copy)
    (copy / "manifest.json").write_text('{"schema": 1, "mod')
    with pytest.raises(PreconditionError, match=r"manifest\.json"):
        Bundle.open(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(PreconditionError, match="not a bundle"):
        Bundle.open(copy)


@pytest.mark.parametrize("location", ["/etc/passwd", "../../secret", "a/../../b"])
def test_weights_outside_the_bundle_are_refused(copy: Path, location: str) -> None:
    graph = copy / "taesd_decoder" / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = location
    graph.write_bytes(model.SerializeToString())
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["taesd_decoder/model.onnx"]["bytes"] = graph.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PreconditionError, match="outside it"):
        Bundle.open(copy)


def test_weights_behind_a_link_are_refused(copy: Path, tmp_path: Path) -> None:
    data = copy / "unet" / "model.onnx.data"
    shutil.move(data, tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PreconditionError, match="link"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_that_points_outside_is_refused(copy: Path, name: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PreconditionError, match="outside it"):
        Bundle.open(copy)


def test_reference_images_come_back_as_they_were(copy: Path) -> None:
    shutil.rmtree(copy / "reference", ignore_errors=True)
    bundle = Bundle.open(copy)
    assert bundle.references() is None
    generator = np.random.default_rng(0)
    images = {
        (decoder, steps): generator.integers(0, 256, (64, 48, 3), dtype=np.uint8)
        for decoder in ("vae", "taesd")
        for steps in (1, 2, 4)
    }
    plain = References(0, "an origami pig", images)
    write_references(bundle, plain)
    read = Bundle.open(copy).references()
    assert read is not None
    assert (read.redrawn, read.redraw_prompt) == ({}, ""), "as bundles of before have it"
    assert np.array_equal(read.picture, images["vae", 4])
    redrawn = {("taesd", 4, "vae", 2): images["vae", 1], ("vae", 2, "taesd", 1): images["vae", 2]}
    write_references(bundle, replace(plain, redraw_prompt="a goat", redrawn=redrawn))
    read = Bundle.open(copy).references()
    assert read is not None
    assert (read.prompt, read.seed, read.redraw_prompt) == ("an origami pig", 0, "a goat")
    for mine, theirs in ((images, read.images), (redrawn, read.redrawn)):
        assert theirs.keys() == mine.keys()
        assert all(np.array_equal(theirs[key], mine[key]) for key in mine)
    assert bundle.verify() == []
    file = copy / "reference" / "vae-1.png"
    file.write_bytes(file.read_bytes()[:-4] + b"....")
    with pytest.raises(AddbenchError, match=r"vae-1\.png"):
        Bundle.open(copy).references()
    assert bundle.verify()


def test_names_are_looked_up_in_the_build_folder(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    with pytest.raises(PreconditionError) as caught:
        find_bundle("tiny-sdxl")
    assert caught.value.next.startswith("addbench export --model tiny-sdxl --weights random")
    with pytest.raises(PreconditionError) as caught:
        find_bundle("sdxl-turbo", dtype="fp32")
    assert caught.value.next == "addbench export --model sdxl-turbo --weights hub --dtype fp32"
    for name in ("tiny-sdxl-random-fp32", "tiny-sdxl-random-fp16", "tiny-sdxl-folder-fp32"):
        shutil.copytree(copy, tmp_path / "build" / name)
    assert find_bundle("tiny-sdxl").path.name == "tiny-sdxl-folder-fp32"
    assert run(main, ["verify", "tiny-sdxl"]) == EXIT_OK
    assert find_bundle("tiny-sdxl", weights="random").path.name == "tiny-sdxl-random-fp16"
    assert find_bundle("tiny-sdxl", dtype="fp16").path.name == "tiny-sdxl-random-fp16"


def test_a_mistyped_model_is_not_told_to_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    with pytest.raises(PreconditionError) as caught:
        find_bundle("shapes-trubo")
    assert "no model is called 'shapes-trubo'" in caught.value.why
    assert "did you mean shapes-turbo?" in caught.value.next
    assert "shapes-trubo" not in caught.value.next
    with pytest.raises(PreconditionError, match=r"did you mean shapes-turbo\?"):
        find_model("shapes-trubo")
    with pytest.raises(PreconditionError) as caught:
        find_bundle("mine")
    assert "known models: shapes-turbo" in caught.value.next
    with pytest.raises(PreconditionError) as caught:
        find_bundle("sdxl-base+lcm-lora")
    assert "addbench export --model sdxl-base" in caught.value.next


def test_a_folder_that_is_not_there_is_no_folder_without_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    with pytest.raises(PreconditionError, match="there is no folder") as caught:
        Bundle.open(tmp_path / "typo")
    assert caught.value.why.endswith("build: none")
    (tmp_path / "build" / "mine-fp16").mkdir(parents=True)
    (tmp_path / "build" / "mine-fp16" / "manifest.json").write_text("{}")
    with pytest.raises(PreconditionError, match="mine-fp16"):
        Bundle.open(tmp_path / "typo")
    with pytest.raises(PreconditionError, match="it holds no manifest"):
        Bundle.open(tmp_path / "build")


def test_opening_a_bundle_imports_no_torch(tiny_bundle: Bundle) -> None:
    script = (
        "import sys, pathlib; from export.bundle import Bundle;"
        "b = Bundle.open(pathlib.Path(sys.argv[1])); b.hash, b.parts, b.model;"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tiny_bundle.path)]
    assert subprocess.run(command, cwd=ROOT, env=dict(os.environ), check=False).returncode == 0
