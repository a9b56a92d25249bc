"""How often the modelled ranges hold what others published: `addbench claims --coverage`.

Every published figure whose conditions are all stated, and whose hardware has a range, against that
range and against its floor. A range holds what would be no surprise; nothing real is below a floor,
so a figure that is makes the floor wrong, or the figure.

Figures of one publication are much alike (36 submissions to one MLPerf round run NVIDIA's code), so
sources are counted beside figures. No end of a GPU's range was set by these figures; what ranges
would hold whose ends are the least and the most of all other sources is said too.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.limits.ledger import ELSEWHERE, LEFT_OUT, PROGRAMS, Claim, read_claims
from bench.limits.ranges import EFFICIENCY, Modelled, models_of
from core.devices import devices
from core.table import Column, console, markdown_lines, terminal_table

INSIDE, FASTER, SLOWER, BELOW = "inside", "faster", "slower", "below the floor"
STATES = (INSIDE, FASTER, SLOWER, BELOW)
SOFTWARE = {
    "trt": "TensorRT",
    "cuda": "ONNX Runtime CUDA",
    "torch": "PyTorch",
    "torch:mode=eager": "PyTorch",
    "torch:mode=compile": "PyTorch, compiled",
    "openvino": "OpenVINO",
    "qaic": "Cloud AI SDK",
}
"""What `ledger.PROGRAMS` runs on, as the figures elsewhere call it."""


SOURCES = {
    "inference_results_v4.1": "MLPerf Inference v4.1",
    "inference_results_v4.0": "MLPerf Inference v4.0",
    "sdxl-turbo-tensorrt": "model card of stabilityai/sdxl-turbo-tensorrt",
    "sd-turbo-onnxruntime": "model card of onnxruntime/sd-turbo",
    "onnxruntime/sd-turbo": "model card of onnxruntime/sd-turbo",
    "Stability AI announcement": "Stability AI's announcement",
    "quoting Stability AI": "Stability AI's announcement",
}
"""A part of where a figure is from -> the publication that it is one of."""
ANNOUNCED = "an announcement: neither software nor what else was counted is stated"
MISSES = {
    "a100-1img-200": ANNOUNCED,
    "a100-1img-207": ANNOUNCED,
    "a100-unet-67": ANNOUNCED,
    "torch-eager-a100-1": "eager PyTorch starts every operator by itself, and one image of one step"
    " waits for that",
    "add-t2-pd4": "software is not stated; its step takes 40 ms, as an eager pipeline's may",
    "f-tl-h100-296-3": "the VAE may not be in FP16: the card of this demo's SDXL-Turbo says so of"
    " its own, this one says nothing",
    "f-ll-t4-(colab-4": "a shared machine: 46 more evaluations take 18.1 s there, so that 6.8 s of"
    " these 8.4 are outside of the UNet",
}
"""Why a figure is outside of its range, as far as can be told."""


@dataclass(frozen=True)
class Held:
    """A published figure beside its range. Milliseconds of a call, or between two."""

    claim: Claim
    model: Modelled
    call_ms: float

    @property
    def slow_ms(self) -> float:
        """The slow end; with switching between programs where a card does that, as users do."""
        return self.model.switched or self.model.slow

    @property
    def state(self) -> str:
        if self.call_ms < self.model.floor:
            return BELOW
        if self.call_ms < self.model.fast:
            return FASTER
        return SLOWER if self.call_ms > self.slow_ms else INSIDE

    @property
    def share(self) -> float:
        """The floor over the figure: what of the peak, or of the bandwidth, it is."""
        return self.model.floor / self.call_ms

    @property
    def software(self) -> str:
        program = PROGRAMS.get(self.claim.system, "")
        return self.claim.software or SOFTWARE.get(program, "not stated")


def publication(claim: Claim) -> str:
    """What a figure was published in: its source, without the place in it."""
    named = [name for part, name in SOURCES.items() if part in claim.source]
    return named[0] if named else claim.source.partition(" (")[0]


def published() -> list[Claim]:
    """All figures of the project: those of the ledger, and what others published elsewhere."""
    return read_claims() + read_claims(ELSEWHERE)


def held(claims: Sequence[Claim]) -> list[Held]:
    """The figures of which one range is known, and only one: nothing of theirs is left open."""
    lines = []
    for claim in claims:
        models = models_of(claim)
        if len(models) == 1 and claim.call_ms is not None:
            lines.append(Held(claim, models[0], claim.call_ms))
    return lines


def left_out() -> list[dict[str, str]]:
    """Published figures that are in no claim: `id`, `figure`, `reason`, `source`."""
    with LEFT_OUT.open(newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Group:
    """The figures of one hardware or one software."""

    name: str
    lines: Sequence[Held]

    def count(self, state: str) -> int:
        return sum(line.state == state for line in self.lines)

    @property
    def sources(self) -> dict[str, list[Held]]:
        """Its figures by publication."""
        found: dict[str, list[Held]] = {}
        for line in self.lines:
            found.setdefault(publication(line.claim), []).append(line)
        return found

    @property
    def sources_inside(self) -> int:
        """Publications all of whose figures are inside."""
        return sum(all(line.state == INSIDE for line in of) for of in self.sources.values())

    @property
    def shares(self) -> str:
        """The least and the largest share of the peak that its figures are."""
        shares = [line.share for line in self.lines]
        return f"{min(shares):.0%} to {max(shares):.0%}"


def groups(lines: Sequence[Held], name: Callable[[Held], str]) -> list[Group]:
    """Return the lines by name, the most figures first."""
    names = Counter(name(line) for line in lines)
    return [
        Group(each, [line for line in lines if name(line) == each])
        for each, _ in names.most_common()
    ]


def counts(title: str) -> tuple[Column, ...]:
    return (
        Column(title, lambda group: group.name),
        Column("figures", lambda group: len(group.lines), 0),
        Column("sources", lambda group: len(group.sources), 0),
        Column("sources all inside", lambda group: group.sources_inside, 0),
        *(Column(state, lambda group, state=state: group.count(state), 0) for state in STATES),  # type: ignore[misc]
        Column("of the floor", lambda group: group.shares),
    )


OUTSIDE = (
    Column("figure", lambda line: line.claim.id),
    Column("hardware", lambda line: line.claim.hardware),
    Column("software", lambda line: line.software),
    Column("conditions", lambda line: f"{line.claim.model}, {line.claim.conditions}"),
    Column("published (ms)", lambda line: line.call_ms, 0),
    Column("floor (ms)", lambda line: line.model.floor, 1),
    Column("range (ms)", lambda line: f"{line.model.fast:.0f} to {line.slow_ms:.0f}"),
    Column("it is", lambda line: line.state),
    Column("because", lambda line: MISSES.get(line.claim.id, "not known")),
    Column("source", lambda line: line.claim.source),
)


def summary(claims: Sequence[Claim], lines: Sequence[Held]) -> list[str]:
    """What there is, in sentences."""
    every = Group("all", lines)
    below = [line.claim.id for line in lines if line.state == BELOW]
    fitted = sum("in the fit" in line.claim.qualifier for line in lines)
    shares = [sum(line.state == INSIDE for line in of) / len(of) for of in every.sources.values()]
    largest, of_largest = max(every.sources.items(), key=lambda item: len(item[1]))
    tested, kept = by_other_sources(lines)
    out = left_out()
    unread = {line.claim.hardware for line in lines
              if "the peak" in devices()[line.claim.hardware].not_checked}  # fmt: skip
    elsewhere = sum("no range is known" in each["reason"] for each in out)
    return [
        f"of {len(lines)} published figures with a range, {every.count(INSIDE)} are inside"
        f" ({every.count(INSIDE) / len(lines):.0%}); {fitted} of them are what their card's model"
        " was fitted to",
        f"they are from {len(every.sources)} sources ({len(of_largest)} from {largest}): all"
        f" figures of {every.sources_inside} are inside, and {sum(shares) / len(shares):.0%} of a"
        " source's figures on average",
        "no end of a GPU's range was set by these figures. Were the ends the least and the most"
        f" that all other sources reached, {kept} of {tested} figures would be inside",
        f"below their floor: {', '.join(below)}: the floor is wrong, or the figure"
        if below
        else "none is below its floor",
        f"{len(claims) - len(lines)} of {len(claims)} figures have no range, or more than one: no"
        " peak is known of their hardware, or conditions are left open",
        "peaks that could not be read in a document of theirs: "
        + (", ".join(sorted(unread)) or "none"),
        f"TPUs, Apple's chips, CPUs and phones are not tested ({elsewhere} figures): no source says"
        " what share of their peaks programs reach, so they have no range here",
        f"{len(out)} published figures are in no claim (bench/limits/data/left_out.csv has each"
        f" with its reason); most often: {'; '.join(most_frequent(out))}",
    ]


def by_other_sources(lines: Sequence[Held]) -> tuple[int, int]:
    """Figures of vendors without a fitted model, and how many lie between the shares of the peak
    that the other sources have."""
    ours = [line for line in lines if devices()[line.claim.hardware].vendor in EFFICIENCY]
    inside = 0
    for line in ours:
        own = publication(line.claim)
        others = [other.share for other in ours if publication(other.claim) != own]
        inside += bool(others) and min(others) <= line.share <= max(others)
    return len(ours), inside


def most_frequent(out: Sequence[dict[str, str]], most: int = 4) -> list[str]:
    counted = Counter(each["reason"] for each in out)
    return [f"{reason} ({count})" for reason, count in counted.most_common(most)]


def tables(lines: Sequence[Held]) -> list[tuple[Sequence[Column], Sequence[Any]]]:
    found: list[tuple[Sequence[Column], Sequence[Any]]] = [
        (counts("hardware"), groups(lines, lambda line: line.claim.hardware)),
        (counts("software"), groups(lines, lambda line: line.software)),
        (counts("source"), groups(lines, lambda line: publication(line.claim))),
    ]
    outside = [line for line in lines if line.state != INSIDE]
    return [*found, (OUTSIDE, outside)] if outside else found


def markdown(claims: Sequence[Claim], lines: Sequence[Held]) -> str:
    text = [*(f"- {line}" for line in summary(claims, lines)), ""]
    for columns, rows in tables(lines):
        text += [*markdown_lines(columns, rows), ""]
    return "\n".join(text)


def show(claims: Sequence[Claim], lines: Sequence[Held]) -> None:
    drawn_on = console()
    for line in summary(claims, lines):
        drawn_on.print(line)
    for columns, rows in tables(lines):
        drawn_on.print(terminal_table(columns, rows))


def as_json(claims: Sequence[Claim], lines: Sequence[Held]) -> dict[str, Any]:
    every = Group("all", lines)
    return {
        "figures": len(claims),
        "sources": {"all": len(every.sources), "all_inside": every.sources_inside},
        "states": {state: sum(line.state == state for line in lines) for state in STATES},
        "held": [
            {
                "id": line.claim.id,
                "hardware": line.claim.hardware,
                "software": line.software,
                "source": publication(line.claim),
                "published_ms": line.call_ms,
                "floor_ms": line.model.floor,
                "fast_ms": line.model.fast,
                "slow_ms": line.slow_ms,
                "state": line.state,
            }
            for line in lines
        ],
        "left_out": left_out(),
    }
