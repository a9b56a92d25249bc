"""What `addbench gpu-check` found, as text: checks, goals, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.limits.floors import share_of_floor
from bench.rows.cell import Cell
from bench.rows.store import Row, Run, is_timed
from core.table import Column, markdown_lines
from export.models import PARTS

GOAL_DEVICE, GOAL_MODEL, GOAL_SIZE = "h200-sxm", "sdxl-turbo", "512x512"
Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Goal:
    """Milliseconds that a call may take at most on an H200: 512 px, FP16, warm, end to end."""

    batch: int
    steps: int
    decoder: str
    ms: float

    @property
    def name(self) -> str:
        return f"batch {self.batch}, steps {self.steps}, {self.decoder}"


GOALS = (
    Goal(1, 1, "taesd", 10.0),
    Goal(1, 1, "vae", 15.0),
    Goal(1, 4, "vae", 40.0),
    Goal(4, 1, "taesd", 25.0),
)


@dataclass(frozen=True)
class Reached:
    """A goal and the fastest of our cells for it, if there is one."""

    goal: Goal
    backend: str | None
    ms: float | None
    judged: bool
    """Whether it was measured on what the goal is for."""

    @property
    def met(self) -> bool | None:
        return None if self.ms is None or not self.judged else self.ms <= self.goal.ms

    def columns(self) -> dict[str, Any]:
        return {
            "goal": self.goal.name,
            "goal_ms": self.goal.ms,
            "backend": self.backend,
            "ms": self.ms,
            "met": self.met,
        }


def goals(rows: Sequence[Row], device: str) -> list[Reached]:
    """Every goal beside the fastest cell that is ok; `device`: as its driver calls it."""
    from core.devices import identify

    known = identify(device)
    found = []
    for goal in GOALS:
        fitting = [
            (row["median_ms"], Cell.of(row).backend_text)
            for row in rows
            if is_timed(row)
            and (row["batch"], row["steps"], row["decoder"])
            == (goal.batch, goal.steps, goal.decoder)
        ]
        models = {(row["model"], row["size"]) for row in rows}
        judged = known is not None and known.name == GOAL_DEVICE
        judged = judged and models == {(GOAL_MODEL, GOAL_SIZE)}
        ms, backend = min(fitting, default=(None, None))
        found.append(Reached(goal, backend, ms, judged))
    return found


def text(results: Results, target: Run, device: str, skipped: Mapping[str, str]) -> str:
    """The report as Markdown."""
    rows = target.rows()
    parts = [
        ["# GPU check", "", f"Device: {device}"],
        skipped_text(skipped),
        *(section(name, results) for name in ("sanity", "parity")),
        claims_text(target),
        goals_text(goals(rows, device)),
        section("profile", results),
    ]
    return "\n".join("\n".join(lines) + "\n" for lines in parts if lines)


def skipped_text(skipped: Mapping[str, str]) -> list[str]:
    if not skipped:
        return []
    lines = [f"- {what}: {why}" for what, why in skipped.items()]
    return ["## Left out", "", *lines]


def section(name: str, results: Results) -> list[str]:
    found = results.get(name)
    if found is None:
        return [f"## {name.capitalize()}", "", "It did not run, or took its process down."]
    head = [f"## {name.capitalize()}: {found['status']}", ""]
    if "error" in found:
        return [*head, str(found["error"].get("what", found["error"]))]
    body = {"sanity": sanity_text, "parity": parity_text, "profile": profile_text}[name]
    return [*head, *body(found)]


def sanity_text(found: Mapping[str, Any]) -> Iterator[str]:
    for key, value in found["device"].items():
        yield f"- {key}: {value}"
    for name, check in found["checks"].items():
        error = "" if check["error"] is None else f", error {check['error']:.1e}"
        yield f"- {name}: {check['status']}{error}"
    for dtype, kinds in found["ceilings"]["tflops"].items():
        rates = ", ".join(f"{kind} {rate:.4g}" for kind, rate in kinds.items())
        yield f"- {dtype}, TFLOP/s: {rates}"
    yield f"- memory, read and written: {found['ceilings']['gb_per_s']:.4g} GB/s"


def parity_text(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['dtype']} against fp32, both on the device."
    yield ""
    for name, part in found["parts"].items():
        yield f"- {name}: relative error {part['error']:.1e}{'' if part['ok'] else ': too much'}"
    for name, image in found["images"].items():
        yield (
            f"- image {name}: {image['to_fp32_db']:.1f} dB step by step,"
            f" {image['whole_to_fp32_db']:.1f} dB in one go; one to the other"
            f" {image['whole_to_steps_db']:.1f} dB{'' if image['ok'] else ': too far'}"
            + ("" if image["repeats"] else "; a second replay gave another image")
        )


def goals_text(found: Sequence[Reached]) -> list[str]:
    columns = (
        Column("goal (H200, 512 px, FP16)", lambda one: one.goal.name),
        Column("at most (ms)", lambda one: one.goal.ms, 1),
        Column("fastest (ms)", lambda one: one.ms, 2),
        Column("by", lambda one: one.backend),
        Column("met", lambda one: verdict(one)),
    )
    return ["## Goals", "", *markdown_lines(columns, found)]


def verdict(one: Reached) -> str:
    if one.ms is None:
        return "not measured"
    if one.met is None:
        return "not judged: another device, model or size"
    return "yes" if one.met else f"no: {one.ms - one.goal.ms:.1f} ms over"


def claims_text(target: Run) -> list[str]:
    """What was published and concerns this run's rows, judged by them."""
    from bench.limits.claims import concerning, figure, findings, near_text
    from bench.limits.ledger import measured, read_claims

    ours = measured([target])
    found = concerning(findings(read_claims(), ours), ours)
    if not found:
        return ["## Claims", "", "None that was published concerns this run's model and device."]
    columns = (
        Column("claim", lambda one: one.claim.id),
        Column("conditions", lambda one: f"{one.claim.hardware}, {one.claim.conditions}"),
        Column("published", lambda one: figure(one.claim)),
        Column("verdict", lambda one: one.verdict),
        Column("why", lambda one: one.reason),
        Column("nearest of ours", near_text),
    )
    return ["## Claims", "", *markdown_lines(columns, found)]


def profile_text(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"Parts on their own, batch {found['batch']}, {found['dtype']}, against their floors."
    yield ""
    columns = (
        Column("part", lambda item: item[0]),
        Column("ms", lambda item: item[1]["ms"], 3),
        Column("floor (ms)", lambda item: item[1].get("floor_ms"), 3),
        Column("bound by", lambda item: item[1].get("bound")),
        Column("of it", lambda item: share_of_floor(item[1].get("fraction")), 2),
        Column("GFLOP", lambda item: item[1]["gflop"], 1),
    )
    yield from markdown_lines(
        columns, [(p, found["parts"][p]) for p in PARTS if p in found["parts"]]
    )
    for name, image in found["images"].items():
        decoder, _, steps = name.rpartition("-")
        yield ""
        yield (
            f"Image with {decoder}, {steps} steps: {image['call_ms']:.2f} ms a call, of it"
            f" {image['kernels_ms']:.2f} ms in {image['launched']} kernels."
        )
        yield ""
        shown = (
            Column("kernel", lambda top: top["name"].replace("|", " ")),
            Column("ms", lambda top: top["ms"], 3),
            Column("share", lambda top: top["share"], 3),
            Column("count", lambda top: top["count"], 0),
        )
        yield from markdown_lines(shown, image["top"])
