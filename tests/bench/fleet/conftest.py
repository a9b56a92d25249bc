"""Clusters for the tests of fleets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "doubles")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A cluster that this process has joined from another folder: Ray's workers would import what
    lies in the driver's, and each node is to have a checkout of its own."""
    pytest.importorskip("ray", reason="ray is not installed: the extra `ray`")
    from clusters import Cluster

    # A worker of Ray limits its threads only where nothing was said.
    before, folder = os.environ.pop("OMP_NUM_THREADS", None), Path.cwd()
    os.chdir(tmp_path_factory.mktemp("driver"))
    try:
        try:
            made = Cluster()
        except Exception:  # Ray gives a node 30 seconds, which a busy machine may need twice
            made = Cluster()
        yield made
        made.fleet.close()
        made.cluster.shutdown()
    finally:
        os.chdir(folder)
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
