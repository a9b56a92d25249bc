"""What a sweep will measure, on what, and how long that takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.rows.cell import Cell
from bench.rows.fields import MODELLED
from bench.rows.store import Row, is_timed, open_run, run_names
from bench.run.measure import FEWEST_SAMPLES, LONG_CALL_S, StopRule
from core.errors import AddbenchError, PreconditionError

if TYPE_CHECKING:
    from backends.base import Backend, Capability
    from export.bundle import Bundle
    from export.models import Model


@dataclass(frozen=True)
class Settings:
    """How every cell of a run is measured: kept in the header, equal for all its rows."""

    rule: StopRule
    rounds: int

    def columns(self) -> dict[str, Any]:
        return {"rounds": self.rounds, **self.rule.columns()}

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Settings:
        rest = dict(columns)
        rounds = rest.pop("rounds")
        return cls(StopRule(**rest), rounds)


@dataclass(frozen=True)
class Candidate:
    """A backend as asked for: `backend` is None when its module does not import."""

    text: str
    backend: Backend | None
    found: Capability

    @property
    def modelled(self) -> bool:
        """Whether its figures come from a model of the device, and no clock."""
        return self.backend is not None and self.backend.provenance == MODELLED

    @property
    def provenance(self) -> str:
        """Of rows that say nothing else: those of cells that failed too."""
        return self.backend.provenance if self.backend else "measured"

    @property
    def key(self) -> str:
        """As `Cell.backend_text` writes it: options sorted."""
        if self.backend is None:
            return self.text
        given = ",".join(f"{key}={value}" for key, value in self.backend.given.items())
        return f"{self.backend.name}:{given}" if given else self.backend.name


def probe(texts: Sequence[str]) -> list[Candidate]:
    """Every backend with what its probe says.

    Raises:
        PreconditionError: an unknown backend or option, one asked for twice, or none usable.
    """
    from backends.base import Capability, UnavailableError
    from backends.registry import parse_backend

    candidates = []
    for text in texts:
        try:
            backend = parse_backend(text)
        except UnavailableError as error:
            if len(texts) == 1:
                raise
            words = Capability(False, error.what, error.why, error.next)
            candidates.append(Candidate(text, None, words))
        else:
            candidates.append(Candidate(text, backend, backend.probe()))
    keys = [candidate.key for candidate in candidates]
    for key in keys:
        if keys.count(key) > 1:
            raise PreconditionError(
                f"--backend {key} stands twice", "a cell is measured once a round", "drop one"
            )
    if len(candidates) == 1 and candidates[0].backend is not None:
        candidates[0].found.require(keys[0])
    if not any(candidate.found.usable for candidate in candidates):
        raise UnavailableError(
            f"none of the backends {', '.join(keys)} can be used",
            "; ".join(
                f"{candidate.key}: {candidate.found.why or candidate.found.what}"
                for candidate in candidates
            ),
            "; ".join(dict.fromkeys(candidate.found.next for candidate in candidates)),
        )
    return candidates


def make_cells(
    bundle: Bundle,
    candidates: Sequence[Candidate],
    *,
    batches: Sequence[int],
    decoders: Sequence[str],
    steps: Sequence[int],
    schedulers: Sequence[str] = (),
    guidance: float | None = None,
    guidance_modes: Sequence[str] = (),
    low_memory: Sequence[bool] = (False,),
) -> list[Cell]:
    """The product of the axes, in the order in which it is measured.

    Args:
        schedulers, guidance, guidance_modes: what differs from the model's own recipe, see
            `backends.pipeline.recipe.make_recipe`.
        low_memory: see `Cell`.

    Raises:
        PreconditionError: a decoder that the bundle does not have, what its model was not made
            for, or low memory of a backend that does not do that.
    """
    from backends.base import check_decoder
    from backends.pipeline.recipe import check_steps, make_recipe
    from export.bundle import size_text

    for decoder in decoders:
        check_decoder(bundle, decoder)
    for candidate in candidates if any(low_memory) else ():
        if candidate.backend is not None:
            candidate.backend.require_low_memory()
    recipes = dict.fromkeys(
        make_recipe(bundle, scheduler, guidance, mode)
        for scheduler in schedulers or (None,)
        for mode in guidance_modes or (None,)
    )
    for recipe in recipes:
        for count in steps:
            check_steps(bundle, recipe, count)
    return [
        Cell(
            model=bundle.name,
            weights=bundle.weights,
            backend=candidate.key.partition(":")[0],
            options=candidate.key.partition(":")[2],
            device=candidate.backend.device if candidate.backend else "unknown",
            precision=candidate.backend.precision(bundle) if candidate.backend else "unknown",
            storage=candidate.backend.storage(bundle) if candidate.backend else bundle.dtype,
            size=size_text(bundle.size),
            batch=batch,
            decoder=decoder,
            steps=count,
            scheduler=recipe.scheduler,
            guidance=recipe.guidance,
            guidance_mode=recipe.guidance_mode,
            low_memory=low,
        )
        for candidate in candidates
        for batch in batches
        for decoder in decoders
        for recipe in recipes
        for low in dict.fromkeys(low_memory)
        for count in steps
    ]


def default_steps(model: Model) -> list[int]:
    """Step counts to measure where none are asked for: those that the model is used with."""
    if model.step_counts:
        return list(model.step_counts)
    return [1, 2, 4] if model.steps <= 8 else [model.steps]


def groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that one worker measures, in the order of the plan."""
    return [list(group) for _, group in groupby(cells, key=lambda cell: cell.group)]


# ---- how long it takes

WORKER_START_S = 5.0
"""Python, torch, diffusers and scikit-image, imported on two cores."""
TYPICAL_FRACTION = 0.6
"""Of the floor that a CPU backend reaches over a whole call, roughly."""


@dataclass(frozen=True)
class Estimate:
    """Seconds for a cell and where they come from. `bound`: at least so long, no more is known."""

    seconds: float
    source: str
    bound: bool = False


def estimate(
    cell: Cell, rule: StopRule, history: Mapping[Cell, Row], surveyed: Mapping[str, Any] | None
) -> Estimate:
    """How long one round of `cell` takes: by an earlier row, else its floor, else a bound."""
    from bench.limits.floors import call_floor_s

    if cell in history:
        row = history[cell]
        call_s, cold_s = row["median_ms"] / 1e3, row["cold_ms"] / 1e3
        return Estimate(sampling_s(call_s, cold_s, rule), f"run {row['run']}")
    least = call_floor_s(cell, surveyed) if surveyed and cell.backend != "null" else None
    if least is not None:
        call_s = least / TYPICAL_FRACTION
        return Estimate(sampling_s(call_s, call_s, rule), f"floor / {TYPICAL_FRACTION}")
    return Estimate(rule.min_time, "no figure yet", bound=True)


def sampling_s(call_s: float, cold_s: float, rule: StopRule) -> float:
    """Seconds of a cell whose calls take `call_s`: cold call, warm-up and samples."""
    samples = max(rule.min_samples, math.ceil(rule.min_time / call_s))
    if samples * call_s > rule.max_time:
        samples = min(samples, max(FEWEST_SAMPLES, math.ceil(rule.max_time / call_s)))
    warmup = 0 if cold_s > LONG_CALL_S else rule.warmup
    return cold_s + (warmup + samples) * call_s


def past_rows(out: Path, machine: str, newest: int = 20) -> dict[Cell, Row]:
    """The last good row of every cell among the newest runs below `out` made on this machine."""
    known: dict[Cell, Row] = {}
    for name in run_names(out)[-newest:]:
        try:
            run = open_run(name, out)
            if run.header.environment["machine"] != machine:
                continue
            known |= {Cell.of(row): row for row in run.rows() if is_timed(row)}
        except (AddbenchError, KeyError):
            continue  # a damaged old run costs its estimates, not this sweep
    return known


def load_s(group: Sequence[Cell], history: Mapping[Cell, Row]) -> float:
    """Seconds before a worker's first call: start, compile and load as an earlier row has them."""
    rows = [history[cell] for cell in group if cell in history]
    loads = [(row["load_s"] or 0.0) + (row["compile_s"] or 0.0) for row in rows]
    return WORKER_START_S + max(loads, default=0.0)
