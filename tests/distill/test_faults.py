"""What goes wrong in long runs: NaN, a full disk, a damaged checkpoint folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.errors import AddbenchError, PreconditionError
from core.files import read_json, write_json
from distill import checkpointing
from distill.context import Context
from distill.train import chosen_precision, main, make_accelerator
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


def test_a_stage_that_followed_another_resumes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage of one command stops; a new command has never seen the first."""
    from distill.stages.tiny_autoencoder import TinyAutoencoderTrainer

    def stopped(self: TinyAutoencoderTrainer, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(TinyAutoencoderTrainer, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            main([*FP32])
    room = tmp_path / "distill" / "smoke"
    assert (room / "autoencoder" / "stage.json").exists()
    assert checkpointing.latest(room / "tiny-autoencoder" / "checkpoints") is not None
    assert main([*FP32, "--stage", "tiny-autoencoder"]) == 0
    assert (room / "tiny-autoencoder" / "stage.json").exists()


def test_a_folder_without_state_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000009").mkdir()
    assert checkpointing.latest(tmp_path) is None


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


def test_shards_and_whole_networks_are_not_mixed_up(tmp_path: Path) -> None:
    accelerator = make_accelerator("cpu", "fp32")
    checkpointing.save(accelerator, tmp_path, checkpointing.State(1, 1.0, "c"))
    state = tmp_path / "step-000001" / checkpointing.STATE
    write_json(state, read_json(state) | {"sharded": True})
    with pytest.raises(PreconditionError, match="was written with --shard"):
        checkpointing.resume(accelerator, tmp_path, "c")


def test_a_refused_command_leaves_the_settings_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that stopped under one setting, asked for under another."""
    from distill.stages.autoencoder import AutoencoderTrainer

    def stopped(self: AutoencoderTrainer, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderTrainer, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            main([*FP32, "--stage", "autoencoder"])
    record = tmp_path / "distill" / "smoke" / "config.json"
    before = record.read_bytes()
    with pytest.raises(PreconditionError, match="another configuration"):
        main([*FP32, "--stage", "autoencoder", "--set", "autoencoder.learning_rate=0.5"])
    with pytest.raises(PreconditionError, match="autoencoder is not finished"):
        main([*FP32, "--stage", "teacher", "--set", "teacher.learning_rate=0.5"])
    assert record.read_bytes() == before


def test_the_precision_that_is_chosen_hangs_on_the_cpu_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for flags, precision in (({"avx2"}, "fp32"), ({"amx_bf16"}, "bf16"), ({"avx512_bf16"}, "bf16")):
        monkeypatch.setattr("distill.train.cpu_flags", lambda flags=flags: flags)
        assert chosen_precision("cpu", "auto") == precision
