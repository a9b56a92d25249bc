"""`addbench load`: LoadGen in a child, its figures beside ours, typists, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.commands.load import main
from bench.traffic.figures import agrees, figures_of, mean_of_md1, percentile, read_samples
from core.cli import run
from core.files import ROOT
from export.bundle import Bundle

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
    assert record["provenance"] == "measured"
    assert record["environment"]["cores_logical"]
    assert record["bundle_hash"] == tiny_bundle.hash
    assert (folder / "01-single-stream" / "mlperf_log_detail.txt").stat().st_size
    assert "not MLPerf-compliant" in capsys.readouterr().out


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
