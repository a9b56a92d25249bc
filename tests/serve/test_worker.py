"""Workers that die, hang, refuse: what the server makes of it. They are test doubles."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from running import Running, decoded, is_picture_of, until

from core.errors import AddbenchError, PreconditionError
from serve.engine import LoadError

Start = Callable[..., Running]


def kill(server: Running, number: int = 0) -> None:
    life = server.app.engine.attendants[number].life
    assert life is not None
    os.kill(life.process.pid, signal.SIGKILL)


def test_a_death_costs_the_requests_in_work_alone(start: Start) -> None:
    server = start(draw_ms=400.0, sizes=[1], queue=16).wait_ready()
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(server.draw, prompt=f"p{n}", seed=n) for n in range(6)]
        until(lambda: server.metric("queue_depth") == 5)
        kill(server)
        answers = [job.result() for job in jobs]
    failed = [answer for answer in answers if answer[0] != 200]
    assert len(failed) == 1
    status, headers, answer = failed[0]
    assert (status, answer["error"]["code"]) == (500, "worker_died")
    assert "the worker was ended by SIGKILL" in answer["error"]["message"]
    assert "its last words are in" in answer["error"]["message"]
    assert headers["retry-after"] == "1"
    for number, (status, _, answer) in enumerate(answers):
        if status == 200:
            assert is_picture_of(decoded(answer)[0], f"p{number}", number)
    assert server.metric("worker_restarts_total") == 1
    assert server.call("GET", "/health")[0] == 200


def test_with_two_workers_the_other_goes_on(start: Start) -> None:
    server = start(workers=2, sizes=[1], load_ms=300.0).wait_ready()
    until(lambda: all(at.state == "ready" for at in server.app.engine.attendants))
    kill(server, 1)
    until(lambda: server.app.engine.attendants[1].state == "loading")
    assert server.call("GET", "/health")[0] == 200
    assert server.draw(prompt="x")[0] == 200
    until(lambda: server.app.engine.attendants[1].state == "ready")


def test_health_while_the_only_worker_comes_back(start: Start) -> None:
    server = start(load_ms=700.0).wait_ready()
    kill(server)
    until(lambda: server.call("GET", "/health")[0] == 503)
    assert server.draw(prompt="waits for it")[0] == 200
    assert server.call("GET", "/health")[0] == 200


def test_a_worker_that_hangs_is_killed(start: Start) -> None:
    server = start(timeout_s=0.5).wait_ready()
    status, _, answer = server.draw(prompt="hang")
    assert (status, answer["error"]["code"]) == (500, "worker_died")
    assert server.draw(prompt="x")[0] == 200


def test_a_refusal_to_load_ends_the_server_with_its_words(start: Start) -> None:
    server = start(load="refuse")
    until(lambda: server.error is not None)
    assert isinstance(server.error, LoadError)
    assert server.error.exit_code == PreconditionError.exit_code
    assert server.error.what == "the double does not load"


def test_a_crash_while_loading_ends_the_server_with_the_obituary(start: Start) -> None:
    server = start(load="crash")
    until(lambda: server.error is not None)
    assert isinstance(server.error, AddbenchError)
    assert server.error.exit_code == AddbenchError.exit_code
    assert server.error.what == "the worker was ended by SIGSEGV"


def test_no_process_outlives_the_server(start: Start) -> None:
    server = start(draw_ms=60_000.0).wait_ready()
    life = server.app.engine.attendants[0].life
    assert life is not None
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(server.draw, prompt="never done")
        until(lambda: server.metric("in_work") == 1)
        server.stop()
        assert job.exception() is not None or job.result()[0] >= 500
    assert life.process.returncode is not None


def test_idle_costs_nothing(server: Running) -> None:
    """No polling: after the last picture the worker's processor time stands still."""
    server.draw(prompt="x")
    life = server.app.engine.attendants[0].life
    assert life is not None

    def ticks() -> int:
        with open(f"/proc/{life.process.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    time.sleep(0.3)
    before = ticks()
    time.sleep(1.0)
    assert ticks() == before
