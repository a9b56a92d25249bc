"""What is asked for: the Python API refuses what the command line refuses, in three parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import make_run

import addbench
from bench.run.request import Request, Sampling
from bench.verdict.outcome import Outcome
from core.errors import PreconditionError
from core.files import ROOT
from export.bundle import Bundle


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batches": 0}, "batches=0 is not understood"),
        ({"batches": [1, 1]}, "name each value once"),
        ({"steps": "1"}, "pass steps=1 or [1, 2, 4]"),
        ({"steps": 1.5}, "whole numbers of at least 1"),
        ({"steps": True}, "whole numbers of at least 1"),
        ({"size": "512"}, "pass size=512"),
        ({"size": (512, 0)}, "pass size=512"),
        ({"model": 7}, "it is a name, or a path"),
        ({"backends": []}, "it has no value"),
        ({"backends": [None]}, "it holds words"),
        ({"guidance": float("nan")}, "a finite number"),
        ({"low_memory": "yes"}, "pass low_memory=True"),
        ({"quality": -1}, "pass quality=600"),
        ({"method": "quick"}, "it is no Sampling"),
    ],
)
def test_what_cannot_be_asked_for(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PreconditionError) as refused:
        Request(**given)
    assert words in str(refused.value)
    assert refused.value.why
    assert refused.value.next


def test_a_lone_value_is_a_sequence_of_one_and_a_path_is_a_model(tmp_path: Path) -> None:
    asked = Request(tmp_path, steps=np.int64(2), backends="null", size=512)  # type: ignore[arg-type]
    assert asked.model == str(tmp_path)
    assert (asked.steps, asked.backends, asked.size) == ((2,), ("null",), (512, 512))
    assert asked == Request(str(tmp_path), steps=(2,), backends=("null",), size=(512, 512))


def test_a_method_cannot_end_before_it_may() -> None:
    with pytest.raises(PreconditionError, match="--max-time 1"):
        Sampling().but(max_time=1.0)


def test_importing_addbench_is_light() -> None:
    code = "import sys, addbench; assert not {'torch', 'numpy', 'pandas'} & {*sys.modules}"
    code += "; assert {'sweep', 'compare', 'Request', 'load_pipeline'} <= {*dir(addbench)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'sweeps'"):
        addbench.sweeps  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch": 0}, "batch=0 is not understood"),
        ({"size": "512"}, "pass size=512"),
        ({"backend": 3}, "backend=3 is not understood"),
        ({"size": 512}, "512x512"),  # understood: this bundle is of another size
    ],
)
def test_a_pipeline_is_refused_in_the_same_words(
    given: dict[str, Any], words: str, tiny_bundle: Bundle
) -> None:
    with pytest.raises(PreconditionError) as refused:
        addbench.load_pipeline(tiny_bundle.path, **{"backend": "null", **given})
    assert words in str(refused.value)


def test_a_sweep_and_a_comparison_from_python(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = Sampling().but(rounds=1, min_samples=3, min_time=0.01)
    asked = Request(tiny_bundle.path, backends="null", steps=1, decoders="taesd", method=quick)
    run = addbench.sweep(asked, runs=tmp_path, patience_s=0)
    (measured,) = run.rows()
    assert (measured["status"], measured["steps"], measured["backend"]) == ("ok", 1, "null")
    assert run.header.command == ["addbench.sweep"]
    other = make_run(tmp_path, run.rows())
    outcome = addbench.compare(run, other.name, runs=tmp_path, allow_other_machine=True)
    assert isinstance(outcome, Outcome)
    assert [line.verdict for line in outcome.lines] == ["inconclusive"]  # one round
    with pytest.raises(PreconditionError, match="it is no Request"):
        addbench.sweep("tiny-sdxl")  # type: ignore[arg-type]
    with pytest.raises(PreconditionError, match="max_slowdown"):
        addbench.compare(run, other, max_slowdown=15)
