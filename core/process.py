"""Processes of our own: they end with the one that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    Args:
        parent: its number; where it has ended before the kernel was told, this process ends now.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        raise SystemExit(1)


def run_apart(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work` in a fresh process: what it imports and holds is gone after it."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, fresh, initializer=die_with_parent, initargs=(os.getpid(),)
    ) as pool:
        return pool.submit(work, *args, **kwargs).result()
