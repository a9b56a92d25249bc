"""What goes wrong in long runs: NaN, a full disk, a damaged checkpoint folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from core.errors import AddbenchError, PreconditionError
from core.files import read_json, write_json
from distill import checkpointing
from distill.context import Context
from distill.train import main, make_accelerator
from tests.distill.settings import SMALL

FP32 = ["--smoke", "--precision", "fp32", *SMALL, "--no-export"]


def test_nan_stops_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    real = Context.pictures
    calls = []

    def damaged(self: Context, indices: list[int]) -> torch.Tensor:
        """The fourth batch has a picture that is not numbers."""
        calls.append(indices)
        pictures = real(self, indices)
        if len(calls) == 4:
            pictures[0] = float("nan")
        return pictures

    monkeypatch.setattr(Context, "pictures", damaged)
    with pytest.raises(AddbenchError, match="stopped at step 3: the loss is not finite") as caught:
        main([*FP32, "--stage", "autoencoder", "--checkpoint-seconds", "0"])
    assert caught.value.exit_code == 4
    kept = checkpointing.latest(tmp_path / "distill" / "smoke" / "autoencoder" / "checkpoints")
    assert kept is not None
    assert kept.name == "step-000003"
    assert str(kept) in caught.value.next
    weights = load_file(kept / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small disk: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk: Path) -> None:
    accelerator = make_accelerator("cpu", "fp32")
    network = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(network.parameters())
    network, optimizer = accelerator.prepare(network, optimizer)
    network(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    folder = small_disk / "checkpoints"
    checkpointing.save(accelerator, folder, checkpointing.State(1, 1.0, "c"))
    before = network.weight.detach().clone()
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    with torch.no_grad():
        network.weight.add_(1)
    with pytest.raises(AddbenchError, match="could not be written") as caught:
        checkpointing.save(accelerator, folder, checkpointing.State(2, 2.0, "c"))
    assert "step-000001 is intact" in caught.value.why
    assert [path.name for path in folder.iterdir()] == ["step-000001"]
    state = checkpointing.resume(accelerator, folder, "c")
    assert state is not None
    assert state.step == 1
    assert torch.equal(network.weight, before)
    filler.unlink()
    checkpointing.save(accelerator, folder, checkpointing.State(2, 2.0, "c"))
    assert [path.name for path in folder.iterdir()] == ["step-000002"]


def test_a_folder_without_state_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000009").mkdir()
    assert checkpointing.latest(tmp_path) is None


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


def test_nfsd_without_a_caption_of_bad_pictures_is_refused(
    smoke: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(smoke))
    run = ["--run", "nfsd", "--base", "smoke", "--stage", "student"]
    with pytest.raises(PreconditionError, match="needs a caption of bad pictures"):
        main([*FP32, *run, "--set", "student.weighting=nfsd"])


def test_a_disk_that_fills_at_the_end_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    """The weights do not fit beside the stage's checkpoint; with room the same command ends."""
    from distill.stages.fid import FidTrainer

    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    room = tmp_path / "distill" / "smoke" / "fid"
    real = FidTrainer.write

    def on_a_small_disk(self: FidTrainer, folder: Path) -> None:
        (small_disk / "filler").write_bytes(b"0" * 2**21)
        real(self, small_disk)
        (small_disk / "more").write_bytes(b"0" * 2**21)

    monkeypatch.setattr(FidTrainer, "write", on_a_small_disk)
    with pytest.raises(AddbenchError, match="the weights of stage fid could not be written") as got:
        main([*FP32, "--stage", "fid"])
    assert "checkpoint is intact" in got.value.why
    assert checkpointing.latest(room / "checkpoints") is not None
    assert not (room / "stage.json").exists()
    monkeypatch.setattr(FidTrainer, "write", real)
    assert main([*FP32, "--stage", "fid"]) == 0
    assert (room / "weights" / "fid.safetensors").exists()


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
