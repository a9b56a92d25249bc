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
