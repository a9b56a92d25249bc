"""Fresh processes that need no start: forked from one that has imported the libraries and done
nothing with them.

Starting Python with torch, diffusers and onnxruntime costs seconds of CPU, and the tests start
hundreds of workers. `install()` makes `subprocess.Popen` of this process take `python -m MODULE`
of our own modules from a fork server. What it returns is a real process all the same: a child of
this one with a pid, a group, pipes and signals of its own. All else is started as ever: another
interpreter, `-c`, an environment whose variables libraries read when they are loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SEATS = {(sys.executable, ROOT)}
"""Interpreters with the checkout that they are started in; a test may add its own."""
ROOMS = ("addbench", "backends", "bench", "distill", "export")
LEAVES = ("bench.worker", "backends.check.parity")
"""What starts nothing itself; the rest starts its workers warm too."""
HEAVY = ("torch", "numpy", "diffusers", "transformers", "onnx", "onnxscript",
         "safetensors.torch", "skimage.metrics", "bench.worker", "backends.ort",
         "backends.torch", "backends.null", "backends.pipeline.pipeline",
         "backends.check.parity", "export.build")  # fmt: skip
FREE = ("ADDBENCH_", "PYTEST_", "TMPDIR", "COLUMNS", "LINES", "NO_COLOR", "TERM", "PATH", "CXX",
        "TORCHINDUCTOR_")  # fmt: skip
"""Beginnings of the variables that a process may have its own way: read when they are needed, not
when a library is loaded."""
SET_NAME, SUBREAPER = 15, 36
"""Of prctl."""
NAME = "warm"
"""What a server that a warm process has of its own is called in /proc; no worker of it."""
real_popen = subprocess.Popen


def settings(environment: dict[str, str]) -> dict[str, str]:
    """The variables that a library may have read while it was loaded."""
    return {k: v for k, v in environment.items() if not k.startswith(FREE)}


class Server:
    """The line to a process that forks, which is a child of this one."""

    def __init__(self, line: socket.socket, environment: dict[str, str]) -> None:
        self.line = line
        self.settings = settings(environment)
        self.lock = threading.Lock()
        self.prctl = ctypes.CDLL(None, use_errno=True).prctl

    def fork(self, job: dict[str, Any], streams: list[int]) -> int:
        """Return the pid of a new child of this process."""
        # The forked process is orphaned at once, and orphans come to the nearest subreaper.
        with self.lock:
            self.prctl(SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self.line, [json.dumps(job).encode()], streams)
                answer = self.line.recv(64)
            finally:
                self.prctl(SUBREAPER, 0, 0, 0, 0)
        if not answer:
            raise OSError("the fork server of the tests has died")
        return int(answer)


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


servers: dict[tuple[str, Path], Server] = {}
starting = threading.Lock()
"""Held while one is started: two threads that ask at once share it, and its lock."""


def server(seat: tuple[str, Path], environment: dict[str, str]) -> Server:
    """The one of this process for a seat, started when it is first asked for."""
    with starting:
        if seat not in servers:
            python, root = seat
            ours, theirs = pair()
            with theirs:
                real_popen(
                    [python, root / "tests" / "warm.py", str(theirs.fileno())],
                    cwd=root,
                    env=environment | {"OPENBLAS_NUM_THREADS": "1"},  # or numpy starts threads
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            servers[seat] = Server(ours, environment)
        return servers[seat]


class WarmPopen(real_popen):  # type: ignore[type-arg]
    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any,
        cwd: Any, env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int,
        p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int,
        restore_signals: Any, gid: Any, gids: Any, uid: Any, umask: int, start_new_session: bool,
        process_group: int,
    ) -> None:  # fmt: skip
        words = [] if isinstance(args, str | bytes) else [os.fspath(word) for word in args]
        environment = dict(os.environ if env is None else env)
        plain = (executable, preexec_fn, gid, gids, uid) == (None,) * 5 and not (shell or pass_fds)
        ours = words[1:2] == ["-m"] and "".join(words[2:3]).split(".")[0] in ROOMS
        seat = ("".join(words[:1]), Path(cwd or os.getcwd()).resolve())
        if not (plain and ours and seat in SEATS and umask < 0) or (
            settings(environment) != server(seat, environment).settings
        ):
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
                restore_signals, gid, gids, uid, umask, start_new_session, process_group,
            )  # fmt: skip
            return
        job = {
            "module": words[2],
            "words": words[3:],
            "environment": environment,
            "session": start_new_session,
            "group": process_group,
        }
        streams = [
            own if theirs == -1 else theirs
            for own, theirs in enumerate((p2cread, c2pwrite, errwrite))
        ]
        self.pid = servers[seat].fork(job, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def install() -> None:
    """Let this process start its workers warm, where the system can."""
    if sys.platform == "linux":
        subprocess.Popen = WarmPopen  # type: ignore[misc]


def serve(line: socket.socket) -> dict[str, Any]:
    """Fork for every job that comes. Return, in the new process, the job."""
    while True:
        message, streams, _, _ = socket.recv_fds(line, 1 << 20, 3)
        if not message:
            os._exit(0)  # the tests are over
        waiting, go = os.pipe()
        between = os.fork()
        if between == 0 and os.fork() == 0:
            break
        if between == 0:
            os._exit(0)
        os.waitpid(between, 0)
        for descriptor in (waiting, go, *streams):
            os.close(descriptor)
    os.close(go)
    os.read(waiting, 1)  # until the one between is gone and the tests' process is the parent
    os.close(waiting)
    job: dict[str, Any] = json.loads(message)
    if job["session"]:
        os.setsid()
    if job["group"] >= 0:
        os.setpgid(0, job["group"])
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    line.send(str(os.getpid()).encode())
    line.close()
    return job


def main() -> None:
    sys.path[0] = str(ROOT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    for name in HEAVY:
        with contextlib.suppress(ModuleNotFoundError):  # one that moved costs time, no more
            importlib.import_module(name)
    import numpy

    # Not onnxruntime: it starts a thread.
    from diffusers import EulerAncestralDiscreteScheduler  # noqa: F401
    from transformers import CLIPTokenizer  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a fork keeps one thread only"
    gc.collect()
    gc.freeze()  # what is shared stays shared: nothing walks it again
    job = serve(socket.socket(fileno=int(sys.argv[1])))
    while job["module"] not in LEAVES:
        ours, theirs = pair()
        if os.fork() == 0:
            ours.close()
            ctypes.CDLL(None).prctl(SET_NAME, NAME.encode(), 0, 0, 0)
            job = serve(theirs)
        else:
            theirs.close()
            servers[sys.executable, ROOT] = Server(ours, job["environment"])
            install()
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(job["environment"])
    numpy.random.seed()
    sys.argv = ["-m", *job["words"]]
    run(job["module"])


def run(module: str) -> NoReturn:
    """Run it as `python -m` does, but for taking down a second's worth of modules at the end."""
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        code = exit.code
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
