"""Checkpoints as people have them: each line of docs/checkpoints.md is a test here or beside."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import edit_json
from original import original_unet, original_vae, write_single_file
from safetensors.torch import load_file, save_file
from small import PROMPT, SEED, copied, distance, opened, redraw, saved

from backends.check.oracle import Oracle
from backends.load import load_pipeline
from backends.pipeline.prompts import token_ids
from backends.pipeline.recipe import make_recipe
from core.errors import PreconditionError
from core.files import ROOT, read_json, write_json
from export.build import ExportPlan, open_all
from export.bundle import bundle_path, export_again, find_bundle
from export.models import MODELS
from export.request import infer_file, infer_model, make_request
from export.source.checkpoint import Checkpoint, CheckpointError, open_checkpoint, open_request

SD, SDXL = "tiny-sd", "tiny-sdxl"


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    return copied(SD, tmp_path / SD)


@pytest.fixture
def sdxl(tmp_path: Path) -> Path:
    return copied(SDXL, tmp_path / SDXL)


def open_folder(folder: Path, **asked: Any) -> Checkpoint:
    """Open a checkpoint, and all of it, as an export does before its first graph."""
    model = infer_model(folder)
    checkpoint = open_checkpoint(model, str(folder), dtype="fp32", **asked)
    open_all(ExportPlan(checkpoint, "fp32", model.size, model.size, {}))
    return checkpoint


def same_weights(checkpoint: Checkpoint, model: str, part: str = "unet") -> bool:
    """Whether a part holds the numbers of the saved small model."""
    ours = checkpoint.module(part, torch.float32).state_dict()
    theirs = open_checkpoint(MODELS[model], "random", seed=5).module(part, torch.float32)
    return all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())


# ---- files of weights


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.non_ema.safetensors", None),
        ("diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
        ("diffusion_pytorch_model.fp16-00001-of-00001.safetensors", None),
        ("diffusion_pytorch_model-00001-of-00001.fp16.safetensors", None),
    ],
)
def test_weights_by_any_name_that_diffusers_has(sd: Path, name: str, variant: str | None) -> None:
    file = sd / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.rename(file.with_name(name))
    if "-of-" in name:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        write_json(sd / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json", index)
    reader = open_checkpoint(infer_model(sd), str(sd), dtype="fp32")
    stored = reader.origins["unet"].stored
    assert stored is not None
    assert stored.variant in ("non_ema", "fp16")
    if "-00001-of-00001.fp16" not in name:  # an old spelling, which this diffusers does not load
        assert same_weights(reader, SD)
    with pytest.raises(CheckpointError, match="leave --variant out"):
        open_checkpoint(infer_model(sd), str(sd), variant="ema")


def test_weights_called_otherwise_are_listed(sd: Path) -> None:
    file = sd / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("my-best-one.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        open_folder(sd)
    assert "my-best-one.safetensors" in caught.value.why
    assert "call the file diffusion_pytorch_model.safetensors" in caught.value.next


# ---- single files


@pytest.mark.parametrize("model", [SD, SDXL])
def test_a_single_file_under_its_original_names(model: str, tmp_path: Path) -> None:
    file = tmp_path / "merged.safetensors"
    write_single_file(saved(model), file)
    checkpoint = open_checkpoint(MODELS[model], str(file), dtype="fp32")
    assert all(same_weights(checkpoint, model, part) for part in checkpoint.parts)
    assert any("by its keys" in note for note in checkpoint.notes)
    assert "taesd_decoder" not in checkpoint.parts
    entry = infer_file(file)
    assert (entry.name, entry.pooled) == ("merged", model == SDXL)


def test_a_single_file_that_draws_on_a_picture(tmp_path: Path) -> None:
    file = tmp_path / "inpainting.safetensors"
    write_single_file(saved(SD), file)
    tensors = load_file(file)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(tensors | {name: torch.zeros(8, 9, 3, 3)}, file)
    with pytest.raises(CheckpointError, match="draws on a picture"):
        infer_file(file)


def test_a_file_that_holds_no_whole_model(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match="no whole model") as caught:
        infer_file(file)
    assert "--lora FILE" in caught.value.next


@pytest.mark.parametrize("flag", ["weights", "vae", "taesd", "unet"])
def test_a_file_that_is_not_there(flag: str) -> None:
    asked = {"weights": "random"} | {flag: "models/gone.safetensors"}
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_checkpoint(MODELS[SD], asked.pop("weights"), **asked)


@pytest.mark.parametrize("original", [False, True])
def test_parts_from_single_files(tmp_path: Path, original: bool) -> None:
    unet = load_file(saved(SD) / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(saved(SD) / "vae" / "diffusion_pytorch_model.safetensors")
    if original:
        unet = {f"model.diffusion_model.{k}": v for k, v in original_unet(unet, 1).items()}
        vae = {k: v.contiguous() for k, v in original_vae(vae).items()}
    save_file(unet, tmp_path / "unet.safetensors")
    save_file(vae, tmp_path / "vae.safetensors")
    checkpoint = open_checkpoint(
        MODELS[SD],
        "random",
        unet=str(tmp_path / "unet.safetensors"),
        vae=str(tmp_path / "vae.safetensors"),
    )
    assert same_weights(checkpoint, SD, "unet")
    assert same_weights(checkpoint, SD, "vae_decoder")


def original_taesd(folder: Path, ending: str) -> Path:
    """The tiny autoencoder of a checkpoint as the two files of TAESD's release; the decoder's."""
    state = load_file(saved(SD) / "taesd" / "diffusion_pytorch_model.safetensors")
    halves: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in state.items():
        half, _, rest = name.partition(".layers.")
        number, _, rest = rest.partition(".")
        halves[half][f"{int(number) + (half == 'decoder')}.{rest}"] = tensor
    for half, tensors in halves.items():
        file = folder / f"taesd_{half}{ending}"
        torch.save(tensors, file) if ending == ".pth" else save_file(tensors, file)
    return folder / f"taesd_decoder{ending}"


def decoded_by_number(file: Path, latents: torch.Tensor) -> torch.Tensor:
    """The picture that a decoder of the release draws, from the numbers of its layers alone."""
    layers = load_file(file)
    image = 3 * torch.tanh(latents / 3)

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv2d(x, layers[f"{name}.weight"], layers.get(f"{name}.bias"), padding=1)

    for number in sorted({int(name.split(".")[0]) for name in layers}):
        if f"{number}.conv.0.weight" in layers:
            inner = image
            for place in (0, 2):
                inner = F.relu(conv(inner, f"{number}.conv.{place}"))
            image = F.relu(conv(inner, f"{number}.conv.4") + image)
        elif f"{number}.bias" not in layers:
            image = conv(F.interpolate(image, scale_factor=2.0), str(number))
        else:
            image = conv(image, str(number))
            image = F.relu(image) if number == 1 else image
    return 2 * image - 1


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_taesd_in_the_two_files_of_its_release(ending: str, tmp_path: Path) -> None:
    file = original_taesd(tmp_path, ending)
    asked = {"taesd": str(file), "allow_pickle": ending == ".pth"}
    checkpoint = open_checkpoint(MODELS[SD], "random", dtype="fp32", **asked)
    assert same_weights(checkpoint, SD, "taesd_decoder")
    latents = 3 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    module = checkpoint.module("taesd_decoder", torch.float32)
    expected = decoded_by_number(original_taesd(tmp_path, ".safetensors"), latents)
    assert torch.allclose(module.decode(latents).sample, expected, atol=1e-5)
    request = make_request(MODELS[SD], "random", **asked)
    before = request.as_dict()["fingerprint"]
    os.utime(tmp_path / f"taesd_encoder{ending}", ns=(0, 0))
    assert request.as_dict()["fingerprint"] != before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [("pickle", "--allow-pickle"), ("alone", "its encoder beside it"), ("torn", "download it"),
     ("another", "taesd_decoder.pth")],
)  # fmt: skip
def test_half_a_taesd_is_refused_before_work(wrong: str, words: str, tmp_path: Path) -> None:
    file = original_taesd(tmp_path, ".pth")
    if wrong == "alone":
        file.with_name("taesd_encoder.pth").unlink()
    elif wrong == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif wrong == "another":
        torch.save({"a.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(MODELS[SD], "random", taesd=str(file), allow_pickle=wrong != "pickle")
    assert words in caught.value.next


# ---- keys


KEYS: list[tuple[str, str, dict[str, Any], str]] = [
    (SD, "vae/config.json", {"shift_factor": 0.2}, "shift_factor is 0.2"),
    (SD, "vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean"),
    (SD, "vae/config.json", {"a_new_key": 3}, "a_new_key is 3"),
    (SD, "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    (SD, "unet/config.json", {"in_channels": 9}, "draws on a picture: in_channels is 9"),
    (SD, "unet/config.json", {"out_channels": 8}, "the channels that the UNet gives is 8"),
    (SD, "unet/config.json", {"sample_size": {"a": 1}}, "sample_size is {'a': 1}"),
    (SD, "unet/config.json", {"block_out_channels": None}, "unet/config.json is no config"),
    (SD, "text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
    (SD, "text_encoder/config.json", {"quantization_config": {"bits": 4}}, "quantization_config"),
    (SD, "scheduler/scheduler_config.json", {"made_up": "yes"}, "made_up is 'yes'"),
    (SD, "scheduler/scheduler_config.json", {"beta_schedule": "cubic"}, "cubic"),
    (SD, "model_index.json", {"scheduler": ["diffusers", "EulerSchedule"]}, "EulerSchedule"),
    (SD, "model_index.json", {"scheduler": ["diffusers", "DPMSolverSDEScheduler"]}, "torchsde"),
    (SD, "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
    (SD, "model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "Inpaint"),
    (SD, "model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet"),
    (SDXL, "model_index.json", {"add_watermarker": True}, "add_watermarker"),
    (SD, "tokenizer/tokenizer_config.json", {"model_max_length": 64}, "model_max_length is"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "file", "changes", "words"), KEYS, ids=[k[3] for k in KEYS])
def test_keys_that_are_refused_by_name(
    tmp_path: Path, model: str, file: str, changes: dict[str, Any], words: str
) -> None:
    folder = copied(model, tmp_path / "model")
    edit_json(folder / file, **changes)
    with pytest.raises(PreconditionError, match=re.escape(words)) as caught:
        open_folder(folder)
    assert caught.value.next


LEGAL: list[tuple[str, dict[str, Any]]] = [
    ("unet/config.json", {"sample_size": [8, 8]}),
    ("unet/config.json", {"sample_size": None}),
    ("unet/config.json", {"cross_attention_dim": [32, 32]}),
    ("unet/config.json", {"attention_head_dim": [2, 2]}),
    ("unet/config.json", {"layers_per_block": [1, 1]}),
    ("vae/config.json", {"latents_mean": None, "latents_std": None, "shift_factor": None}),
    ("vae/config.json", {"sample_size": [64, 64]}),
    ("text_encoder/config.json", {"attention_dropout": 0, "dropout": 0.0, "max_length": 20}),
    ("model_index.json", {"safety_checker": ["stable_diffusion", "X"], "_name_or_path": "a/b"}),
    ("scheduler/scheduler_config.json", {"trained_betas": None, "clip_sample_range": 1}),
]


@pytest.mark.parametrize(("file", "changes"), LEGAL)
def test_legal_json_of_another_type_is_read(sd: Path, file: str, changes: dict[str, Any]) -> None:
    edit_json(sd / file, **changes)
    assert open_folder(sd).parts


def test_json_that_is_no_object_is_told(sd: Path) -> None:
    write_json(sd / "model_index.json", [1, 2])
    with pytest.raises(CheckpointError, match=r"model_index\.json does not hold a JSON object"):
        open_folder(sd)


# ---- schedulers


def test_two_files_that_name_two_schedulers(sd: Path) -> None:
    edit_json(sd / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    checkpoint = open_folder(sd)
    assert checkpoint.scheduler_config()["_class_name"] == "DDIMScheduler"
    assert "the index decides" in checkpoint.notes[0]


def test_no_file_that_names_a_scheduler(sd: Path) -> None:
    config = read_json(sd / "scheduler" / "scheduler_config.json")
    config.pop("_class_name")
    write_json(sd / "scheduler" / "scheduler_config.json", config)
    assert open_folder(sd).scheduler_config()["_class_name"] == "PNDMScheduler"
    edit_json(sd / "model_index.json", scheduler=[None, None])
    with pytest.raises(CheckpointError, match="names no scheduler class"):
        open_folder(sd)


def test_a_scheduler_that_needs_more_steps(sd: Path, tmp_path: Path) -> None:
    edit_json(sd / "scheduler" / "scheduler_config.json", skip_prk_steps=False)
    bundle = opened(sd, tmp_path / "bundle")
    assert (bundle.least_steps, bundle.steps) == (4, 4)
    with load_pipeline(str(bundle.path), "torch") as pipeline:
        with pytest.raises(PreconditionError, match="too few") as caught:
            pipeline(["x"], steps=1)
        assert "--steps 4" in caught.value.next


# ---- tokens


def add_token(folder: Path, count: int = 1) -> None:
    """A learned token as older transformers wrote it: in added_tokens.json, rows at the end."""
    tokenizer = read_json(folder / "tokenizer" / "tokenizer.json")
    vocab = tokenizer["model"]["vocab"]
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    names = ["<x>", *(f"<x>_{i}" for i in range(1, count))]
    added = {name: len(vocab) + i for i, name in enumerate(names)}
    write_json(folder / "tokenizer" / "added_tokens.json", added)
    redraw(folder, "text_encoder", vocab_size=len(vocab) + count)


def test_learned_tokens_reach_the_bundle(sd: Path, tmp_path: Path) -> None:
    add_token(sd, 3)
    bundle = opened(sd, tmp_path / "bundle")
    (tokenizer,) = bundle.tokenizers()
    first = len(tokenizer) - 3
    ids = token_ids(tokenizer, ["a <x> on fire"])[0].tolist()
    assert ids[ids.index(first) :][:3] == [first, first + 1, first + 2], "one word, three vectors"
    assert min(distance(bundle, prompt="a <x> on fire").values()) >= 60


def test_an_embedding_is_put_in(sd: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat-toy.safetensors"
    save_file({"<cat-toy>": torch.randn(2, 32, generator=torch.Generator().manual_seed(1))}, file)
    bundle = opened(sd, tmp_path / "bundle", embeddings=[str(file)])
    assert bundle.name == "tiny-sd+cat-toy"
    assert min(distance(bundle, prompt="a photo of <cat-toy>").values()) >= 60
    other = open_checkpoint(infer_model(sd), str(sd), embeddings=[f"{file}:sks"])
    assert other.embeddings[0].tokens("text_encoder") == ["sks", "sks_1"]
    save_file({"emb_params": torch.zeros(1, 7)}, file)
    with pytest.raises(CheckpointError, match="7 wide"):
        open_checkpoint(infer_model(sd), str(sd), embeddings=[str(file)])


@pytest.mark.parametrize("model", [SD, SDXL])
def test_a_skipped_layer_is_diffusers_own(model: str, tmp_path: Path) -> None:
    bundle, plain = (opened(saved(model), tmp_path / str(skip), clip_skip=skip) for skip in (1, 0))
    assert bundle.name == f"{plain.name}+clip-skip-1"
    assert bundle.checkpoint().model.clip_skip == 1
    assert min(distance(bundle).values()) >= 60
    drawn = [Oracle(each, make_recipe(each)).draw(PROMPT, [2], SEED) for each in (bundle, plain)]
    assert not np.array_equal(drawn[0]["vae", 2], drawn[1]["vae", 2])


def test_more_layers_than_there_are_cannot_be_skipped() -> None:
    asked = make_request(MODELS[SDXL], "random", clip_skip=2)
    with pytest.raises(CheckpointError, match="leaves no layer of text_encoder") as caught:
        open_request(MODELS[SDXL], asked, "fp32")
    assert caught.value.next == "pass --clip-skip 1 or less"


def test_a_tokenizer_without_merges(sd: Path) -> None:
    (sd / "tokenizer" / "tokenizer.json").unlink()
    (sd / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt is missing"):
        open_folder(sd)


def test_a_tokenizer_with_more_tokens_than_vectors(sd: Path) -> None:
    redraw(sd, "text_encoder", vocab_size=500)
    with pytest.raises(CheckpointError, match="its text encoder 500 vectors"):
        open_folder(sd)


# ---- autoencoders and sizes


def test_without_a_taesd_the_vae_serves(sd: Path, tmp_path: Path) -> None:
    shutil.rmtree(sd / "taesd")
    model = replace(infer_model(sd), taesd=None)
    checkpoint = open_checkpoint(model, str(sd), dtype="fp32")
    assert "taesd_decoder" not in checkpoint.parts
    assert any("--taesd PATH" in note for note in checkpoint.notes)


def test_a_vae_of_three_blocks_has_another_scale(sd: Path, tmp_path: Path) -> None:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "block_out_channels": [8, 16, 16],
              "up_block_types": ["UpDecoderBlock2D"] * 3}  # fmt: skip
    redraw(sd, "vae_decoder", **blocks)
    with pytest.raises(PreconditionError, match="TAESD's scale is 8"):
        open_folder(sd)
    redraw(sd, "taesd_decoder", encoder_block_out_channels=[8] * 3, num_encoder_blocks=[1] * 3,
           decoder_block_out_channels=[8] * 3, num_decoder_blocks=[1] * 3)  # fmt: skip
    bundle = opened(sd, tmp_path / "bundle")
    assert (bundle.vae_scale, bundle.size) == (4, (32, 32))
    assert min(distance(bundle).values()) >= 60


def test_the_checkpoint_that_was_exported_finds_its_bundle(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    with pytest.raises(PreconditionError, match="there is no bundle of") as caught:
        find_bundle(str(sd))
    assert f"addbench export --model {sd}" in caught.value.next
    bundle = opened(sd, bundle_path(sd.name, "folder", "fp32"))
    assert find_bundle(str(sd)).path == bundle.path
    assert find_bundle(str(sd), size=(64, 64)).path == bundle.path


def test_a_checkpoint_with_more_fused_in_finds_its_bundle(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    skipped = opened(sd, bundle_path(f"{sd.name}+clip-skip-1", "folder", "fp32"), clip_skip=1)
    assert "--clip-skip 1" in export_again(skipped)
    with pytest.raises(PreconditionError, match="there is no bundle") as gone:
        find_bundle("sd15+style+clip-skip-2")
    assert gone.value.next.endswith("--lora style.safetensors --clip-skip 2")
    assert find_bundle(str(sd)).path == skipped.path
    other = Path(shutil.copytree(skipped.path, tmp_path / "build" / f"{sd.name}+style-folder-fp32"))
    with pytest.raises(PreconditionError, match="2 bundles of") as caught:
        find_bundle(str(sd))
    assert other.name in caught.value.why
    assert find_bundle(caught.value.next.split()[-1]).path == skipped.path
    alone = opened(sd, bundle_path(sd.name, "folder", "fp32"))
    assert find_bundle(str(sd)).path == alone.path


# ---- the page


def test_every_line_of_the_page_names_a_test() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) >= 40
    sources = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for row in rows:
        for name in re.findall(r"`(test_\w+)`", row):
            assert f"def {name}(" in sources, row
