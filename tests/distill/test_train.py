"""The whole machinery: every stage, the folders it writes, resuming, several processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core.errors import PreconditionError
from core.files import ROOT, read_json, write_json
from distill.config import STAGES, load_config
from distill.evaluate import WORDINGS
from distill.stages.tiny_autoencoder import TinyAutoencoderTrainer
from distill.train import main, make_context
from tests.distill.settings import SMALL

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FP32 = ["--smoke", "--precision", "fp32", *SMALL]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distill.train", *FP32, *arguments]


def rows(build: Path, run: str, stage: str) -> dict[int, dict[str, float]]:
    """Losses by step."""
    found = {}
    for line in (build / "distill" / run / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["stage"] == stage and "quality" not in row:
            found[row["step"]] = {
                k: v for k, v in row.items() if k not in ("stage", "step", "seconds", "s_per_step")
            }
    return found


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    for module in ("distill.train", "distill.evaluate", "distill.ablate"):
        code = f"import sys, {module} as m; m.parser(); print(sorted(sys.modules))"
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert not {"torch", "diffusers", "transformers", "numpy"} & set(eval(out))


def test_a_run_writes_logs_samples_and_models(smoke: Path) -> None:
    run = smoke / "distill" / "smoke"
    for stage in ("autoencoder", "tiny-autoencoder", "features", "teacher", "student"):
        losses = rows(smoke, "smoke", stage)
        assert losses
        assert all(np.isfinite(v) for row in losses.values() for v in row.values())
        done = json.loads((run / stage / "stage.json").read_text())
        assert done["steps"] == max(losses)
    assert set(rows(smoke, "smoke", "student")[1]) >= {
        "adv",
        "distill",
        "disc",
        "r1",
        "adv_pull",
        "distill_pull",
    }
    assert list((run / "samples").glob("student-*.png"))
    record = json.loads((run / "smoke-turbo" / "training.json").read_text())
    assert record["git_revision"]
    assert record["config"]["student"]["lambda_"] == 2.5
    quality = json.loads((run / "smoke-turbo" / "quality.json").read_text())
    assert {row["steps"] for row in quality["student"]} == {1, 2, 4}
    assert quality["student"][0]["fid_shapes"] > 0
    assert {row["wording"] for row in quality["wordings"]} == set(WORDINGS) - {"full"}
    assert quality["ratios"].keys() == quality["wanted"].keys()
    card = (run / "smoke-turbo" / "README.md").read_text()
    assert record["git_revision"] in card
    assert "missed" in card  # six steps of training reach no goal, and the card says so
    assert str(smoke) not in card


@pytest.mark.parametrize("name", ["smoke-turbo", "smoke-teacher"])
def test_diffusers_loads_the_folders(smoke: Path, name: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder = smoke / "distill" / "smoke" / name
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    images = pipeline(
        ["a large red circle on a black background"] * 2,
        num_inference_steps=1,
        guidance_scale=0.0,
        output_type="np",
    ).images
    assert images.shape == (2, 64, 64, 3)
    assert np.isfinite(images).all()
    assert pipeline.tokenizer.eos_token_id == len(pipeline.tokenizer) - 1


def test_weights_are_float16_and_nothing_is_missing(smoke: Path) -> None:
    from diffusers import AutoencoderTiny
    from transformers import CLIPTextModel

    folder = smoke / "distill" / "smoke" / "smoke-turbo"
    for file in folder.rglob("*.safetensors"):
        if file.parent.name != "fid":
            floats = [v for v in load_file(file).values() if v.is_floating_point()]
            assert {v.dtype for v in floats} == {torch.float16}
    # The names in the files are the ones that the libraries look for.
    _, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tiny = AutoencoderTiny.from_pretrained(folder / "taesd", dtype=torch.float32)
    assert tiny.decode(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)


def test_latents_have_unit_variance_and_scaling_factor_one(smoke: Path) -> None:
    run = smoke / "distill" / "smoke"
    moments = np.load(next(run.glob("latents-*.npy"))).astype(np.float32)
    mean, deviation = moments[:, :4], moments[:, 4:]
    total = np.sqrt(mean.var((0, 2, 3)) + np.square(deviation).mean((0, 2, 3)))
    assert total == pytest.approx(np.ones(4), abs=0.1)
    assert mean.mean((0, 2, 3)) == pytest.approx(np.zeros(4), abs=0.1)
    config = json.loads((run / "smoke-turbo" / "vae" / "config.json").read_text())
    assert config["scaling_factor"] == 1.0


def test_an_image_does_not_depend_on_its_batch(smoke: Path) -> None:
    from distill.pipeline import generate, open_folder

    pipeline = open_folder(smoke / "distill" / "smoke" / "smoke-turbo")
    captions = [
        "a small red circle on a white background",
        "a large blue star on a gray background",
    ]
    options = {"steps": 2, "guidance": 0.0, "size": 64}
    together = generate(pipeline, captions, seeds=[1, 2], **options)  # type: ignore[arg-type]
    alone = generate(pipeline, captions[1:], seeds=[2], **options)  # type: ignore[arg-type]
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1


def test_half_of_what_the_tiny_autoencoder_decodes_is_the_student_s(
    smoke: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(smoke))
    config = load_config("smoke", SMALL[1::2])
    trainer = TinyAutoencoderTrainer(make_context(config, "smoke", device="cpu", precision="fp32"))
    trainer.setup()
    trainer.progress = 1.0  # whole pictures
    decoded: list[torch.Tensor] = []
    asked: list[tuple[Any, torch.Tensor]] = []
    decode = trainer.latents.decode

    def kept(latents: torch.Tensor) -> torch.Tensor:
        decoded.append(latents)
        return decode(latents)

    def predicted(unet: Any, noisy: torch.Tensor, t: torch.Tensor, _: Any) -> torch.Tensor:
        asked.append((unet, t))
        return torch.full_like(noisy, 7.0)

    monkeypatch.setattr(trainer.latents, "decode", kept)
    monkeypatch.setattr(trainer.checkpoint, "predict", predicted)
    losses = trainer.step(0)
    assert set(losses) == {"l1", "mse", "edges", "objects", "latents"}
    ((unet, t),) = asked
    assert unet is trainer.student
    assert len(t) == config.tiny_autoencoder.batch // 2
    assert 999 in t  # one step from pure noise, where this student says: all -7
    (latents,) = decoded
    shown = latents[len(t) :]
    assert (shown[t == 999] == -7).all()
    assert latents[: len(t)].abs().max() < 7


def test_finished_stages_are_left_alone(
    smoke: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(smoke))
    before = (smoke / "distill" / "smoke" / "log.jsonl").read_bytes()
    assert main([*FP32, "--no-export"]) == 0
    assert capsys.readouterr().err.count("is finished") == len(STAGES)
    assert (smoke / "distill" / "smoke" / "log.jsonl").read_bytes() == before


def test_a_stage_without_those_before_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    with pytest.raises(PreconditionError, match="stage autoencoder is not finished"):
        main([*FP32, "--stage", "teacher"])


@pytest.mark.parametrize(
    "arguments", [["--stage", "dinner"], ["--preset", "none"], ["--minutes", "x"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(PreconditionError):
        main([*arguments])


VARIANTS = (
    ["student.loss=adversarial", "student.conditioning=none"],
    ["student.loss=distillation", "student.space=latent", "student.weighting=sds"],
    ["student.weighting=nfsd", "student.negative=ugly", "student.conditioning=image"],
    ["student.teacher-steps=2", "student.text=pooled", "student.mismatch=0.5"],
    ["student.pretrained=false", "student.terminal=0.5", "student.headstart=1"],
)


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: ",".join(c))
def test_every_choice_of_the_method_runs(
    smoke: Path, changes: list[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(smoke))
    run = f"variant-{VARIANTS.index(changes)}"
    settings = [x for change in (*changes, "student.iterations=2") for x in ("--set", change)]
    assert (
        main(
            [*FP32, "--run", run, "--base", "smoke", "--stage", "student", "--no-export", *settings]
        )
        == 0
    )
    losses = rows(smoke, run, "student")[2]
    assert ("distill" in losses) == ("student.loss=adversarial" not in changes)
    assert ("adv" in losses) == ("student.loss=distillation" not in changes)
    assert ("mismatch" in losses) == ("student.mismatch=0.5" in changes)


def test_a_killed_run_resumes_with_the_same_losses(tmp_path: Path) -> None:
    """kill -9 in the middle of a stage; the resumed run repeats what an unharmed one does."""
    stage = [
        "--stage",
        "autoencoder",
        "--set",
        "autoencoder.iterations=14",
        "--checkpoint-seconds",
        "0",
    ]
    environment = {**ENVIRONMENT, "ADDBENCH_BUILD": str(tmp_path)}
    checkpoints = tmp_path / "distill" / "killed" / "autoencoder" / "checkpoints"
    process = subprocess.Popen(
        command(*stage, "--run", "killed"), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-0000[01][4-9]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (checkpoints.parent / "stage.json").exists(), "it finished before it was killed"
    # A half-written line at the end of the log is what a kill can leave too.
    with (tmp_path / "distill" / "killed" / "log.jsonl").open("a") as file:
        file.write('{"stage": "autoencoder", "st')

    refused = subprocess.run(
        command(*stage, "--run", "killed", "--set", "autoencoder.kl=0.5"),
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "belongs to another configuration" in refused.stderr
    for run in ("killed", "whole"):
        subprocess.run(
            command(*stage, "--run", run),
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
        )
    killed, whole = (rows(tmp_path, run, "autoencoder") for run in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    for step, losses in whole.items():
        assert killed[step] == pytest.approx(losses, rel=1e-5), step


def test_what_is_refused_leaves_the_record_of_the_run(tmp_path: Path) -> None:
    """Data that is not there, and a checkpoint that wants --shard the other way round."""
    environment = {**ENVIRONMENT, "ADDBENCH_BUILD": str(tmp_path)}
    run = tmp_path / "distill" / "kept"
    state = run / "autoencoder" / "checkpoints" / "step-000002" / "state.json"
    write_json(run / "config.json", {"of": "another command"})
    settings = ["--set", 'data.kind="folder"', "--set", f'data.path="{tmp_path / "gone"}"']
    config = load_config("smoke", SMALL[1::2])
    write_json(state, {"step": 2, "seconds": 1.0, "config": config.stage_hash("autoencoder"),
                       "sharded": True})  # fmt: skip
    for arguments, words in (
        (["--stage", "features", *settings], "gone"),
        (["--stage", "autoencoder"], "was written with --shard"),
    ):
        refused = subprocess.run(
            command(*arguments, "--run", "kept"),
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert refused.returncode == 2, refused.stderr
        assert words in refused.stderr
        assert read_json(run / "config.json") == {"of": "another command"}


def launch(build: Path, *arguments: str) -> tuple[list[int], str]:
    """Exit codes of a run on two processes, and what both said.

    By the variables that a launcher sets: on a CPU `accelerate launch` starts one process only.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**ENVIRONMENT, **group, "ADDBENCH_BUILD": str(build),
                            "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


STUDENT = ["--stage", "student", "--base", "smoke", "--no-export", "--set", "student.iterations=4",
           "--set", "student.ema=0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def alone(smoke: Path) -> Path:
    """The finished student stage of one process."""
    subprocess.run(
        command(*STUDENT, "--run", "one"), cwd=ROOT, check=True, capture_output=True,
        env={**ENVIRONMENT, "ADDBENCH_BUILD": str(smoke)},
    )  # fmt: skip
    return smoke / "distill" / "one" / "student"


@pytest.mark.parametrize("way", ["whole", "sharded"])
def test_two_processes_have_the_losses_and_weights_of_one(
    smoke: Path, alone: Path, way: str
) -> None:
    shard = ["--shard"] if way == "sharded" else []
    codes, said = launch(smoke, *STUDENT, *shard, "--run", way)
    assert codes == [0, 0], said[-3000:]
    assert "2 processes" in said
    known, found = (rows(smoke, run, "student") for run in ("one", way))
    assert known.keys() == found.keys()
    for step, losses in known.items():
        assert found[step] == pytest.approx(losses, rel=2e-3, abs=1e-5), step
    name = Path("weights", "unet", "diffusion_pytorch_model.safetensors")
    folder = smoke / "distill" / way / "student"
    wanted, written = load_file(alone / name), load_file(folder / name)
    assert wanted.keys() == written.keys()
    apart = max(float((wanted[key] - written[key]).abs().max()) for key in wanted)
    assert apart < 1e-5
    if not shard:
        return
    # From the shards of the checkpoint alone the same weights are written again.
    (folder / name).unlink()
    (folder / "stage.json").unlink()
    codes, said = launch(smoke, *STUDENT, *shard, "--run", way)
    assert codes == [0, 0], said[-3000:]
    restored = load_file(folder / name)
    assert all(torch.equal(restored[key], written[key]) for key in written)


def test_one_process_has_nothing_to_shard(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(smoke))
    with pytest.raises(PreconditionError, match="several processes"):
        main([*FP32, *STUDENT, "--run", "single", "--shard"])


def test_float16_on_a_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    with pytest.raises(PreconditionError, match="FP16 training needs a GPU"):
        main(["--smoke", "--precision", "fp16"])
