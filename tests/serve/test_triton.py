"""`addbench export triton`: the repository, and what Triton's Python backend runs of it.

Triton itself is a test double here; `docs/serving.md` says what was run in a real one.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_double as double

from backends.load import load_pipeline
from core.cli import run
from export.bundle import Bundle
from serve.triton.repository import MARK, config_text, main

PROMPTS = ["a large red circle on a black background", "a small blue star on a white background"]


@pytest.fixture(scope="module")
def repository(shapes_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    argv = [str(shapes_bundle.path), str(out), "--decoder", "taesd", "--name", "shapes"]
    assert run(main, argv) == 0
    return out


@pytest.fixture(scope="module")
def model(repository: Path) -> Iterator[Any]:
    """The copied file, started as Triton starts it."""
    double.install()
    file = repository / "shapes" / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("triton_model", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    started = module.TritonPythonModel()
    config = (repository / "shapes" / "config.pbtxt").read_text()
    said = re.findall(r'parameters \{ key: "(\w+)" value \{ string_value: "([^"]*)" \} \}', config)
    started.initialize({
        "model_config": json.dumps({
            "max_batch_size": 4,
            "parameters": {name: {"string_value": value} for name, value in said},
        }),
        "model_repository": str(repository / "shapes"),
        "model_version": "1",
    })  # fmt: skip
    yield started
    started.finalize()


def test_pictures_are_the_pipelines(model: Any, shapes_bundle: Bundle) -> None:
    requests = [
        double.asked(PROMPTS, seed=[7, 2**40]),
        double.asked(PROMPTS[:1]),
        double.asked(PROMPTS[1:], seed=[3], steps=[2]),
    ]
    answers = model.execute(requests)
    assert not any(answer.error for answer in answers)
    images = [answer.output_tensors[0].as_numpy() for answer in answers]
    assert [image.shape for image in images] == [(2, 64, 64, 3), (1, 64, 64, 3), (1, 64, 64, 3)]
    with load_pipeline(str(shapes_bundle.path), "ort", "taesd") as pipe:
        for image, prompt, seed, steps in (
            (images[0][0], PROMPTS[0], 7, 1),
            (images[0][1], PROMPTS[1], 2**40, 1),
            (images[1][0], PROMPTS[0], 0, 1),
            (images[2][0], PROMPTS[1], 3, 2),
        ):
            assert np.array_equal(image, pipe(prompt, steps=steps, seed=seed).images[0])


def test_what_is_asked_wrongly_costs_nobody_else(model: Any) -> None:
    wrong, right = model.execute(
        [double.asked(PROMPTS[:1], steps=[-1]), double.asked(PROMPTS[1:], seed=[1])]
    )
    assert wrong.error.kind == double.TritonError.INVALID_ARG
    assert "steps" in str(wrong.error)
    assert right.error is None


def test_the_configuration(shapes_bundle: Bundle) -> None:
    text = config_text(shapes_bundle, "a-name", "ort:threads=2", "vae", batch=8, queue=32,
                       environment=Path("/opt/env"))  # fmt: skip
    assert text.startswith(MARK)
    assert text.count("{") == text.count("}")
    assert text.count("[") == text.count("]")
    for words in (
        'name: "a-name"', 'backend: "python"', "max_batch_size: 8", "max_queue_size: 32",
        "TYPE_UINT8 dims: [ 64, 64, 3 ]", '"ort:threads=2"', '"EXECUTION_ENV_PATH"', '"/opt/env"',
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--backend", "tpu"], "no backend called 'tpu'"),
        (["--backend", "optimum"], "does not run in Triton"),
        (["--backend", "openvino:precision=int8,batch=2"], "no option"),
        (["--decoder", "jpeg"], "jpeg"),
        (["--name", "a b"], "is no name"),
        (["--name", "theirs"], "was not written by"),
    ],
)
def test_refusals_write_nothing(
    shapes_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.pbtxt").write_text('name: "theirs"\n')
    assert run(main, [str(shapes_bundle.path), str(tmp_path), *more]) == 2
    assert words in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]
    assert (tmp_path / "theirs" / "config.pbtxt").read_text() == 'name: "theirs"\n'


def test_it_is_written_again(repository: Path, shapes_bundle: Bundle) -> None:
    again = ["--decoder", "taesd", "--name", "shapes"]
    assert run(main, [str(shapes_bundle.path), str(repository), *again]) == 0
    assert (repository / "shapes" / "1" / "bundle" / "manifest.json").is_file()
