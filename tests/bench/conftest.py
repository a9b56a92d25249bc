"""Sweeps on the null backend, a scripted device, over the tiny bundle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.rows.store import ROWS, Row, open_run
from bench.sweep import main as sweep_main
from core.cli import run as shell
from core.files import ROOT
from export.bundle import Bundle


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Workers start faster, and the machine is shared."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


Sweep = Callable[..., int]


@pytest.fixture(scope="session")
def sweep(tiny_bundle: Bundle) -> Sweep:
    """Run a sweep of the tiny bundle in this process (its workers are real); the exit code.

    With one round, and without patience on a machine that others use too, unless told otherwise.
    """

    def run(out: Path, *arguments: str) -> int:
        calm = [] if "--resume" in arguments else ["--rounds", "1"]
        usual = ["--model", str(tiny_bundle.path), "--runs", str(out), "--patience", "0", *calm]
        return shell(sweep_main, [*usual, *arguments])

    return run


class Started:
    """A sweep, or a search, in a process and a process group of its own, to be killed."""

    def __init__(
        self, bundle: Bundle, log: Path, out: Path, *arguments: str, module: str = "bench.sweep"
    ) -> None:
        self.out, self.log = out, log
        command = [
            sys.executable,
            "-m",
            *module.split(),
            "--model",
            str(bundle.path),
            "--runs",
            str(out),
        ]
        if module == "bench.sweep":
            command += ["--patience", "0"]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def rows(self) -> list[Row]:
        """The rows of the only run in its folder."""
        files = list(self.out.glob(f"*/{ROWS}"))
        return open_run(str(files[0].parent), self.out).rows() if files else []

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def wait_for(self, what: Callable[[], object], seconds: float = 180) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, f"it did not come:\n{self.text()}"
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)


@pytest.fixture
def start(
    tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(out: Path, *arguments: str, **rest: str) -> Started:
        log = tmp_path_factory.mktemp("log") / "out.txt"
        started.append(Started(tiny_bundle, log, out, *arguments, **rest))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
