"""The dry run of Cloud AI 100: its script and manifest, and the script run on the SDK stand-in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from backends.__main__ import main
from backends.base import PreconditionError
from backends.cloud_ai import probe
from export.bundle import Bundle
from tests.doubles.cloud_ai_sdk_standin import NEW, OLD, ULTRA, make_sdk, set_state

PARTS = ("text_encoder", "text_encoder_2", "unet", "taesd_decoder")


def sh(script: Path, step: str, sdk: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script as a person runs it: from elsewhere, with nothing of ours in the environment."""
    return subprocess.run(
        [str(script), step],
        cwd="/",
        env={"PATH": os.environ["PATH"], "QAIC_SDK_ROOT": str(sdk), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without SDK and bundles."""
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv(probe.ROOT_VARIABLE, str(tmp_path / "no-sdk"))
    return tmp_path


def dry_run(*words: str) -> None:
    assert main(["compile", "--backend", "qaic", "--dry-run", *words]) == 0


def test_without_bundle_and_sdk_everything_but_the_graphs_is_there(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run("--model", "sdxl-turbo", "--batch", "1,4")
    said = capsys.readouterr().out
    folder = empty / "build" / "cloud-ai-100" / "sdxl-turbo-ultra"
    script, manifest = (
        folder / "cloud-ai-100.sh",
        json.loads((folder / "manifest.json").read_text()),
    )
    assert str(script) in said
    for word in ("qaic-exec", "qaic-compile", "qaic-runner", "-onnx-define-symbol=batch,4",
                 "-mos=2", "public recipe", "derived", "graphs are missing"):  # fmt: skip
        assert word in said
    assert manifest["bundle"] is None
    assert len(manifest["programs"]) == 10
    unet = next(each for each in manifest["programs"] if each["name"] == "unet-batch1")
    assert unet["preset"]["follows"] == "public recipe"
    assert unet["arguments"]["qaic-exec"][-1] == "-aic-binary-dir=qpc/unet-batch1"
    assert "qpc/unet-batch1/programqpc.bin" in unet["expected_files"]
    listed = (folder / "buffers" / "unet-batch1.yaml").read_text()
    assert " - IOName: encoder_hidden_states\n   Precision: float16\n" in listed
    assert "timestep" not in listed
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert str(empty) not in script.read_text(), "no path of this machine"

    none = sh(script, "check", empty / "no-sdk")
    assert none.returncode == 2
    assert "error: there is no compiler" in none.stderr
    no_graph = sh(script, "compile", make_sdk(empty / "sdk"))
    assert no_graph.returncode == 2
    assert "onnx/text_encoder-batch1/model.onnx is missing" in no_graph.stderr
    assert "addbench export --model sdxl-turbo" in no_graph.stderr
    assert sh(script, "dance", empty).returncode == 2


def test_encoders_of_pictures_are_programs_where_they_are_asked_for(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run("--model", "sdxl-turbo", "--encoder", "vae,taesd")
    assert "an encoder of pictures: the recipe has none" in capsys.readouterr().out
    folder = empty / "build" / "cloud-ai-100" / "sdxl-turbo-ultra"
    programs = json.loads((folder / "manifest.json").read_text())["programs"]
    encoders = [each for each in programs if each["part"] in ("vae_encoder", "taesd_encoder")]
    assert len(encoders) == 2
    assert len(programs) == 7
    for each in encoders:
        assert each["preset"]["follows"] == "derived"
        assert each["fp16_buffers"] == ["image", "latent_sample"]


def test_the_script_compiles_and_times_every_part_on_the_stand_in(
    empty: Path, tiny_bundle: Bundle
) -> None:
    dry_run("--model", str(tiny_bundle.path), "--decoder", "taesd")
    (folder,) = (empty / "build" / "cloud-ai-100").iterdir()
    # Elsewhere, as it would be on the host with the SDK; the weights are no links to the bundle.
    moved = empty / "a host's folder"
    shutil.copytree(folder, moved)
    for data in moved.rglob("*.data"):
        assert data.stat().st_nlink == 1
    script, sdk = moved / "cloud-ai-100.sh", make_sdk(empty / "sdk", OLD)
    done = sh(script, "all", sdk, DEVICES="0 2", ITERATIONS="7")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "InferenceCnt 7 TotalDuration 17500us" in done.stdout
    manifest = json.loads((moved / "manifest.json").read_text())
    assert [each["part"] for each in manifest["programs"]] == list(PARTS)
    for each in manifest["programs"]:
        for file in each["expected_files"]:
            assert (moved / file).is_file(), file
        assert (moved / "logs" / f"run-{each['name']}-beside-device2.log").is_file()
    assert "SDK stand-in qaic-exec" in (moved / "logs" / "compile-unet-batch1.log").read_text()
    # onnx refuses a weights file with several links.
    own = {info.data.stat().st_ino for info in tiny_bundle.parts.values() if info.data}
    assert not own & {data.stat().st_ino for data in folder.rglob("*.data")}

    again = sh(script, "compile", sdk)
    assert again.stdout.count("there already") == len(PARTS)
    # What is there counts only for what it was made from: arguments, graph, buffers, compiler.
    text = script.read_text()
    script.write_text(text.replace("-mos=2", "-mos=1"))
    other = sh(script, "compile", sdk)
    assert other.stdout.count("there already") == len(PARTS) - 2
    assert other.stdout.count("made from another graph, other arguments") == 2
    script.write_text(text)
    with (moved / "buffers" / "text_encoder-batch1.yaml").open("a") as file:
        file.write("\n")
    assert sh(script, "compile", sdk).stdout.count("there already") == len(PARTS) - 3
    (moved / "qpc" / "unet-batch1" / "programqpc.bin").write_bytes(b"not a program")
    damaged = sh(script, "compile", sdk)
    assert damaged.returncode == 4
    assert "is not a QPC" in damaged.stderr
    (moved / "qpc" / "unet-batch1" / "programqpc.bin").write_bytes(bytes.fromhex("7ccda1000301"))
    assert "is a QPC of another version" in sh(script, "run", sdk).stderr

    shutil.rmtree(moved / "qpc" / "unet-batch1")
    newer = make_sdk(empty / "newer", NEW)
    assert sh(script, "compile", newer).returncode == 0
    assert "SDK stand-in qaic-compile" in (moved / "logs" / "compile-unet-batch1.log").read_text()

    shutil.rmtree(moved / "qpc" / "unet-batch1")
    set_state(newer, {"unknown_flags": ["-ols"]})
    refused = sh(script, "compile", newer)
    assert refused.returncode == 4
    assert "Unknown command line argument '-ols=1'" in refused.stderr
    assert "exit code 1" in refused.stderr
    away = sh(script, "run", sdk, DEVICES="9")
    assert away.returncode == 2
    assert "device 9 is not ready: it is not there" in away.stderr
    set_state(sdk, {"cards": [{"id": 1, **ULTRA}, {"id": 10, **ULTRA, "free": 2}]})
    busy = sh(script, "run", sdk, DEVICES="1 10")
    assert busy.returncode == 2
    assert "device 10 has too few free cores" in busy.stderr
    assert "need 16, 2 of 16 are free" in busy.stderr
    assert "qaic:cores=2" in busy.stderr
    (moved / "buffers" / "unet-batch1.yaml").unlink()
    torn = sh(script, "compile", sdk)
    assert torn.returncode == 2
    assert "buffers/unet-batch1.yaml is missing" in torn.stderr
    assert "copy the whole folder again" in torn.stderr
    set_state(sdk, {"util_fails": True})
    closed = sh(script, "run", sdk)
    assert closed.returncode == 2
    assert "Permission denied" in closed.stderr
    assert "usermod -aG qaic $USER" in closed.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no-such-model"], "there is no bundle of no-such-model"),
        (["--model", "sdxl-turbo", "--weights", "hub"], "there is no bundle"),
        (["--model", "sdxl-turbo", "--batch", "3"], "no preset for a batch of 3"),
        (["--model", "tiny-sdxl", "--decoder", "gan"], "no decoder called 'gan'"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], message: str, empty: Path) -> None:
    with pytest.raises(PreconditionError) as error:
        main(["compile", "--backend", "qaic", "--dry-run", *words])
    assert message in str(error.value)
    assert not (empty / "build" / "cloud-ai-100").exists()
