"""`python -m bench.overhead`: what pipeline and harness add to a bare loop over the same sessions.

Three ways of making the same images in one process - sessions called by hand, the pipeline, the
pipeline under `measure` - in blocks of alternating order, so that a drift meets all three alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bench.measure import StopRule, inputs_of_call, measure
from core.cli import Parser, add_model_arguments, run
from core.errors import EXIT_FAILED, EXIT_OK
from export.models import DEFAULT_MODEL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from backends.pipeline import Pipeline

LIMIT = 0.01


def bare_call(
    pipe: Pipeline, scheduler: Any, prompts: Sequence[str], steps: int, seeds: Sequence[int]
) -> NDArray[np.uint8]:
    """What one would write by hand: no guards, no clocks, no stages; uint8 [batch, h, w, 3]."""
    import torch

    from backends.pipeline import DTYPES

    def session(part: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        found = pipe.session(part)
        return found.run(
            {name: tensors[name].to(DTYPES[spec.dtype]) for name, spec in found.inputs.items()}
        )

    with torch.inference_mode():
        encoders = [part for part in pipe.parts if part.startswith("text_encoder")]
        ids = pipe.tokenise(prompts)
        encoded = [session(part, input_ids=i) for part, i in zip(encoders, ids, strict=True)]
        hidden = torch.cat([outputs["hidden_states"] for outputs in encoded], dim=-1)
        inputs = {"encoder_hidden_states": hidden, **pipe.context(hidden)}
        width, height = pipe.bundle.size
        if pipe.bundle.pooled:
            inputs["text_embeds"] = encoded[-1]["text_embeds"]
            row = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
            inputs["time_ids"] = row.expand(len(seeds), -1)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        scheduler.set_timesteps(steps)
        scale = pipe.bundle.vae_scale
        shape = (1, pipe.bundle.latent_channels, height // scale, width // scale)
        latents = torch.cat([torch.randn(shape, generator=g) for g in generators])
        latents = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            sample = scheduler.scale_model_input(latents, timestep)
            moment = timestep.reshape(1).float()
            predicted = session("unet", sample=sample, timestep=moment, **inputs)["out_sample"]
            latents = scheduler.step(
                predicted.float(), timestep, latents, generator=generators
            ).prev_sample
        decoded = session(f"{pipe.decoder}_decoder", latent_sample=latents)["sample"].float()
        image = (decoded * 127.5).add_(128).clamp_(0.5, 255.5).to(torch.uint8)
        return image.permute(0, 2, 3, 1).contiguous().numpy()


def blocks(pipe: Pipeline, batch: int, steps: int, calls: int) -> dict[str, Callable[[], None]]:
    """The three ways, each making `calls` calls."""

    scheduler, asked = pipe.bundle.scheduler(), pipe.bundle.model.prompts

    def sessions() -> None:
        for number in range(calls):
            prompts, seeds = inputs_of_call(number, batch, asked)
            bare_call(pipe, scheduler, prompts, steps, seeds)

    def pipeline() -> None:
        for number in range(calls):
            prompts, seeds = inputs_of_call(number, batch, asked)
            pipe(prompts, steps=steps, seed=seeds)

    def harness() -> None:
        # The cold call is one of them: `calls` in all, as in the other two.
        rule = StopRule(min_samples=calls - 1, min_time=0.0, max_time=math.inf, warmup=0)
        measure(pipe, batch, steps, rule, prompts=asked)

    return {"sessions by hand": sessions, "pipeline": pipeline, "pipeline under measure": harness}


def interleaved(
    ways: dict[str, Callable[[], None]], repeats: int, calls: int
) -> dict[str, list[float]]:
    """Milliseconds per call of each way, a value per repeat; every other repeat runs backwards."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        names = list(ways) if repeat % 2 == 0 else list(ways)[::-1]
        for name in names:
            started = time.perf_counter_ns()
            ways[name]()
            found[name].append((time.perf_counter_ns() - started) / 1e6 / calls)
    return found


def parser() -> Parser:
    top = Parser(prog="python -m bench.overhead", description=__doc__)
    add_model_arguments(top, DEFAULT_MODEL)
    top.add_argument("--backend", default="ort", metavar="NAME[:KEY=VALUE,...]")
    top.add_argument("--decoder", default="taesd")
    top.add_argument("--batch", type=int, default=1)
    top.add_argument("--steps", type=int, default=1)
    top.add_argument("--calls", type=int, default=20, help="calls per block")
    top.add_argument("--repeats", type=int, default=20, help="blocks of each way")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from backends.pipeline import load_pipeline

    with load_pipeline(
        args.model,
        args.backend,
        args.decoder,
        batch=args.batch,
        weights=args.weights,
        dtype=args.dtype,
    ) as pipe:
        ways = blocks(pipe, args.batch, args.steps, args.calls)
        interleaved(ways, 1, args.calls)  # warm
        found = interleaved(ways, args.repeats, args.calls)
    print(
        f"{args.repeats} blocks of {args.calls} calls each, {args.steps} steps, alternating order"
    )
    over = False
    for name, times in found.items():
        print(f"{name:<24} {statistics.median(times):10.3f} ms/call")
    *bases, harness = found
    for base in bases:
        pairs = zip(found[harness], found[base], strict=True)
        low, middle, high = statistics.quantiles([mine / bare - 1 for mine, bare in pairs], n=4)
        print(f"{harness} over {base}: {middle:+.2%} (quartiles {low:+.2%} to {high:+.2%})")
        over = over or low > LIMIT
    print(f"{'over' if over else 'within'} the limit of {LIMIT:.0%}")
    return EXIT_FAILED if over else EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run(main))
