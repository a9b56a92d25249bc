"""Rows of cells on a card that is modelled: every figure is the model's, no sample was taken.

The image, where one was made, comes from this CPU, and nothing of what that took is in the row.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from backends.modelled import VERSION
from bench.rows.fields import MODELLED, NUMERICS, OK
from core.errors import AddbenchError, PreconditionError
from core.process import run_apart
from export.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from backends.modelled.card import Estimate, Interval
    from bench.rows.cell import Cell
    from bench.run.plan import Candidate
    from export.bundle import Bundle

Result = dict[str, Any]


def with_devices(texts: Sequence[str], devices: Sequence[str]) -> list[str]:
    """`texts` as `--backend` takes them, with every device for each that takes one.

    Raises:
        PreconditionError: none of them does.
    """
    from backends.registry import parse_backend

    if not devices:
        return list(texts)
    found, taken = [], False
    for text in texts:
        takes = "device" in parse_backend(text).option_types
        taken |= takes
        comma = "," if ":" in text else ":"
        found += [f"{text}{comma}device={name}" for name in devices] if takes else [text]
    if not taken:
        raise PreconditionError(
            f"--device {','.join(devices)} fits no backend",
            f"{', '.join(texts)} take no device",
            f"use --backend qaic --device {devices[0]} for a Cloud AI 100",
        )
    return found


def bundle_for(args: argparse.Namespace, candidates: Sequence[Candidate]) -> Bundle:
    """The bundle to run; with `--no-images` a model's architecture will do.

    Raises:
        PreconditionError: there is no bundle, or something is to be measured without images.
    """
    from bench.limits.unbuilt import bundle_or_architecture
    from export.bundle import find_bundle

    wanted = (args.model or DEFAULT_MODEL, args.weights, args.dtype, args.size)
    real = [candidate.key for candidate in candidates if not candidate.modelled]
    if args.no_images:
        if real:
            raise PreconditionError(
                f"--no-images does not fit --backend {real[0]}",
                "its figures are measured while it makes images",
                "drop one of them",
            )
        return bundle_or_architecture(*wanted)
    try:
        return find_bundle(*wanted)
    except PreconditionError as error:
        if real:
            raise
        raise PreconditionError(
            error.what, error.why, f"{error.next}; or, without a bundle: --no-images"
        ) from error


def figures(cells: Sequence[Cell], bundle: Path | None) -> dict[Cell, Result]:
    """Status and figures of every cell.

    Args:
        bundle: counted for what its parts cost; None for the model's architecture.
    """
    from backends.modelled.backend import ModelledBackend
    from backends.modelled.card import estimate
    from backends.modelled.costs import bundle_costs, known_costs
    from backends.pipeline.recipe import Recipe
    from backends.registry import parse_backend
    from core.cli import image_size
    from export.bundle import Bundle

    found = {}
    opened = None if bundle is None else Bundle.open(bundle)
    for cell in cells:
        backend = cast(ModelledBackend, parse_backend(cell.backend_text))
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


def columns(cell: Cell, modelled: Estimate, split: str, tdp_w: float) -> Result:
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
            "switching": {
                "latency": ms(modelled.switching_latency),
                "period": ms(modelled.switching_period),
            },
        },
    }


def ms(interval: Interval) -> dict[str, float]:
    """An interval in milliseconds."""
    return {f"{name}_ms": round(1e3 * value, 4) for name, value in vars(interval).items()}


def figures_apart(cells: Sequence[Cell], bundle: Bundle) -> dict[Cell, Result]:
    """`figures`, in a process of its own where there are graphs to count: the parent of a sweep
    stays small."""
    from bench.limits.unbuilt import Unbuilt

    if isinstance(bundle, Unbuilt):
        return figures(cells, None)
    return run_apart(figures, cells, bundle.path)


def without_worker(
    modelled: Mapping[Cell, Result], group: Sequence[Cell], images: bool
) -> dict[Cell, Result]:
    """The results of a group that takes no worker: all of it or nothing.

    Args:
        images: whether the group's images are wanted, where its card can be modelled.
    """
    known = {cell: modelled[cell] for cell in group if cell in modelled}
    return {} if known and images and known[group[0]]["status"] == OK else known


def with_image(modelled: Result, made: Mapping[str, Any]) -> Result:
    """A modelled cell with what the worker found that made its images: status, check, NFE."""
    kept = {name: made[name] for name in (*NUMERICS, "time_utc", "status") if name in made}
    if made["status"] in (OK, "mismatch"):
        return modelled | kept
    return {"provenance": MODELLED, **kept}
