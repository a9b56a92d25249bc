"""What pipeline and harness add to a bare loop over the same sessions.

Three ways of making the same images in one process - sessions called by hand, the pipeline, the
pipeline under `measure` - in blocks of alternating order, so that a drift meets all three alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.machine.environment import subject
from bench.run.measure import StopRule, inputs_of_call, measure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from backends.pipeline.pipeline import Pipeline

LIMIT = 0.01


def bare_call(
    pipe: Pipeline, scheduler: Any, prompts: Sequence[str], steps: int, seeds: Sequence[int]
) -> NDArray[np.uint8]:
    """What one would write by hand: no guards, no clocks, no stages; uint8 [batch, h, w, 3]."""
    import torch

    from backends.pipeline.pipeline import DTYPES

    def session(part: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        opened = pipe.session(part)
        return opened.run(
            {name: tensors[name].to(DTYPES[spec.dtype]) for name, spec in opened.inputs.items()}
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
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        names = list(ways) if repeat % 2 == 0 else list(ways)[::-1]
        for name in names:
            started = time.perf_counter_ns()
            ways[name]()
            times[name].append((time.perf_counter_ns() - started) / 1e6 / calls)
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """What the last way adds to each other one: quartiles of its times over theirs, less one.

    A ratio is of the two blocks of one repeat: what drifts from repeat to repeat is not in it.
    """
    *bases, last = times
    added = {}
    for base in bases:
        pairs = zip(times[last], times[base], strict=True)
        cuts = statistics.quantiles([mine / bare - 1 for mine, bare in pairs], n=4)
        added[base] = dict(zip(("lower_quartile", "median", "upper_quartile"), cuts, strict=True))
    return added


def compare_ways(
    pipe: Pipeline, batch: int, steps: int, calls: int, repeats: int
) -> dict[str, Any]:
    """What the pipeline and the harness add, as a record."""
    ways = blocks(pipe, batch, steps, calls)
    interleaved(ways, 1, calls)  # warm
    measured = subject(pipe.bundle, pipe.backend)
    times = interleaved(ways, repeats, calls)
    added = ratios(times)
    return {
        "schema": 1,
        **measured,
        "decoder": pipe.decoder,
        "batch": batch,
        "steps": steps,
        "calls": calls,
        "ms_per_call": {name: [round(each, 4) for each in many] for name, many in times.items()},
        "added": {
            base: {name: round(value, 5) for name, value in cut.items()}
            for base, cut in added.items()
        },
        "limit": LIMIT,
        "within": not any(cut["median"] > LIMIT for cut in added.values()),
    }


def record_text(record: Mapping[str, Any]) -> str:
    """A record in lines."""
    times = record["ms_per_call"]
    repeats, harness = len(next(iter(times.values()))), [*times][-1]
    within = "within" if record["within"] else "over"
    return "\n".join(
        [
            f"{repeats} blocks of {record['calls']} calls each, {record['steps']} steps,"
            " alternating order",
            *(
                f"{name:<24} {statistics.median(many):10.3f} ms/call"
                for name, many in times.items()
            ),
            *(
                f"{harness} over {base}: {cut['median']:+.2%}"
                f" (quartiles {cut['lower_quartile']:+.2%} to {cut['upper_quartile']:+.2%})"
                for base, cut in record["added"].items()
            ),
            f"the median is {within} the limit of {LIMIT:.0%}",
        ]
    )
