"""The same command over checkpoint folders: SDXL's form, Stable Diffusion's, and pairs of both."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from core.errors import PreconditionError
from core.files import read_json, write_json
from distill.train import main


@pytest.fixture
def large(smoke: Path, tmp_path: Path) -> list[str]:
    """The command line of a run over a checkpoint folder: epsilon, DINOv2, pictures in a folder."""
    from transformers import Dinov2Config, Dinov2Model

    source = smoke / "distill" / "smoke" / "smoke-teacher"
    shutil.copytree(source, tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "scheduler" / "scheduler_config.json"
    changed = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    write_json(config, read_json(config) | changed)
    dino = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=70)
    Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        Image.new("RGB", (80, 70), (index * 60, 0, 0)).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text("a red picture")
    changes = {
        "data.kind": "folder",
        "data.path": str(tmp_path / "pictures"),
        "data.size": "64",
        "networks.checkpoint": str(tmp_path / "checkpoint"),
        "networks.vae": str(tmp_path / "checkpoint" / "vae"),
        "networks.features": str(tmp_path / "dino"),
        "student.iterations": "2",
        "student.batch": "2",
    }
    return ["--preset", "sdxl", *(x for k, v in changes.items() for x in ("--set", f"{k}={v}"))]


def test_the_same_command_distils_a_checkpoint_folder(
    large: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    assert main([*large, "--precision", "bf16"]) == 0
    student = tmp_path / "build" / "distill" / "sdxl" / "sdxl-student"
    assert (student / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert (student / "training.json").exists()
    # Eight pictures, of one step and of four, of the folder's own captions (it has four).
    (sheet,) = (student.parent / "samples").glob("student-*.png")
    with Image.open(sheet) as picture:
        assert picture.size == (8 * 64, 64)


@pytest.mark.parametrize("part", ["unet", "text_encoder_2", "tokenizer", "scheduler", "vae"])
def test_a_checkpoint_that_lacks_a_part_is_refused(
    large: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    shutil.rmtree(tmp_path / "checkpoint" / part)
    with pytest.raises(PreconditionError, match=f"lacks {part}"):
        main([*large, "--precision", "fp32"])


def test_a_truncated_part_is_refused(
    large: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    file = tmp_path / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(PreconditionError, match="cannot be loaded"):
        main([*large, "--precision", "fp32"])


def one_encoder(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint of Stable Diffusion's form, with the other one's tokenizer and autoencoder."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    for part in ("tokenizer", "vae", "scheduler"):
        shutil.copytree(checkpoint / part, folder / part)
    # Latents of another scale than the student's.
    config = read_json(folder / "vae" / "config.json")
    write_json(folder / "vae" / "config.json", config | {"scaling_factor": 0.5})
    words = read_json(checkpoint / "text_encoder" / "config.json")
    CLIPTextModel(CLIPTextConfig(**words | {"hidden_size": 48})).save_pretrained(
        folder / "text_encoder"
    )
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


@pytest.mark.parametrize("pair", [("one", "two"), ("two", "one"), ("one", "one")], ids="-".join)
def test_student_and_teacher_may_be_of_different_families(
    large: list[str], pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the number of their text encoders, student first."""
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    folders = {"two": tmp_path / "checkpoint"}
    folders["one"] = one_encoder(folders["two"], tmp_path / "one")
    student, teacher = (folders[name] for name in pair)
    changes = [f"networks.checkpoint={student}", f"networks.vae={student / 'vae'}"]
    # Distillation alone: what the student learns, it learns from the teacher.
    changes += ["student.loss=distillation", "student.lambda=100.0"]
    if pair[0] != pair[1]:
        changes.append(f"networks.teacher={teacher}")
    chosen = [x for change in changes for x in ("--set", change)]
    assert main([*large, *chosen, "--precision", "fp32"]) == 0
    name = Path("unet", "diffusion_pytorch_model.safetensors")
    before, after = (
        load_file(folder / name)
        for folder in (student, tmp_path / "build" / "distill" / "sdxl" / "student" / "weights")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key].float(), after[key]) for key in before)


def test_another_familys_teacher_has_no_latents_in_common(
    large: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    changes = [f"networks.teacher={tmp_path / 'checkpoint'}", "student.space=latent"]
    with pytest.raises(PreconditionError, match="in pixels only"):
        main([*large, *(x for change in changes for x in ("--set", change))])
