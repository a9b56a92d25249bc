"""`addbench load`: LoadGen in a child, its figures beside ours, typists, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.commands.load import main
from bench.commands.show import main as show
from bench.limits.ledger import Claim, Ours, mismatches, read_claims
from bench.rows.cell import Cell
from bench.rows.store import now_utc, open_run
from bench.traffic.figures import agrees, figures_of, mean_of_md1, percentile, read_samples
from bench.traffic.rows import LoadRun
from core.cli import run
from core.files import ROOT
from export.bundle import Bundle
from tests.bench import made

SLEEPER = """
import json, sys, time
from bench.traffic import generator
job = json.loads(sys.argv[1])
def sleeper(job):
    def draw(prompt, seed):
        time.sleep(job["sleep_s"])
        return 500 if seed % job["fail_every"] == 0 else 200
    return lambda: draw
generator.in_process = sleeper
generator.run(job)
"""
"""LoadGen over something that sleeps: a test double of a pipeline."""


def generated(folder: Path, scenario: str, **rest: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    pytest.importorskip("mlperf_loadgen", reason="the extra `load` is not installed")
    job = {
        "scenario": scenario, "folder": str(folder), "sut": "pipeline", "captions": ["a"],
        "seconds": 0.5, "requests": 64, "seeds": [1, 2, 3], "steps": 1, "decoder": None,
        "sleep_s": 0.005, "fail_every": 10**9, **rest,
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", SLEEPER, json.dumps(job)], cwd=ROOT, check=True)
    return job, figures_of(job, folder)


def test_single_stream_is_one_after_the_other(tmp_path: Path) -> None:
    _, figures = generated(tmp_path, "single-stream")
    samples = read_samples(tmp_path)
    assert figures["samples"] == len(samples) >= 64
    assert figures["p50_ms"] >= 5.0
    assert all(after["issued_ns"] >= before["done_ns"] for before, after in pairwise(samples))
    assert figures["apart"].keys() == {"p50", "p90"}
    assert "another model" in figures["mlperf"][0]
    assert any("600 s are asked for" in words for words in figures["mlperf"])


def test_offline_gives_everything_at_once(tmp_path: Path) -> None:
    _, figures = generated(tmp_path, "offline", fail_every=7)
    issued = {sample["issued_ns"] for sample in read_samples(tmp_path)}
    assert len(issued) == 1
    assert figures["failed"] > 0
    assert 0 < figures["per_second"] < 200


class Narrow(BaseHTTPRequestHandler):
    """A server that has room for two requests at once, and refuses the others for a while."""

    protocol_version = "HTTP/1.1"
    room = threading.Semaphore(2)
    refused = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        entered = self.room.acquire(blocking=False)
        if entered:
            time.sleep(0.01)
            self.room.release()
        else:
            Narrow.refused += 1
        self.send_response(200 if entered else 429)
        self.send_header("Content-Length", "0")
        self.send_header("Retry-After", "1")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("scenario", ["offline", "server"])
def test_a_refused_request_asks_again_but_for_a_server_under_load(
    tmp_path: Path, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Narrow.refused = 0
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 256)
    with ThreadingHTTPServer(("127.0.0.1", 0), Narrow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sut = f"http://127.0.0.1:{server.server_address[1]}"
        more = {"rate": 500.0, "limit_s": 0.1} if scenario == "server" else {}
        _, figures = generated(tmp_path, scenario, sut=sut, requests=200, **more)
        server.shutdown()
    assert Narrow.refused > 0
    assert figures["samples"] >= 200
    assert figures["failed"] == (Narrow.refused if scenario == "server" else 0)


def test_a_server_that_is_asked_for_too_much_shows_it(tmp_path: Path) -> None:
    _, figures = generated(tmp_path, "server", rate=400.0, limit_s=0.02, sleep_s=0.01, seconds=1.0)
    assert not figures["within_limit"]
    assert figures["planned_p99_ms"] > 100
    assert not figures["loadgen_valid"]


def test_figures_that_are_apart_are_told_apart() -> None:
    assert agrees({"apart": {"p50": 0.009}})
    assert not agrees({"apart": {"p50": 0.001, "p90": 0.011}})
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0.5, 0.9)] == [3.0, 4.0]


def test_queueing_theory() -> None:
    assert mean_of_md1(59, 10.2) == pytest.approx(18.0, abs=0.1)
    assert mean_of_md1(0.001, 10) == pytest.approx(10, rel=1e-3)


@pytest.mark.slow
def test_the_harness_is_right_about_a_queue_whose_mean_is_known(tmp_path: Path) -> None:
    job, figures = generated(tmp_path, "server", rate=60.0, limit_s=1.0, sleep_s=0.01, seconds=60.0)
    expected = mean_of_md1(job["rate"], figures["service_ms"])
    assert figures["planned_mean_ms"] == pytest.approx(expected, rel=0.1)


def test_a_pipeline_with_its_image_check(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlperf_loadgen", reason="the extra `load` is not installed")
    argv = ["single-stream", "--model", str(tiny_bundle.path), "--backend", "null", "--for", "1s",
            "--runs", str(tmp_path)]  # fmt: skip
    code = run(main, argv)
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "load.json").read_text())
    (figures,) = record["measurements"]
    assert code == (0 if figures["agrees"] else 4)
    assert figures["image_check"]["status"] == "ok"
    opened = open_run("latest", tmp_path)
    assert opened.header.environment["cores_logical"]
    assert opened.header.command[:3] == ["addbench", "load", "single-stream"]
    (row,) = opened.rows()
    assert row["status"] == ("ok" if figures["agrees"] else "failed")
    assert (row["backend"], row["scenario"]) == ("null", "single-stream")
    assert (row["provenance"], row["bundle_hash"]) == ("measured", tiny_bundle.hash)
    assert row["image_check"]["status"] == "ok"
    assert len(row["samples_ms"]) == figures["samples"]
    assert row["median_ms"] == pytest.approx(figures["p50_ms"], rel=0.05)
    assert row["images_per_s"] == figures["per_second"]
    assert row["period_ms"] is None
    assert not opened.missing()
    assert (folder / "01-single-stream" / "mlperf_log_detail.txt").stat().st_size
    assert "not MLPerf-compliant" in capsys.readouterr().out


def test_every_measurement_is_a_row_of_its_own_cell(tiny_bundle: Bundle, tmp_path: Path) -> None:
    load_run = LoadRun(
        tiny_bundle, "null:unet_ms=3", tmp_path, ["addbench", "load"], decoder="taesd", steps=1,
        seconds=1.0, requests=3, provenance="measured", served={"id": "x"},
    )  # fmt: skip
    good: dict[str, Any] = {"ok": True, "failed": 0, "per_second": 50.0}
    load_run.keep("offline", [9.0, 10.0, 12.0], good, now_utc())
    load_run.keep("server 20/s", [9.0, 10.0, 12.0], good | {"per_second": 19.0}, now_utc())
    load_run.keep("server 40/s", [9.0], good | {"ok": False, "failed": 4}, now_utc())
    wrong = {"status": "mismatch", "psnr_db": 9.1, "ssim": 0.1}
    load_run.keep("single-stream", [9.0], good | {"ok": False, "image_check": wrong}, now_utc())
    opened = open_run("latest", tmp_path)
    rows = {row["scenario"]: row for row in opened.rows()}
    assert set(rows) == {f"{name} over http" for name in
                         ("offline", "server 20/s", "server 40/s", "single-stream")}  # fmt: skip
    assert len(opened.plan) == 4
    assert not opened.missing()
    offline = rows["offline over http"]
    assert (offline["median_ms"], offline["period_ms"], offline["options"]) == (
        10.0, 20.0, "unet_ms=3"
    )  # fmt: skip
    assert rows["server 20/s over http"]["period_ms"] is None
    assert rows["server 40/s over http"]["error"]["what"] == "4 requests were refused or failed"
    assert rows["single-stream over http"]["status"] == "mismatch"
    assert str(Cell.of(offline)).endswith("offline over http")
    # What shows and compares runs reads them.
    for form in ("table", "csv", "json", "page"):
        assert run(show, [opened.name, "--runs", str(tmp_path), "--as", form,
                          "--out", str(tmp_path / f"out.{form}")]) in (0, 4), form  # fmt: skip


def test_a_period_under_full_load_answers_a_claim_about_periods() -> None:
    claim = next(claim for claim in read_claims() if claim.metric == "period")
    cell = made.cell(size=f"{claim.size}x{claim.size}", steps=claim.steps or 1,
                  batch=claim.batch or 1, decoder=claim.decoder or "vae",
                  precision=claim.precision or "fp16")  # fmt: skip
    other = next(claim for claim in read_claims() if claim.metric == "latency")

    def differs(claim: Claim, scenario: str) -> bool:
        ours = Ours(claim.hardware, replace(cell, scenario=scenario), "run", 9.0, 8.0, None, None)
        return "scenario" in mismatches(claim, ours)

    assert [differs(claim, name) for name in ("", "offline", "server 9/s")] == [False, False, True]
    assert [differs(other, name) for name in ("", "offline", "single-stream")] == [
        False, True, True
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["typists"], "typists need a server"),
        (["server"], "there is no rate"),
        (["offline", "--rate", "5"], "do not fit"),
        (["server", "--rate", "5", "--find-peak"], "do not fit"),
        (["server", "--rate", "0"], "requests a second"),
        (["offline", "--sut", "http://127.0.0.1:9"], "is not ready"),
        (["offline", "--sut", "ftp://x"], "is no server"),
        (["offline", "--sut", "http://203.0.113.7:8000"], "is another machine"),
        (["offline", "--for", "5"], "with its unit"),
        (["offline", "--backend", "null:usable=0"], "cannot be used"),
    ],
)
def test_refusals_write_nothing(
    argv: list[str],
    words: str,
    tiny_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rest = ["--model", str(tiny_bundle.path), "--runs", str(tmp_path)]
    assert run(main, [*argv, *rest]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
