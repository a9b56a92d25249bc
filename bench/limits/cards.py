"""What a Cloud AI 100 would do, by a model of it; `addbench cards --help` says how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.limits.cardwords import (
    BEYOND,
    FITS,
    IMPOSSIBLE,
    SPARE,
    answer,
    decoder_words,
    fit_words,
    joule_span,
    reading_words,
    span,
)
from core.errors import PreconditionError
from core.table import Column, console, markdown_lines, terminal_table

if TYPE_CHECKING:
    from backends.modelled.card import CallEstimate, Pace
    from backends.modelled.fit import Fit
    from core.devices import Device
    from export.cost import Cost

SWITCHING = {"once": "a switch a turn", "each": "a switch a program"}
"""How a published 100 to 200 ms of switching may count, and what columns call it."""
CLAIMED = "ai100-ultra"
HEADLINE = "modelled, not measured"
READING = (
    "the published figure states neither steps nor decoder nor split; four batch-1 pipelines side"
    " by side is its likely reading"
)


@dataclass(frozen=True)
class Question:
    """What is asked: calls of a model's images, on which cards, within which period."""

    model: str
    size: tuple[int, int] | None
    devices: Sequence[str]
    steps: Sequence[int]
    batch: int
    decoders: Sequence[str]
    target_ms: float

    @property
    def pixels(self) -> tuple[int, int]:
        """The size of the question, or the model's own."""
        from export.models import find_model

        own = find_model(self.model).size
        return self.size or (own, own)

    def costs(self) -> Mapping[str, Cost]:
        """What each part of the model costs at that size."""
        from backends.modelled.costs import known_costs

        return known_costs(self.model, self.pixels)


@dataclass(frozen=True)
class CardSetup:
    """One way to run a call on one card, with what the model says of it."""

    device: Device
    decoder: str
    steps: int
    split: str
    batch: int
    found: CallEstimate

    def pace(self, switching: str) -> Pace:
        """The pace of a call: `resident`, or by a name of `SWITCHING`."""
        return {"resident": self.found, "once": self.found.once, "each": self.found.each}[switching]

    def verdict(self, target_ms: float, switching: str = "resident") -> str:
        """Whether a period of `target_ms` is plausible."""
        period = self.pace(switching).period
        if target_ms < 1e3 * self.found.period_floor:
            return IMPOSSIBLE
        if target_ms < 1e3 * period.low:
            return BEYOND
        return FITS if target_ms <= 1e3 * period.high else SPARE

    def per_joule(self, period_s: float) -> float:
        """Images per joule at the TDP."""
        return self.batch / (self.device.tdp_w * period_s)

    def switched_per_joule(self, switching: str) -> float:
        """`per_joule` of the middle of a period with switching."""
        return self.per_joule(self.pace(switching).period.mid)

    def columns(self, target_ms: float) -> dict[str, Any]:
        """Return the setup's figures as JSON, times in milliseconds."""
        from bench.limits.modelled import ms, pace

        switched = {
            name: {
                **pace(self.pace(name)),
                "verdict": self.verdict(target_ms, name),
                "images_per_joule_at_tdp": round(self.switched_per_joule(name), 5),
            }
            for name in SWITCHING
        }
        return {
            "provenance": "modelled",
            "device": self.device.name,
            "decoder": self.decoder,
            "steps": self.steps,
            "split": self.split,
            "batch": self.batch,
            "floor_ms": round(1e3 * self.found.floor, 4),
            "latency": ms(self.found.latency),
            "period": ms(self.found.period),
            "verdict": self.verdict(target_ms),
            "switching": switched,
            "stages": {name: ms(each) for name, each in self.found.stages.items()},
            "images_per_joule_at_tdp": round(self.per_joule(self.found.period.mid), 5),
        }


def options(question: Question) -> list[CardSetup]:
    """Every card, decoder, step count and split that there is."""
    from backends.base import UnsupportedError
    from backends.modelled.backend import VENDOR
    from backends.modelled.card import SPLITS, Call, estimate
    from core.devices import find_device

    costs = question.costs()
    found = []
    for name in question.devices:
        device = find_device(name)
        if device.vendor != VENDOR:
            raise PreconditionError(
                f"{name} is no {VENDOR} card", "there is a model of these only",
                "use --device ai100-standard,ai100-pro,ai100-ultra",
            )  # fmt: skip
        for decoder in question.decoders:
            if f"{decoder}_decoder" not in costs:
                raise PreconditionError(
                    f"there is no decoder called {decoder!r}",
                    "known: vae, taesd",
                    "use one of them",
                )
            for steps in question.steps:
                for split in SPLITS:
                    call = Call(decoder, steps, question.batch, split)
                    try:
                        one = estimate(device, costs, call)
                    except UnsupportedError:
                        continue  # fewer SoCs than parts
                    found.append(CardSetup(device, decoder, steps, split, question.batch, one))
    return found


def best(found: Sequence[CardSetup]) -> list[CardSetup]:
    """The split with the shortest period for each card, decoder and step count."""
    kept: dict[tuple[str, str, int], CardSetup] = {}
    for one in found:
        key = (one.device.name, one.decoder, one.steps)
        if key not in kept or one.found.period.mid < kept[key].found.period.mid:
            kept[key] = one
    return list(kept.values())


def resident_words(found: Sequence[CardSetup], question: Question) -> str:
    """Whether all parts could be resident, as far as memory goes."""
    costs = question.costs()
    weights = sum(cost.weight_bytes for cost in costs.values()) / 1e9
    rooms = {one.device.name: one.device.memory_gb / one.device.socs for one in found}
    having = ", ".join(f"{name} {gb:g} GB" for name, gb in rooms.items())
    return f"the weights of all parts are {weights:.1f} GB; an SoC has: {having}"


# ---- tables


def option_columns(target_ms: float) -> tuple[Column, ...]:
    target = f"{target_ms:g} ms"
    return (
        Column("decoder", lambda one: one.decoder),
        Column("steps", lambda one: one.steps),
        Column("split", lambda one: one.split),
        Column("latency (ms)", lambda one: span(one.found.latency)),
        Column("period (ms)", lambda one: span(one.found.period)),
        Column(target, lambda one: one.verdict(target_ms)),
        *switched_columns(),
        *(
            Column(f"{target}, {header}", lambda one, name=name: one.verdict(target_ms, name))  # type: ignore[misc]
            for name, header in SWITCHING.items()
        ),
        Column("images/J at TDP", joule_span),
    )


def switched_columns() -> list[Column]:
    """The periods of both ways to count switching."""
    return [
        Column(f"period, {header} (ms)", lambda one, name=name: span(one.pace(name).period))  # type: ignore[misc]
        for name, header in SWITCHING.items()
    ]


CARD_COLUMNS = (
    Column("card", lambda one: f"{one.device.name} ({one.device.tdp_w:g} W)"),
    Column("decoder", lambda one: one.decoder),
    Column("steps", lambda one: one.steps),
    Column("split", lambda one: one.split),
    Column("period (ms)", lambda one: span(one.found.period)),
    *switched_columns(),
    Column("images/s", lambda one: one.batch / one.found.period.mid, 1),
    Column("images/J at TDP", joule_span),
    *(
        Column(f"images/J, {header}", lambda one, name=name: one.switched_per_joule(name), 3)  # type: ignore[misc]
        for name, header in SWITCHING.items()
    ),
)


@dataclass(frozen=True)
class Section:
    """A title, sentences, and a table."""

    title: str
    lines: Sequence[str]
    columns: Sequence[Column] = ()
    rows: Sequence[CardSetup] = ()


def sections(found: Sequence[CardSetup], question: Question) -> list[Section]:
    from backends.modelled.card import ASSUMPTIONS
    from core.devices import find_device

    unet = question.costs()["unet"]
    what = f"{question.model}, FP16, a call of {question.batch} image{'s' * (question.batch != 1)}"
    claimed = CLAIMED if CLAIMED in question.devices else question.devices[-1]
    ours = [one for one in found if one.device.name == claimed]
    width, height = question.pixels
    readings = reading_words(find_device(claimed), unet, (width, height))
    return [
        Section(
            f"{what}, every {question.target_ms:g} ms on {claimed}: {HEADLINE}",
            [*([READING] if claimed == CLAIMED else []), *answer(ours, question.target_ms)],
            option_columns(question.target_ms),
            ours,
        ),
        Section(f"What TAESDXL buys: {HEADLINE}", decoder_words(found)),
        Section(
            f"The cards side by side, each with its split of shortest period: {HEADLINE}",
            [
                "images/J at TDP: the card at its power limit over the period, so at least that"
                " many",
                "in MLPerf's terms: the latency of one image is SingleStream's, images/s are"
                " Offline's samples/s; Server, a latency under load, is not modelled",
            ],
            CARD_COLUMNS,
            best(found),
        ),
        Section("How far the fit is off", [*fit_words(), *readings]),
        Section("What is assumed", [*ASSUMPTIONS, resident_words(found, question)]),
    ]


def markdown(found: Sequence[Section]) -> str:
    text = []
    for section in found:
        text += [f"**{section.title}**", "", *(f"- {line}" for line in section.lines), ""]
        if section.columns:
            text += [*markdown_lines(section.columns, section.rows), ""]
    return "\n".join(text).rstrip() + "\n"


def show(found: Sequence[Section]) -> None:
    drawn_on = console(170)
    for section in found:
        drawn_on.print(section.title, style="bold")
        if section.columns:
            drawn_on.print(terminal_table(section.columns, section.rows))
        for line in section.lines:
            drawn_on.print(f"  {line}")
        drawn_on.print()


def report(found: Sequence[CardSetup], question: Question) -> dict[str, Any]:
    """Return the setups as JSON."""
    from backends.modelled import VERSION
    from backends.modelled.card import ASSUMPTIONS, INTERVAL
    from backends.modelled.fit import (
        KINDS,
        coverage,
        errors_of,
        factor,
        fits,
        weights,
        without_sdxl,
    )
    from backends.modelled.program import SHARES

    counts = weights()

    def columns(each: Fit) -> Mapping[str, Any]:
        errors: dict[str, Any] = {}
        for kind in KINDS:
            held_out, rows = errors_of(each, kind)
            errors[kind] = {
                "rows": len(rows),
                "held_out_median": factor(held_out, rows, 0.5),
                "held_out_p90": factor(held_out, rows, 0.9),
            }
        return {
            "share_of_scores": each.share,
            "ddr": each.ddr,
            "weight": counts[each.share, each.ddr],
            "parameters": dict(vars(each.parameters)),
            "at_bounds": list(each.at_bounds),
            **errors,
        }

    inside = [each.inside for each in coverage(INTERVAL)]
    return {
        "provenance": "modelled",
        "version": VERSION,
        "model": question.model,
        "batch": question.batch,
        "target_ms": question.target_ms,
        "options": [one.columns(question.target_ms) for one in found],
        "fits": [columns(one) for one in fits().values()],
        "inside_8_of_10": {"rows": len(inside), "inside": sum(inside)},
        "sdxl_measured_over_modelled_without_its_rows": {
            name: dict(zip(map(str, SHARES), off, strict=True))
            for name, off in without_sdxl().items()
        },
        "assumptions": list(ASSUMPTIONS),
    }
