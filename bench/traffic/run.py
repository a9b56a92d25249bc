"""A measurement under load from what was asked to its folder: check, generate, judge, write."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from backends.check.gate import gate_for, image_distance
from backends.registry import parse_backend
from bench.rows.store import now_utc
from bench.traffic.figures import agrees, figures_of, read_samples, times_of
from bench.traffic.generator import IMAGE
from bench.traffic.rows import LoadRun
from core.errors import AddbenchError, PreconditionError
from core.files import ROOT, write_json
from distill.captions import captions
from export.bundle import Bundle, find_bundle

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SEEDS = (7, 11, 13)
"""LoadGen's own: of the library, of the samples, of the arrivals."""
RECORD = "load.json"
PEAK_RUNS = 8
SLACK = 5.0
"""The limit of the 99th percentile, in 90th percentiles of single-stream."""


@dataclass(frozen=True)
class Load:
    """What was asked for; see `bench/commands/load.py`."""

    scenario: str
    sut: str
    model: str
    weights: str | None
    dtype: str | None
    backend: str
    decoder: str | None
    steps: int | None
    rate: float | None
    limit_s: float | None
    seconds: float
    requests: int
    typists: int
    keys: int
    gap_s: float


def measure(load: Load, runs: Path, command: Sequence[str] = (), remote: bool = False) -> bool:
    """Measure, print and keep; whether nothing failed and LoadGen's figures agree.

    Args:
        runs: where the run's folder is made, which `addbench show` and the others read.
        command: as it was typed.

    Raises:
        PreconditionError: it cannot be measured here; nothing was written.
    """
    over_http = load.sut != "pipeline"
    bundle = find_bundle(load.model, load.weights, load.dtype)
    if not over_http:
        backend = parse_backend(load.backend)
        backend.probe().require(backend.name)
    if load.scenario != "typists" and find_spec("mlperf_loadgen") is None:
        raise PreconditionError(
            "LoadGen is not installed", "it is MLPerf's load generator, the extra `load`",
            "pip install -e '.[load]'",
        )  # fmt: skip
    served = check_server(load.sut, bundle, remote) if over_http else None
    steps = load.steps or bundle.steps
    worker = served["workers"][0] if served else {"backend": load.backend}
    load_run = LoadRun(
        bundle,
        worker["backend"],
        runs,
        command,
        decoder=load.decoder or next(iter(worker.get("decoders", ())), None),
        steps=steps,
        seconds=load.seconds,
        requests=load.requests,
        provenance="measured" if served is None else provenance_of(served),
        served=served,
    )
    folder = load_run.run.path
    record: dict[str, Any] = {
        "kind": "load",
        "time_utc": now_utc(),
        "asked": asdict(load),
        "server": served,
        "measurements": [],
    }

    def keep(figures: dict[str, Any], samples_ms: Sequence[float], begun: str) -> dict[str, Any]:
        # Each as it is done: nothing finished is lost.
        record["measurements"].append(figures)
        write_json(folder / RECORD, record)
        load_run.keep(scenario_of(figures), samples_ms, figures, begun)
        print(text_of(figures), flush=True)
        return figures

    if load.scenario == "typists":
        from bench.traffic.typists import type_all

        begun = now_utc()
        figures = type_all(load.sut, lines_of(bundle), load.typists, load.keys, load.gap_s)
        keep(figures, figures["samples_ms"], begun)
        print(folder)
        return bool(figures["ok"])

    run = Measuring(load, bundle, steps, folder, keep)
    if load.scenario != "server":
        good = run(load.scenario)["ok"]
    else:
        limit_s = load.limit_s
        if not limit_s:
            alone = run("single-stream")  # of few requests there is no p90
            limit_s = SLACK * (alone["p90_ms"] or alone["p50_ms"]) / 1e3
        if load.rate is not None:
            good = run("server", rate=load.rate, limit_s=limit_s)["ok"]
        else:
            offline = run("offline")
            good = run.find_peak(offline["per_second"], limit_s)
            from bench.traffic.plot import draw_knee

            draw_knee(record["measurements"], limit_s, folder / "load.svg")
    print(folder)
    return bool(good)


class Measuring:
    """Runs LoadGen in a child, once for each measurement."""

    def __init__(
        self,
        load: Load,
        bundle: Bundle,
        steps: int,
        folder: Path,
        keep: Callable[[dict[str, Any], Sequence[float], str], dict[str, Any]],
    ) -> None:
        self.load, self.bundle, self.steps, self.folder, self.keep = (
            load, bundle, steps, folder, keep,
        )  # fmt: skip
        self.count = 0

    def __call__(self, scenario: str, **more: float) -> dict[str, Any]:
        self.count += 1
        folder = self.folder / f"{self.count:02d}-{scenario}"
        folder.mkdir()
        known = self.bundle.references()
        job: dict[str, Any] = {
            "reference": known and {"prompt": known.prompt, "seed": known.seed},
            "scenario": scenario,
            "folder": str(folder),
            "sut": self.load.sut,
            "model": str(self.bundle.path),
            "backend": self.load.backend,
            "decoder": self.load.decoder,
            "steps": self.steps,
            "captions": lines_of(self.bundle),
            "seconds": self.load.seconds,
            "requests": self.load.requests,
            "seeds": SEEDS,
            **more,
        }
        begun = now_utc()
        generate(job, folder)
        figures = figures_of(job, folder) | {"image_check": self.image_check(folder)}
        figures["agrees"] = agrees(figures)
        # A server that is asked for more than it can must refuse some: that is no failure.
        failed = figures["failed"] and scenario != "server"
        check = figures["image_check"]["status"]
        figures["ok"] = figures["agrees"] and not failed and check != "mismatch"
        return self.keep(figures, times_of(scenario, read_samples(folder)), begun)

    def image_check(self, folder: Path) -> dict[str, Any]:
        """The reference's picture, drawn by what is under load, against torch in FP32."""
        from PIL import Image

        references, file = self.bundle.references(), folder / IMAGE
        decoder = self.load.decoder or "vae"
        if references is None or (decoder, self.steps) not in references.images:
            return {"status": "no_reference"}
        image = np.asarray(Image.open(file).convert("RGB"))
        distance = image_distance(image, references.images[decoder, self.steps])
        good = distance.passes(gate_for(self.bundle.dtype, "fp32", self.bundle.weights))
        return {
            "status": "ok" if good else "mismatch",
            "psnr_db": round(distance.psnr_db, 2),
            "ssim": round(distance.ssim, 5),
        }

    def find_peak(self, offline_rate: float, limit_s: float) -> bool:
        """Bisect for the highest rate whose 99th percentile stays below the limit."""
        low, high, good = 0.0, 1.2 * offline_rate, True
        for turn in range(PEAK_RUNS):
            rate = round(0.6 * offline_rate if turn == 0 else (low + high) / 2, 4)
            figures = self("server", rate=rate, limit_s=limit_s)
            good = good and figures["ok"]
            low, high = (rate, high) if figures["within_limit"] else (low, rate)
            if high - low < 0.02 * high:
                break
        shown = f"{low:.4g} images/s at p99 <= {1e3 * limit_s:.4g} ms" if low else "none"
        print(f"peak: {shown}; offline: {offline_rate:.4g} images/s")
        return good and low > 0


def generate(job: Mapping[str, Any], folder: Path) -> None:
    """Run LoadGen on a job.

    Raises:
        AddbenchError: it ended without a result.
    """
    log = folder / "generator.log"
    with log.open("wb") as stderr:
        done = subprocess.run(
            [sys.executable, "-m", "bench.traffic.generator"],
            input=json.dumps(job).encode(), stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT,
            check=False,
        )  # fmt: skip
    if done.returncode or done.stdout.strip() != b"done":
        raise AddbenchError(
            f"the load generator ended with {done.returncode}", f"its last words are in {log}",
            "mend what they say, and run it again",
        )  # fmt: skip


def lines_of(bundle: Bundle) -> list[str]:
    """What is drawn under load: held-out captions where the model has a grammar, else its own."""
    if bundle.model.judge == "shapes":
        return [caption.text for caption in captions(600, 1, True, {"full": 1.0})]
    return list(bundle.model.prompts)


def check_server(url: str, bundle: Bundle, remote: bool) -> dict[str, Any]:
    """What the server says of itself.

    Raises:
        PreconditionError: it is not there, not ready, not this machine's, or serves another bundle.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise PreconditionError(f"{url} is no server", "--sut is pipeline, or an address",
                                "pass --sut http://127.0.0.1:8000")  # fmt: skip
    if parts.hostname not in LOOPBACK and not remote:
        raise PreconditionError(f"{parts.hostname} is another machine", "load would hit whoever"
                                " uses it", "pass --remote where it is yours to load")  # fmt: skip
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=10):
            pass
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as answer:
            served: dict[str, Any] = json.loads(answer.read())["data"][0]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise PreconditionError(
            f"{url} is not ready", str(error), "start it with addbench serve, and wait for /health"
        ) from error
    if served.get("bundle") != bundle.hash:
        raise PreconditionError(
            f"{url} serves another bundle", f"it has {served.get('id')}, --model is {bundle.name}",
            "pass the --model that it was started with",
        )  # fmt: skip
    return served


def provenance_of(served: Mapping[str, Any]) -> str:
    kinds = {worker.get("provenance", "measured") for worker in served["workers"]}
    return "measured" if kinds == {"measured"} else ", ".join(sorted(kinds))


def scenario_of(figures: Mapping[str, Any]) -> str:
    """What a row calls a measurement."""
    scenario = str(figures["scenario"])
    if scenario == "typists":
        return f"typists {figures['typists']}"
    return f"server {figures['rate']:g}/s" if scenario == "server" else scenario


def text_of(figures: Mapping[str, Any]) -> str:
    """A measurement on a few lines."""
    if figures["scenario"] == "typists":
        return (
            f"{figures['typists']} typists, {figures['keys']} keys: p50 {figures['p50_ms']} ms,"
            f" p95 {figures['p95_ms']} ms from key to picture; server's own p50"
            f" {figures['server_ms']} ms; last text drawn {figures['last_drawn']} of"
            f" {figures['typists']}, ids in order: {figures['in_order']}"
        )
    rate = f" at {figures['rate']:g}/s" if "rate" in figures else ""
    tail = f", p99 {figures['planned_p99_ms']} ms from arrival" if rate else ""
    lines = [
        f"{figures['scenario']}{rate}: {figures['samples']} requests in {figures['seconds']:g} s,"
        f" {figures['per_second']:g} images/s, p50 {figures['p50_ms']} ms, p90"
        f" {figures['p90_ms']} ms{tail}, {figures['failed']} refused or failed"
    ]
    if not figures["agrees"]:
        lines.append(
            f"  LoadGen's figures are apart from ours by {max(figures['apart'].values()):.1%}:"
            " something kept the generator from its schedule; measure on a quiet machine"
        )
    lines.append(f"  not MLPerf-compliant: {'; '.join(figures['mlperf'])}")
    return "\n".join(lines)
