"""`python -m core.readahead FILE PARENT`: bring FILE into the page cache, and end with PARENT.

Imports nothing of weight: it has to be at work before whoever maps the file is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from core.process import die_with_parent

PIECE = 1 << 24


def read_through(file: Path, ended: Callable[[], bool] = lambda: False) -> None:
    """Have the system read `file` from front to back, until `ended`; none of it is copied."""
    with file.open("rb") as opened, open(os.devnull, "wb") as nowhere:
        while not ended() and os.sendfile(nowhere.fileno(), opened.fileno(), None, PIECE):
            pass


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    read_through(Path(sys.argv[1]))
