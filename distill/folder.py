"""A finished run as model folders in diffusers format, float16, with a card that says how.

`<name>-turbo` is whole; `<name>-teacher` has its own UNet and scheduler and links to the rest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from core.errors import AddbenchError
from core.files import read_json, staged_folder, write_atomic, write_json
from core.git import revision
from distill.context import DONE, Context
from distill.quality import quality_table, weaknesses, wording_table

SHARED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "taesd", "fid")
CLASSES = {
    "scheduler": None,
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def export_run(context: Context) -> list[Path]:
    """Write the folders of a finished run; for a run over a checkpoint, the student's alone."""
    name, folder = context.config.name, context.folder
    student = context.weights("student") / "weights"
    if "teacher" not in context.config.stages:
        target = folder / f"{name}-student"
        with staged_folder(target) as scratch:
            for part in ("unet", "scheduler"):
                _copy_half(student / part, scratch / part)
            _write_record(context, scratch)
        return [target]
    turbo = assemble_turbo(context)
    teacher = context.weights("teacher") / "weights"
    whole = folder / f"{name}-teacher"
    with staged_folder(whole) as scratch:
        for part in ("unet", "scheduler"):
            _copy_half(teacher / part, scratch / part)
        for part in SHARED:
            os.symlink(f"../{turbo.name}/{part}", scratch / part)
        _write_index(scratch)
        _write_record(context, scratch)
        write_card(context, scratch, name=whole.name)
    return [turbo, whole]


def assemble_turbo(context: Context) -> Path:
    """The student with all it needs, below the run's folder."""
    student = context.weights("student") / "weights"
    teacher = context.weights("teacher") / "weights"
    sources = {part: teacher / part for part in SHARED[:4]}
    sources["vae"] = context.weights("autoencoder") / "weights"
    # The one of another student is of no use to this one: an ablation does without.
    if (tiny := context.finished("tiny-autoencoder")) is not None:
        sources["taesd"] = tiny / "weights"
    turbo = context.folder / f"{context.config.name}-turbo"
    with staged_folder(turbo) as scratch:
        for part, source in sources.items():
            _copy_half(source, scratch / part)
        _copy_fid(context.weights("fid") / "weights", scratch / "fid")
        for part in ("unet", "scheduler"):
            _copy_half(student / part, scratch / part)
        _write_index(scratch)
        _write_record(context, scratch)
        write_card(context, scratch, name=turbo.name)
    return turbo


def _copy_half(source: Path, target: Path) -> None:
    """A part with its weights in float16; a value beyond float16 is an error that names it."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copy(file, target / file.name)
            continue
        half: dict[str, torch.Tensor] = {}
        for name, value in load_file(file).items():
            cast = value.half() if value.is_floating_point() else value
            if not bool(torch.isfinite(cast).all()):
                raise AddbenchError(
                    f"{source.name} does not fit float16",
                    f"{name} has a value beyond 65504 or not finite",
                    "train the stage again with a lower learning rate",
                )
            # transformers before 5 nests the first encoder's weights, and 5 reads both.
            if source.name == "text_encoder" and not name.startswith("text_model."):
                name = f"text_model.{name}"
            half[name] = cast.contiguous()
        save_file(half, target / file.name, metadata={"format": "pt"})
    config = target / "config.json"
    if config.exists():
        settings = read_json(config)
        # Stored in float16, loaded in float32 unless the caller asks: transformers 5 takes the
        # dtype from here where diffusers takes float32, and the two must meet.
        if "dtype" in settings:
            settings["dtype"] = "float32"
        # A diffusers config remembers the folder it was loaded from.
        write_json(config, {k: v for k, v in settings.items() if k != "_name_or_path"})


def _copy_fid(source: Path, target: Path) -> None:
    target.mkdir()
    for suffix in ("safetensors", "json"):
        shutil.copy(source / f"fid.{suffix}", target / f"fid.{suffix}")


def _write_index(folder: Path) -> None:
    """model_index.json of a StableDiffusionXLPipeline."""
    import diffusers

    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": False,
        "add_watermarker": None,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    for part, kind in CLASSES.items():
        index[part] = list(kind or ("diffusers", scheduler))
    write_json(folder / "model_index.json", index)


def _write_record(context: Context, folder: Path) -> None:
    """training.json: the recipe and how it went; training-log.jsonl: the losses."""
    stages = {}
    for name in context.config.stages:
        if (finished := context.finished(name)) is not None:
            stages[name] = read_json(finished / DONE)
    record = {
        "config": dataclasses.asdict(context.config),
        "stages": stages,
        "git_revision": revision(),
        "versions": _versions(),
        "device": str(context.device),
        "precision": context.accelerator.mixed_precision,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    write_json(folder / "training.json", record)
    log = context.folder / "log.jsonl"
    if log.exists():
        write_atomic(folder / "training-log.jsonl", log.read_bytes())


def write_card(
    context: Context, folder: Path, quality: dict[str, Any] | None = None, name: str = ""
) -> None:
    """README.md of a model folder: recipe, times, limits, and what was measured of it."""
    name = name or folder.name
    config = context.config
    record = read_json(folder / "training.json")
    lines = [
        "---",
        "license: apache-2.0",
        "pipeline_tag: text-to-image",
        "---",
        "",
        f"# {name}",
        "",
        "Draws one to three flat shapes from a caption, at 64 x 64 pixels. Made to measure runtimes"
        " with a model that was really trained, on any machine, without a download.",
        "",
        "    a large red circle on the left of a black background",
        "    a small blue star above a large white square on a gray background",
        "    two red circles",
        "    a yellow sta",
        "",
        "What a caption does not say is drawn plainly: a large red circle in the middle, on black.",
        "",
        f"Trained from nothing by `addbench train --preset {config.name}`, seed"
        f" {config.seed}, written at git revision {record['git_revision']}; nothing in it comes"
        " from another model or from pictures of others. `training.json` has the whole"
        " configuration and the time of each stage, `training-log.jsonl` the losses,"
        " `quality.json` what was measured of it.",
        "",
        "| stage | steps | minutes | git revision |",
        "|---|---|---|---|",
    ]
    for stage in config.stages:
        if (finished := context.finished(stage)) is not None:
            done = read_json(finished / DONE)
            budget = done.get("minutes")
            ended = f" (ended by --minutes {budget:g})" if budget else ""
            minutes, told = done["seconds"] / 60, done.get("git_revision", "not recorded")
            lines.append(f"| {stage} | {done['steps']}{ended} | {minutes:.1f} | {told} |")
    lines += [
        "",
        f"Minutes on {record['device']} in {record['precision']}, threads: {record['threads']},"
        " with whatever else the machine did.",
    ]
    turbo = name.endswith("turbo")
    lines += [
        "",
        "The student of adversarial diffusion distillation: 1, 2 or 4 steps, no guidance."
        if turbo
        else f"The teacher: {config.teacher.steps} steps with guidance {config.teacher.guidance}."
        " All but the UNet and the scheduler are links into the turbo model's folder.",
    ]
    if quality is not None:
        count = quality["student"][0]["captions"]
        lines += [
            "",
            f"Share of {count} held-out captions with every attribute right, as `distill/judge.py`"
            " reads them from pixels (1, 2, 3: by number of objects), and the FID of as many"
            " pictures over a network of this project, comparable only with itself:",
            "",
            *quality_table(quality),
            "",
            f"The student on {count} held-out captions that say less or in other words"
            " (`distill/captions.py`): on every background (`grounds`), in looser words (`loose`),"
            f" cut off anywhere (`cut`); {count // 10} captions typed letter by letter (`typed`:"
            " `steady` is the share of letters within a word that leave the picture the same"
            " scene); and full ones through the tiny decoder:",
            "",
            *wording_table(quality),
        ]
        for goal, wanted in quality["wanted"].items():
            missed = ": missed" if goal in quality["missed"] else ""
            lines += ["", f"{goal} {quality['ratios'][goal]}, wanted {wanted}{missed}"]
    lines += [
        "",
        "Limits: it knows the captions of one grammar (`distill/shapes.py`), whole, loose or cut"
        " off (`distill/captions.py`), and nothing else; a word it never saw is noise to it; it"
        " says nothing about the quality of large models. One combination in five was held out of"
        " training.",
        *(weaknesses(quality) if quality is not None else ()),
        "",
        "Licence: Apache-2.0, the project's; the weights are its own work.",
        "",
    ]
    write_atomic(folder / "README.md", "\n".join(lines))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "diffusers", "transformers", "accelerate", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of log.jsonl; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
