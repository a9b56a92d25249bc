"""Graphs for a folder that goes to another machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from export.lower import lower
from export.lower.profile import Profile


def lower_apart(source: Path, profile: Profile, graph: Path) -> None:
    """Lower a graph with weights of its own.

    Copies, not links: onnx takes a file with several links for an attack, here and in the bundle.
    """
    lower(source, profile, graph)
    for data in graph.parent.glob(f"{graph.name}.data*"):
        with tempfile.TemporaryDirectory(dir=data.parent) as scratch:
            own = shutil.copyfile(data, Path(scratch) / data.name)
            os.replace(own, data)
