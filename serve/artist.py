"""Pipelines that a worker draws with: loaded, warmed, their batches held against single pictures.

The decoders of a model share everything but the decoder.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.artifacts.child import HOME_PYTHON, environment_for
from backends.base import Backend, Shapes, artifact_key
from backends.pipeline.output import Output
from backends.pipeline.pictures import read_picture
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.prompts import TOKENS
from backends.pipeline.recipe import make_recipe
from backends.pipeline.session import encoders
from backends.registry import parse_backend
from core.errors import AddbenchError, PreconditionError
from core.files import ROOT
from distill.shapes import unknown_words
from export.bundle import Bundle
from serve.model import redraws

QUICK_S = 0.5
"""A picture that takes no longer is worth drawing in batches where nobody said."""
BATCH = 4


class Progress(Protocol):
    """Tells the server what is being done before the first picture."""

    def __call__(self, stage: str, share: float | None = None) -> None:
        """`share`: how much of it is done, 0 to 1; None where that is not known."""


class Loading:
    """Tells which part of how many is being compiled or loaded; decoders share parts."""

    def __init__(self, progress: Progress, parts: Collection[str]) -> None:
        self.progress, self.total = progress, len(parts)
        self.begun: dict[str, set[str]] = {"compiling": set(), "loading": set()}

    def __call__(self, doing: str, part: str) -> None:
        if part in self.begun[doing]:
            return
        share = sum(map(len, self.begun.values())) / (2 * self.total)
        self.begun[doing].add(part)
        self.progress(f"{doing} {part}, {len(self.begun[doing])} of {self.total}", share=share)


def load(job: Mapping[str, Any], progress: Progress) -> Artist:
    """Load, warm and check what `job` names: `bundle`, `backend`, `decoders`, `all_decoders`
    (whether each of them was asked for), `batch` (null: as many as pay), `scheduler`, `guidance`.

    A backend of another environment: this process becomes one of that interpreter.
    """
    backend = parse_backend(job["backend"])
    backend.probe().require(backend.name)
    if backend.interpreter and Path(backend.interpreter) != Path(sys.executable):
        os.chdir(ROOT)
        home = Path(sys.executable)
        variables = environment_for(backend.interpreter, home) | {HOME_PYTHON: str(home)}
        python = str(backend.interpreter)
        os.execve(python, [python, "-m", "serve.worker", *sys.argv[1:]], variables)
    bundle = Bundle.open(Path(job["bundle"]))
    fixed = one_batch_only(backend, bundle)
    batch = job["batch"] or (1 if fixed else BATCH)
    recipe = make_recipe(bundle, job["scheduler"], job["guidance"])
    pictures = bool(encoders(bundle)) and not backend.no_pictures
    planned: dict[str, Pipeline] = {}
    for decoder in job["decoders"]:
        pipeline = backend.pipeline(bundle, decoder, Shapes(batch, *bundle.size), recipe=recipe)
        planned[decoder] = pipeline.use_encoder() if pictures else pipeline
    loading = Loading(progress, {part for each in planned.values() for part in each.parts})
    pipelines: dict[str, Pipeline] = {}
    for decoder, pipeline in planned.items():
        pipeline.on_part = loading
        first = next(iter(pipelines.values()), None)
        if first and type(first).session is Pipeline.session and first.staged:
            for part in set(first.parts) & set(pipeline.parts):
                pipeline.put(part, first.session(part))
        elif first and not job["all_decoders"]:
            break  # it would hold the whole model twice, and nobody asked for it
        pipelines[decoder] = pipeline.prepare()
    artist = Artist(pipelines, batch, fixed, pictures)
    progress("warming up", share=1.0)
    artist.warm(chosen=job["batch"] is not None)
    return artist


def one_batch_only(backend: Backend, bundle: Bundle) -> bool:
    """Whether what the backend compiles is for one size of batch."""
    keys = {artifact_key(backend, bundle, "unet", Shapes(n, *bundle.size)) for n in (1, 2)}
    return len(keys) > 1


class Artist:
    """Draws batches with one pipeline for each decoder.

    Args:
        batch: the largest.
        fixed: whether the graphs take exactly `batch`; fewer are filled up, and thrown away.
        pictures: whether they can start from a picture.
    """

    def __init__(
        self, pipelines: Mapping[str, Pipeline], batch: int, fixed: bool, pictures: bool
    ) -> None:
        self.pipelines, self.batch, self.fixed = dict(pipelines), batch, fixed
        self.pictures = pictures
        self.sizes = [1]
        self.remarks: list[str] = []
        self.first = next(iter(self.pipelines.values()))
        self.tokenizer = self.first.bundle.tokenizers()[0]

    @property
    def backend(self) -> Backend:
        return self.first.backend

    def facts(self) -> dict[str, Any]:
        return {
            "sizes": self.sizes,
            "decoders": list(self.pipelines),
            "pictures": self.pictures,
            "pairs": redraws(self.first.bundle, self.first.recipe) if self.pictures else [],
            "remarks": self.remarks,
            "precision": self.backend.precision(self.first.bundle),
            "provenance": self.backend.provenance,
        }

    def warm(self, chosen: bool) -> None:
        """Draw once at every batch size that will be used, and hold batches against single
        pictures: where they differ by more than rounding, batches are given up unless `chosen`."""
        prompts = self.first.bundle.model.prompts
        steps = self.first.bundle.steps
        for pipeline in self.pipelines.values():
            self.call(pipeline, [prompts[0]], [0], steps)  # the cold call
        started = time.perf_counter()
        alone = self.call(self.first, [prompts[0]], [0], steps).images[0]
        if not chosen and time.perf_counter() - started > QUICK_S:
            return
        for size in batch_sizes(self.batch)[1:]:
            filled = [prompts[index % len(prompts)] for index in range(size)]
            for pipeline in self.pipelines.values():
                images = self.call(pipeline, filled, list(range(size)), steps).images
                if pipeline is self.first and not self.same(images[0], alone):
                    self.remarks.append(
                        f"a picture drawn in a batch of {size} is not the one drawn alone"
                    )
                    if not chosen:
                        return
            self.sizes.append(size)

    def same(self, image: NDArray[np.uint8], alone: NDArray[np.uint8]) -> bool:
        """Whether two pictures differ by rounding at most: by the gate of the parity checks."""
        if np.array_equal(image, alone):
            return True
        from backends.check.gate import gate_for, image_distance

        bundle = self.first.bundle
        gate = gate_for(
            self.backend.storage(bundle), self.backend.precision(bundle), bundle.weights
        )
        return image_distance(image, alone).passes(gate)

    def call(
        self,
        pipeline: Pipeline,
        prompts: list[str],
        seeds: list[int],
        steps: int,
        pictures: list[NDArray[np.uint8]] | None = None,
        strength: float | None = None,
    ) -> Output:
        """A call of the pipeline, filled up where its batch is fixed. Its warnings are the notes'
        business: they quote prompts."""
        filling = self.batch - len(prompts) if self.fixed else 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pipeline(
                prompts + prompts[-1:] * filling,
                steps=steps,
                seed=seeds + seeds[-1:] * filling,
                images=pictures + pictures[-1:] * filling if pictures else None,
                strength=strength if pictures else None,
            )

    def draw(
        self, order: Mapping[str, Any], files: list[bytes], check: Callable[[], None]
    ) -> tuple[list[NDArray[np.uint8] | AddbenchError], list[dict[str, Any]], dict[str, float]]:
        pipeline = self.pipelines[order["decoder"]]
        answers: list[NDArray[np.uint8] | AddbenchError | None] = [None] * len(order["pictures"])
        pictures: list[NDArray[np.uint8]] = []
        for place, file in enumerate(files):
            if file:
                try:
                    shapes = pipeline.shapes
                    read = read_picture(file, "the picture", shapes.width, shapes.height)
                    pictures.append(read.pixels)
                except PreconditionError as error:  # of this one alone, not of its batch
                    answers[place] = error
        asked = [p for p, answer in zip(order["pictures"], answers, strict=True) if answer is None]
        ms: dict[str, float] = {}
        if asked:
            prompts, seeds = [p["prompt"] for p in asked], [p["seed"] for p in asked]
            with checked(pipeline, check):
                output = self.call(
                    pipeline, prompts, seeds, order["steps"], pictures, order["strength"]
                )
            drawn, ms = iter(output.images), milliseconds(output)
            answers = [next(drawn) if answer is None else answer for answer in answers]
        notes = [self.notes(picture["prompt"]) for picture in order["pictures"]]
        return [answer for answer in answers if answer is not None], notes, ms

    def notes(self, prompt: str) -> dict[str, Any]:
        """What the client should know: how many tokens, and how many are read where fewer are;
        words that the model was never shown."""
        count = len(self.tokenizer(prompt, verbose=False)["input_ids"])
        notes: dict[str, Any] = {"tokens": count}
        if count > TOKENS:
            notes["cut_at"] = TOKENS
        if self.first.bundle.model.judge == "shapes" and (unknown := unknown_words(prompt)):
            notes["unknown"] = list(unknown)[:8]
        return notes


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    sizes = [1]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == most else [*sizes, most]


@contextmanager
def checked(pipeline: Pipeline, check: Callable[[], None]) -> Iterator[None]:
    """A block in which `check` is called before each part runs, where the pipeline runs parts one
    by one; a captured one is only asked before the call."""
    check()
    if not pipeline.staged:
        yield
        return
    own = pipeline.run

    def run(part: str, **inputs: Any) -> Any:
        check()
        return own(part, **inputs)

    pipeline.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pipeline.run  # the class's again


def milliseconds(output: Output) -> dict[str, float]:
    """A call's milliseconds by stage; its total alone where it did not wait between stages."""
    times = output.timings
    stages = {"text": times.text, "picture": times.encode, "decode": times.decode,
              "rest": times.rest}  # fmt: skip
    known = {name: 1e3 * seconds for name, seconds in stages.items() if seconds is not None}
    if times.unet:
        known["unet"] = 1e3 * sum(times.unet)
    return {name: round(ms, 3) for name, ms in (known | {"total": 1e3 * times.total}).items()}
