"""`addbench calibrate`: record the UNet's inputs while a trained model draws images.

What is recorded is what FP8 and calibrated INT8 take their scales from (`trt:precision=fp8`).
It goes on where it was cut off: every image is a file of its own until the last is drawn.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backends.base import Session, UnsupportedError
from backends.check.gate import QUANTISED
from core.cli import Parser, add_model_arguments
from core.errors import EXIT_OK, PreconditionError
from export.models import DEFAULT_MODEL, SCHEDULERS
from export.quantize.calibration import Calibration, CalibrationOrigin, calibration_path, join, save

if TYPE_CHECKING:
    import torch

    from backends.base import Backend
    from export.bundle import Bundle

KEPT = 8
SEED = 1000
"""The seed of the first image: none that is timed or compared starts from its noise."""


def parser() -> Parser:
    made = Parser(prog="addbench calibrate", description=__doc__)
    add_model_arguments(made, DEFAULT_MODEL)
    made.add_argument("--backend", default="ort", metavar="NAME[:KEY=VALUE,...]")
    made.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line (default: the model's)"
    )
    made.add_argument("--steps", type=int, default=None, help="default: the model's own")
    made.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (the model's)")
    made.add_argument("--guidance", type=float, metavar="SCALE", help="default: the model's own")
    made.add_argument("--seed", type=int, default=SEED, help=f"of the first image ({SEED})")
    made.add_argument(
        "--keep", type=int, default=KEPT, metavar="N",
        help=f"timesteps recorded of each image, spread over its steps ({KEPT})",
    )  # fmt: skip
    made.add_argument("--out", type=Path, metavar="FILE", help="default: where `trt` looks for it")
    made.add_argument(
        "--random-weights",
        action="store_true",
        help="record although the weights are random: such scales are for timing only",
    )
    made.add_argument("--force", action="store_true", help="record it again")
    return made


class CallRecorder(Session):
    """A session that keeps what goes into another and what comes out of it.

    Attributes:
        calls: (inputs, outputs) of every run since `calls` was last cleared, on the host.
    """

    def __init__(self, inner: Session) -> None:
        self.inner = inner
        self.inputs, self.outputs, self.device = inner.inputs, inner.outputs, inner.device
        self.calls: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = self.inner.run(inputs)
        kept = [{n: t.detach().cpu().clone() for n, t in x.items()} for x in (inputs, outputs)]
        self.calls.append((kept[0], kept[1]))
        return outputs

    def synchronize(self) -> None:
        self.inner.synchronize()

    def close(self) -> None:
        self.inner.close()


def record(
    bundle: Bundle,
    backend: Backend,
    out: Path,
    *,
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    scheduler: str | None = None,
    guidance: float | None = None,
    seed: int = SEED,
    kept: int = KEPT,
    random_weights: bool = False,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Calibration:
    """Draw an image for each prompt on `backend` and write what went into the UNet to `out`.

    Raises:
        PreconditionError: the weights are random and `random_weights` does not ask for that.
    """
    from importlib.metadata import version

    import torch

    from backends.base import Shapes
    from backends.pipeline.prompts import check_prompts, check_seeds
    from backends.pipeline.recipe import check_steps, make_recipe

    if bundle.weights == "random" and not random_weights:
        raise PreconditionError(
            f"{bundle.path.name} has random weights: there is nothing to calibrate on",
            "scales follow what a trained model computes; those of random weights are good for"
            " timing and say nothing of an image",
            "use trained weights (--weights hub, or a folder), or ask for it: --random-weights",
        )
    split = backend.parts(bundle) != tuple(bundle.parts)
    if backend.storage(bundle) in QUANTISED or split:
        raise UnsupportedError(
            f"{backend.name} with these options is nothing to calibrate on",
            "scales are of the UNet as the bundle has it, neither quantised nor split",
            f"use --backend {backend.name}{':context=inline' if split else ''}",
        )
    if kept < 1:
        raise PreconditionError(f"--keep {kept} keeps nothing", "", f"use --keep {KEPT}")
    recipe = make_recipe(bundle, scheduler, guidance)
    count = bundle.steps if steps is None else steps
    check_steps(bundle, recipe, count)
    prompts = check_prompts(bundle.model.prompts if prompts is None else prompts)
    seeds = check_seeds(seed, len(prompts))
    packages = {package: version(package) for package in ("torch", "diffusers")}
    key = ",".join(f"{name}={value}" for name, value in backend.given.items())
    origin = CalibrationOrigin(
        model=bundle.name,
        weights=bundle.weights,
        dtype=bundle.dtype,
        unet=bundle.parts["unet"].hash,
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        steps=count,
        scheduler=recipe.scheduler,
        guidance=recipe.guidance,
        kept=kept,
        backend=f"{backend.name}:{key}" if key else backend.name,
        versions=packages | backend.fingerprint(),
    )
    if out.exists() and not force:
        known = Calibration.open(out)
        known.require(bundle)
        if known.origin != origin:
            raise PreconditionError(
                f"{out} holds another recording",
                "prompts, seeds, steps, guidance, backend or versions differ",
                "replace it with --force, or name another file with --out",
            )
        say(f"{out} is there already ({known.samples} samples); --force records it again")
        return known
    folder = out.with_name(f".{out.name}.{origin.hash[:16]}")
    files = [folder / f"{number:05d}.safetensors" for number in range(len(prompts))]
    decoder = next(p for p in bundle.parts if p.endswith("_decoder")).removesuffix("_decoder")
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in bundle.parts["unet"].inputs}
    with (
        torch.inference_mode(),
        backend.pipeline(bundle, decoder, Shapes(1, *bundle.size), recipe=recipe) as pipeline,
    ):
        recorder = pipeline.put("unet", CallRecorder(pipeline.session("unet")))
        for number, (prompt, one, file) in enumerate(zip(prompts, seeds, files, strict=True), 1):
            if file.exists():
                say(f"  {number}/{len(prompts)} is recorded already")
                continue
            recorder.calls.clear()
            conditioning = pipeline.condition([prompt])
            pipeline.denoise(conditioning, count, [one])
            places = torch.linspace(0, len(recorder.calls) - 1, min(kept, len(recorder.calls)))
            chosen = [recorder.calls[i][0] for i in sorted({round(float(p)) for p in places})]
            save(file, origin, rows(chosen, dtypes))
            say(f"  {number}/{len(prompts)} {len(chosen)} of {len(recorder.calls)} calls: {prompt}")
    join(out, origin, files)
    shutil.rmtree(folder)
    return Calibration.open(out)


def rows(
    calls: Sequence[Mapping[str, torch.Tensor]], dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Inputs of some calls as [samples, ...]: a call with guidance is a sample for each half.

    What a whole batch shares, the timestep, stands in each of its samples.
    """
    import torch

    batch = [len(call["encoder_hidden_states"]) for call in calls]
    return {
        name: torch.cat(
            [
                call[name] if len(call[name]) == size else call[name].repeat(size)
                for call, size in zip(calls, batch, strict=True)
            ]
        ).to(dtype)
        for name, dtype in dtypes.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from backends.registry import parse_backend

    backend = parse_backend(args.backend)
    backend.probe().require(backend.name)
    from export.bundle import find_bundle

    prompts: Sequence[str] | None = None
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PreconditionError(
                f"the prompts {args.prompts} cannot be read", str(error), "pass a text file"
            ) from error
        prompts = [line for line in lines if line.strip()]
    bundle = find_bundle(args.model, args.weights, args.dtype)
    out = args.out or calibration_path(bundle)
    print(f"recording the UNet's inputs of {bundle.path.name} on {args.backend}", flush=True)
    made = record(
        bundle,
        backend,
        out,
        prompts=prompts,
        steps=args.steps,
        scheduler=args.scheduler,
        guidance=args.guidance,
        seed=args.seed,
        kept=args.keep,
        random_weights=args.random_weights,
        force=args.force,
        say=lambda line: print(line, flush=True),
    )
    print(f"{out}: {made.samples} samples, {out.stat().st_size / 1e6:.1f} MB")
    return EXIT_OK
