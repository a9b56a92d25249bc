"""Prompts over several devices.

A lane is a pipeline whose parts are on certain devices. The three splits:

    pipelines   a whole pipeline of batch 1 on every device, side by side: the likely reading of
                'an Ultra makes 4 images for 4 prompts'. The images of a call are dealt out
    batch       all images of a call as one batch on one device; calls are dealt out
    parts       each part on the next device in turn, all images of a call through each; calls
                follow each other

A call's latency is not what a busy card delivers: `period_s` is the time between the ends of two
calls while calls are always in flight on all lanes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import numpy as np

from backends.base import Session, Shapes, UnsupportedError
from backends.pipeline.output import Output, Timings
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.prompts import ImageCall
from export.models import PICTURE_PARTS

if TYPE_CHECKING:
    from backends.pipeline.recipe import Recipe
    from backends.qaic import QaicBackend
    from export.bundle import Bundle

FEWEST_CALLS = 3
"""The fewest calls of each lane that tell a rate."""


class Lane(Pipeline):
    """One pipeline; `devices` says where each part runs."""

    backend: QaicBackend
    devices: Mapping[str, int]

    def session(self, part: str) -> Session:
        if part not in self._sessions:
            self._sessions[part] = self.backend.load_on(
                self.bundle, self._artifact(part), self.devices[part]
            )
        return self._sessions[part]


class LanesPipeline(Lane):
    """The first lane, and those beside it; calls are dealt out over all of them."""

    def __init__(
        self,
        backend: QaicBackend,
        bundle: Bundle,
        decoder: str,
        shapes: Shapes,
        *,
        devices: Sequence[int],
        split: str,
        embedding_cache: int = 0,
        recipe: Recipe | None = None,
    ) -> None:
        self.images = shapes.batch
        own = replace(shapes, batch=1) if split == "pipelines" else shapes
        super().__init__(
            backend, bundle, decoder, own, embedding_cache=embedding_cache, recipe=recipe
        )
        self.split = split
        self.others = [
            Lane(backend, bundle, decoder, own, embedding_cache=embedding_cache, recipe=recipe)
            for _ in devices[1:]
        ]
        for lane, device in zip(self.lanes, devices, strict=True):
            lane.artifacts = self.artifacts  # compiled once
            if split == "parts":
                lane.devices, lane._sessions = place(self.placed, devices), self._sessions
            else:
                lane.devices = place(self.placed, [device])
        self._pool = ThreadPoolExecutor(len(self.lanes), "qaic-lane")

    @property
    def placed(self) -> tuple[str, ...]:
        """The parts that may come to run, those for a picture last."""
        return (*self.parts, *PICTURE_PARTS)

    @property
    def lanes(self) -> list[Lane]:
        return [self, *self.others]

    @property
    def load_s(self) -> float:
        loaded = {id(each): each for lane in self.lanes for each in lane._sessions.values()}
        return sum(session.load_s for session in loaded.values())

    def prepare(self) -> Self:
        super().prepare()
        for lane in self.others:
            lane.prepare()
        return self

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for lane in self.others:
            lane.close()
        super().close()

    def use_encoder(self, encoder: str | None = None) -> Self:
        super().use_encoder(encoder)
        for lane in self.others:
            lane.encoder = self.encoder
        return self

    def _draw(self, call: ImageCall) -> Output:
        """Draw as every pipeline; the lanes work at the same time."""
        count = len(call.prompts)
        if self.split != "pipelines":
            if count != self.shapes.batch:
                raise UnsupportedError(
                    f"{count} prompts do not fit",
                    f"the programs were compiled for a batch of {self.shapes.batch}",
                    f"pass {self.shapes.batch} prompts, or compile with --batch {count}",
                )
            return super()._draw(call)
        for lane in self.lanes[:count]:
            for part in lane.parts:
                lane.session(part)
        started = time.perf_counter_ns()
        # Image i on lane i modulo their number; a lane makes its images one after the other.
        futures = [
            self._pool.submit(run_each, lane, call.part(slice(at, None, len(self.lanes))))
            for at, lane in enumerate(self.lanes[:count])
        ]
        made = [future.result() for future in futures]
        total = (time.perf_counter_ns() - started) / 1e9
        images = np.empty((count, *made[0][0].images.shape[1:]), np.uint8)
        for at, outputs in enumerate(made):
            for index, output in enumerate(outputs):
                images[at + index * len(self.lanes)] = output.images[0]
        return replace(made[0][0], images=images, timings=slowest(made, total))

    def period_s(
        self, inputs: Callable[[int], tuple[list[str], list[int]]], steps: int, seconds: float
    ) -> float | None:
        """Seconds between the ends of two calls of `images` prompts, all lanes kept busy.

        None for a single device: there one call follows the other.

        Args:
            inputs: number of a call -> its prompts and seeds, as many as the lanes were made for.
            seconds: how long to keep them busy, at least; every lane makes three calls in any case.

        Every lane takes the next images when it is done with its own. A lane's rate is counted from
        the end of its first call to the end of its last; the rates of all lanes add up.
        """
        if len(self.lanes) == 1:
            return None
        size = 1 if self.split == "pipelines" else self.shapes.batch
        numbers, stop = itertools.count(), time.perf_counter() + seconds

        def rate(lane: Lane) -> float:
            """Images per second."""
            ended: list[float] = []
            while len(ended) < FEWEST_CALLS or time.perf_counter() < stop:
                first = next(numbers) * size
                prompts, seeds = inputs(first // self.images)
                span = slice(first % self.images, first % self.images + size)
                Pipeline._draw(lane, ImageCall(prompts, steps, seeds).part(span))
                ended.append(time.perf_counter())
            return (len(ended) - 1) * size / (ended[-1] - ended[0])

        with self._turn:
            return self.images / sum(self._pool.map(rate, self.lanes))


def place(parts: Sequence[str], devices: Sequence[int]) -> dict[str, int]:
    """Each part's device, dealt out in turn."""
    return {part: devices[at % len(devices)] for at, part in enumerate(parts)}


def run_each(lane: Lane, call: ImageCall) -> list[Output]:
    """One image after the other on one lane."""
    return [Pipeline._draw(lane, call.part(slice(at, at + 1))) for at in range(len(call.prompts))]


def slowest(made: Sequence[Sequence[Output]], total: float) -> Timings:
    """The stages of the lane that ended last, its images added up; what is left is `rest`."""
    lane = max(made, key=lambda outputs: sum(output.timings.total for output in outputs))
    text = sum(output.timings.text or 0.0 for output in lane)
    decode = sum(output.timings.decode or 0.0 for output in lane)
    unet = [sum(steps) for steps in zip(*(output.timings.unet for output in lane), strict=True)]
    encode = sum(output.timings.encode or 0.0 for output in lane)
    rest = total - text - encode - decode - sum(unet)
    has_picture = any(output.timings.encode is not None for output in lane)
    return Timings(text, unet, decode, rest, total, encode=encode if has_picture else None)
