"""What a model's quality.json says, for its card: tables, and sentences on its weaknesses."""

from __future__ import annotations

from typing import Any


def quality_table(quality: dict[str, Any]) -> list[str]:
    """Markdown rows of every evaluation."""
    names = ("all", "all_1", "all_2", "all_3", "count", "shape", "colour", "size", "position",
             "background")  # fmt: skip
    lines = [
        f"| model | steps | guidance | {' | '.join(names)} | FID (own network) |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in (*quality["student"], *quality["teacher"]):
        shares = " | ".join(f"{row[name]:.3f}" if name in row else "" for name in names)
        fid = f"{row['fid_shapes']:.4f}" if "fid_shapes" in row else ""
        lines.append(
            f"| {row['model']} | {row['steps']} | {row['guidance']:g} | {shares} | {fid} |"
        )
    return lines


def wording_table(quality: dict[str, Any]) -> list[str]:
    """Markdown rows of the student on other captions than the grammar's, and through the tiny
    decoder."""
    lines = [
        "| captions | decoder | steps | all that is said | attributes stated | a scene | steady |",
        "|---|---|---|---|---|---|---|",
    ]
    full = [row | {"wording": "full"} for row in quality["tiny"]]
    for row in (*quality["wordings"], *full):
        shares = " | ".join(
            f"{row[name]:.3f}" if name in row else ""
            for name in ("all", "stated", "valid", "steady")
        )
        lines.append(f"| {row['wording']} | {row['decoder']} | {row['steps']} | {shares} |")
    return lines


def weaknesses(quality: dict[str, Any]) -> list[str]:
    """Sentences on what the figures say against the student and its teacher."""
    student, teacher = quality["student"], quality["teacher"]
    counts = {"all_1": "one object", "all_2": "two objects", "all_3": "three objects"}
    counted = [key for key in counts if all(key in row for row in (*student, *teacher))]
    said = []
    if counted:
        hardest = min(counted, key=lambda key: sum(row[key] for row in student))
        shares = " / ".join(f"{row[hardest]:.1%}" for row in student)
        steps = " / ".join(str(row["steps"]) for row in student)
        said.append(f"Pictures of {counts[hardest]} are hardest: {shares} at {steps} steps.")
        single = next(r for r in teacher if r["steps"] == 1 and not r["guidance"])
        parts = ", ".join(f"{single[key]:.1%} of {counts[key]}" for key in counted)
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
