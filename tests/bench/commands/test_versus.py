"""`addbench versus`: pairs in words, the order of rounds, what the runs say; then a real pair that
is killed in the middle.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made import cell, gone, make_run, row

from bench.commands import versus
from bench.commands.arguments import axes_of_keys, keys_of
from bench.commands.publish import main as publish_main
from bench.limits.ledger import read_claims
from bench.machine import environment
from bench.rows import stats
from bench.rows.cell import Cell
from bench.rows.store import HEADER, Run, open_run, run_names
from bench.run import pair, plan, resume, spawn
from bench.run.request import Request
from bench.sweep import main as sweep_main
from bench.verdict.pairs import PAIRS
from core.cli import run as shell
from core.errors import PreconditionError
from core.files import ROOT, write_json
from export.bundle import Bundle

# ---- a cell in words


def test_a_cell_in_words_is_a_request() -> None:
    keys = keys_of(
        "sd15 steps=20 backend=ort:threads=2,level=all", {"decoder": "vae", "steps": "1"}
    )
    asked = Request(**axes_of_keys(keys))
    assert asked.model == "sd15"
    assert (asked.steps, asked.decoders) == ((20,), ("vae",))
    assert asked.backends == ("ort:threads=2,level=all",)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "names no model"),
        ("steps=1", "names no model"),
        ("tiny-sdxl 4", "'4'"),
        ("tiny-sdxl steps=", "'steps='"),
        ("tiny-sdxl rounds=3", "'rounds=3'"),
        ("tiny-sdxl resume=latest", "'resume=latest'"),
        ("tiny-sdxl steps=many", "steps=many"),
    ],
)
def test_what_is_no_spec(spec: str, words: str) -> None:
    with pytest.raises(PreconditionError, match=words):
        axes_of_keys(keys_of(spec, {}))


def test_ready_made_pairs_are_cells_of_models_with_published_figures() -> None:
    claims = {claim.id for claim in read_claims()}
    models = {}
    for name, ready in PAIRS.items():
        asked = [Request(**axes_of_keys(keys_of(each, {}))) for each in (ready.base, ready.head)]
        models[name] = [each.model for each in asked]
        assert len(asked[0].steps) == 1
        assert {each.size for each in asked} == {(512, 512)}
        assert set(ready.published) <= claims
    assert models == {
        "sd15-vs-turbo": ["sd15", "sdxl-turbo"],
        "sdxl-vs-turbo": ["sdxl-base", "sdxl-turbo"],
    }


# ---- whole pairs, on scripted workers


class Workers:
    """Stands in for `spawn.results`: a test double of all worker processes.

    A step takes 10 ms by default, and what is paid once an image 20 ms.
    """

    def __init__(self) -> None:
        self.jobs: list[tuple[int, int, bool]] = []
        self.step_ms: Callable[[Cell], float] = lambda _: 10.0
        self.status: Callable[[Cell, int], str] = lambda _cell, _round: "ok"
        self.stop_after = 1_000

    def __call__(self, job: spawn.Job, limits: spawn.Limits, view: Any) -> Iterator[Any]:
        if len(self.jobs) == self.stop_after:
            raise KeyboardInterrupt
        self.jobs.append((job.cells[0].steps, job.round, job.rule.single))
        for each in job.cells:
            status = self.status(each, job.round)
            if status != "ok":
                yield each, {"status": status, "error": {"what": "scripted"}}
                continue
            wobble = 1 + 0.01 * (job.round % 3)
            steps = [self.step_ms(each) * (1 + 0.002 * (-1) ** n) for n in range(each.steps)]
            call = (sum(steps) + 20) * wobble
            yield (
                each,
                {
                    "status": "ok",
                    **vars(stats.summarise([call], each.batch)),
                    "samples_ms": [call],
                    "cold_ms": 30.0,
                    "nfe": each.steps,
                    "stages_ms": {},
                    "stages_samples_ms": {"unet": [steps]},
                    "flags": ["single_sample"] if job.rule.single else [],
                },
            )


@pytest.fixture(scope="module")
def machine() -> dict[str, Any]:
    """What the environment is: asking takes a second."""
    return environment.collect()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any]) -> Workers:
    scripted = Workers()
    monkeypatch.setattr(spawn, "results", scripted)
    for module in (plan, resume):
        monkeypatch.setattr(module, "collect", lambda: machine)
    monkeypatch.setattr(pair, "survey", lambda _: None)
    return scripted


@pytest.fixture
def compare(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    """Run bench.commands.versus on the tiny bundle; exit code, and the JSON or what went wrong."""

    def run(*arguments: str, base: str = "steps=40", head: str = "steps=1,2") -> tuple[int, Any]:
        words = list(arguments)
        for name, spec in {"base": base, "head": head}.items():
            words += [f"--{name}", f"{tiny_bundle.path} {spec}"]
        words += ["--backend", "null", "--out", str(tmp_path), "--format", "json"]
        code = shell(versus.main, words)
        seen = capsys.readouterr()
        return code, json.loads(seen.out) if seen.out.startswith("{") else seen.out + seen.err

    return run


def measured(found: Any) -> list[dict[str, Any]]:
    return [figure for figure in found["ratios"] if figure["kind"] == "latency"]


def pair_in(out: Path) -> tuple[Run, Run]:
    base, head = [open_run(name, out) for name in run_names(out)]
    return base, head


def slow_before(out: Path, bundle: Bundle, wanted: dict[int, float]) -> None:
    """An earlier run of this machine that says how many ms a call of each step count takes."""
    usual = {"decoder": "vae", "storage": bundle.dtype, "scheduler": bundle.scheduler_name}
    rows = [row(cell(steps=steps, **usual), [ms]) for steps, ms in wanted.items()]
    earlier = make_run(out / "earlier", rows)
    header = earlier.header.as_json() | {"environment": environment.collect()}
    write_json(earlier.path / HEADER, header)
    (out / "earlier" / earlier.name).rename(out / earlier.name)
    (out / "earlier").rmdir()


def test_rounds_alternate_and_the_ratio_has_an_interval(
    workers: Workers, compare: Any, tmp_path: Path
) -> None:
    code, found = compare("--rounds", "5")
    assert code == 0, found
    orders = [steps for steps, _, _ in workers.jobs]
    assert orders == [40, 1, 1, 40, 40, 1, 1, 40, 40, 1]
    one, two = measured(found)
    assert one["ratio"] == pytest.approx(420 / 30.02, rel=1e-3)
    assert two["ratio"] == pytest.approx(420 / 40, rel=1e-3)
    assert one["low"] <= one["ratio"] <= one["high"]
    assert one["provenance"] == "measured"
    flops = [figure for figure in found["ratios"] if figure["kind"] == "flops"]
    assert [figure["provenance"] for figure in flops] == ["modelled", "modelled"]
    gflop = pair_in(tmp_path)[0].header.versus["gflop"]
    once = gflop["text"] + gflop["decode"]
    expected = (once + 40 * gflop["unet"]) / (once + 2 * gflop["unet"])
    assert flops[1]["ratio"] == pytest.approx(expected, rel=1e-6)
    assert min(gflop.values()) > 0
    assert [run.header.versus["side"] for run in pair_in(tmp_path)] == ["base", "head"]


def test_a_call_of_minutes_is_one_sample_in_the_middle(
    workers: Workers, compare: Any, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    slow_before(tmp_path, tiny_bundle, {40: 200_000.0, 1: 40.0, 2: 50.0})
    code, found = compare("--rounds", "6")
    assert code == 0, found
    assert [(steps, single) for steps, _, single in workers.jobs] == [
        *[(1, False)] * 3,
        (40, True),
        *[(1, False)] * 3,
    ]
    figure = measured(found)[0]
    assert 0 < figure["low"] < figure["ratio"] < figure["high"]
    assert "one sample of base" in figure["note"]
    assert found["cells"][0]["single_sample"]
    assert any("ten means of neighbours" in note for note in found["notes"])


def test_a_single_call_of_one_step_has_no_interval(
    workers: Workers, compare: Any, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    slow_before(tmp_path, tiny_bundle, {40: 200_000.0, 1: 170_000.0, 2: 180_000.0})
    code, found = compare()
    assert code == 5
    assert len(workers.jobs) == 2
    one, two = measured(found)
    assert one["low"] is None
    assert "no spread" in one["note"]
    assert two["low"] < two["ratio"] < two["high"]


def test_dry_run_says_what_it_would_take(
    workers: Workers, compare: Any, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    slow_before(tmp_path, tiny_bundle, {40: 200_000.0, 1: 40.0, 2: 50.0})
    code, text = compare("--dry-run")
    assert code == 0
    assert not workers.jobs
    assert len(run_names(tmp_path)) == 1
    assert text.count("base round") == 1
    assert text.count("head round") == 12
    assert "one sample" in text
    assert "not measured now" in text


def test_what_was_interrupted_is_gone_on_with(
    workers: Workers, compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # headers hold paths below the checkout only
    workers.stop_after = 4
    code, text = compare("--rounds", "5")
    assert code == 130
    base, head = pair_in(tmp_path)
    assert f"--resume {head.name}" in text
    kept = [len(run.all_rows()) for run in (base, head)]
    assert kept == [2, 4]
    assert shell(sweep_main, ["--resume", head.name, "--out", str(tmp_path)]) == 2
    code, text = compare("--resume", head.name, "--rounds", "5")
    assert code == 2
    assert "keeps the settings" in text
    words = ["--resume", head.name, "--out", str(tmp_path)]
    assert shell(versus.main, words) == 2  # the bundle was named by its path
    workers.stop_after = 1_000
    code, found = compare("--resume", base.name)  # either one's name will do
    assert code == 0, found
    assert len(workers.jobs) == 10
    assert [len(run.all_rows()) for run in (base, head)] == [5, 10]
    code, again = compare("--resume", "latest")  # nothing is left: the figures again
    assert (code, again) == (0, found)
    assert len(workers.jobs) == 10


def test_a_failed_round_is_told_and_measured_again(
    workers: Workers, compare: Any, tmp_path: Path
) -> None:
    workers.status = lambda each, round_: "oom" if (each.steps, round_) == (2, 3) else "ok"
    code, found = compare("--rounds", "6")
    assert code == 4
    assert any("oom (1 of 6)" in note for note in found["notes"])
    assert measured(found)[1]["low"] is not None  # five rounds have both sides
    workers.status = lambda *_: "ok"
    code, found = compare("--resume")
    assert code == 0
    assert len(workers.jobs) == 13


def test_the_budget_ends_it_with_what_there_is(
    workers: Workers, compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(each: Cell) -> float:
        now[0] += 10.0
        return 10.0

    workers.step_ms = slow
    code, found = compare("--budget", "1", head="steps=2")
    assert code == 4
    assert len(workers.jobs) < 10
    assert any("rounds are missing" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("arguments", "sides", "words"),
    [
        (["--rounds", "4"], {}, "too few"),
        ([], {"head": "steps=40"}, "same cell"),
        ([], {"base": "steps=1,2", "head": "steps=4"}, "the base is one cell"),
        ([], {"head": "steps=1 flavour=mint"}, "--head: 'flavour=mint'"),
        ([], {"head": "steps=1 decoder=jpeg"}, "jpeg"),
        (["--pair", "sd15-vs-turbo"], {}, "--pair stands for both"),
    ],
)
def test_preconditions(
    workers: Workers, compare: Any, arguments: list[str], sides: dict[str, str], words: str
) -> None:
    code, text = compare(*arguments, **sides)
    assert code == 2
    assert words in text
    assert not workers.jobs


def test_nothing_to_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert shell(versus.main, []) == 2
    assert "--pair" in capsys.readouterr().err
    other = make_run(tmp_path, [row(cell(), [1.0])])
    assert shell(versus.main, ["--resume", other.name, "--out", str(tmp_path)]) == 2
    assert "not of `addbench versus`" in capsys.readouterr().err


def test_the_published_ratio_stands_beside_with_its_hardware(
    workers: Workers, compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("--rounds", "5")[0] == 0
    base, head = pair_in(tmp_path)
    header = head.header.as_json()
    header["versus"]["pair"] = "sd15-vs-turbo"
    write_json(head.path / HEADER, header)
    assert shell(versus.main, ["--resume", "--out", str(tmp_path), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "published" in line]
    assert [word.strip() for word in line.split("|")[2:8]] == [
        "published", "a10g", "1,200 ms", "180 ms", "6.70", "-",
    ]  # fmt: skip
    assert text.count("| measured") == text.count("| modelled") == 2
    assert shell(versus.main, ["--resume", base.name, "--out", str(tmp_path)]) == 0
    assert "base / head" in capsys.readouterr().out


def test_a_published_pair_shows_its_ratios(workers: Workers, compare: Any, tmp_path: Path) -> None:
    assert compare("--rounds", "5")[0] == 0
    base, head = pair_in(tmp_path)
    sweep = make_run(tmp_path, [row(cell(), [1.0, 1.1, 1.2])])
    results, readme = tmp_path / "results", tmp_path / "README.md"
    readme.touch()
    place = ["--runs", str(tmp_path), "--results", str(results), "--pages", str(readme)]
    for run in (sweep, base, head):
        assert shell(publish_main, [run.name, *place]) == 0
    blocks = [f"<!-- results{name} -->\n<!-- /results -->\n" for name in (f" {head.name}", "")]
    readme.write_text("".join(blocks))
    assert shell(publish_main, place) == 0
    named, newest = readme.read_text().split("<!-- /results -->\n")[:2]
    assert "base / head" in named
    assert f"tables/{sweep.name}.md" in newest
    assert "base / head" in (results / "tables" / f"{head.name}-versus.md").read_text()
    assert shell(publish_main, ["--check", *place]) == 0


# ---- real workers, and a kill


def test_killed_in_the_middle_it_keeps_what_is_finished(
    tiny_bundle: Bundle, workers: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two calls a cell: the head's second cell hangs in its real worker, and is resumed on the
    scripted ones."""
    backend = "null:at=2,fail=hang"
    usual = {"decoder": "vae", "storage": tiny_bundle.dtype, "options": "at=2,fail=hang",
             "scheduler": tiny_bundle.scheduler_name}  # fmt: skip
    rows = [row(cell(steps=steps, **usual), [200_000.0]) for steps in (2, 3, 4)]
    header = make_run(tmp_path, rows).header.as_json()
    header["environment"] = environment.collect()
    write_json(tmp_path / header["run"] / HEADER, header)
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "addbench", "versus", "--backend", backend,
             "--out", str(tmp_path),
             "--base", f"{tiny_bundle.path} steps=4", "--head", f"{tiny_bundle.path} steps=2,3"],
            cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        until = time.monotonic() + 180
        while "[2/3]" not in log.read_text():
            assert time.monotonic() < until, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        pids = [int(pid) for pid in children.read_text().split()]
        process.kill()
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert pids
    assert all(gone(pid) for pid in pids)
    capsys.readouterr()
    sides = {"base": "steps=4", "head": "steps=2,3"}
    specs = {name: f"{tiny_bundle.path} {steps} backend={backend}" for name, steps in sides.items()}
    words = [word for name, spec in specs.items() for word in (f"--{name}", spec)]
    code = shell(versus.main, ["--resume", "--out", str(tmp_path), "--format", "json", *words])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, found
    assert workers.jobs == [(3, 0, True)]
    assert [each["samples"] for each in found["cells"]] == [1, 1, 1]
    assert all(each["single_sample"] for each in found["cells"])
    assert all(figure["low"] for figure in measured(found))
    (*_, base, head) = [open_run(name, tmp_path) for name in run_names(tmp_path)]
    (one,) = base.all_rows()
    assert (one["nfe"], len(one["stages_samples_ms"]["unet"][0]), one["warmup_calls"]) == (4, 4, 0)
    assert one["flags"][0] == "single_sample"
    assert one["image_check"]["status"] == "ok"
    assert [each["steps"] for each in head.all_rows()] == [2, 3]
