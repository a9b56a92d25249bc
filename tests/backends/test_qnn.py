"""The emulated NPU: what it takes, how far it is from FP32, and that it never shows a time.

Most of it needs the package `onnxruntime-qnn`, which `make install` brings.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from backends import qnn
from backends.__main__ import main as backends_main
from backends.base import BackendError, Shapes, UnsupportedError
from backends.check.parity import seeded_inputs
from backends.pipeline.pipeline import Pipeline
from backends.registry import parse_backend
from bench.rows.fields import FIGURES, NUMERICS
from bench.rows.store import Run, check_row, open_run
from bench.show.export import smaller_is_better
from bench.show.table import EMULATED_WORDS, markdown
from bench.sweep import main as sweep_main
from bench.verdict.compare import gather, judge
from core.errors import EXIT_OK, AddbenchError, PreconditionError
from export.bundle import Bundle
from export.lower import CANONICAL
from export.models import PARTS

emulation = pytest.mark.skipif(
    not parse_backend("qnn").probe().usable, reason=parse_backend("qnn").probe().what
)
BOUND = 2.5e-3
"""Relative L2 error of a part against torch FP32. Found: 0.0005 for the text encoders, 0.0008 for
the UNet, 0.0012 for TAESDXL, 0.0013 for the VAE; FP16 rounds by 0.0005 (2**-11)."""
LEAST = 1e-4
"""FP32 kernels of the CPU are off by 1e-6 at most: a smaller error would not be the emulation's."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own: every part is compiled once, here."""
    folder = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDBENCH_BUILD", str(folder))
        yield folder


def pipeline(name: str, bundle: Bundle, decoder: str = "taesd") -> Pipeline:
    return parse_backend(name).pipeline(bundle, decoder, Shapes(1, *bundle.size))


@emulation
@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_taken_whole_and_close_to_fp32(
    part: str, tiny_bundle: Bundle, build: Path
) -> None:
    inputs = seeded_inputs(tiny_bundle.parts[part].inputs, torch.Generator().manual_seed(0))
    with pipeline("qnn", tiny_bundle) as emulated, pipeline("torch", tiny_bundle) as reference:
        artifact = emulated.backend.compile(tiny_bundle, part, Shapes(1, *tiny_bundle.size))
        assert artifact.path is not None
        # One node, of Qualcomm's binary: nothing was left to the CPU (loading refuses it, too).
        graph = onnx.load(artifact.path / "model.onnx").graph
        assert [(node.op_type, node.domain) for node in graph.node] == [
            ("EPContext", "com.microsoft")
        ]
        found, expected = emulated.run(part, **inputs), reference.run(part, **inputs)
    for name, wanted in expected.items():
        error = float((found[name].float() - wanted).norm() / wanted.norm())
        assert LEAST < error < BOUND, (name, error)


@emulation
def test_the_images_of_a_batch_do_not_meet(tiny_bundle: Bundle, build: Path) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with pipeline("qnn", tiny_bundle) as emulated:
        both = emulated.decode(latents)
        alone = emulated.decode(latents[1:])
        again = emulated.backend.compile(tiny_bundle, "taesd_decoder", Shapes(2, 64, 64))
    assert both.shape == (2, 3, *tiny_bundle.size[::-1])
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[:1], alone)
    assert again.cached, "one artifact serves every batch"


@emulation
def test_a_refused_part_names_its_operator(
    tiny_bundle: Bundle,
    build: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    canonical = replace(CANONICAL, batch=1)
    monkeypatch.setattr(
        qnn.QnnBackend, "profile", lambda _, part: canonical if part == "vae_decoder" else qnn.HTP
    )
    with pytest.raises(BackendError, match="not take vae_decoder: GroupNormalization of float16"):
        parse_backend("qnn").compile(tiny_bundle, "vae_decoder", Shapes(1, 64, 64))
    command = ["parts", "--backend", "qnn", "--model", str(tiny_bundle.path)]
    assert backends_main(command) == EXIT_OK
    said = capsys.readouterr().out
    assert "never a speed, and not a Cloud AI 100's" in said
    states = {words[0]: words[1] for line in said.splitlines() if (words := line.split())}
    assert {part: states[part] for part in PARTS} == {
        **dict.fromkeys(PARTS, "taken"),
        "vae_decoder": "refused:",
    }
    assert "GroupNormalization" in said


@emulation
def test_fp32_bundles_are_refused(tiny_bundle: Bundle, build: Path) -> None:
    wide = copy.copy(tiny_bundle)
    wide.manifest = {**tiny_bundle.manifest, "dtype": "fp32"}
    with pytest.raises(UnsupportedError, match="--dtype fp16"):
        qnn.QnnBackend()._compile(wide, "taesd_decoder", Shapes(1, 64, 64), build)


@pytest.fixture(scope="module")
def emulated_run(tiny_bundle: Bundle, build: Path) -> Run:
    out = build / "runs"
    arguments = ["--model", str(tiny_bundle.path), "--out", str(out), "--backend", "qnn"]
    assert sweep_main([*arguments, "--steps", "1", "--decoder", "taesd"]) == EXIT_OK
    return open_run("latest", out)


@emulation
def test_a_sweep_gives_numerics_and_no_time(emulated_run: Run) -> None:
    (row,) = emulated_run.rows()
    assert (row["status"], row["provenance"]) == ("ok", "emulated")
    assert (row["device"], row["precision"], row["nfe"]) == ("htp-emulated", "fp16", 1)
    assert row["image_check"]["status"] == "ok"
    assert row["image_check"]["psnr_db"] > 45  # found: 58.7
    assert {name: row[name] for name in FIGURES if name not in NUMERICS} == {
        name: empty for name, empty in FIGURES.items() if name not in NUMERICS
    }
    assert emulated_run.header.roofline is None
    table = (emulated_run.path / "table.md").read_text()
    assert "provenance emulated" in table
    assert EMULATED_WORDS in table
    assert "(ms)" not in table
    assert "(s)" not in table


@emulation
def test_a_row_of_an_emulation_with_a_time_is_no_row(emulated_run: Run) -> None:
    (row,) = emulated_run.rows()
    for name, value in {"median_ms": 3.0, "samples_ms": [3.0], "load_s": 1.0}.items():
        with pytest.raises(AddbenchError) as raised:
            check_row(json.loads(json.dumps(row | {name: value})), Path("rows.jsonl"), 1)
        assert f"no speed, and has {name}" in raised.value.why


@emulation
def test_nothing_makes_a_speed_of_it(emulated_run: Run) -> None:
    rows = emulated_run.rows()
    cells = gather(rows, "run")
    (line,) = judge(cells, cells, list(cells), 0.05)
    assert (line.verdict, line.ratio, line.base_ms) == ("inconclusive", None, None)
    assert "no speed" in line.reason
    with pytest.raises(PreconditionError, match="no cell"):
        smaller_is_better(emulated_run)
    measured = copy.deepcopy(rows[0]) | {"provenance": "measured", "backend": "ort", "batch": 2}
    assert "| emulated" in markdown(emulated_run, [*rows, measured], brief=True), "said per line"


@pytest.mark.parametrize(
    ("missing", "machine", "words"),
    [
        ("onnxruntime-qnn", "x86_64", "onnxruntime-qnn is missing"),
        ("onnxruntime", "x86_64", "onnxruntime is missing"),
        ("", "aarch64", "no emulation on linux aarch64"),
    ],
)
def test_where_it_cannot_be_used_it_says_why_and_what_next(
    missing: str, machine: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: machine)
    there = {"onnxruntime": "1.31.1", "onnxruntime-qnn": "2.7.0"}
    there.pop(missing, None)
    monkeypatch.setattr(qnn, "installed", there.get)
    found = parse_backend("qnn").probe()
    assert not found.usable
    assert words in found.what
    assert found.why
    assert found.next
