"""Children end with the process that started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from core.files import ROOT
from core.process import run_apart

PARENT = """
import os, sys, time
from core.process import run_apart
def tell(): print(os.getpid(), flush=True); time.sleep(600)
if __name__ == "__main__": run_apart(tell)
"""


def test_it_runs_elsewhere_and_answers() -> None:
    assert run_apart(os.getpid) != os.getpid()
    assert run_apart(max, 3, 4) == 4


def test_a_killed_parent_leaves_no_child(tmp_path: Path) -> None:
    file = tmp_path / "parent.py"
    file.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(file)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 20
    while alive(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(child)


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
