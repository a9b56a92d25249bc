"""The served model, as far as the server must know it: read from its bundle, without torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from backends.pipeline.recipe import Recipe, check_steps, make_recipe
from backends.pipeline.session import check_decoder, decoders, encoders
from backends.pipeline.start import pairs
from core.errors import PreconditionError
from export.bundle import Bundle

MOST_STEPS = 50
"""Steps that one request may ask for."""


@dataclass(frozen=True)
class ServedModel:
    """What requests are held against.

    Attributes:
        decoders: those that may be asked for; the first where nothing is said.
        steps: where nothing is said; `step_counts` are those that may be asked for.
        guidance: of the server's recipe; 0 for none.
        judge: "shapes" where the captions of a grammar are what it knows.
        pictures: whether it can start from a picture.
        pairs: steps and strengths that suit it when it does, by strength; its workers say them.
        bundle: what the worker opens.
    """

    name: str
    width: int
    height: int
    steps: int
    step_counts: tuple[int, ...]
    decoders: tuple[str, ...]
    guidance: float = 0.0
    judge: str | None = None
    pictures: bool = False
    pairs: tuple[tuple[int, float], ...] = ()
    licence: str = ""
    weights: str = ""
    hash: str = ""
    bundle: Path = Path()

    @property
    def pair(self) -> tuple[int, float]:
        """Steps and strength of a picture that is redrawn, where nothing is said: about half."""
        return min(self.pairs or ((4, 0.5),), key=lambda pair: abs(pair[1] - 0.5))

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


def served_model(
    bundle: Bundle,
    chosen: tuple[str, ...] = (),
    scheduler: str | None = None,
    guidance: float | None = None,
) -> ServedModel:
    """What `bundle` can be asked for.

    Args:
        chosen: decoders; none for all that the bundle has.

    Raises:
        PreconditionError: it has no such decoder, scheduler or guidance.
    """
    recipe = make_recipe(bundle, scheduler, guidance)
    for name in chosen:
        check_decoder(bundle, name)
    counts = []
    for steps in range(1, MOST_STEPS + 1):
        try:
            check_steps(bundle, recipe, steps)
        except PreconditionError:
            continue
        counts.append(steps)
    return ServedModel(
        name=bundle.name,
        width=bundle.size[0],
        height=bundle.size[1],
        steps=bundle.steps,
        step_counts=tuple(counts),
        decoders=chosen or decoders(bundle),
        guidance=recipe.guidance,
        judge=bundle.model.judge,
        pictures=bool(encoders(bundle)),
        licence=bundle.licence,
        weights=bundle.weights,
        hash=bundle.hash,
        bundle=bundle.path,
    )


def redraws(
    bundle: Bundle, recipe: Recipe, counts: Collection[int] | None = None
) -> list[tuple[int, float]]:
    """Steps and strengths with which a picture is redrawn on the model's own timesteps: for each
    strength the fewest steps.

    Args:
        counts: steps that there may be; None for any.
    """
    fewest: dict[float, int] = {}
    for strength in (0.25, 0.5, 0.75):
        for steps, share, _ in pairs(bundle, recipe, 4, strength):
            if counts is None or steps in counts:
                fewest[share] = min(steps, fewest.get(share, steps))
    return [(fewest[share], share) for share in sorted(fewest)]
