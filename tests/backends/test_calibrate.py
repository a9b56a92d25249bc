"""Recording the UNet's inputs: what is kept, what goes on after an interrupt, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends.base import Backend, Session, UnsupportedError
from backends.commands.calibrate import CallRecorder, main, record, rows
from backends.ort import OrtBackend
from backends.registry import parse_backend
from core.cli import run as shell
from core.errors import PreconditionError
from export.bundle import Bundle, Spec
from export.quantize.calibration import META, Calibration, calibration_path

PLAIN = {"graph": "canonical", "threads": "1"}
PROMPTS = ["a fox", "a hen", "a cow"]


@pytest.fixture
def backend() -> Backend:
    return OrtBackend(PLAIN)


def test_a_file_holds_what_went_into_the_unet(
    tiny_bundle: Bundle, backend: Backend, tmp_path: Path
) -> None:
    out, said = tmp_path / "c.safetensors", list[str]()
    made = record(
        tiny_bundle, backend, out, prompts=PROMPTS[:2], steps=4, seed=7, kept=2,
        random_weights=True, say=said.append,
    )  # fmt: skip
    assert made.samples == 4
    assert (made.origin.prompts, made.origin.seeds) == (tuple(PROMPTS[:2]), (7, 8))
    assert made.origin.backend == "ort:graph=canonical,threads=1"
    assert "onnxruntime" in made.origin.versions
    made.require(tiny_bundle)
    feeds = list(made.feeds())
    specs = {spec.name: spec for spec in tiny_bundle.parts["unet"].inputs}
    assert all(set(feed) == set(specs) for feed in feeds)
    for name, array in feeds[0].items():
        assert array.dtype == specs[name].dtype
        assert len(array) == 1
    times = [float(feed["timestep"][0]) for feed in feeds]
    # The first and the last of four timesteps, for each image.
    assert times[0] == times[2] > times[1] == times[3]
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    scheduler = tiny_bundle.scheduler()
    scheduler.set_timesteps(4)
    first = scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])
    assert torch.allclose(torch.from_numpy(feeds[0]["sample"]).float(), first, atol=2e-3)
    assert "2 of 4 calls: a fox" in said[0]


def test_it_goes_on_where_it_was_cut_off(
    tiny_bundle: Bundle, backend: Backend, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    asked = {"prompts": PROMPTS, "steps": 1, "random_weights": True}
    record(tiny_bundle, backend, whole, **asked, say=lambda line: None)  # type: ignore[arg-type]
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(tiny_bundle, backend, cut, **asked, say=interrupt)  # type: ignore[arg-type]
    assert not cut.exists()
    again: list[str] = []
    record(tiny_bundle, backend, cut, **asked, say=again.append)  # type: ignore[arg-type]
    assert ["is recorded already" in line for line in again] == [True, True, False]
    assert Calibration.open(cut).hash == Calibration.open(whole).hash
    assert {path.name for path in tmp_path.iterdir()} == {cut.name, whole.name}
    record(tiny_bundle, backend, cut, **asked, say=again.append)  # type: ignore[arg-type]
    assert "is there already (3 samples)" in again[-1]


def test_both_halves_of_a_guided_call_are_samples() -> None:
    call = {
        "sample": torch.arange(2.0).reshape(2, 1),
        "timestep": torch.tensor([999.0]),
        "encoder_hidden_states": torch.zeros(2, 3),
    }
    half, full = torch.float16, torch.float32
    dtypes = {"sample": half, "timestep": full, "encoder_hidden_states": half}
    found = rows([call, call], dtypes)
    assert found["sample"].flatten().tolist() == [0, 1, 0, 1]
    assert found["timestep"].tolist() == [999.0] * 4
    assert found["sample"].dtype == torch.float16
    assert found["timestep"].dtype == torch.float32


def test_random_weights_are_refused_unless_asked_for(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="nothing to calibrate on") as caught:
        record(tiny_bundle, OrtBackend(PLAIN), tmp_path / "c.safetensors")
    assert "--random-weights" in caught.value.next
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("ort:precision=int8", "use --backend ort"),
        ("ort:context=split", "use --backend ort:context=inline"),
        ("trt", "use --backend trt:context=inline"),
    ],
)
def test_a_unet_that_is_not_the_bundles_is_refused(
    text: str, instead: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="neither quantised nor split") as caught:
        record(tiny_bundle, parse_backend(text), tmp_path / "c.safetensors", random_weights=True)
    assert caught.value.next == instead


def test_the_command_reads_prompts_and_says_where_the_file_is(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a fox\n\na hen\n")
    argv = ["--model", str(tiny_bundle.path), "--backend", "ort:graph=canonical,threads=1"]
    argv += ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "1"]
    assert shell(main, argv) == 2
    assert shell(main, [*argv, "--random-weights"]) == 0
    out = calibration_path(tiny_bundle)
    assert f"{out}: 2 samples" in capsys.readouterr().out
    # The file of another model, where this one's is looked for.
    content = out.read_bytes().replace(tiny_bundle.parts["unet"].hash.encode(), b"0" * 64)
    out.write_bytes(content)
    assert META.encode() in content
    assert shell(main, [*argv, "--random-weights"]) == 2
    assert "is not of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--prompts", "none.txt"], "cannot be read"), (["--keep", "0"], "keeps nothing")],
)
def test_what_cannot_be_recorded_is_refused(
    argv: list[str], words: str, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model", str(tiny_bundle.path), "--random-weights", "--out", "unused.safetensors"]
    assert shell(main, [*base, *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_recorder_is_the_session_that_it_wraps() -> None:
    class Doubling(Session):
        """A test double of a session."""

        closed = waited = False

        def __init__(self) -> None:
            self.inputs = self.outputs = {"x": Spec("x", "float32", (2,))}

        def _run(self, inputs: object) -> dict[str, torch.Tensor]:
            return {"y": 2 * inputs["x"]}  # type: ignore[index]

        def synchronize(self) -> None:
            self.waited = True

        def close(self) -> None:
            self.closed = True

    inner = Doubling()
    with CallRecorder(inner) as recorder:
        x = torch.ones(2)
        assert torch.equal(recorder.run({"x": x})["y"], 2 * torch.ones(2))
        x.zero_()  # a caller may write to its buffers again
        recorder.synchronize()
        ((kept, outputs),) = recorder.calls
    assert kept["x"].tolist() == [1, 1]
    assert outputs["y"].tolist() == [2, 2]
    assert inner.waited
    assert inner.closed
