"""From a request to a plan: its backends as they are here, its bundle, its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from backends.base import Backend, Capability, UnavailableError, check_decoder
from backends.pipeline.prompts import check_negative
from backends.pipeline.recipe import Recipe, check_steps, make_recipe
from backends.pipeline.session import check_encoder, decoders, encoders
from backends.pipeline.start import check_strength, kept_steps
from backends.registry import parse_backend, with_precision
from bench.limits.unbuilt import bundle_or_architecture
from bench.machine.environment import collect, git_state, with_hardware
from bench.rows.cell import Cell
from bench.rows.fields import MODELLED
from bench.rows.header import Header
from bench.rows.store import portable
from bench.run.quality import require_judge
from bench.run.request import Request, Sampling
from core.errors import PreconditionError
from export.bundle import Bundle, find_bundle, size_text
from export.models import Model


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
        """The provenance of rows that say nothing else: those of cells that failed too."""
        return self.backend.provenance if self.backend else "measured"

    @property
    def key(self) -> str:
        """The candidate as `Cell.backend_text` writes it: options sorted."""
        if self.backend is None:
            return self.text
        given = ",".join(f"{key}={value}" for key, value in self.backend.given.items())
        return f"{self.backend.name}:{given}" if given else self.backend.name


def probe(texts: Sequence[str], *, away: bool = False) -> list[Candidate]:
    """Every backend with what its probe says.

    Args:
        away: none of them need be usable here, as where nothing is to run.

    Raises:
        PreconditionError: an unknown backend or option, one asked for twice, or none usable.
    """
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
    if away:
        return candidates
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


def with_devices(backends: Sequence[str], devices: Sequence[str]) -> list[str]:
    """The backends as `--backend` takes them, with every device for each that takes one.

    Raises:
        PreconditionError: none of them does.
    """
    if not devices:
        return list(backends)
    texts, taken = [], False
    for text in backends:
        takes = "device" in parse_backend(text).option_types
        taken |= takes
        comma = "," if ":" in text else ":"
        texts += [f"{text}{comma}device={name}" for name in devices] if takes else [text]
    if not taken:
        raise PreconditionError(
            f"--device {','.join(devices)} fits no backend",
            f"{', '.join(backends)} take no device",
            f"use --backend qaic --device {devices[0]} for a Cloud AI 100",
        )
    return texts


def bundle_for(request: Request, candidates: Sequence[Candidate]) -> Bundle:
    """The bundle to run; where no images are wanted a model's architecture will do.

    Raises:
        PreconditionError: there is no bundle, or something is to be measured without images.
    """
    wanted = (request.model, request.weights, request.dtype, request.size)
    real = [candidate.key for candidate in candidates if not candidate.modelled]
    if not request.images:
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


def make_cells(
    bundle: Bundle, candidates: Sequence[Candidate], request: Request
) -> tuple[Cell, ...]:
    """The product of the request's axes, in the order in which it is measured.

    Raises:
        PreconditionError: a decoder that the bundle does not have, what its model was not made
            for, a negative prompt that nothing reads, or low memory of a backend that does not do
            that.
    """
    chosen = request.decoders or decoders(bundle)
    for decoder in chosen:
        check_decoder(bundle, decoder)
    for candidate in candidates if any(request.low_memory) else ():
        if candidate.backend is not None:
            candidate.backend.require_low_memory()
    starts = starts_of(bundle, candidates, request)
    steps = request.steps or default_steps(bundle.model)
    recipes = dict.fromkeys(
        make_recipe(bundle, scheduler, request.guidance, mode)
        for scheduler in request.schedulers or (None,)
        for mode in request.guidance_modes or (None,)
    )
    for recipe in recipes:
        for count in steps:
            check_steps(bundle, recipe, count)
        for negative in filter(None, request.negatives):
            check_negative(bundle, recipe, negative, 1)
    runs = {
        (recipe, strength, count): fits(bundle, recipe, strength, count, asked=bool(request.steps))
        for recipe in recipes
        for strength in request.strengths or (1.0,)
        for count in steps
    }
    for strength in request.strengths:
        if not any(good for (_, of, _), good in runs.items() if of == strength):
            check_strength(bundle, next(iter(recipes)), steps[0], strength)
    return tuple(
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
            encoder=encoder,
            strength=strength,
            negative=negative,
        )
        for candidate in candidates
        for batch in request.batches
        for decoder in chosen
        for recipe in recipes
        for low in request.low_memory
        for encoder, strength in starts(decoder)
        for negative in request.negatives or ("",)
        for count in steps
        if runs[recipe, strength, count]
    )


def starts_of(
    bundle: Bundle, candidates: Sequence[Candidate], request: Request
) -> Callable[[str], list[tuple[str, float]]]:
    """What images of a decoder start from: (encoder, strength); ("", 1) is noise.

    Raises:
        PreconditionError: the bundle has no such encoder.
        UnsupportedError: a backend does not start from a picture.
    """
    pictured = any(strength < 1 for strength in request.strengths)
    for candidate in candidates if pictured else ():
        if candidate.backend is not None:
            candidate.backend.require_pictures()
    if pictured:
        for encoder in request.encoders or encoders(bundle)[:1] or ("vae",):
            check_encoder(bundle, encoder)

    def starts(decoder: str) -> list[tuple[str, float]]:
        of = request.encoders or (decoder if decoder in encoders(bundle) else "vae",)
        pairs = [
            ("", 1.0) if strength == 1 else (encoder, strength)
            for strength in request.strengths or (1.0,)
            for encoder in of
        ]
        return list(dict.fromkeys(pairs))

    return starts


def fits(bundle: Bundle, recipe: Recipe, strength: float, steps: int, *, asked: bool) -> bool:
    """Whether `steps` at `strength` is a cell: all that were asked for must be, of the usual ones
    those count that leave a step to run.

    Raises:
        PreconditionError: it was asked for and leaves none; the nearest pairs are named.
    """
    if strength < 1 and asked:
        check_strength(bundle, recipe, steps, strength)
    return kept_steps(steps, strength) >= 1


@dataclass(frozen=True)
class Plan:
    """What will be measured, of what, by what, and how.

    Attributes:
        cells: in the order of measurement.
        work: the (cell, round) pairs that are left to measure.
        roofline: the machine's ceilings and the parts' costs; None where they were not measured.
        images: False where only the figures of modelled cells are wanted.
    """

    bundle: Bundle
    candidates: tuple[Candidate, ...]
    cells: tuple[Cell, ...]
    method: Sampling
    environment: Mapping[str, Any]
    images: bool = True
    roofline: Mapping[str, Any] | None = None
    rest: tuple[tuple[Cell, int], ...] | None = None

    @property
    def work(self) -> tuple[tuple[Cell, int], ...]:
        if self.rest is not None:
            return self.rest
        rounds = range(max(1, self.method.rounds))
        return tuple((cell, round_) for round_ in rounds for cell in self.cells)

    def candidate(self, cell: Cell) -> Candidate:
        """The backend of one of its cells."""
        return next(each for each in self.candidates if each.key == cell.backend_text)

    def header(self, command: Sequence[str], **more: Any) -> Header:
        """The header of a run of it.

        Args:
            command: as it was typed; this machine's folders are taken out of it.
            more: fields that only some commands write, or write otherwise.
        """
        fields: dict[str, Any] = {
            "command": [portable(word) for word in command],
            "settings": self.method.columns(),
            "images": self.images,
            "bundle": {
                "name": self.bundle.name,
                "weights": self.bundle.weights,
                "dtype": self.bundle.dtype,
                "licence": self.bundle.licence,
                "hash": self.bundle.hash,
            },
            "backends": {
                each.key: {
                    "usable": each.found.usable,
                    "version": each.found.version,
                    "what": each.found.what,
                    "options": each.backend.effective_options() if each.backend else {},
                }
                for each in self.candidates
            },
            "environment": self.environment,
            "plan": self.cells,
            "roofline": self.roofline,
        }
        return Header(**(fields | git_state() | more))


def plan(request: Request, *, away: bool = False) -> Plan:
    """What `request` comes to on this machine; nothing is measured or written.

    The backends are probed before the bundle is looked for: where none can run, no export helps.

    Args:
        away: plan for another machine: none of the backends need be usable on this one.

    Raises:
        PreconditionError: a backend, the bundle or a cell cannot be had; what to do instead.
    """
    texts = [with_precision(text, request.precision) for text in request.backends]
    candidates = probe(with_devices(texts, request.devices), away=away)
    return plan_of(request, candidates, bundle_for(request, candidates))


def plan_of(request: Request, candidates: Sequence[Candidate], bundle: Bundle) -> Plan:
    """The plan of a request whose backends and bundle are there."""
    if request.quality:
        require_judge(bundle.name)
    usable = [each.backend for each in candidates if each.backend and each.found.usable]
    return Plan(
        bundle,
        tuple(candidates),
        make_cells(bundle, candidates, request),
        request.method.but(quality=request.quality or None, frames=request.frames or None),
        with_hardware(collect(), usable),
        images=request.images,
    )


def default_steps(model: Model) -> list[int]:
    """Step counts to measure where none are asked for: those that the model is used with."""
    if model.step_counts:
        return list(model.step_counts)
    return [1, 2, 4] if model.steps <= 8 else [model.steps]


def groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that one worker measures, in the order of the plan."""
    return [list(group) for _, group in groupby(cells, key=lambda cell: cell.group)]
