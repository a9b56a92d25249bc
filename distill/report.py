"""What a finished run must show: student and teacher on held-out captions, compared; the student on
what else people type, and through the tiny decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.files import write_json
from distill.context import Context
from distill.evaluate import CAPTION_SEED, WORDINGS, evaluate, evaluate_wording, held_out
from distill.folder import write_card
from distill.judge import following
from distill.latents import to_uint8
from distill.shapes import Pictures, draw

STUDENT_STEPS = (1, 2, 4)
WANTED = {
    "one_step": 0.9,
    "gap_closed": 0.8,
    "four_steps": 0.97,
    "teacher_single": 0.93,
    "full": 0.98,
    "grounds": 0.97,
    "loose": 0.95,
    "cut_stated": 0.93,
    "cut_valid": 0.97,
    "steady": 0.9,
    "tiny_decoder": 0.96,
    "tiny_encoder": 0.95,
}
"""The student at one and four steps against the teacher in full; the share of the way from the
teacher at one step to the teacher in full that the student at one step goes; the teacher on
single objects. Of the student at one step: full captions, those on every background, looser ones,
what cut ones state and whether their pictures are scenes, how still a picture holds while its
caption is typed, full captions through the tiny decoder; drawn pictures through the tiny encoder
and back by the autoencoder."""


def measure_run(context: Context, turbo: Path, teacher: Path) -> dict[str, Any]:
    """Evaluate both models, write quality.json and the card of each; the turbo's figures."""
    config = context.config
    options: dict[str, Any] = {"captions": config.evaluate_captions, "device": str(context.device)}
    full = config.teacher.steps
    student_rows = [evaluate(turbo, steps=steps, **options)[0] for steps in STUDENT_STEPS]
    # The paper's student has no guidance; the teacher at few steps is given its best of both.
    guided = config.teacher.guidance
    teacher_rows = [evaluate(teacher, steps=full, guidance=guided, **options)[0]]
    for steps in STUDENT_STEPS:
        teacher_rows += [
            evaluate(teacher, steps=steps, guidance=guidance, **options)[0]
            for guidance in (0.0, guided)
        ]
    quality = compare(student_rows, teacher_rows, full)
    quality["wordings"] = [
        evaluate_wording(turbo, wording, steps=steps, **options)[0]
        for wording in WORDINGS[1:]
        for steps in ((1,) if wording == "typed" else (1, 4))
    ]
    quality["tiny"] = [
        evaluate(turbo, steps=steps, decoder="taesd", **options)[0] for steps in STUDENT_STEPS
    ]
    quality["tiny_encoder"] = tiny_encoder(turbo, config.evaluate_captions)
    quality["ratios"] |= typing_shares(quality)
    quality["missed"] = [
        name for name, goal in WANTED.items() if (quality["ratios"][name] or 0) < goal
    ]
    for folder in (turbo, teacher):
        write_json(folder / "quality.json", quality)
        write_card(context, folder, quality)
    return quality


def tiny_encoder(turbo: Path, captions: int) -> dict[str, float]:
    """What the judge reads of drawn held-out pictures that went through the tiny encoder and back
    by either decoder: share with everything right."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    items = held_out(captions)
    drawn = draw(items, seed=CAPTION_SEED)
    tiny, vae = (
        kind.from_pretrained(turbo / part, dtype=torch.float32).eval()
        for kind, part in ((AutoencoderTiny, "taesd"), (AutoencoderKL, "vae"))
    )
    shown: dict[str, list[Pictures]] = {"vae": [], "taesd": []}
    with torch.no_grad():
        for start in range(0, len(drawn), 64):
            part = torch.from_numpy(drawn[start : start + 64]).permute(0, 3, 1, 2).float()
            latents = tiny.encode(part / 127.5 - 1).latents
            shown["vae"].append(to_uint8(vae.decode(latents).sample))
            shown["taesd"].append(to_uint8(tiny.decode(latents).sample))
    return {name: following(np.concatenate(made), items)["all"] for name, made in shown.items()}


def typing_shares(quality: dict[str, Any]) -> dict[str, float]:
    """The student's shares at one step that are wanted of it, by goal."""
    first = {row["wording"]: row for row in quality["wordings"] if row["steps"] == 1}
    return {
        "full": quality["student"][0]["all"],
        "grounds": first["grounds"]["all"],
        "loose": first["loose"]["all"],
        "cut_stated": first["cut"]["stated"],
        "cut_valid": first["cut"]["valid"],
        "steady": first["typed"]["steady"],
        "tiny_decoder": quality["tiny"][0]["all"],
        "tiny_encoder": quality["tiny_encoder"]["vae"],
    }


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
