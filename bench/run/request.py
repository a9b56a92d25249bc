"""What is asked for, as frozen data: commands, tests and notebooks make one, `plan` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from bench.run.measure import StopRule
from core.errors import PreconditionError
from core.values import counts, finite, path_text, pixels, refuse, shares, switches, texts
from export.models import DEFAULT_MODEL

CAPTIONS = 600
"""Captions that are judged where nobody says how many: a share of 0.9 is known to 2.4 points."""
BY_TIME = 0
"""Rounds of a method that leaves their number to how long one takes."""


@dataclass(frozen=True)
class Sampling:
    """How every cell of a run is measured: kept in its header, equal for all its rows.

    Attributes:
        rule: how long a cell is sampled in one round.
        rounds: fresh processes for each cell; BY_TIME: several where one round of all is short.
    """

    rule: StopRule = field(default_factory=StopRule)
    rounds: int = BY_TIME

    def __post_init__(self) -> None:
        if self.rule.max_time < self.rule.min_time:
            raise PreconditionError(
                f"--max-time {self.rule.max_time:g} is below --min-time {self.rule.min_time:g}",
                "a cell cannot take at least one and at most the other",
                "raise --max-time or lower --min-time",
            )

    def columns(self) -> dict[str, Any]:
        """The method as a header holds it."""
        return {"rounds": self.rounds, **self.rule.columns()}

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Self:
        """The method that a header holds."""
        rest = dict(columns)
        rounds = rest.pop("rounds")
        return cls(StopRule(**rest), rounds)

    def but(self, **changes: Any) -> Self:
        """The method with other rounds or fields of the rule; None leaves one as it is."""
        given = {name: value for name, value in changes.items() if value is not None}
        rounds = given.pop("rounds", self.rounds)
        return replace(self, rule=replace(self.rule, **given), rounds=rounds)


SWEEP = Sampling()
QUICK = Sampling(StopRule(min_samples=3, min_time=0.2, max_time=5.0), rounds=1)
PAIR = Sampling(StopRule(min_samples=1, min_time=2.0), rounds=6)
"""Rounds are independent, samples of one process are not: many rounds of few samples."""
AB = Sampling(StopRule(min_samples=5, min_time=1.0, max_time=20.0), rounds=10)
SINGLE = Sampling(StopRule(min_samples=1, min_time=0.0, max_time=1e6, warmup=0), rounds=1)
"""One sample after a one-step call: for cells whose call takes minutes."""


@dataclass(frozen=True)
class Request:
    """A model, the axes of the cells to measure, and how to measure them.

    The cells are the product of the axes. A lone value stands for a sequence of one, and every
    value is checked as the command line checks it.

    Args:
        model: a model's name, or the folder of a bundle.
        weights, dtype, size: which bundle of that model; None for the first that there is.
        backends: each `NAME[:KEY=VALUE,...]`, as `--backend` takes it.
        devices: for backends that take one; a card's name is modelled, an id is a card here.
        precision: of the arithmetic, for backends that can choose.
        steps: denoising steps; () for those that the model is used with.
        batches: images a call.
        decoders: `vae`, `taesd`; () for those that the bundle has.
        schedulers, guidance, guidance_modes: where they are not the model's own.
        strengths: share of the steps that run on a picture that the images start from; () for
            images from noise.
        negatives: prompts that guidance leads away from, "" for none given; () for that alone.
        encoders: of that picture, `vae`, `taesd`; () for that of the decoder.
        low_memory: whether a call loads each part when it needs it and releases it after.
        method: how long and in how many fresh processes each cell is measured.
        quality: of how many held-out captions the pictures are judged too; 0 for none.
        frames: how many pictures in a row are started from too, for frames a second; 0 for none.
        images: False for the figures of modelled cards alone.

    Raises:
        PreconditionError: a value cannot be measured; what is wrong, why, and what to pass.
    """

    model: str = DEFAULT_MODEL
    weights: str | None = None
    dtype: str | None = None
    size: tuple[int, int] | None = None
    backends: tuple[str, ...] = ("ort",)
    devices: tuple[str, ...] = ()
    precision: str | None = None
    steps: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    decoders: tuple[str, ...] = ()
    schedulers: tuple[str, ...] = ()
    guidance: float | None = None
    guidance_modes: tuple[str, ...] = ()
    low_memory: tuple[bool, ...] = (False,)
    encoders: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    negatives: tuple[str, ...] = ()
    method: Sampling = SWEEP
    quality: int = 0
    frames: int = 0
    images: bool = True

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"model": path_text("model", self.model)}
        for name in ("weights", "dtype", "precision"):
            value = getattr(self, name)
            checked[name] = None if value is None else path_text(name, value)
        if self.size is not None:
            checked["size"] = pixels(self.size)
        for name in ("backends", "devices", "decoders", "schedulers", "guidance_modes", "encoders"):
            checked[name] = texts(name, getattr(self, name))
        checked["negatives"] = texts("negatives", self.negatives, empty=True)
        checked["steps"] = counts("steps", self.steps)
        checked["batches"] = counts("batches", self.batches)
        checked["strengths"] = shares("strengths", self.strengths)
        if self.encoders and not self.strengths:
            refuse("encoders", self.encoders, "they are of a picture, and none is started from",
                   "add strengths=0.5 (--strength 0.5), or leave them out")  # fmt: skip
        checked["low_memory"] = switches("low_memory", self.low_memory)
        for name in ("backends", "batches", "low_memory"):
            if not checked[name]:
                refuse(name, getattr(self, name), "it has no value", "leave it out, or name one")
        if self.guidance is not None:
            checked["guidance"] = finite("guidance", self.guidance)
        if not isinstance(self.method, Sampling):
            refuse(
                "method", self.method, "it is no Sampling", "pass bench.run.request.Sampling(...)"
            )
        if type(self.quality) is not int or self.quality < 0:
            refuse("quality", self.quality, "it is a number of captions", "pass quality=600")
        if type(self.frames) is not int or self.frames < 0:
            refuse("frames", self.frames, "it is a number of pictures", "pass frames=100")
        if self.frames and not any(share < 1 for share in checked["strengths"]):
            refuse("frames", self.frames, "they are pictures, and none is started from",
                   "add strengths=0.5 (--strength 0.5), or leave it out")  # fmt: skip
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def axes(self) -> dict[str, Any]:
        """The fields by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}
