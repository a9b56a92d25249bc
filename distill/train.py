"""Train a model by adversarial diffusion distillation, every stage from nothing or one of them.

addbench train --preset shapes
addbench train --preset shapes --stage student --minutes 60
accelerate launch -m distill.train --preset sdxl --device cuda --shard
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli import Parser, run
from core.errors import PreconditionError
from core.files import build_root, write_json
from core.isa import cpu_flags

if TYPE_CHECKING:
    from distill.config import Config
    from distill.context import Context

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""Instruction sets with which a CPU multiplies faster in bfloat16 than in float32."""


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="addbench train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="shapes", help="shapes, smoke, sdxl or a .toml file")
    parser.add_argument("--smoke", action="store_true", help="the same as --preset smoke")
    parser.add_argument("--stage", help="only this stage (default: all that are not finished)")
    parser.add_argument("--minutes", type=float, help="budget of each stage; rates end with it")
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=120.0, help="time between checkpoints"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto: bf16 on a GPU and on a CPU with AMX or AVX-512 for it; else fp32",
    )
    parser.add_argument(
        "--shard", action="store_true", help="FSDP: teacher and student in shards over processes"
    )
    parser.add_argument("--run", help="name of the run's folder below build/distill")
    parser.add_argument("--base", help="another run whose finished stages may be used")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting"
    )
    parser.add_argument(
        "--no-export", action="store_true", help="train only, write no model folder"
    )
    return parser


def runs_root() -> Path:
    return build_root() / "distill"


def chosen_precision(device: str, asked: str) -> str:
    """The precision to train in: as asked, or what the hardware says where that is `auto`."""
    if asked != "auto":
        return asked
    return "bf16" if device == "cuda" or cpu_flags() & BF16_FLAGS else "fp32"


def make_accelerator(device: str, precision: str) -> Any:
    """accelerate's one object for device, precision and processes."""
    import torch
    from accelerate import Accelerator

    if device == "cuda" and not torch.cuda.is_available():
        raise PreconditionError(
            "there is no CUDA device",
            "torch finds none, or is a CPU build",
            "use --device cpu, or install a CUDA build of torch",
        )
    precision = chosen_precision(device, precision)
    if device == "cpu" and precision == "fp16":
        raise PreconditionError(
            "FP16 training needs a GPU",
            "torch trains in float32 or bfloat16 on a CPU",
            "use --precision bf16, fp32 or auto, or --device cuda",
        )
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=PRECISIONS[precision])
    if accelerator.distributed_type == "FSDP":
        raise PreconditionError(
            "accelerate is configured to shard every network (--use_fsdp)",
            "the discriminator's R1 penalty differentiates twice, which shards do not take",
            "launch without --use_fsdp and pass --shard: it shards teacher and student",
        )
    return accelerator


def make_context(
    config: Config,
    run_name: str,
    *,
    device: str,
    precision: str,
    base: str | None = None,
    shard: bool = False,
) -> Context:
    from distill.context import Context
    from distill.sharding import require_sharding

    _quiet_libraries()
    root = runs_root()
    accelerator = make_accelerator(device, precision)
    if shard:
        require_sharding(accelerator)
    return Context(config, root / run_name, accelerator, root / base if base else None, shard)


def train(
    config: Config,
    *,
    run_name: str,
    stage: str | None = None,
    minutes: float | None = None,
    checkpoint_seconds: float = 120.0,
    device: str = "cpu",
    precision: str = "auto",
    base: str | None = None,
    shard: bool = False,
    export: bool = True,
) -> Path:
    """Run the stages of a config that are not finished; the run's folder."""
    from distill.loop import run_stage
    from distill.stages import trainer

    context = make_context(
        config, run_name, device=device, precision=precision, base=base, shard=shard
    )
    accelerator, folder = context.accelerator, context.folder
    stages = [stage] if stage else list(config.stages)
    for name in stages:  # a command that is refused leaves the run's record as it was
        refuse_early(context, name, stages)
    if config.data.kind != "shapes" and not all(map(context.finished, stages)):
        _ = context.source  # opened before anything is written: it may not be there
    if accelerator.is_main_process:
        write_json(folder / "config.json", dataclasses.asdict(config))
    for name in stages:
        if context.finished(name):
            _say(accelerator, f"stage {name} is finished")
            continue
        count = accelerator.num_processes
        on = f"{accelerator.device}, {accelerator.mixed_precision}"
        _say(accelerator, f"stage {name} on {on}, {count} process{'es' if count > 1 else ''}")
        run_stage(trainer(name, context), minutes, checkpoint_seconds)
        # An accelerator keeps what a stage registered for its checkpoints, whatever it frees, and
        # would save it with the next stage's: those could then not be resumed alone.
        accelerator.free_memory()
        accelerator = context.accelerator = make_accelerator(device, precision)
    whole = all(context.finished(name) for name in config.stages)
    if export and accelerator.is_main_process and whole:
        from distill.checkpointing import writing
        from distill.folder import export_run

        with writing("the model folder", folder, "every stage's weights are intact"):
            written = export_run(context)
        for path in written:
            _say(accelerator, f"wrote {path}")
        if len(written) == 2:  # turbo and teacher: a run from nothing
            from distill.report import measure_run

            quality = measure_run(context, *written)
            _say(accelerator, f"ratios {quality['ratios']}, wanted {quality['wanted']}")
    accelerator.wait_for_everyone()
    return folder


def refuse_early(context: Context, stage: str, stages: Sequence[str]) -> None:
    """Refuse what cannot be trained before anything is written.

    Raises:
        PreconditionError: a stage that this one starts from is neither finished nor among `stages`,
            or this one's checkpoint belongs to another configuration or wants --shard otherwise.
    """
    from distill.checkpointing import resumable
    from distill.config import upstream

    if context.finished(stage):
        return
    for needed in upstream(stage):  # a preset that starts from a checkpoint has fewer stages
        if needed in context.config.stages and needed not in stages:
            context.weights(needed)
    sharded = context.shard and stage == "student"  # no other stage has a network that large
    resumable(context.folder / stage / "checkpoints", context.config.stage_hash(stage), sharded)


def _quiet_libraries() -> None:
    """Progress of loading a megabyte is noise in the log."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def _say(accelerator: Any, text: str) -> None:
    if accelerator.is_main_process:
        print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from distill.config import load_config

    config = load_config("smoke" if arguments.smoke else arguments.preset, arguments.set)
    if arguments.stage and arguments.stage not in config.stages:
        raise PreconditionError(
            f"the preset {config.name} has no stage {arguments.stage!r}",
            f"its stages: {', '.join(config.stages)}",
            "pass one of these",
        )
    # Loading is local: a missing file must not turn into a wait for a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    train(
        config,
        run_name=arguments.run or config.name,
        stage=arguments.stage,
        minutes=arguments.minutes,
        checkpoint_seconds=arguments.checkpoint_seconds,
        device=arguments.device,
        precision=arguments.precision,
        base=arguments.base,
        shard=arguments.shard,
        export=not arguments.no_export,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
