"""Prompts -> images: the one place that knows the order of the parts.

Sessions are made when a stage first needs one, so that a process which runs one stage holds one
part. Noise comes from one CPU generator per image in float32, ancestral steps included: every
backend starts from the same bits and an image does not depend on its batch.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch

from backends.base import (
    Artifact,
    Backend,
    NonFiniteError,
    Session,
    Shapes,
    UnsupportedError,
    check_decoder,
    parse_backend,
    stage_parts,
)
from backends.conditioning import Conditioning, Denoised, guidance_embedding, takes_generator
from backends.prompts import check_prompts, check_seeds
from backends.recipe import Recipe, check_steps, make_recipe
from export.bundle import Bundle, find_bundle

if TYPE_CHECKING:
    from numpy.typing import NDArray

Given = TypeVar("Given", bound=Session)
TOKENS = 77
"""Length of a CLIP prompt in tokens, start and end included."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}


@dataclass(frozen=True)
class Timings:
    """Seconds per stage of one call. `unet` has an entry for each timestep, guidance included.

    A call that did not wait between its stages has a total only: None, and no entries.
    """

    text: float | None
    unet: list[float]
    decode: float | None
    rest: float | None
    total: float


@dataclass(frozen=True)
class Output:
    """What one call gives.

    Attributes:
        images: uint8 [batch, height, width, 3].
        timings: seconds per stage, of this same call.
        nfe: UNet evaluations of one image, counted as they happened.
        provenance: `measured` when a clock gave the timings; `emulated` when it timed an
            emulation, which says nothing of the device's speed.
    """

    images: NDArray[np.uint8]
    timings: Timings
    nfe: int
    provenance: str = "measured"


class Pipeline:
    """A bundle's parts over one backend's sessions.

    Args:
        decoder: `vae` or `taesd`.
        shapes: what the sessions are compiled for; a backend with a named batch axis takes any
            number of prompts, a static one exactly `shapes.batch`.
        embedding_cache: how many prompts' embeddings are kept (0: none, as measurements need).
        recipe: scheduler and guidance (None: the model's own).
    """

    staged = True
    """Whether a call waits for the device after each stage and times it."""
    can_stage = True

    def __init__(
        self,
        backend: Backend,
        bundle: Bundle,
        decoder: str,
        shapes: Shapes,
        *,
        embedding_cache: int = 0,
        recipe: Recipe | None = None,
    ) -> None:
        self.backend, self.bundle, self.decoder, self.shapes = backend, bundle, decoder, shapes
        self.recipe = recipe or make_recipe(bundle)
        self.artifacts: dict[str, Artifact] = {}
        self._sessions: dict[str, Session] = {}
        self._tokenizers: list[Any] | None = None
        self._scheduler: Any = None
        self._embeddings: OrderedDict[str, Conditioning] = OrderedDict()
        self._embedding_cache = embedding_cache

    # ---- lifecycle

    @property
    def parts(self) -> tuple[str, ...]:
        return stage_parts(tuple(self.bundle.parts), self.decoder)

    @property
    def compile_s(self) -> float:
        return sum(artifact.compile_s for artifact in self.artifacts.values())

    @property
    def compile_cached(self) -> bool:
        return all(artifact.cached for artifact in self.artifacts.values())

    @property
    def load_s(self) -> float:
        return sum(session.load_s for session in self._sessions.values())

    def prepare(self) -> Self:
        """Compile every part, then load every part: a compile's memory is free before loading."""
        for part in self.parts:
            self._artifact(part)
        for part in self.parts:
            self.session(part)
        self._tokenizers = self.bundle.tokenizers()
        self._scheduler = self.bundle.scheduler(self.recipe.scheduler)
        return self

    def _artifact(self, part: str) -> Artifact:
        if part not in self.artifacts:
            shapes = self.recipe.shapes(part, self.shapes)
            self.artifacts[part] = self.backend.compile(self.bundle, part, shapes)
        return self.artifacts[part]

    def session(self, part: str) -> Session:
        if part not in self._sessions:
            self._sessions[part] = self.backend.load(self.bundle, self._artifact(part))
        return self._sessions[part]

    def put(self, part: str, session: Given) -> Given:
        """Run `part` by another session from now on; returns it. Close the old one first."""
        self._sessions[part] = session
        return session

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- stages

    def tokenise(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Token ids, int64 [batch, 77], for each text encoder; longer prompts are cut and said."""
        if self._tokenizers is None:
            self._tokenizers = self.bundle.tokenizers()
        rows = []
        for tokenizer in self._tokenizers:
            full = tokenizer(list(prompts))["input_ids"]
            for prompt, ids in zip(prompts, full, strict=True):
                if len(ids) > TOKENS:
                    warnings.warn(
                        f"the prompt {prompt[:40]!r}... has {len(ids)} tokens; CLIP reads "
                        f"{TOKENS}, the rest is cut",
                        stacklevel=2,
                    )
            cut = tokenizer(
                list(prompts),
                padding="max_length",
                max_length=TOKENS,
                truncation=True,
                return_tensors="pt",
            )
            rows.append(cut["input_ids"].to(torch.int64))
        return rows

    def run(self, part: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """One part on tensors of any float dtype: cast to what the session takes."""
        session = self.session(part)
        ready = {}
        for name, spec in session.inputs.items():
            tensor = inputs[name]
            batch = spec.shape[0]
            if name != "timestep" and isinstance(batch, int) and tensor.shape[0] != batch:
                raise UnsupportedError(
                    f"{tensor.shape[0]} prompts do not fit {part}",
                    f"it was compiled for a batch of {batch}",
                    f"pass {batch} prompts, or compile with --batch {tensor.shape[0]}",
                )
            ready[name] = tensor.to(device=session.device, dtype=DTYPES[spec.dtype])
        return session.run(ready)

    @staticmethod
    def join(encoded: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        """The text encoders' outputs side by side, as SDXL wants them."""
        hidden = torch.cat([outputs["hidden_states"] for outputs in encoded], dim=-1)
        return Conditioning(hidden, encoded[-1].get("text_embeds"))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        if self._embedding_cache:
            return self._encode_cached(prompts)
        encoders = [part for part in self.parts if part.startswith("text_encoder")]
        ids = self.tokenise(prompts)
        return self.join(
            [self.run(part, input_ids=rows) for part, rows in zip(encoders, ids, strict=True)]
        )

    def _encode_cached(self, prompts: Sequence[str]) -> Conditioning:
        missing = list(dict.fromkeys(p for p in prompts if p not in self._embeddings))
        size, self._embedding_cache = self._embedding_cache, 0
        try:
            fresh = {prompt: self.encode([prompt]) for prompt in missing}
        finally:
            self._embedding_cache = size
        known = {prompt: fresh.get(prompt) or self._embeddings[prompt] for prompt in prompts}
        for prompt, embedding in known.items():
            self._embeddings[prompt] = embedding
            self._embeddings.move_to_end(prompt)
        while len(self._embeddings) > size:
            self._embeddings.popitem(last=False)
        rows = [known[prompt] for prompt in prompts]
        pooled = [row.text_embeds for row in rows if row.text_embeds is not None]
        return Conditioning(
            torch.cat([row.hidden_states for row in rows]), torch.cat(pooled) if pooled else None
        )

    def with_negative(
        self, conditioning: Conditioning, empty: Conditioning | None = None
    ) -> Conditioning:
        """`conditioning` with the embeddings of the empty prompt where guidance needs them.

        As diffusers' pipelines have it: zeros where the checkpoint's model index says so (SDXL),
        else the empty prompt encoded, once for each prompt (`empty`, where that is done already).
        """
        if not self.recipe.guided:
            return conditioning
        if self.bundle.force_zeros:
            pooled = conditioning.text_embeds
            zeros = None if pooled is None else torch.zeros_like(pooled)
            empty = Conditioning(torch.zeros_like(conditioning.hidden_states), zeros)
        elif empty is None:
            empty = self.encode([""] * len(conditioning.hidden_states))
        return replace(conditioning, negative=empty)

    def unet_inputs(self, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        """What the UNet takes besides sample and timestep, the same at every step."""
        batch = len(conditioning.hidden_states)
        inputs = {"encoder_hidden_states": conditioning.hidden_states}
        if conditioning.text_embeds is not None:
            inputs["text_embeds"] = conditioning.text_embeds
            # SDXL's size conditioning: original size, crop corner, target size; (height, width).
            height, width = self.shapes.height, self.shapes.width
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
            inputs["time_ids"] = time_ids.expand(batch, -1)
        if self.recipe.guidance_mode == "embedding":
            specs = {spec.name: spec for spec in self.bundle.parts["unet"].inputs}
            size = specs["timestep_cond"].shape[1]
            embedding = guidance_embedding(self.recipe.guidance, int(size))
            inputs["timestep_cond"] = embedding.expand(batch, -1)
        return inputs

    def denoise(self, conditioning: Conditioning, steps: int, seeds: Sequence[int]) -> Denoised:
        """Seeds -> final latents. The negative embeddings are those of `conditioning`."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if self._scheduler is None:
            self._scheduler = self.bundle.scheduler(self.recipe.scheduler)
        scheduler = self._scheduler
        scheduler.set_timesteps(steps)  # also forgets the previous call: steps, index, history
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        # Those that add no noise take no generator.
        extra = {"generator": generators} if takes_generator(scheduler) else {}
        scale = self.bundle.vae_scale
        shape = (
            1,
            self.bundle.latent_channels,
            self.shapes.height // scale,
            self.shapes.width // scale,
        )
        noise = [torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]
        latents = torch.cat(noise) * scheduler.init_noise_sigma
        calls = self._unet_calls(conditioning)
        copies = len(calls[0]["encoder_hidden_states"]) // len(seeds)
        session = self.session("unet")
        seconds, predictions = [], 0
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            started = time.perf_counter_ns()
            outputs = [
                self.run(
                    "unet",
                    sample=torch.cat([scaled] * copies) if copies > 1 else scaled,
                    timestep=timestep.reshape(1).float(),
                    **inputs,
                )["out_sample"]
                for inputs in calls
            ]
            session.synchronize()
            seconds.append((time.perf_counter_ns() - started) / 1e9)
            predicted = torch.cat([output.to("cpu", torch.float32) for output in outputs])
            predictions += len(predicted)
            if self.recipe.guided:
                empty, prompted = predicted.chunk(2)
                predicted = empty + self.recipe.guidance * (prompted - empty)
            latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
        return Denoised(latents, seconds, predictions // len(seeds))

    def _unet_calls(self, conditioning: Conditioning) -> list[dict[str, torch.Tensor]]:
        """Inputs of each UNet call of a step; the empty prompt before the prompt, as diffusers."""
        prompted = self.unet_inputs(conditioning)
        if conditioning.negative is None:
            return [prompted]
        empty = self.unet_inputs(conditioning.negative)
        if self.recipe.guidance_mode == "calls":
            return [empty, prompted]
        return [{name: torch.cat([empty[name], prompted[name]]) for name in prompted}]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Final latents -> sample in [-1, 1], float32 [batch, 3, height, width] on the host."""
        part = f"{self.decoder}_decoder"
        sample = self.run(part, latent_sample=latents)["sample"]
        self.session(part).synchronize()
        return sample.to("cpu", torch.float32)

    @staticmethod
    def to_uint8(sample: torch.Tensor) -> NDArray[np.uint8]:
        """[-1, 1] [batch, 3, height, width] -> uint8 [batch, height, width, 3]; NaN is refused."""
        # A sum is finite only if every element is: one cheap pass instead of a mask.
        if not math.isfinite(float(sample.sum())):
            raise non_finite()
        # Rounded by the cast: torch.round forks threads even for a small image.
        image = (sample * 127.5).add_(128).clamp_(0.5, 255.5).to(torch.uint8)
        return image.permute(0, 2, 3, 1).contiguous().numpy()

    def period_s(
        self, inputs: Callable[[int], tuple[list[str], list[int]]], steps: int, seconds: float
    ) -> float | None:
        """Seconds between the ends of two calls while calls are always in flight.

        None here: this pipeline makes one call after the other. One that spreads them over several
        devices keeps all of them busy for `seconds` and more.

        Args:
            inputs: number of a call -> its prompts and seeds.
        """
        return None

    def __call__(
        self, prompts: str | Sequence[str], *, steps: int, seed: int | Sequence[int] = 0
    ) -> Output:
        """Generate an image for each prompt.

        Args:
            prompts: 1 to N prompts; empty ones are allowed.
            steps: denoising steps, at least 1; some models take few counts only.
            seed: one seed per prompt; an integer n means n, n+1, ...
        """
        prompts = check_prompts(prompts)
        seeds = check_seeds(seed, len(prompts))
        check_steps(self.bundle, self.recipe, steps)
        for part in self.parts:
            self.session(part)
        with torch.inference_mode():
            started = time.perf_counter_ns()
            conditioning = self.with_negative(self.encode(prompts))
            for part in self.parts:
                if part.startswith("text_encoder"):
                    self.session(part).synchronize()
            encoded = time.perf_counter_ns()
            latents, unet, nfe = self.denoise(conditioning, steps, seeds)
            denoised = time.perf_counter_ns()
            sample = self.decode(latents)
            decoded = time.perf_counter_ns()
            images = self.to_uint8(sample)
            ended = time.perf_counter_ns()
        text, decode = (encoded - started) / 1e9, (decoded - denoised) / 1e9
        total = (ended - started) / 1e9
        rest = total - text - decode - sum(unet)
        timings = Timings(text, unet, decode, rest, total)
        return Output(images, timings, nfe=nfe, provenance=self.backend.provenance)


def non_finite() -> NonFiniteError:
    return NonFiniteError(
        "the image holds NaN or infinity",
        "an op overflowed, in FP16 most likely, or the weights are damaged",
        "run `python -m backends parity` on the bundle: it names the part and the op",
    )


def load_pipeline(
    model: str,
    backend: str = "ort",
    decoder: str = "taesd",
    *,
    batch: int = 1,
    weights: str | None = None,
    dtype: str | None = None,
    size: tuple[int, int] | None = None,
    embedding_cache: int = 0,
    scheduler: str | None = None,
    guidance: float | None = None,
    guidance_mode: str | None = None,
) -> Pipeline:
    """A ready pipeline for a model's name or a bundle's folder.

    Args:
        size: width and height in pixels; None for the model's own.
        scheduler, guidance, guidance_mode: see `backends.recipe.make_recipe`.

    Raises:
        PreconditionError: the backend cannot be used (checked first), or there is no such bundle;
            the message names the command that makes it.
    """
    chosen = parse_backend(backend)
    chosen.probe().require(chosen.name)
    bundle = find_bundle(model, weights, dtype, size)
    check_decoder(bundle, decoder)
    made = chosen.pipeline(
        bundle,
        decoder,
        Shapes(batch, *bundle.size),
        embedding_cache=embedding_cache,
        recipe=make_recipe(bundle, scheduler, guidance, guidance_mode),
    )
    return made.prepare()
