"""Holds back what diffusers and transformers log while files are read."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = ("diffusers", "transformers")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the two libraries inside the block: what matters of it is checked and said here."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for name in LIBRARIES:
        importlib.import_module(f"{name}.utils.logging").disable_progress_bar()
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
