"""Published figures of few-step models against ours and against physics: the verdict on each.

What the verdicts mean: `addbench claims --help`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.limits import ranges as models
from bench.limits.ledger import (
    MODELS,
    Claim,
    Ours,
    is_program,
    mismatches,
    nearest,
)
from bench.limits.ranges import DECODERS, STEPS, Modelled, floor_of, modelled, models_of
from core.table import Column, console, markdown_lines, terminal_table

REPRODUCED, CONSISTENT, CONTRADICTED = "reproduced", "consistent", "contradicted"
BEATEN, NOT_TESTABLE = "beaten", "not testable here"
VERDICTS = (REPRODUCED, CONSISTENT, CONTRADICTED, BEATEN, NOT_TESTABLE)
HEADLINES = ("ai100-ultra-4img", "a100-1img-200")
TOLERANCE = 0.10
"""The tolerance of a measured figure against the published one, as a share."""
NO_TIME = {
    "speedup": "a ratio of two pipelines: both would have to run on that card",
    "steps ratio": "a ratio of step counts, from people's preferences: no time",
    "latency ratio": "no number is given",
    "resolution": "no number is given, and the figures compared are for one resolution",
}


@dataclass(frozen=True)
class Finding:
    """A claim with all that is known about it."""

    claim: Claim
    verdict: str
    reason: str
    models: Sequence[Modelled]
    nearest: Ours | None

    @property
    def joules_at_most(self) -> float | None:
        """The energy of one image: the card's power limit over the published time. An upper bound.

        None of a figure that is of a part of the work: the rest takes energy too.
        """
        from core.devices import devices

        device, time = devices().get(self.claim.hardware), self.claim.call_ms
        if device is None or time is None or not self.claim.batch:
            return None
        if self.claim.scope != "end-to-end":
            return None
        return device.tdp_w * time / 1e3 / self.claim.batch

    def columns(self) -> dict[str, Any]:
        """Return the line as JSON. `images_per_joule` is measured, of the nearest cell of ours."""
        near, most = self.nearest, self.joules_at_most
        return {
            **asdict(self.claim),
            "verdict": self.verdict,
            "reason": self.reason,
            "modelled_ms": [
                asdict(each) | {"fit": each.fit(self.claim.call_ms) if self.claim.call_ms else None}
                for each in self.models
            ],
            "nearest": None
            if near is None
            else {
                "run": near.run,
                "hardware": near.hardware,
                **near.cell.columns(),
                "median_ms": near.median_ms,
                "period_ms": near.period_ms,
                "differs_in": mismatches(self.claim, near),
                "images_per_joule": near.images_per_joule,
            },
            "tdp_bound": None
            if most is None
            else {"joules_per_image_at_most": most, "images_per_joule_at_least": 1 / most},
        }


def judge(claim: Claim, claims: Sequence[Claim], ours: Sequence[Ours]) -> Finding:
    """The verdict on one claim; what was measured speaks before what is modelled."""
    models, near = models_of(claim), nearest(claim, ours)
    time = claim.call_ms
    if time is None:
        reason = NO_TIME.get(claim.metric, "its conditions do not say how many images a call has")
        return Finding(claim, NOT_TESTABLE, reason, models, near)
    verdict, reason = (
        by_measurement(claim, time, ours)
        or by_floor(time, models)
        or by_others(claim, time, claims)
        or by_range(claim, time, models)
    )
    return Finding(claim, verdict, reason, models, near)


def by_measurement(claim: Claim, time: float, ours: Sequence[Ours]) -> tuple[str, str] | None:
    """Against ours on that hardware. An unstated condition may be any of what we measured.

    A program other than the claim's can beat its figure, not reproduce or contradict it.
    """
    same = [
        (found, one)
        for one in ours
        if one.cell.model == MODELS.get(claim.model)
        and not mismatches(claim, one)
        and (found := one.time_for(claim)) is not None
    ]
    alike = [pair for pair in same if is_program(claim, pair[1])]
    fastest = min((found for found, _ in same), default=math.inf)
    if not alike and fastest * (1 + TOLERANCE) >= time:
        return None
    found, one = min(alike or same, key=lambda pair: abs(pair[0] - time))
    text = f"{one.cell}: {found:.1f} ms in run {one.run}"
    if alike and abs(found / time - 1) <= TOLERANCE:
        return REPRODUCED, text
    if alike and all(other > time for other, _ in alike):
        return CONTRADICTED, f"ours is slower there: {text}"
    if all(other < time for other, _ in alike):
        return BEATEN, f"ours is faster there: {text}"
    return CONSISTENT, f"it lies among ours at the conditions left open; the nearest is {text}"


def by_floor(time: float, models: Sequence[Modelled]) -> tuple[str, str] | None:
    if not models or any(time >= each.floor for each in models):
        return None
    least = min(each.floor for each in models)
    return CONTRADICTED, f"below the floor of {least:.1f} ms for direct algorithms"


def by_others(claim: Claim, time: float, claims: Sequence[Claim]) -> tuple[str, str] | None:
    """Against the fastest other figure for the same work on the same card."""
    if claim.batch is None or claim.steps is None:
        return None
    work = ("model", "hardware", "precision", "size", "batch", "steps", "evaluations", "decoder",
            "scope", "metric")  # fmt: skip
    rivals = [
        (other.call_ms, other)
        for other in claims
        if other.call_ms is not None
        and other.system != claim.system
        and all(getattr(other, name) == getattr(claim, name) for name in work)
    ]
    if not rivals:
        return None
    best, other = min(rivals, key=lambda pair: pair[0])
    if best * (1 + TOLERANCE) >= time:
        return None
    return BEATEN, f"{other.system} published {best:g} ms for the same ({other.id})"


def by_range(claim: Claim, time: float, models: Sequence[Modelled]) -> tuple[str, str]:
    if not models:
        return NOT_TESTABLE, without_model(claim)
    fitting = [each for each in models if each.fit(time) == "fits"]
    if fitting:
        return CONSISTENT, "in the modelled range of " + ", ".join(
            f"{named(each)} ({each.fast:.0f} to {each.slow:.0f} ms)" for each in fitting
        )
    slow = max(each.slow for each in models)
    if time > slow:
        return CONSISTENT, f"time to spare: the modelled range ends at {slow:.0f} ms"
    return NOT_TESTABLE, "between the floor and the modelled range"


def without_model(claim: Claim) -> str:
    from core.devices import devices

    if claim.model not in MODELS:
        return f"{claim.model} is no model of ours"
    if claim.hardware not in devices():
        return f"no run of ours on a {claim.hardware or 'named device'}, and no peak known of it"
    return "its conditions are not stated well enough to model it"


def named(model: Modelled) -> str:
    plural = "s" * (model.steps != 1)
    return f"{model.steps} step{plural}{', ' + model.decoder if model.decoder else ''}"


def impossible(ours: Sequence[Ours]) -> list[Ours]:
    """Cells of ours that are faster than the floor of what they ran on: no verdict counts them."""
    floors = [(one, floor_of(one)) for one in ours]
    return [one for one, floor in floors if floor is not None and one.median_ms < floor]


def findings(claims: Sequence[Claim], ours: Sequence[Ours]) -> list[Finding]:
    """Every claim judged, the headline claims first."""
    not_counted = {id(one) for one in impossible(ours)}
    ours = [one for one in ours if id(one) not in not_counted]
    ranked = sorted(claims, key=lambda claim: HEADLINES.index(claim.id)
                    if claim.id in HEADLINES else len(HEADLINES))  # fmt: skip
    return [judge(claim, claims, ours) for claim in ranked]


def concerning(judged: Sequence[Finding], ours: Sequence[Ours]) -> list[Finding]:
    """The findings that rows of ours say something about: of their models, on their hardware."""
    return [
        finding
        for finding in judged
        if any(
            each.cell.model == MODELS.get(finding.claim.model)
            and each.hardware == finding.claim.hardware
            for each in ours
        )
    ]


# ---- shown


def figure(claim: Claim) -> str:
    return "" if claim.value is None else f"{claim.value:g} {claim.unit}"


def bounds(finding: Finding) -> str:
    """Floor and range in milliseconds; over every open condition."""
    models = finding.models
    if not models:
        return ""

    def span(values: Sequence[float]) -> str:
        low, high = f"{min(values):.0f}", f"{max(values):.0f}"
        return low if low == high else f"{low}-{high}"

    return (
        f"{span([each.floor for each in models])};"
        f" {span([value for each in models for value in (each.fast, each.slow)])}"
    )


def near_text(finding: Finding) -> str:
    near = finding.nearest
    if near is None:
        return ""
    differs = mismatches(finding.claim, near)
    joule = f", {near.images_per_joule:.3g} images/J" if near.images_per_joule else ""
    other = f" (other {', '.join(differs)})" if differs else ""
    return f"{near.median_ms:.1f} ms{joule}{other}"


def energy_text(finding: Finding) -> str:
    most = finding.joules_at_most
    return "" if most is None else f"at most {most:.3g} J"


COLUMNS = (
    Column("claim", lambda finding: finding.claim.id),
    Column("system", lambda finding: f"{finding.claim.system}, {finding.claim.model}"),
    Column("hardware", lambda finding: finding.claim.hardware),
    Column("conditions", lambda finding: finding.claim.conditions),
    Column("published", lambda finding: figure(finding.claim)),
    Column("verdict", lambda finding: finding.verdict),
    Column("why", lambda finding: finding.reason),
    Column("modelled (ms): floor; range", bounds),
    Column("nearest of ours", near_text),
    Column("an image takes, by TDP", energy_text),
    Column("source", lambda finding: finding.claim.source),
)
TERMINAL = ("claim", "hardware", "conditions", "published", "verdict", "why",
            "modelled (ms): floor; range", "nearest of ours")  # fmt: skip


def headline(finding: Finding) -> list[str]:
    """Which step counts and decoders a headline claim is compatible with."""
    from core.devices import find_device

    claim = finding.claim
    device = find_device(claim.hardware)
    lines = [f"{claim.system}: {figure(claim)} ({claim.qualifier}): {finding.verdict}"]
    for decoder in DECODERS:
        for steps in STEPS:
            model = modelled(device, claim.size or 512, claim.batch or 1, steps, decoder)
            if model is not None and claim.call_ms is not None:
                switched = ""
                if model.switched is not None:
                    switched = f"; to {model.switched:.0f} ms if it switches to each program"
                lines.append(
                    f"{named(model)}: {model.fit(claim.call_ms)} (floor {model.floor:.0f} ms,"
                    f" range {model.fast:.0f} to {model.slow:.0f} ms"
                    f"{switched})"
                )
    return lines


def explained() -> list[str]:
    """What the modelled columns mean."""
    text = [
        "Modelled: the floor is the sum over parts of the longer of compute at the peak and weights"
        " at full bandwidth; the range is what programs were seen to reach, or 8 of 10 draws of a"
        " fitted model. A card of four SoCs runs four pipelines. Floors hold no host work, ranges"
        " no switching between programs."
        ' "Fits": within the range; "time to spare": slower than it, so compatible too.'
    ]
    text += models.explained()
    text.append(
        "Energy by TDP: the card's power limit times the published time, so at most that much, and"
        " at least its inverse in images per joule. Measured images per joule stand beside ours."
    )
    return text


def markdown(found: Sequence[Finding]) -> str:
    """The ledger for a README."""
    lines = []
    for finding in found:
        if finding.claim.id in HEADLINES:
            first, *rest = headline(finding)
            lines += [f"**{first}**", "", *(f"- {text}" for text in rest), ""]
    lines += markdown_lines(COLUMNS, found)
    lines += ["", *(f"{text}\n" for text in explained())]
    return "\n".join(lines).rstrip() + "\n"


def show(found: Sequence[Finding]) -> None:
    drawn_on = console()
    for finding in found:
        if finding.claim.id in HEADLINES:
            first, *rest = headline(finding)
            drawn_on.print(first)
            for text in rest:
                drawn_on.print(f"  {text}")
    columns = [column for column in COLUMNS if column.header in TERMINAL]
    drawn_on.print(terminal_table(columns, found))
    for text in explained():
        drawn_on.print(text)
