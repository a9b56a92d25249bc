"""`trt:context=split`, its default: the prompt's half of the UNet runs once an image, not a step.

TensorRT, the GPU and CUDA's graphs are test doubles here (tests/doubles).
"""

from __future__ import annotations

import contextlib
import math
import pickle
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import test_contract as contract
import torch

from backends.__main__ import main
from backends.base import Shapes, artifact_key
from backends.check.gate import image_distance
from backends.load import load_pipeline
from backends.pipeline.captured import DevicePipeline
from backends.pipeline.recipe import Recipe
from backends.registry import parse_backend
from core.files import ROOT
from export.bundle import Bundle
from export.models import CONTEXT_PART, SCHEDULERS

sys.path.insert(0, str(ROOT / "tests" / "doubles"))
import cuda_graph_double
import gpu_double
import tensorrt_double as double

PROMPTS = ["a small red circle", "a large blue star on a white background"]
SEEDS = [3, 4]
EULER = SCHEDULERS["euler"]
NEAR_DB = 40.0
"""FP16 products in other shapes."""


class OnGraph(list[Any]):
    """What TensorRT's double is asked to run while a graph is captured: ops among torch's."""

    def __init__(self, graph: cuda_graph_double.GraphDouble) -> None:
        super().__init__()
        self.graph = graph

    def append(self, recorded: tuple[Any, int]) -> None:
        context, state = recorded

        def run() -> None:
            gpu_double.demand(context._state == state, "a graph is void once its context changed")
            context._compute()

        super().append(context)
        self.graph.ops.append((run, (), {}, []))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> gpu_double.World:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    return double.install(monkeypatch)


@pytest.fixture
def captures(world: gpu_double.World, monkeypatch: pytest.MonkeyPatch) -> list[OnGraph]:
    """CUDA's graphs hold plans as well as torch's ops; what each capture was asked to run."""
    cuda_graph_double.install(monkeypatch)
    made: list[OnGraph] = []

    @contextlib.contextmanager
    def capture(graph: cuda_graph_double.GraphDouble, **words: Any) -> Iterator[None]:
        with cuda_graph_double.capture(graph, **words):
            made.append(OnGraph(graph))
            world.recording = made[-1]
            try:
                yield
            finally:
                world.recording = None

    monkeypatch.setattr(torch.cuda, "graph", capture)
    return made


def pipeline(bundle: Bundle, text: str, recipe: Recipe | None = None, batch: int = 1) -> Any:
    shapes = Shapes(batch, *bundle.size)
    return parse_backend(text).pipeline(bundle, "taesd", shapes, recipe=recipe)


def plan_graph(folder: Path | None) -> onnx.GraphProto:
    """The graph that a plan of the double was built from."""
    assert folder is not None
    plan = pickle.loads((folder / "model.plan").read_bytes()[4:])
    return onnx.load_from_string(plan["graph"]).graph


def recipes(bundle: Bundle) -> list[tuple[Bundle, Recipe]]:
    encoded = bundle.manifest["pipeline"] | {"force_zeros": False}
    other = Bundle(bundle.path, bundle.manifest | {"pipeline": encoded})
    return [
        (bundle, Recipe("EulerAncestralDiscreteScheduler")),
        (bundle, Recipe(EULER, 5.0, "batch")),
        (other, Recipe(EULER, 5.0, "calls")),
    ]


@pytest.mark.parametrize("which", range(3))
def test_one_graph_gives_the_image_of_the_step_by_step_order(
    captures: list[OnGraph], tiny_bundle: Bundle, which: int
) -> None:
    bundle, recipe = recipes(tiny_bundle)[which]
    with (
        pipeline(bundle, "trt", recipe, 2) as whole,
        pipeline(bundle, "trt:graph=none", recipe, 2) as by_step,
        pipeline(bundle, "trt:graph=none,context=inline", recipe, 2) as inline,
    ):
        assert isinstance(whole, DevicePipeline)
        by_step.staged = inline.staged = True
        for prompts, seeds in ((PROMPTS, SEEDS), (PROMPTS[::-1], [8, 9])):  # captured, replayed
            found, expected, uncut = (
                pipe(prompts, steps=3, seed=seeds) for pipe in (whole, by_step, inline)
            )
            assert found.timings.text is None
            assert expected.timings.text is not None
            assert found.nfe == expected.nfe == 3 * recipe.evaluations
            for image, reference, other in zip(
                found.images, expected.images, uncut.images, strict=True
            ):
                assert image_distance(image, reference).psnr_db > 60
                assert image_distance(image, other).psnr_db > NEAR_DB
        (capture,) = captures
        runs = Counter(id(context._engine) for context in capture)

        def count(part: str) -> int:
            return runs[id(whole.session(part)._engine)]

        assert count("unet") == 3 * (2 if recipe.guidance_mode == "calls" else 1)
        assert count(CONTEXT_PART) == (2 if recipe.guided else 1), "the prompt's, the empty one's"


def test_a_call_in_steps_makes_the_context_once(
    world: gpu_double.World, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pipeline(tiny_bundle, "trt:graph=part") as made:
        made.staged, ran, run = True, [], made.run

        def counting(part: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            ran.append(part)
            return run(part, **inputs)  # type: ignore[no-any-return]

        monkeypatch.setattr(made, "run", counting)
        made(PROMPTS[0], steps=4)
        encoders = ["text_encoder", "text_encoder_2"]
        assert ran == [*encoders, CONTEXT_PART, *["unet"] * 4, "taesd_decoder"]
        taken = made.session("unet").inputs
        assert "encoder_hidden_states" not in taken
        assert (taken["context"].shape[0], taken["context"].dtype) == (1, "float16")


def test_the_contract_of_every_backend_holds(world: gpu_double.World, tiny_bundle: Bundle) -> None:
    """Where there is no GPU, test_contract.py leaves `trt` out."""
    path, batch = str(tiny_bundle.path), len(contract.PROMPTS)
    with load_pipeline(path, "trt:batch=1-4", "taesd", batch=batch) as made:
        contract.test_images_and_timings(made, tiny_bundle)
        contract.test_sessions_take_and_give_what_the_graph_says(made)
    contract.test_an_image_does_not_depend_on_its_batch("trt", tiny_bundle)
    for decoder in ("vae", "taesd"):
        contract.test_images_match_the_references("trt", decoder, tiny_bundle)


def test_no_weight_is_in_both_plans(world: gpu_double.World, tiny_bundle: Bundle) -> None:
    def weights(text: str, part: str) -> dict[str, int]:
        backend, shapes = parse_backend(text), Shapes(1, *tiny_bundle.size)
        graph = plan_graph(backend.compile(tiny_bundle, part, shapes).path)
        return {
            tensor.name: math.prod(tensor.dims)
            for tensor in graph.initializer
            if len(tensor.dims) > 1
        }

    giving, taking = weights("trt", CONTEXT_PART), weights("trt", "unet")
    whole = weights("trt:context=inline", "unet")
    assert giving
    assert not giving.keys() & taking.keys()
    assert sum(giving.values()) + sum(taking.values()) == sum(whole.values())


def test_only_the_unet_has_another_plan(world: gpu_double.World, tiny_bundle: Bundle) -> None:
    def key(text: str, part: str) -> str:
        shapes = Shapes(1, *tiny_bundle.size)
        return artifact_key(parse_backend(text), tiny_bundle, part, shapes)

    inline = "trt:context=inline"
    assert parse_backend(inline).parts(tiny_bundle) == tuple(tiny_bundle.parts)
    assert parse_backend("trt").parts(tiny_bundle)[2:4] == (CONTEXT_PART, "unet")
    for part in tiny_bundle.parts:
        assert (key("trt", part) == key(inline, part)) == (part != "unet")
    assert key("trt", CONTEXT_PART) != key("trt", "unet")


@pytest.mark.parametrize("options", ["batch=1-4", "refit=1"])
def test_both_halves_take_the_options_of_a_plan(
    world: gpu_double.World, tiny_bundle: Bundle, options: str
) -> None:
    with (
        pipeline(tiny_bundle, f"trt:{options}") as split,
        pipeline(tiny_bundle, f"trt:{options},context=inline") as inline,
    ):
        counts = (1, 3) if "batch" in options else (1,)
        for count in counts:
            prompts = (PROMPTS * 2)[:count]
            found, expected = (pipe(prompts, steps=2, seed=5) for pipe in (split, inline))
            for image, reference in zip(found.images, expected.images, strict=True):
                assert image_distance(image, reference).psnr_db > NEAR_DB


def test_an_older_release_reads_both_halves(world: gpu_double.World, tiny_bundle: Bundle) -> None:
    double.set_version("10.3.0.26")
    for part in (CONTEXT_PART, "unet"):
        backend, shapes = parse_backend("trt"), Shapes(1, *tiny_bundle.size)
        kinds = {
            node.op_type
            for node in plan_graph(backend.compile(tiny_bundle, part, shapes).path).node
        }
        assert not {"Attention", "GroupNormalization"} & kinds
        assert ("Softmax" in kinds) == (part == "unet")


def test_a_dry_run_lists_the_plan_of_the_prompt(
    world: gpu_double.World, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compile", "--dry-run", "--model", str(tiny_bundle.path), "--decoder", "taesd"]
    assert main([*argv, "--backend", "trt:batch=1-4"]) == 0
    said = capsys.readouterr().out
    assert f"# trt {tiny_bundle.path.name} {CONTEXT_PART} batch 1" in said
    builds = [shlex.split(line) for line in said.splitlines() if line.startswith("trtexec")]
    options = [dict(word.partition("=")[::2] for word in words[1:]) for words in builds]
    assert len({one["--saveEngine"] for one in options}) == len(options) == 5
    giving, taking = options[2:4]
    assert giving["--minShapes"] == "encoder_hidden_states:1x77x80"
    taken = dict(each.split(":") for each in taking["--maxShapes"].split(","))
    assert taken.keys() == {"sample", "text_embeds", "time_ids", "context"}
    assert taken["context"].startswith("4x")
    lower = next(line for line in said.splitlines() if 'context="output"' in line)
    exec(shlex.split(lower)[2], {})
    written = Path(giving["--onnx"])
    (prompt,) = onnx.load(written, load_external_data=False).graph.input
    assert prompt.name == "encoder_hidden_states"
    for file in written.parent.iterdir():  # a link to the bundle's weights
        file.unlink()
