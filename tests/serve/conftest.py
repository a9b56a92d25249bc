"""Fixtures of servers over test doubles."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from running import Running

PACKAGES = ("starlette", "uvicorn", "websockets", "prometheus_client", "python_multipart")
if missing := [package for package in PACKAGES if find_spec(package) is None]:
    collect_ignore_glob = ["test_*.py"]
    print(f"tests/serve are left out: {', '.join(missing)} not installed (extra serve)")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "doubles"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start servers, as `running.serving` does; they end with the test."""
    from running import serving

    started: list[Running] = []

    def begin(**given: Any) -> Running:
        started.append(serving(tmp_path, **given))
        return started[-1]

    yield begin
    for server in started:
        server.stop()


@pytest.fixture
def server(start: Callable[..., Running]) -> Running:
    """A server that is ready."""
    return start().wait_ready()
