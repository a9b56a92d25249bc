"""Checkpoints from folders and from the hub's cache, whole and broken."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import edit_json, lay_out
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.errors import EXIT_USAGE
from core.files import ROOT
from export.models import MODELS, Model
from export.request import find_place, infer_model
from export.source.checkpoint import CheckpointError, open_checkpoint, reopen
from export.source.layout import pick_weights

TINY = MODELS["tiny-sdxl"]
ON_HUB = dataclasses.replace(TINY, checkpoint="org/tiny", taesd="org/taesd")
"""tiny-sdxl as if it had a repository: what sdxl-turbo's entry looks like."""


def test_a_folder_gives_the_weights_that_are_in_it(folder: Path) -> None:
    model = infer_model(folder)
    assert (model.name, model.size, model.scheduler) == ("my-sdxl", 64, "")
    checkpoint = open_checkpoint(model, str(folder))
    assert checkpoint.scheduler_config()["timestep_spacing"] == "trailing"
    assert checkpoint.kind == "folder"
    assert checkpoint.source["taesd"]["kind"] == "own"
    expected = open_checkpoint(TINY, "random", seed=5)
    for part in model.parts:
        loaded = checkpoint.module(part, torch.float32).state_dict()
        drawn = expected.module(part, torch.float32).state_dict()
        assert all(torch.equal(loaded[name], drawn[name]) for name in drawn)
        assert checkpoint.module(part, torch.float16).dtype == torch.float16
    assert [t.pad_token for t in checkpoint.tokenizers()] == ["<|endoftext|>", "!"]


def test_text_encoders_saved_by_older_transformers_are_read(folder: Path) -> None:
    """Published checkpoints name every tensor `text_model.*` and carry `position_ids`."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    prefixed = {"text_model." + name.removeprefix("text_model."): tensors[name] for name in tensors}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(prefixed, file, metadata={"format": "pt"})
    module = open_checkpoint(infer_model(folder), str(folder)).module("text_encoder", torch.float32)
    drawn = open_checkpoint(TINY, "random", seed=5).module("text_encoder", torch.float32)
    for name, tensor in drawn.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)


def test_autoencoders_can_be_given_as_folders(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "taesd", tmp_path / "elsewhere")
    whole = Path(shutil.copytree(folder, tmp_path / "other"))
    model = infer_model(folder)
    checkpoint = open_checkpoint(
        model, str(folder), vae=str(whole), taesd=str(tmp_path / "elsewhere")
    )
    assert checkpoint.origins["vae_decoder"].folder == whole / "vae"
    assert checkpoint.origins["taesd_decoder"].folder == tmp_path / "elsewhere"
    again = reopen(model, checkpoint.source, "fp16")
    assert again.origins == checkpoint.origins


def test_random_weights_reopen_as_the_same_numbers() -> None:
    checkpoint = open_checkpoint(TINY, "random", seed=9)
    again = reopen(TINY, checkpoint.source, "fp16")
    assert (again.source, again.origins) == (checkpoint.source, checkpoint.origins)


@pytest.mark.parametrize("name", ["text_encoder_2", "unet", "vae", "scheduler", "tokenizer"])
def test_a_missing_part_is_named(folder: Path, name: str) -> None:
    model = infer_model(folder)
    shutil.rmtree(folder / name)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model, str(folder))
    assert str(folder / name) in caught.value.what
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("keep", [0, 4, 60, 0.5, -1])
def test_a_cut_safetensors_file_is_named(folder: Path, keep: float) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match="unet/diffusion_pytorch_model.safetensors"):
        open_checkpoint(infer_model(folder), str(folder))


def test_a_git_lfs_pointer_is_told(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(infer_model(folder), str(folder))


def test_a_torn_config_is_told(folder: Path) -> None:
    model = infer_model(folder)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"unet/config\.json"):
        open_checkpoint(model, str(folder))


def test_missing_tensors_are_told_and_not_made_up(folder: Path) -> None:
    for name, file in (
        ("text_encoder", folder / "text_encoder" / "model.safetensors"),
        ("unet", folder / "unet" / "diffusion_pytorch_model.safetensors"),
    ):
        tensors = load_file(file)
        tensors.pop(sorted(tensors)[-1])
        save_file(tensors, file, metadata={"format": "pt"})
        checkpoint = open_checkpoint(infer_model(folder), str(folder))
        with pytest.raises(CheckpointError, match="missing|lacks"):
            checkpoint.module(name, torch.float32)


def test_tensors_of_another_shape_are_told(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", cross_attention_dim=64)
    checkpoint = open_checkpoint(infer_model(folder), str(folder))
    with pytest.raises(CheckpointError, match="unet"):
        checkpoint.module("unet", torch.float32)


@pytest.mark.parametrize("value", [float("nan"), 7e4])
def test_weights_that_fp16_cannot_hold_are_told(folder: Path, value: float) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"][0, 0, 0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(infer_model(folder), str(folder))
    with pytest.raises(CheckpointError, match=r"conv_in\.weight"):
        checkpoint.module("unet", torch.float16)


def test_a_pickle_is_refused_unless_asked_for(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    model = infer_model(folder)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(model, str(folder))
    checkpoint = open_checkpoint(model, str(folder), allow_pickle=True)
    weights = checkpoint.module("unet", torch.float32).state_dict()
    drawn = open_checkpoint(TINY, "random", seed=5).module("unet", torch.float32).state_dict()
    assert all(torch.equal(weights[name], drawn[name]) for name in drawn)
    assert reopen(model, checkpoint.source, "fp16").origins == checkpoint.origins


def test_shards_are_read_and_a_missing_one_is_told(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    module.save_pretrained(folder / "unet", max_shard_size="500KB")
    checkpoint = open_checkpoint(infer_model(folder), str(folder))
    loaded = checkpoint.module("unet", torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in module.state_dict().items())
    next((folder / "unet").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="download the checkpoint again"):
        open_checkpoint(infer_model(folder), str(folder))


def test_the_hub_cache_serves_without_network(hub_cache: Path) -> None:
    checkpoint = open_checkpoint(ON_HUB, "hub")
    assert (checkpoint.kind, checkpoint.source["revision"]) == ("hub", "1" * 40)
    assert checkpoint.source["taesd"] == {
        "kind": "hub", "id": "org/taesd", "revision": "2" * 40, "path": None, "file": None,
    }  # fmt: skip
    stored = checkpoint.origins["unet"].stored
    assert stored is not None
    assert stored.files == ("diffusion_pytorch_model.fp16.safetensors",)
    assert checkpoint.module("unet", torch.float16).dtype == torch.float16
    again = reopen(ON_HUB, checkpoint.source, "fp16")
    assert again.origins == checkpoint.origins
    plain = open_checkpoint(ON_HUB, "org/tiny", dtype="fp32").origins["unet"].stored
    assert plain is not None
    assert plain.variant is None


def test_a_pinned_revision_stays_when_main_moves_on(hub_cache: Path, folder: Path) -> None:
    source = open_checkpoint(ON_HUB, "hub").source
    lay_out(hub_cache, "org/next", folder, "3" * 40)
    shutil.move(
        hub_cache / "models--org--next" / "snapshots" / ("3" * 40),
        hub_cache / "models--org--tiny" / "snapshots",
    )
    (hub_cache / "models--org--tiny" / "refs" / "main").write_text("3" * 40)
    assert open_checkpoint(ON_HUB, "hub").source["revision"] == "3" * 40
    assert reopen(ON_HUB, source, "fp16").source["revision"] == "1" * 40
    with_revision = open_checkpoint(ON_HUB, f"org/tiny@{'1' * 40}")
    assert with_revision.source["revision"] == "1" * 40


def test_a_pinned_commit_is_not_asked_for(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    opened = open_checkpoint(ON_HUB, f"org/tiny@{'1' * 40}", taesd=f"org/taesd@{'2' * 40}")
    assert opened.source["revision"] == "1" * 40
    again = reopen(ON_HUB, opened.source, "fp16")
    assert again.origins == opened.origins


def test_one_failed_connection_is_enough(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    calls: list[object] = []

    def unreachable(*_: object, **named: object) -> None:
        calls.append(named)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    opened = open_checkpoint(ON_HUB, "hub")
    assert (opened.source["revision"], len(calls)) == ("1" * 40, 1)
    assert capsys.readouterr().err.count("no route to host") == 1


def test_the_fp16_safe_vae_replaces_one_that_needs_upcasting(hub_cache: Path) -> None:
    root = hub_cache / "models--org--tiny" / "snapshots" / ("1" * 40)
    lay_out(hub_cache, "org/safe", root / "vae", "4" * 40)
    model = dataclasses.replace(ON_HUB, vae="org/safe")
    assert open_checkpoint(model, "hub").source["vae"]["kind"] == "own"
    edit_json(root / "vae" / "config.json", force_upcast=True)
    assert open_checkpoint(model, "hub").source["vae"]["id"] == "org/safe"
    own = open_checkpoint(model, "hub", vae=str(root / "vae"))
    assert own.origins["vae_decoder"].folder == root / "vae"


def test_a_folder_without_taesd_takes_the_models_or_names_the_flag(
    hub_cache: Path, folder: Path
) -> None:
    model = dataclasses.replace(infer_model(folder), taesd="org/taesd")
    assert open_checkpoint(model, str(folder)).source["taesd"]["id"] == "org/taesd"
    gone = dataclasses.replace(model, taesd="org/gone")
    without = open_checkpoint(gone, str(folder))
    assert "taesd_decoder" not in without.parts
    assert "--taesd PATH would add one" in without.notes[0]
    assert reopen(gone, without.source, "fp16").parts == without.parts
    with pytest.raises(CheckpointError, match="--taesd PATH"):
        open_checkpoint(gone, str(folder), taesd="org/gone")


@pytest.mark.parametrize("network", ["offline", "unreachable"])
def test_without_network_and_cache_the_command_names_three_ways(
    tmp_path: Path, network: str
) -> None:
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "ADDBENCH_BUILD": str(tmp_path)}
    env |= (
        {"HF_HUB_OFFLINE": "1"} if network == "offline" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    )
    command = [sys.executable, "-m", "export", "--model", "sdxl-turbo"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_USAGE
    assert "stabilityai/sdxl-turbo cannot be had" in done.stderr
    for way in ("--weights PATH", "hf auth login", "--weights random"):
        assert way in done.stderr
    assert not list(tmp_path.glob("sdxl-turbo*"))


@pytest.mark.parametrize("text", ["no-such-name", "./nowhere", "/no/such/folder", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_told(text: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find_place(text, "--weights")


def test_a_file_that_holds_no_weights_is_not_said_to_be_missing(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("words")
    with pytest.raises(CheckpointError, match="this file is not read"):
        find_place(str(file), "--weights", files=True)


def test_a_folder_that_is_no_sdxl_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint in diffusers format"):
        infer_model(tmp_path)
    edit_json(folder / "unet" / "config.json", addition_embed_type=None)
    with pytest.raises(CheckpointError, match="SDXL form"):
        infer_model(folder)


def test_a_model_without_a_repository_says_so() -> None:
    with pytest.raises(CheckpointError, match="--weights random"):
        open_checkpoint(TINY, "hub")


@given(st.sets(st.sampled_from(["", ".fp16"])), st.booleans(), st.sampled_from(["fp16", "fp32"]))
def test_the_variant_asked_for_comes_first(variants: set[str], noise: bool, prefer: str) -> None:
    names = [f"model{variant}.safetensors" for variant in variants]
    names += ["model.onnx", "pytorch_model.bin", "other.safetensors"] if noise else []
    stored = pick_weights(names, "model", prefer, pickle=False)
    if not variants:
        assert stored is None
        return
    assert stored is not None
    wanted = {"fp16": ".fp16", "fp32": ""}[prefer]
    infix = wanted if wanted in variants else variants.copy().pop()
    assert stored.files == (f"model{infix}.safetensors",)


def test_every_entry_has_its_architecture_on_disk() -> None:
    def has_all(model: Model) -> bool:
        checkpoint = open_checkpoint(model, "random")
        return all(checkpoint.config(part) for part in model.parts)

    assert all(has_all(model) for model in MODELS.values())
