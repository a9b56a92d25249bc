"""A scheduler's arithmetic as numbers: what one captured graph of a whole image needs.

Nothing of a scheduler is written anew here. Its own `step` and `scale_model_input` are fed random
tensors, and the coefficients are read off what they give: every scheduler whose next sample is a
sum of samples, model outputs and noises - each times a number that the step count decides - can be
read, solvers that remember earlier steps too. One that clips or thresholds is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from backends.base import UnsupportedError

if TYPE_CHECKING:
    import torch

Kind = Literal["sample", "output", "noise"]
KINDS: tuple[Kind, ...] = ("sample", "output", "noise")
NUMBERS = 4096
"""Elements of a probe: rounding errors of FP32 average out over them."""
TOLERANCE = 1e-4
"""The relative error that a prediction may have. FP32 rounding stays below 1e-5; what is not
linear, far above."""
NEGLIGIBLE = 1e-6
"""A term this small beside the result's is rounding (the probe's own error is about 1e-8)."""
LOUD = 20.0
"""Scale of the second probe: clipping that unit normal numbers do not meet shows there."""


@dataclass(frozen=True)
class Term:
    """A number times a tensor: the `step`-th sample, model output or noise."""

    kind: Kind
    step: int
    factor: float


@dataclass(frozen=True)
class Step:
    """One timestep.

    Attributes:
        timestep: what the UNet is told.
        input_factor: the UNet's input is the sample times this.
        terms: their sum is the next sample.
        draws: whether the scheduler draws a noise of the sample's shape in it.
    """

    timestep: float
    input_factor: float
    terms: tuple[Term, ...]
    draws: bool


@dataclass(frozen=True)
class LinearSchedule:
    """All steps of one image; the first sample is standard noise times `first`, and the latents of
    the picture that it starts from times `picture`."""

    first: float
    steps: tuple[Step, ...]
    picture: float = 0.0

    @property
    def draws(self) -> int:
        """Noises of one image, the one it starts from included."""
        return 1 + sum(step.draws for step in self.steps)

    def next_sample(
        self,
        index: int,
        samples: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        noises: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """The sample after step `index`; each sequence holds what there was at steps 0..index."""
        import torch

        tensors = {"sample": samples, "output": outputs, "noise": noises}
        total: torch.Tensor | None = None
        for term in self.steps[index].terms:
            tensor = tensors[term.kind][term.step]
            if tensor is None:  # a step that draws nothing has no such term
                continue
            total = (
                tensor * term.factor
                if total is None
                else torch.add(total, tensor, alpha=term.factor)
            )
        return torch.zeros_like(samples[index]) if total is None else total


def read_schedule(scheduler: Any, steps: int, begin: int = 0) -> LinearSchedule:
    """The numbers of `scheduler`, a diffusers scheduler of its own (its state is used), at `steps`.

    Args:
        begin: the first step that runs, of an image that starts from a picture; 0: from noise.

    Raises:
        UnsupportedError: its next sample is no such sum, or it draws noise in another way than one
            tensor of the sample's shape from the generator it is given.
    """
    import torch

    with torch.inference_mode():
        start = read_start(scheduler, steps, begin) if begin else None
        quiet = Probe(scheduler, steps, begin, scale=1.0, seed=0)
        loud = Probe(scheduler, steps, begin, scale=LOUD, seed=1)
        read = []
        for index, timestep in enumerate(quiet.timesteps):
            columns = quiet.columns(index)
            factors = solve([tensor for _, _, tensor in columns], quiet.results[index])
            largest = max(map(abs, factors))
            terms = tuple(
                Term(kind, step, factor)
                for (kind, step, _), factor in zip(columns, factors, strict=True)
                if abs(factor) > NEGLIGIBLE * largest
            )
            for probe in (quiet, loud):
                require_linear(scheduler, probe, index, terms)
            scale = solve([quiet.samples[index]], quiet.inputs[index])[0]
            scale = 1.0 if abs(scale - 1) < NEGLIGIBLE else scale
            for probe in (quiet, loud):
                wrong = relative(probe.samples[index] * scale, probe.inputs[index])
                if not wrong < TOLERANCE:
                    raise refusal(scheduler, index, "scale_model_input", wrong)
            draws = quiet.noises[index] is not None
            read.append(Step(float(timestep), scale, terms, draws))
        # Of the timesteps that are set now.
        first, picture = start or (float(scheduler.init_noise_sigma), 0.0)
        return LinearSchedule(first, tuple(read), picture)


def read_start(scheduler: Any, steps: int, begin: int) -> tuple[float, float]:
    """What noise and the latents of a picture are multiplied with at step `begin`.

    Raises:
        UnsupportedError: `add_noise` is no such sum.
    """
    import torch

    timesteps = begun(scheduler, steps, begin)
    source = torch.Generator().manual_seed(2)
    noise, latents = (torch.randn((1, 4, NUMBERS // 256, 64), generator=source) for _ in range(2))
    result = scheduler.add_noise(latents, noise, timesteps[:1])
    first, picture = solve([noise, latents], result)
    wrong = relative(noise * first + latents * picture, result)
    if not wrong < TOLERANCE:
        raise refusal(scheduler, begin, "add_noise", wrong)
    return first, picture


def begun(scheduler: Any, steps: int, begin: int) -> Any:
    """The timesteps that run, of a scheduler that is set to begin with the first of them."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


class Probe:
    """All steps of a scheduler once, on random samples and outputs that have nothing to do with
    each other: what depends on an earlier step shows as such."""

    def __init__(
        self, scheduler: Any, steps: int, begin: int = 0, *, scale: float, seed: int
    ) -> None:
        import torch

        from export.source.scheduler import step_arguments

        timesteps = begun(scheduler, steps, begin)
        source = torch.Generator().manual_seed(seed)
        given = torch.Generator().manual_seed(seed + 1000)
        self.timesteps = timesteps
        self.samples: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.noises: list[torch.Tensor | None] = []
        self.results: list[torch.Tensor] = []
        shape = (1, 4, NUMBERS // 256, 64)
        for timestep in self.timesteps:
            sample, output = (torch.randn(shape, generator=source) * scale for _ in range(2))
            before = given.get_state()
            extra = step_arguments(scheduler, given)
            self.inputs.append(scheduler.scale_model_input(sample.clone(), timestep))
            result = scheduler.step(output.clone(), timestep, sample.clone(), **extra).prev_sample
            self.noises.append(drawn(scheduler, before, given, shape))
            self.samples.append(sample)
            self.outputs.append(output)
            self.results.append(result)

    def columns(self, index: int) -> list[tuple[Kind, int, torch.Tensor]]:
        """Every tensor that the result of step `index` may be a sum of."""
        of: dict[Kind, Sequence[torch.Tensor | None]] = {
            "sample": self.samples,
            "output": self.outputs,
            "noise": self.noises,
        }
        return [
            (kind, step, tensor)
            for kind in KINDS
            for step in range(index + 1)
            if (tensor := of[kind][step]) is not None
        ]


def drawn(
    scheduler: Any, before: torch.Tensor, given: torch.Generator, shape: tuple[int, ...]
) -> torch.Tensor | None:
    """The noise that was drawn from `given` since its state was `before`; None if none was."""
    import torch

    now = given.get_state()
    if torch.equal(now, before):
        return None
    again = torch.Generator()
    again.set_state(before)
    noise = torch.randn(shape, generator=again, dtype=torch.float32)
    if not torch.equal(again.get_state(), now):
        raise UnsupportedError(
            f"{type(scheduler).__name__} cannot be captured",
            "a step draws its noise otherwise than as one tensor of the sample's shape",
            "use another scheduler, or a backend's step-by-step order (torch:mode=eager)",
        )
    return noise


def solve(columns: Sequence[torch.Tensor], result: torch.Tensor) -> list[float]:
    """The factors with which the columns come closest to `result`, in FP64."""
    import torch

    matrix = torch.stack([column.flatten().double() for column in columns], dim=1)
    answer = torch.linalg.lstsq(matrix, result.flatten().double()[:, None]).solution
    return [float(value) for value in answer[:, 0]]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def require_linear(scheduler: Any, probe: Probe, index: int, terms: Sequence[Term]) -> None:
    schedule = LinearSchedule(1.0, (Step(0.0, 1.0, tuple(terms), False),) * (index + 1))
    found = schedule.next_sample(index, probe.samples, probe.outputs, probe.noises)
    wrong = relative(found, probe.results[index])
    if not wrong < TOLERANCE:  # NaN too
        raise refusal(scheduler, index, "step", wrong)


def refusal(scheduler: Any, index: int, method: str, wrong: float) -> UnsupportedError:
    name = type(scheduler).__name__
    clips = [key for key in ("clip_sample", "thresholding") if scheduler.config.get(key)]
    return UnsupportedError(
        f"{name} cannot be captured in one graph",
        f"`{method}` of step {index + 1} is not a sum of samples, model outputs and noises: the"
        f" nearest sum is {wrong:.1%} off"
        + (f" (its config asks for {' and '.join(clips)})" if clips else ""),
        "use another scheduler, or a backend's step-by-step order (torch:mode=eager)",
    )
