"""Holds back what libraries log: what matters of it is checked and said by their callers."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LIBRARIES = ("diffusers", "transformers")


@contextmanager
def quiet(names: Sequence[str], level: int) -> Iterator[None]:
    """Hold back warnings, and what these loggers say below `level`, inside the block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the two libraries that read checkpoints inside the block."""
    for name in LIBRARIES:
        importlib.import_module(f"{name}.utils.logging").disable_progress_bar()
    with quiet(LIBRARIES, logging.CRITICAL):
        yield
