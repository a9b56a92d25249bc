"""Figures of cells on a card that is modelled: all of them the model's, no sample was taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from backends.modelled import VERSION
from bench.limits.unbuilt import Unbuilt
from bench.rows.cell import Cell
from bench.rows.fields import MODELLED, OK
from core.cli import image_size
from core.errors import AddbenchError
from core.process import run_apart
from export.bundle import Bundle

if TYPE_CHECKING:
    from backends.modelled.backend import ModelledBackend
    from backends.modelled.card import CallEstimate, Interval, Pace

Result = dict[str, Any]


def figures(cells: Sequence[Cell], bundle: Path | None) -> dict[Cell, Result]:
    """Status and figures of every cell.

    Args:
        bundle: counted for what its parts cost; None for the model's architecture.
    """
    from backends.modelled.card import estimate
    from backends.modelled.costs import bundle_costs, known_costs
    from backends.pipeline.recipe import Recipe
    from backends.registry import parse_backend

    found = {}
    opened = None if bundle is None else Bundle.open(bundle)
    for cell in cells:
        backend = cast("ModelledBackend", parse_backend(cell.backend_text))
        recipe = Recipe(cell.scheduler, cell.guidance, cell.guidance_mode)
        call = backend.call(cell.decoder, cell.batch, cell.steps, recipe)
        try:
            if opened is None:
                costs = known_costs(cell.model, image_size(cell.size))
            else:
                costs = bundle_costs(opened)
            modelled = estimate(backend.card, costs, call)
        except AddbenchError as error:
            found[cell] = {"status": "skipped", "provenance": MODELLED, "error": error.as_dict()}
        else:
            found[cell] = columns(cell, modelled, backend.split, backend.card.tdp_w)
    return found


def columns(cell: Cell, modelled: CallEstimate, split: str, tdp_w: float) -> Result:
    """A modelled call as the figures of a row, in milliseconds."""
    stages = {name: ms(each)["mid_ms"] for name, each in modelled.stages.items()}
    latency, period = ms(modelled.latency), ms(modelled.period)
    return {
        "status": OK,
        "provenance": MODELLED,
        "median_ms": latency["mid_ms"],
        "low_ms": latency["low_ms"],
        "high_ms": latency["high_ms"],
        "period_ms": period["mid_ms"],
        "images_per_s": round(cell.batch * 1e3 / latency["mid_ms"], 4),
        "stages_ms": {
            "text": stages["text"],
            "unet_first": stages["unet_step"],
            "unet_step": stages["unet_step"] if cell.steps > 1 else None,
            "decode": stages["decode"],
            "rest": stages["rest"],
        },
        "energy_j": round(tdp_w * modelled.period.mid, 4),
        "modelled": {
            "version": VERSION,
            "split": split,
            "tdp_w": tdp_w,
            "floor_ms": round(1e3 * modelled.floor, 4),
            "stages": {name: ms(each) for name, each in modelled.stages.items()},
            "period": period,
            "switching": pace(modelled.once),
            "switching_each": pace(modelled.each),
        },
    }


def pace(switched: Pace) -> dict[str, dict[str, float]]:
    """Latency and period in milliseconds."""
    return {"latency": ms(switched.latency), "period": ms(switched.period)}


def ms(interval: Interval) -> dict[str, float]:
    """An interval in milliseconds."""
    return {f"{name}_ms": round(1e3 * value, 4) for name, value in vars(interval).items()}


def figures_apart(cells: Sequence[Cell], bundle: Bundle) -> dict[Cell, Result]:
    """`figures`, in a process of its own where there are graphs to count: the parent of a sweep
    stays small."""
    if isinstance(bundle, Unbuilt):
        return figures(cells, None)
    return run_apart(figures, cells, bundle.path)
