"""A whole image in one go against the step-by-step order; its CUDA half on a test double.

torch in FP32 on the CPU, random weights drawn there: the same arithmetic as on a GPU, uncaptured.
`GraphDouble` stands for CUDA's graphs where the order of capture and replay is looked at.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from backends.base import BackendError, OutOfMemoryError, Shapes, UnsupportedError
from backends.check.gate import image_distance
from backends.pipeline.captured import DevicePipeline
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.recipe import Recipe
from backends.registry import parse_backend
from core.errors import AddbenchError
from core.files import ROOT
from export.bundle import Bundle
from export.graphless import write_graphless
from export.models import MODELS, SCHEDULERS, TINY_LCM, TINY_SD

sys.path.insert(0, str(ROOT / "tests" / "doubles"))
import cuda_graph_double

PROMPTS = ["a small red circle", "", "ein Bär, 熊 🐻"]
SEEDS = [5, 6, 11]
SAME_DB = 60.0
"""A level of 255 in few pixels: FP32 sums in another order, rounded to uint8."""
MORE = ("TCDScheduler", "DDPMScheduler")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("drawn") / "tiny"
    write_graphless(MODELS["tiny-sdxl"], folder, "cpu", "fp32")
    return Bundle.open(folder)


def pipeline(
    bundle: Bundle, mode: str, decoder: str = "taesd", recipe: Recipe | None = None, **options: str
) -> Pipeline:
    words = {"mode": mode, "threads": "1", **options}
    backend = parse_backend("torch:" + ",".join(f"{k}={v}" for k, v in words.items()))
    shapes = Shapes(len(PROMPTS), *bundle.size)
    return backend.pipeline(bundle, decoder, shapes, recipe=recipe)


def same(whole: Pipeline, by_step: Pipeline, steps: int, prompts: list[str] = PROMPTS) -> None:
    seeds = SEEDS[: len(prompts)]
    found = whole(prompts, steps=steps, seed=seeds)
    expected = by_step(prompts, steps=steps, seed=seeds)
    assert found.nfe == expected.nfe
    assert found.timings.text is None
    assert found.timings.unet == []
    for image, reference in zip(found.images, expected.images, strict=True):
        assert image_distance(image, reference).psnr_db > SAME_DB


@pytest.fixture(scope="module")
def plain(drawn: Bundle) -> Iterator[Pipeline]:
    with pipeline(drawn, "eager") as made:
        yield made


@pytest.fixture(scope="module")
def whole(drawn: Bundle) -> Iterator[Pipeline]:
    with pipeline(drawn, "graph") as made:
        yield made


@pytest.mark.parametrize("name", sorted({*SCHEDULERS.values(), *MORE}))
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_every_scheduler_gives_the_same_image(
    name: str, spacing: str, plain: Pipeline, whole: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = plain.bundle
    config = dict(bundle.scheduler().config) | {"clip_sample": False, "timestep_spacing": spacing}

    def scheduler(_: object, asked: str | None = None) -> Any:
        return getattr(diffusers, str(asked)).from_config(config)

    monkeypatch.setattr(Bundle, "scheduler", scheduler)
    for pipe in (plain, whole):
        monkeypatch.setattr(pipe, "recipe", Recipe(name))
        monkeypatch.setattr(pipe, "_scheduler", None)
    for kept in ("_slots", "_schedules", "_readable"):
        monkeypatch.setattr(whole, kept, {})
    same(whole, plain, 4, PROMPTS[:1])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_batches_and_step_counts(steps: int, plain: Pipeline, whole: Pipeline) -> None:
    same(whole, plain, steps)
    same(whole, plain, steps, PROMPTS[:1])


@pytest.mark.parametrize("mode", ["batch", "calls"])
def test_guidance(mode: str, drawn: Bundle) -> None:
    recipe = Recipe(SCHEDULERS["euler"], 5.0, mode)
    with (
        pipeline(drawn, "eager", "vae", recipe) as one,
        pipeline(drawn, "graph", "vae", recipe) as other,
    ):
        same(other, one, 2)


@pytest.mark.parametrize("model", [TINY_SD, TINY_LCM])
def test_other_forms_of_model(model: Any, tmp_path: Any) -> None:
    """One text encoder, the empty prompt encoded, guidance as an input of the UNet."""
    write_graphless(model, tmp_path / "bundle", "cpu", "fp32")
    bundle = Bundle.open(tmp_path / "bundle")
    with pipeline(bundle, "eager") as one, pipeline(bundle, "graph") as other:
        same(other, one, 2, PROMPTS[:2])


def test_half_precision_channels_last_is_near(drawn: Bundle, plain: Pipeline) -> None:
    expected = plain(PROMPTS, steps=2, seed=SEEDS).images
    with pipeline(drawn, "graph", dtype="fp16", channels_last="1") as half:
        assert half.backend.precision(drawn) == half.backend.storage(drawn) == "fp16"
        weights = {p.dtype for p in half.session("unet").module.parameters()}  # type: ignore[attr-defined]
        assert weights == {torch.float16}
        found = half(PROMPTS, steps=2, seed=SEEDS).images
    assert min(image_distance(a, b).psnr_db for a, b in zip(found, expected, strict=True)) > 30


def test_prompt_projections_are_computed_once(whole: Pipeline) -> None:
    session = whole.session("unet")
    projections = session.projections.projections  # type: ignore[attr-defined]
    blocks = [m for m in session.module.modules() if getattr(m, "is_cross_attention", False)]  # type: ignore[attr-defined]
    assert len(projections) == 2 * len(blocks) > 0
    products = 0
    linear = torch.nn.functional.linear

    def counting(given: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        nonlocal products
        width = whole.bundle.parts["unet"].inputs[2].shape[-1]
        products += given.shape[1:] == (77, width)
        return linear(given, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counting)
        whole(PROMPTS[:1], steps=4, seed=1)
    assert products == 1
    assert all(one.held is None for one in projections)


def test_self_attentions_project_once_and_hold_no_weight_twice(
    whole: Pipeline, plain: Pipeline
) -> None:
    """That the image stays the same is what every test against `plain` shows."""

    def attentions(pipe: Pipeline) -> list[Any]:
        module = pipe.session("unet").module  # type: ignore[attr-defined]
        kinds = (getattr(one, "is_cross_attention", None) for one in module.modules())
        return [one for one, kind in zip(module.modules(), kinds, strict=True) if kind is False]

    fused = attentions(whole)
    assert len(fused) == len(attentions(plain)) > 0
    assert all(hasattr(one, "to_q") for one in attentions(plain))
    assert not any(hasattr(one, name) for one in fused for name in ("to_q", "to_k", "to_v"))
    sizes = [
        sum(p.numel() for p in pipe.session("unet").module.parameters())  # type: ignore[attr-defined]
        for pipe in (whole, plain)
    ]
    assert sizes[0] == sizes[1]


def test_an_unreadable_scheduler_is_refused_in_a_graph_and_stepped_without(
    drawn: Bundle,
) -> None:
    """DDIM that clips, as its config has it where nobody says otherwise."""
    recipe = Recipe(SCHEDULERS["ddim"])
    with (
        pipeline(drawn, "graph", recipe=recipe) as captured,
        pytest.raises(UnsupportedError, match="cannot be captured"),
    ):
        captured("a star", steps=2)
    with (
        pipeline(drawn, "eager", recipe=recipe) as plain,
        DevicePipeline(
            plain.backend, drawn, "taesd", plain.shapes, capture=False, recipe=recipe
        ) as loose,
    ):
        found, expected = (p("a star", steps=2, seed=3) for p in (loose, plain))
    assert np.array_equal(found.images, expected.images)
    assert found.timings.text is not None


# ---- capture and replay, on a double of CUDA's graphs


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[cuda_graph_double.GraphDouble]:
    return cuda_graph_double.install(monkeypatch)


def test_a_replay_reads_new_prompts_and_seeds(
    cuda: type[cuda_graph_double.GraphDouble], drawn: Bundle, plain: Pipeline
) -> None:
    with pipeline(drawn, "graph") as captured:
        for number, prompt in enumerate(["a star", "a red circle", ""]):
            found = captured(prompt, steps=2, seed=number)
            expected = plain(prompt, steps=2, seed=number)
            assert image_distance(found.images[0], expected.images[0]).psnr_db > SAME_DB
            assert found.nfe == 2
        assert cuda.replays == 3
        first = captured._slots[1, 2, 0, False, False].graph  # type: ignore[attr-defined]
        captured("a star", steps=1)
        assert captured._slots[1, 1, 0, False, False].graph is not first  # type: ignore[attr-defined]
        assert captured._slots[1, 2, 0, False, False].graph is first  # type: ignore[attr-defined]


def test_a_replay_reads_new_pictures_and_negative_prompts(
    cuda: type[cuda_graph_double.GraphDouble], drawn: Bundle
) -> None:
    """The encoder is in the graph: a frame costs one launch."""
    rng = np.random.default_rng(0)
    recipe = Recipe(SCHEDULERS["euler"], 4.0, "batch")
    with (
        pipeline(drawn, "graph", recipe=recipe) as captured,
        pipeline(drawn, "eager", recipe=recipe) as by_step,
    ):
        for number, negative in enumerate(["a dog", "", "a red circle"]):
            picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
            asked: dict[str, Any] = {"steps": 4, "seed": number, "strength": 0.5}
            asked |= {"images": picture, "negative": negative}
            found, expected = (each("a star", **asked) for each in (captured, by_step))
            assert image_distance(found.images[0], expected.images[0]).psnr_db > SAME_DB
        assert cuda.replays == 3
        frames = list(captured.frames([picture] * 2, "a star", steps=4, seed=2, strength=0.5,
                                      negative="a red circle"))  # fmt: skip
        assert cuda.replays == 5
        assert np.array_equal(frames[0].images, frames[1].images)
        assert image_distance(frames[0].images[0], expected.images[0]).psnr_db > SAME_DB


def test_text_encoders_run_on_two_streams_that_wait_for_each_other(
    cuda: type[cuda_graph_double.GraphDouble], drawn: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    on: list[Any] = [cuda_graph_double.StreamDouble()]

    @contextlib.contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        on.append(stream)
        yield
        on.pop()

    def wait_stream(stream: Any, other: Any) -> None:
        order.append(f"{names.get(id(stream), 'main')} waits for {names.get(id(other), 'main')}")

    with pipeline(drawn, "graph") as captured:
        captured("a star", steps=1)
        names = {id(captured._side): "side", id(captured._stream): "main"}  # type: ignore[attr-defined]
        monkeypatch.setattr(torch.cuda, "stream", on_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: on[-1])
        monkeypatch.setattr(cuda_graph_double.StreamDouble, "wait_stream", wait_stream)
        run = captured.run

        def noted(part: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            order.append(f"{part} on {names[id(on[-1])]}")
            return run(part, **inputs)

        monkeypatch.setattr(captured, "run", noted)
        captured._slots[1, 1, 0, False, False].graph = None  # type: ignore[attr-defined]
        captured.capture = False  # type: ignore[attr-defined]
        captured("a star", steps=1)
    assert order == [
        "main waits for main",  # of whoever loaded the weights
        "side waits for main",
        "text_encoder on side",
        "text_encoder_2 on main",
        "main waits for side",
        "unet on main",
        "taesd_decoder on main",
    ]


@pytest.mark.parametrize("call", [1, 3])
def test_memory_that_runs_out_is_said_so(
    call: int,
    cuda: type[cuda_graph_double.GraphDouble],
    drawn: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first run, or while the third is captured."""
    with pipeline(drawn, "graph") as captured:
        session = captured.session("unet")
        calls, runs = 0, session.runs  # type: ignore[attr-defined]

        def full(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls < call:
                return runs(*arguments)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(session, "runs", full)
        with pytest.raises(OutOfMemoryError, match="memory ran out"):
            captured("a star", steps=1)


def test_a_part_whose_capture_breaks_says_what_broke_it(
    cuda: type[cuda_graph_double.GraphDouble],
) -> None:
    from backends.tensorrt.device import CudaDevice

    def breaks(error: Exception) -> None:
        raise error

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(OutOfMemoryError, match="while a part was captured") as caught:
        CudaDevice().capture(lambda: breaks(full))
    assert "2.00 GiB" in caught.value.why
    with pytest.raises(BackendError, match="did not run the plan"):
        CudaDevice().capture(lambda: breaks(BackendError("TensorRT did not run the plan")))
    with pytest.raises(BackendError, match="cannot be captured") as named:
        CudaDevice().capture(lambda: breaks(RuntimeError("not permitted when capturing")))
    assert "not permitted when capturing" in named.value.why


def test_what_cannot_be_captured_is_named(
    cuda: type[cuda_graph_double.GraphDouble], drawn: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pipeline(drawn, "graph") as captured:
        calls = 0
        run = captured.session("unet").run

        def third_fails(inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:  # two warm up
                raise RuntimeError("operation not permitted when stream is capturing")
            return run(inputs)

        monkeypatch.setattr(captured.session("unet"), "run", third_fails)
        with pytest.raises(AddbenchError, match="could not be captured") as caught:
            captured("a star", steps=1)
    assert "not permitted when stream is capturing" in caught.value.why
