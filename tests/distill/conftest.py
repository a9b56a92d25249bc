"""One smoke run of every stage, shared by the tests that need a trained folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distill.settings import SMALL


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state per process; each test may ask for another precision."""
    from accelerate.state import AcceleratorState, PartialState

    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of a finished run called `smoke`, in float32."""
    from accelerate.state import AcceleratorState, PartialState

    from distill.train import main

    build = tmp_path_factory.mktemp("distill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDBENCH_BUILD", str(build))
        assert main(["--smoke", "--precision", "fp32", *SMALL]) == 0
    AcceleratorState._reset_state()
    PartialState._reset_state()
    return build
