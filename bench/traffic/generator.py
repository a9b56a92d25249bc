"""The child process that runs LoadGen: a job on stdin, its samples and logs in a folder.

    python -m bench.traffic.generator < job.json

LoadGen ends the process with SIGSEGV where a callback raises, and at Ctrl-C: hence the process,
and callbacks that cannot raise. Single latencies are in none of LoadGen's logs: they are kept here,
by a clock of ours, a line for each sample.
"""

from __future__ import annotations

import http.client
import json
import queue
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from core.process import die_with_parent, take_stdout

SAMPLES = "samples.jsonl"
IMAGE = "image.png"
"""The reference's picture, drawn by what is under load before the load."""
CONNECTIONS = 128
"""Requests that are open at once over HTTP; what comes on top waits, which counts. One that is
refused for a full queue (429) waits for an answer to another, or as long as the server says."""
WARM = 5
"""Requests before the first that counts."""
LIBRARY = 600
"""Captions that requests are drawn from, each with a seed of its own."""

RETRY_S = 600.0
"""How long a refused request asks again, where none may be lost."""

Draw = Callable[[str, int], int]
"""Draw a caption with a seed; the HTTP status, or 0 in process."""


def over_http(job: Mapping[str, Any], url: str) -> Callable[[], Draw]:
    """What makes a connection of its own for a thread; the reference is drawn first."""
    steps, decoder = job["steps"], job["decoder"]
    parts = urlsplit(url)
    room = threading.Condition()
    # Refusals are what `server` is to show; elsewhere every request is to be drawn.
    patience_s = 0.0 if job["scenario"] == "server" else RETRY_S
    fields: dict[str, Any] = {"num_inference_steps": steps}
    if decoder:
        fields["decoder"] = decoder

    def connect() -> Draw:
        client = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)

        def ask(body: str) -> tuple[int, float]:
            """The status, and the seconds after which to ask again."""
            client.request("POST", "/v1/images/generations", body,
                           {"Content-Type": "application/json"})  # fmt: skip
            response = client.getresponse()
            response.read()
            return response.status, float(response.headers.get("Retry-After", 1))

        def draw(prompt: str, seed: int) -> int:
            body = json.dumps({"prompt": prompt, "seed": seed, **fields})
            until = time.monotonic() + patience_s
            while True:
                status, retry_s = answer(body)
                with room:
                    if status != 429 or time.monotonic() + retry_s > until:
                        room.notify()  # an answer of ours is out: there is room for another
                        return status
                    room.wait(retry_s)

        def answer(body: str) -> tuple[int, float]:
            idle = client.sock is not None
            try:
                try:
                    return ask(body)
                except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                    if not idle:
                        raise
                    client.close()  # the server ends connections that nobody uses for seconds
                    return ask(body)
            except (OSError, http.client.HTTPException):
                client.close()
                return 599, 0.0  # no answer

        return draw

    if reference := job.get("reference"):
        body = json.dumps({**reference, **fields, "response_format": "file"}).encode()
        kind = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{url.rstrip('/')}/v1/images/generations", body, kind)
        with urllib.request.urlopen(asked, timeout=600) as answer:
            (Path(job["folder"]) / IMAGE).write_bytes(answer.read())
    return connect


def in_process(job: Mapping[str, Any]) -> Callable[[], Draw]:
    """The pipeline itself, warmed; calls take turns."""
    import warnings

    from backends.load import load_pipeline

    pipe = load_pipeline(job["model"], job["backend"], job["decoder"])
    warnings.simplefilter("ignore")  # a caption is no news
    steps = job["steps"]
    if reference := job.get("reference"):
        from PIL import Image

        drawn = pipe([reference["prompt"]], steps=steps, seed=reference["seed"])
        Image.fromarray(drawn.images[0]).save(Path(job["folder"]) / IMAGE)

    def draw(prompt: str, seed: int) -> int:
        try:
            pipe([prompt], steps=steps, seed=seed)
        except Exception as error:  # it is this sample's, and must not reach LoadGen
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return 500
        return 200

    return lambda: draw


class Subject:
    """The system under test: takes LoadGen's samples, draws, and keeps when."""

    def __init__(self, connect: Callable[[], Draw], threads: int, captions: Sequence[str]) -> None:
        self.connect, self.captions = connect, captions
        self.waiting: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self.kept: list[tuple[int, int, int, int, int]] = []
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def issue(self, samples: Sequence[Any]) -> None:
        now = time.perf_counter_ns()
        for sample in samples:
            self.waiting.put((sample.id, sample.index, now))

    def work(self) -> None:
        import mlperf_loadgen as loadgen

        draw = self.connect()
        while (entry := self.waiting.get()) is not None:
            number, index, issued = entry
            started = time.perf_counter_ns()
            code = draw(self.captions[index % len(self.captions)], index)
            self.kept.append((index, issued, started, time.perf_counter_ns(), code))
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(number, 0, 0)])

    def close(self) -> None:
        for _ in self.threads:
            self.waiting.put(None)
        for thread in self.threads:
            thread.join(10)


def settings_of(job: Mapping[str, Any]) -> Any:
    """LoadGen's settings; every default that would matter is set."""
    import mlperf_loadgen as loadgen

    settings = loadgen.TestSettings()
    settings.scenario = {
        "single-stream": loadgen.TestScenario.SingleStream,
        "offline": loadgen.TestScenario.Offline,
        "server": loadgen.TestScenario.Server,
    }[job["scenario"]]
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(1e3 * job["seconds"])
    settings.min_query_count = job["requests"]
    settings.qsl_rng_seed, settings.sample_index_rng_seed, settings.schedule_rng_seed = job["seeds"]
    if job["scenario"] == "server":
        settings.server_target_qps = job["rate"]
        settings.server_target_latency_ns = int(1e9 * job["limit_s"])
        settings.server_target_latency_percentile = 0.99
    elif job["scenario"] == "single-stream":
        settings.single_stream_expected_latency_ns = int(1e9 * job["expected_s"])
        settings.single_stream_target_latency_percentile = 0.9
    else:
        settings.offline_expected_qps = job["expected_rate"]
    return settings


def warmed(draw: Draw, job: Mapping[str, Any]) -> dict[str, Any]:
    """The job with what LoadGen must expect, from a few requests before it starts."""
    started = time.perf_counter()
    for seed in range(WARM):
        draw(job["captions"][seed % len(job["captions"])], seed)
    seconds = (time.perf_counter() - started) / WARM
    return {"expected_s": seconds, "expected_rate": 1.2 / seconds, **job}


def run(job: Mapping[str, Any]) -> None:
    import mlperf_loadgen as loadgen

    folder = Path(job["folder"])
    url = None if job["sut"] == "pipeline" else job["sut"]
    connect = over_http(job, url) if url else in_process(job)
    job = warmed(connect(), job)
    threads = 1 if job["scenario"] == "single-stream" or not url else CONNECTIONS
    subject = Subject(connect, threads, job["captions"])
    log = loadgen.LogSettings()
    output = loadgen.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout = str(folder), False
    log.log_output = output
    log.enable_trace = False  # it writes no JSON, and hundreds of megabytes
    sut = loadgen.ConstructSUT(subject.issue, lambda: None)
    library = loadgen.ConstructQSL(LIBRARY, LIBRARY, lambda _: None, lambda _: None)
    loadgen.StartTestWithLogSettings(sut, library, settings_of(job), log, "")
    subject.close()
    names = ("index", "issued_ns", "started_ns", "done_ns", "code")
    with (folder / SAMPLES).open("w") as file:
        for entry in subject.kept:
            file.write(json.dumps(dict(zip(names, entry, strict=True))) + "\n")
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(sut)


def main() -> int:
    die_with_parent()
    answers = take_stdout()
    run(json.loads(sys.stdin.read()))
    print("done", file=answers, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
