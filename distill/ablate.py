"""Table 1 of the paper in small: one student per choice, compared in direction with the paper's.

addbench ablate --base shapes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.cli import Parser, run
from core.errors import PreconditionError

if TYPE_CHECKING:
    from distill.config import Config


@dataclass(frozen=True)
class Choice:
    """One row: `changes` to the default's, and the paper's FID (down) and CLIP score (up)."""

    group: str
    name: str
    changes: tuple[str, ...]
    paper_fid: float
    paper_clip: float


# One teacher step, as the paper's default has, whatever the preset says. To a teacher that saw no
# bad pictures Katzir et al.'s negative caption (arXiv 2310.17590) is words it does not know.
DEFAULT = Choice("default", "default", ("student.teacher-steps=1",), 20.6, 0.319)
NEGATIVE = "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark"
CHOICES = (
    DEFAULT,
    Choice("conditioning", "none", ("student.conditioning=none",), 21.2, 0.302),
    Choice("conditioning", "text", ("student.conditioning=text",), 21.2, 0.307),
    Choice("conditioning", "image", ("student.conditioning=image",), 21.1, 0.316),
    Choice("student", "random", ("student.pretrained=false",), 293.6, 0.065),
    Choice("loss", "adversarial only", ("student.loss=adversarial",), 20.8, 0.315),
    Choice("loss", "distillation only", ("student.loss=distillation",), 315.6, 0.076),
    Choice("weighting", "sds", ("student.weighting=sds",), 22.3, 0.325),
    Choice(
        "weighting",
        "nfsd",
        ("student.weighting=nfsd", f"student.negative={NEGATIVE!r}"),
        21.8,
        0.327,
    ),
    Choice("teacher steps", "2", ("student.teacher-steps=2",), 20.8, 0.321),
    Choice("teacher steps", "4", ("student.teacher-steps=4",), 20.3, 0.317),
)
"""Published: Sauer et al., arXiv 2311.17042, Table 1 (COCO zero-shot FID-5k, CLIP score)."""


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="addbench ablate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="shapes")
    parser.add_argument("--base", help="run whose autoencoder, features and teacher are used")
    parser.add_argument("--share", type=float, default=0.2, help="of the student's iterations")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1, help="students per choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--only", nargs="*", help="groups or names, e.g. loss weighting")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every student"
    )
    return parser


def run_choice(choice: Choice, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one student and judge it at one step and at four; finished ones are not repeated."""
    from core.files import read_json, write_json
    from distill.config import load_config
    from distill.evaluate import evaluate
    from distill.folder import assemble_turbo
    from distill.train import make_context, runs_root, train

    base = arguments.base or arguments.preset
    plain = load_config(arguments.preset, arguments.set)
    iterations = max(1, round(plain.student.iterations * arguments.share))
    slug = f"{choice.group}-{choice.name}".replace(" ", "-")
    name = f"ablation/{base}-{slug}-{seed}"
    changes = [*arguments.set, *DEFAULT.changes, *choice.changes]
    changes += [f"student.iterations={iterations}", f"student.seed={seed}"]
    config = load_config(arguments.preset, changes)
    config = load_config(arguments.preset, [*changes, f"student.lambda={balanced_lambda(config)}"])
    figures = runs_root() / name / "figures.json"
    wanted = config.stage_hash("student")
    if figures.exists() and (earlier := read_json(figures))["config"] == wanted:
        return dict(earlier)
    options = {"device": arguments.device, "precision": arguments.precision, "base": base}
    train(config, run_name=name, stage="student", export=False, **options)
    folder = assemble_turbo(make_context(config, name, **options))
    row: dict[str, Any] = {"group": choice.group, "choice": choice.name, "seed": seed,
                           "iterations": iterations, "config": wanted}  # fmt: skip
    for steps in (1, 4):
        judged, _ = evaluate(
            folder, steps=steps, captions=arguments.captions, device=arguments.device
        )
        row |= {f"{key}@{steps}": judged[key] for key in ("all", "fid_shapes", "fid_shapes_se")}
    row["captions"] = arguments.captions
    write_json(figures, row)
    return row


def balanced_lambda(config: Config) -> float:
    """lambda under which a weighting pulls, over its timesteps, as hard as the exponential one."""
    import torch

    from distill.losses import weight
    from distill.schedule import Schedule, scheduler_config

    teacher, student = config.teacher, config.student
    schedule = Schedule.from_config(scheduler_config(teacher.beta_start, teacher.beta_end))
    low, high = (round(share * len(schedule)) for share in student.teacher_range)
    t = torch.arange(low, high)
    usual, mine = (float(weight(w, schedule, t).mean()) for w in ("exp", student.weighting))
    return student.lambda_ * usual / mine


def directions(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each choice against the default, here and in the paper.

    Prompt following stands for the CLIP score (up is better), the own FID for FID (down).
    `agrees`: True or False; None where ours differs by less than two standard errors of the
    difference, which the sampled captions alone give (a student's own luck is in them only with
    several seeds), or the paper's by less than 0.002 of CLIP score or 1% of FID.
    """
    import numpy as np

    def values(choice: Choice, key: str) -> list[float]:
        return [r[key] for r in rows if (r["group"], r["choice"]) == (choice.group, choice.name)]

    def mean(choice: Choice, key: str) -> float:
        sample = values(choice, key)
        return float(np.mean(sample)) if sample else float("nan")

    def variance(choice: Choice, key: str, error: Callable[[dict[str, Any]], float]) -> float:
        """Return the variance of the mean over seeds."""
        mine = [r for r in rows if (r["group"], r["choice"]) == (choice.group, choice.name)]
        sampled = float(np.mean([error(r) ** 2 for r in mine])) / len(mine)
        spread = float(np.var(values(choice, key), ddof=1)) / len(mine) if len(mine) > 1 else 0.0
        return max(sampled, spread)

    def ours_sign(choice: Choice, key: str, error: Callable[[dict[str, Any]], float]) -> int:
        change = mean(choice, key) - mean(DEFAULT, key)
        least = 2 * (variance(choice, key, error) + variance(DEFAULT, key, error)) ** 0.5
        return 0 if abs(change) <= least else int(np.sign(change))

    def paper_sign(change: float, least: float) -> int:
        return 0 if round(abs(change), 6) < least else int(np.sign(change))

    def share_error(row: dict[str, Any]) -> float:
        # One more right and one more wrong: a share of 1 is not sure either.
        p = (row["all@1"] * row["captions"] + 1) / (row["captions"] + 2)
        return float((p * (1 - p) / row["captions"]) ** 0.5)

    def fid_error(row: dict[str, Any]) -> float:
        return float(row["fid_shapes_se@1"])

    verdicts = []
    for choice in CHOICES[1:]:
        ours = mean(choice, "all@1")
        if np.isnan(ours):
            continue
        ours_fid = mean(choice, "fid_shapes@1")
        pairs = {
            "following": (
                ours_sign(choice, "all@1", share_error),
                paper_sign(choice.paper_clip - DEFAULT.paper_clip, 0.002),
            ),
            "fid": (
                ours_sign(choice, "fid_shapes@1", fid_error),
                paper_sign(choice.paper_fid - DEFAULT.paper_fid, 0.01 * DEFAULT.paper_fid),
            ),
        }
        row: dict[str, Any] = {
            "group": choice.group,
            "choice": choice.name,
            "all@1": ours,
            "all@4": mean(choice, "all@4"),
            "fid_shapes@1": ours_fid,
            "paper_fid": choice.paper_fid,
            "paper_clip": choice.paper_clip,
        }
        for key, (mine, theirs) in pairs.items():
            row[f"{key}_agrees"] = None if 0 in (mine, theirs) else mine == theirs
        verdicts.append(row)
    return verdicts


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Every choice beside the paper's figures for it, and whether the directions agree."""
    agreement = {True: "agrees", False: "disagrees", None: "-"}
    first = rows[0]
    verdicts = directions(rows)
    by_choice = {(row["group"], row["choice"]): row for row in verdicts}
    lines = [
        f"One student per choice and seed ({len({row['seed'] for row in rows})}),"
        f" {first['iterations']} iterations, {first['captions']} held-out captions.",
        "",
        "| what | choice | all right at 1 step | at 4 steps | own FID at 1 step | paper FID"
        " | paper CLIP | prompt following against CLIP | own FID against FID |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for choice in CHOICES:
        ours = [r for r in rows if (r["group"], r["choice"]) == (choice.group, choice.name)]
        if not ours:
            continue
        keys = ("all@1", "all@4", "fid_shapes@1", "fid_shapes_se@1")
        first_step, fourth_step, fid, error = (
            sum(row[key] for row in ours) / len(ours) for key in keys
        )
        judged = by_choice.get((choice.group, choice.name), {})
        agree = [agreement[judged.get(f"{key}_agrees")] for key in ("following", "fid")]
        lines.append(
            f"| {choice.group} | {choice.name} | {first_step:.3f} | {fourth_step:.3f}"
            f" | {fid:.2f} ± {error:.2f}"
            f" | {choice.paper_fid} | {choice.paper_clip} | {agree[0]} | {agree[1]} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from core.files import write_json
    from distill.train import runs_root

    chosen = [
        choice
        for choice in CHOICES
        if not arguments.only
        or choice is DEFAULT
        or {choice.group, choice.name} & set(arguments.only)
    ]
    if len(chosen) == 1:
        raise PreconditionError(
            f"--only {' '.join(arguments.only)} names no choice",
            f"groups: {', '.join(sorted({choice.group for choice in CHOICES[1:]}))}",
            "pass a group or a name of these",
        )
    rows = []
    for seed in range(arguments.seeds):
        for choice in chosen:
            print(f"{choice.group}: {choice.name}, seed {seed}", file=sys.stderr, flush=True)
            rows.append(run_choice(choice, seed, arguments))
    out = runs_root() / "ablation" / f"{arguments.base or arguments.preset}.json"
    write_json(out, {"rows": rows, "directions": directions(rows), "seeds": arguments.seeds})
    print(markdown(rows))
    print(f"wrote {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
