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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

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
from core.errors import PreconditionError
from export.bundle import Bundle, find_bundle

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOKENS = 77
"""Length of a CLIP prompt in tokens, start and end included."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}


@dataclass(frozen=True)
class Timings:
    """Seconds per stage of one call. `unet` has an entry for each step."""

    text: float
    unet: list[float]
    decode: float
    rest: float
    total: float


@dataclass(frozen=True)
class Output:
    """What one call gives.

    Attributes:
        images: uint8 [batch, height, width, 3].
        timings: seconds per stage, of this same call.
        nfe: UNet evaluations of one image, counted as they happened.
        provenance: `measured` when a clock gave the timings.
    """

    images: NDArray[np.uint8]
    timings: Timings
    nfe: int
    provenance: str = "measured"


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings: hidden states [batch, 77, dim]; pooled [batch, dim] or None."""

    hidden_states: torch.Tensor
    text_embeds: torch.Tensor | None


class Pipeline:
    """A bundle's parts over one backend's sessions.

    Args:
        decoder: `vae` or `taesd`.
        shapes: what the sessions are compiled for; a backend with a named batch axis takes any
            number of prompts, a static one exactly `shapes.batch`.
        embedding_cache: how many prompts' embeddings are kept (0: none, as measurements need).
    """

    def __init__(
        self,
        backend: Backend,
        bundle: Bundle,
        decoder: str,
        shapes: Shapes,
        *,
        embedding_cache: int = 0,
    ) -> None:
        self.backend, self.bundle, self.decoder, self.shapes = backend, bundle, decoder, shapes
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
        self._tokenizers, self._scheduler = self.bundle.tokenizers(), self.bundle.scheduler()
        return self

    def _artifact(self, part: str) -> Artifact:
        if part not in self.artifacts:
            self.artifacts[part] = self.backend.compile(self.bundle, part, self.shapes)
        return self.artifacts[part]

    def session(self, part: str) -> Session:
        if part not in self._sessions:
            self._sessions[part] = self.backend.load(self.bundle, self._artifact(part))
        return self._sessions[part]

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

    def denoise(
        self, conditioning: Conditioning, steps: int, seeds: Sequence[int]
    ) -> tuple[torch.Tensor, list[float]]:
        """Seeds -> final latents, float32 [batch, channels, height/8, width/8]; step seconds."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if self._scheduler is None:
            self._scheduler = self.bundle.scheduler()
        scheduler = self._scheduler
        scheduler.set_timesteps(steps)  # also forgets the previous call's step count
        width, height = self.shapes.width, self.shapes.height
        scale = self.bundle.vae_scale
        shape = (1, self.bundle.latent_channels, height // scale, width // scale)
        noise = [torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]
        latents = torch.cat(noise) * scheduler.init_noise_sigma
        inputs = {"encoder_hidden_states": conditioning.hidden_states}
        if conditioning.text_embeds is not None:
            inputs["text_embeds"] = conditioning.text_embeds
            # SDXL's size conditioning: original size, crop corner, target size; (height, width).
            time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
            inputs["time_ids"] = time_ids.expand(len(seeds), -1)
        session = self.session("unet")
        seconds = []
        for timestep in scheduler.timesteps:
            started = time.perf_counter_ns()
            predicted = self.run(
                "unet",
                sample=scheduler.scale_model_input(latents, timestep),
                timestep=timestep.reshape(1).float(),
                **inputs,
            )["out_sample"]
            session.synchronize()
            seconds.append((time.perf_counter_ns() - started) / 1e9)
            stepped = scheduler.step(
                predicted.to("cpu", torch.float32), timestep, latents, generator=generators
            )
            latents = stepped.prev_sample
        return latents, seconds

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
            raise NonFiniteError(
                "the image holds NaN or infinity",
                "an op overflowed, in FP16 most likely, or the weights are damaged",
                "run `python -m backends parity` on the bundle: it names the part and the op",
            )
        # Rounded by the cast: torch.round forks threads even for a small image.
        image = (sample * 127.5).add_(128).clamp_(0.5, 255.5).to(torch.uint8)
        return image.permute(0, 2, 3, 1).contiguous().numpy()

    def __call__(
        self, prompts: str | Sequence[str], *, steps: int, seed: int | Sequence[int] = 0
    ) -> Output:
        """Generate an image for each prompt.

        Args:
            prompts: 1 to N prompts; empty ones are allowed.
            steps: denoising steps, at least 1.
            seed: one seed per prompt; an integer n means n, n+1, ...
        """
        prompts = check_prompts(prompts)
        seeds = check_seeds(seed, len(prompts))
        if steps < 1:
            raise PreconditionError(f"steps={steps} is too few", "an image needs one", "use 1 to 4")
        for part in self.parts:
            self.session(part)
        with torch.inference_mode():
            started = time.perf_counter_ns()
            conditioning = self.encode(prompts)
            for part in self.parts:
                if part.startswith("text_encoder"):
                    self.session(part).synchronize()
            encoded = time.perf_counter_ns()
            latents, unet = self.denoise(conditioning, steps, seeds)
            denoised = time.perf_counter_ns()
            sample = self.decode(latents)
            decoded = time.perf_counter_ns()
            images = self.to_uint8(sample)
            ended = time.perf_counter_ns()
        text, decode = (encoded - started) / 1e9, (decoded - denoised) / 1e9
        total = (ended - started) / 1e9
        rest = total - text - decode - sum(unet)
        return Output(images, Timings(text, unet, decode, rest, total), nfe=len(unet))


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise PreconditionError("there is no prompt", "the list is empty", "pass at least one")
    for prompt in listed:
        if not isinstance(prompt, str):
            raise PreconditionError(
                f"{prompt!r} is not a prompt",
                f"it is a {type(prompt).__name__}, prompts are strings",
                "pass a list of strings",
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PreconditionError(
                f"the prompt {prompt!r} is not valid text", str(error), "pass valid Unicode"
            ) from error
    return listed


def check_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise PreconditionError(
            f"{len(seeds)} seeds do not fit {count} prompts",
            "every image has a generator of its own",
            "pass one seed per prompt, or a single integer",
        )
    for one in seeds:
        if not isinstance(one, int) or not 0 <= one < 2**63:
            raise PreconditionError(
                f"{one!r} is not a seed", "a seed is an integer from 0 to 2**63 - 1", "pass one"
            )
    return seeds


def load_pipeline(
    model: str,
    backend: str = "ort",
    decoder: str = "taesd",
    *,
    batch: int = 1,
    weights: str | None = None,
    dtype: str | None = None,
    embedding_cache: int = 0,
) -> Pipeline:
    """A ready pipeline for a model's name or a bundle's folder.

    Raises:
        PreconditionError: the backend cannot be used (checked first), or there is no such bundle;
            the message names the command that makes it.
    """
    chosen = parse_backend(backend)
    chosen.probe().require(chosen.name)
    bundle = find_bundle(model, weights, dtype)
    check_decoder(bundle, decoder)
    width, height = bundle.size
    shapes = Shapes(batch, width, height)
    return chosen.pipeline(bundle, decoder, shapes, embedding_cache=embedding_cache).prepare()
