"""`addbench export triton`: the repository, and what Triton's Python backend runs of it.

Triton itself is a test double; the slow test starts a real one, of `make env-triton`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sysconfig import get_config_var
from typing import Any

import numpy as np
import onnx
import pytest
import triton_double as double
from running import until

from backends.check.gate import image_distance
from backends.load import load_pipeline
from core.cli import run
from core.files import ROOT
from export.bundle import Bundle
from serve.triton.parts import parts_of
from serve.triton.repository import MARK, config_text, main

PROMPTS = ["a large red circle on a black background", "a small blue star on a white background"]


@pytest.fixture(scope="module")
def repository(shapes_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "models"
    argv = [str(shapes_bundle.path), str(out), "--decoder", "taesd", "--name", "shapes"]
    assert run(main, argv) == 0
    return out


def started_model(repository: Path) -> Any:
    """The copied file's model, started as Triton starts it."""
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
            "name": "shapes",
            "max_batch_size": 4,
            "parameters": {name: {"string_value": value} for name, value in said},
        }),
        "model_repository": str(repository / "shapes"),
        "model_version": "1",
    })  # fmt: skip
    return started


@pytest.fixture(scope="module")
def model(repository: Path) -> Iterator[Any]:
    started = started_model(repository)
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
        (["--backend", "torch", "--form", "onnx"], "does not fit --form onnx"),
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


@pytest.fixture(scope="module")
def parted(shapes_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "parted"
    argv = [str(shapes_bundle.path), str(out), "--decoder", "taesd", "--name", "shapes"]
    assert run(main, [*argv, "--form", "onnx"]) == 0
    return out


def test_each_part_is_a_model_whose_configuration_is_its_graphs(
    parted: Path, shapes_bundle: Bundle
) -> None:
    parts = parts_of(shapes_bundle, "taesd")
    assert {folder.name for folder in parted.iterdir()} == {
        "shapes", *(f"shapes_{part}" for part in parts)
    }  # fmt: skip
    for part in parts:
        text = (parted / f"shapes_{part}" / "config.pbtxt").read_text()
        assert 'platform: "onnxruntime_onnx"' in text
        model = onnx.load(parted / f"shapes_{part}" / "1" / "model.onnx", load_external_data=False)
        assert model.opset_import[0].version == 17
        for which, values in (("input", model.graph.input), ("output", model.graph.output)):
            (block,) = re.findall(rf"^{which} \[\n(.*?)\n\]", text, re.M | re.S)
            said = re.findall(r'name: "(\w+)" data_type: TYPE_(\w+) dims: \[ (.*?) \]', block)
            graph = [
                (
                    value.name,
                    {1: "FP32", 7: "INT64"}[value.type.tensor_type.elem_type],
                    ", ".join(
                        str(dim.dim_value) if dim.HasField("dim_value") else "-1"
                        for dim in value.type.tensor_type.shape.dim
                    ),
                )
                for value in values
            ]
            assert said == graph, part


def test_pictures_over_parts_are_the_pipelines(
    parted: Path, shapes_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = started_model(parted)
    monkeypatch.setattr(double, "REPOSITORY", parted)
    requests = [double.asked(PROMPTS, seed=[7, 2**40]), double.asked(PROMPTS[:1], steps=[2])]
    first, second = (answer.output_tensors[0].as_numpy() for answer in started.execute(requests))
    with load_pipeline(str(shapes_bundle.path), "ort", "taesd") as pipe:
        for image, prompt, seed, steps in (
            (first[0], PROMPTS[0], 7, 1), (first[1], PROMPTS[1], 2**40, 1),
            (second[0], PROMPTS[0], 0, 2),
        ):  # fmt: skip
            assert (
                image_distance(image, pipe(prompt, steps=steps, seed=seed).images[0]).psnr_db > 60
            )
    started.finalize()


# ---- a real Triton

TRITON = ROOT / ".venv-triton"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def triton(repository: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a real Triton over the repository, whose Python is this environment's with
    the NumPy that Triton wants before it."""
    theirs = TRITON / "lib" / PYTHON / "site-packages"
    python = tmp_path / "python"
    venv.create(python, symlinks=True)
    packages = python / "lib" / PYTHON / "site-packages"
    for name in ("numpy", "numpy.libs"):
        (packages / name).symlink_to(theirs / name)
    paths = [ROOT, *(path for path in map(Path, sys.path) if path.name == "site-packages")]
    (packages / "99.pth").write_text("".join(f"{path}\n" for path in paths))
    config = repository / "shapes" / "config.pbtxt"
    before = config.read_text()
    environment = f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{python}" }} }}'
    config.write_text(f"{before}{environment}\n")
    server = tmp_path / "server"
    shutil.copytree(theirs / "pytriton" / "tritonserver", server)
    stub = "triton_python_backend_stub"
    version = PYTHON.removeprefix("python")
    shutil.copy(server / "python_backend_stubs" / version / stub, server / "backends" / "python")
    libraries = [server / "external_libs", *theirs.glob("*libs"), get_config_var("LIBDIR")]
    ports = [free_port() for _ in range(3)]
    arguments = [f"--{name}-port={port}" for name, port in
                 zip(("http", "grpc", "metrics"), ports, strict=True)]  # fmt: skip
    log = tmp_path / "triton.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [server / "bin" / "tritonserver", f"--model-repository={repository}",
             f"--backend-directory={server / 'backends'}", "--http-address=127.0.0.1", *arguments],
            env=os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, libraries))},
            stdout=stream, stderr=stream,
        )  # fmt: skip
    address = f"http://127.0.0.1:{ports[0]}/v2"
    try:
        until(lambda: process.poll() is not None or answers(f"{address}/health/ready"), 1200)
        assert process.poll() is None, log.read_text()
        yield address
    finally:
        process.terminate()
        process.wait(120)
        config.write_text(before)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=10).status == 200)
    except OSError:
        return False


def inferred(address: str, prompt: str, **rest: int) -> Any:
    """The picture that Triton answers with."""
    kinds = {"seed": "INT64", "steps": "INT32"}
    inputs = [{"name": "prompt", "shape": [1, 1], "datatype": "BYTES", "data": [prompt]}]
    inputs += [{"name": name, "shape": [1, 1], "datatype": kinds[name], "data": [value]}
               for name, value in rest.items()]  # fmt: skip
    body = json.dumps({"inputs": inputs}).encode()
    asked = urllib.request.Request(f"{address}/models/shapes/infer", body)
    (output,) = json.loads(urllib.request.urlopen(asked, timeout=600).read())["outputs"]
    return np.array(output["data"], np.uint8).reshape(output["shape"])[0]


@pytest.mark.slow
@pytest.mark.skipif(not TRITON.exists(), reason="make env-triton has not been run")
def test_a_real_triton_draws_the_pipelines_pictures(triton: str, shapes_bundle: Bundle) -> None:
    with load_pipeline(str(shapes_bundle.path), "ort", "taesd") as pipe:
        for prompt, seed, steps in ((PROMPTS[0], 7, 1), (PROMPTS[1], 2**40, 2)):
            image = inferred(triton, prompt, seed=seed, steps=steps)
            assert np.array_equal(image, pipe(prompt, steps=steps, seed=seed).images[0])
        with ThreadPoolExecutor(8) as pool:  # joined in batches as they come
            images = list(pool.map(lambda seed: inferred(triton, PROMPTS[0], seed=seed), range(16)))
        for seed, image in enumerate(images):
            assert np.array_equal(image, pipe(PROMPTS[0], steps=1, seed=seed).images[0])
    with pytest.raises(urllib.error.HTTPError) as refused:
        inferred(triton, PROMPTS[0], steps=-1)
    assert "steps" in json.loads(refused.value.read())["error"]
