"""What a finished run must show: student and teacher on held-out captions, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.files import write_json
from distill.context import Context
from distill.evaluate import evaluate
from distill.folder import write_card

STUDENT_STEPS = (1, 2, 4)
WANTED = {"one_step": 0.9, "gap_closed": 0.8, "four_steps": 0.97, "teacher_single": 0.93}
"""The student at one and four steps against the teacher in full; the share of the way from the
teacher at one step to the teacher in full that the student at one step goes; the teacher on
single objects."""


def measure_run(context: Context, turbo: Path, teacher: Path) -> dict[str, Any]:
    """Evaluate both models, write quality.json and the card of each; the turbo's figures."""
    config = context.config
    captions, full = config.evaluate_captions, config.teacher.steps
    device = str(context.device)
    student_rows = [
        evaluate(turbo, steps=steps, captions=captions, device=device)[0] for steps in STUDENT_STEPS
    ]
    # The paper's student has no guidance; the teacher at few steps is given its best of both.
    teacher_rows = [
        evaluate(
            teacher, steps=full, guidance=config.teacher.guidance, captions=captions, device=device
        )[0]
    ]
    for steps in STUDENT_STEPS:
        teacher_rows += [
            evaluate(teacher, steps=steps, guidance=guidance, captions=captions, device=device)[0]
            for guidance in (0.0, config.teacher.guidance)
        ]
    found = compare(student_rows, teacher_rows, full)
    found["missed"] = [name for name, goal in WANTED.items() if (found["ratios"][name] or 0) < goal]
    write_json(turbo / "quality.json", found)
    write_card(context, turbo, found)
    write_json(teacher / "quality.json", found)
    write_card(context, teacher, found)
    return found


def compare(
    student: list[dict[str, Any]], teacher: list[dict[str, Any]], full: int
) -> dict[str, Any]:
    """Rows of both and the ratios wanted of them; a ratio over nothing right is None."""
    by_steps = {row["steps"]: row for row in student}
    whole = next(row for row in teacher if row["steps"] == full)
    one_step = max(row["all"] for row in teacher if row["steps"] == 1)

    def over(part: float, of: float) -> float | None:
        return round(part / of, 4) if of > 0 else None

    ratios = {
        "one_step": over(by_steps[1]["all"], whole["all"]),
        "four_steps": over(by_steps[4]["all"], whole["all"]),
        "gap_closed": over(by_steps[1]["all"] - one_step, whole["all"] - one_step),
        "teacher_single": whole.get("all_1"),
    }
    return {"student": student, "teacher": teacher, "ratios": ratios, "wanted": WANTED}


def quality_table(found: dict[str, Any]) -> list[str]:
    """Markdown rows of every evaluation."""
    names = ("all", "all_1", "all_2", "all_3", "count", "shape", "colour", "size", "position",
             "background")  # fmt: skip
    lines = [
        f"| model | steps | guidance | {' | '.join(names)} | FID (own network) |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in (*found["student"], *found["teacher"]):
        shares = " | ".join(f"{row[name]:.3f}" if name in row else "" for name in names)
        fid = f"{row['fid_shapes']:.4f}" if "fid_shapes" in row else ""
        lines.append(
            f"| {row['model']} | {row['steps']} | {row['guidance']:g} | {shares} | {fid} |"
        )
    return lines


def weaknesses(found: dict[str, Any]) -> list[str]:
    """Sentences on what the figures say against the student and its teacher."""
    student, teacher = found["student"], found["teacher"]
    counts = {"all_1": "one object", "all_2": "two objects", "all_3": "three objects"}
    known = [key for key in counts if all(key in row for row in (*student, *teacher))]
    said = []
    if known:
        hardest = min(known, key=lambda key: sum(row[key] for row in student))
        shares = " / ".join(f"{row[hardest]:.1%}" for row in student)
        steps = " / ".join(str(row["steps"]) for row in student)
        said.append(f"Pictures of {counts[hardest]} are hardest: {shares} at {steps} steps.")
        one = next(r for r in teacher if r["steps"] == 1 and not r["guidance"])
        parts = ", ".join(f"{one[key]:.1%} of {counts[key]}" for key in known)
        said.append(
            f"The gap that the student closes at one step is not the same everywhere: the teacher's"
            f" single step without guidance gets {parts} right."
        )
    better = [
        f"{row['steps']} steps ({row['fid_shapes']:.1f} against {mine['fid_shapes']:.1f})"
        for mine in student
        for row in teacher
        if row["steps"] == mine["steps"]
        and not row["guidance"]
        and row.get("fid_shapes", float("inf")) < mine.get("fid_shapes", 0.0)
    ]
    if better:
        said.append(
            f"By FID the teacher without guidance is the better one at {', '.join(better)}."
        )
    return said
