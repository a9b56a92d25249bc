"""A choice as a locked recipe."""

from __future__ import annotations

import os
from pathlib import Path

from backends.locked import LockedRecipe
from bench.verdict.choosing.choice import Decision
from core.errors import PreconditionError


def recipe_of(choice: Decision, model: str = "") -> LockedRecipe:
    """The recipe of what was taken.

    Args:
        model: what was typed for --model; "" for the model's name.
    """
    if choice.taken is None or choice.taken.contender.header is None:
        raise PreconditionError(
            "there is no choice to save", "nothing was taken", "loosen --within"
        )
    contender = choice.taken.contender
    cell, header = contender.cell, choice.taken.contender.header
    folder = os.sep in model or Path(model).is_dir() if model else False
    return LockedRecipe(
        model=str(Path(model).resolve()) if folder else cell.model,
        weights=cell.weights,
        dtype=str(header.bundle["dtype"]),
        size=cell.size,
        backend=cell.backend_text,
        decoder=cell.decoder,
        steps=cell.steps,
        batch=cell.batch,
        scheduler=cell.scheduler,
        guidance=cell.guidance,
        guidance_mode=cell.guidance_mode,
        low_memory=cell.low_memory,
        bundle=str(header.bundle["hash"]),
        measured={
            "machine": contender.machine,
            "place": contender.place,
            "run": contender.run,
            "rounds": contender.rounds,
            "provenance": contender.provenance,
        },
        figures={name: [span.mid, span.low, span.high] for name, span in contender.spans.items()},
        wanted={"within": choice.wants.text, "best": choice.objective.name},
    )


def require_place(path: Path) -> None:
    """Refuse a place that no recipe can be written to, before anything is measured."""
    if path.suffix != ".toml" or not path.parent.is_dir() or path.is_dir():
        raise PreconditionError(
            f"--save {path} is no place for a recipe",
            "it is a .toml file in a folder that is there",
            "use --save recipe.toml",
        )
