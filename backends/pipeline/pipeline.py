"""Prompts -> images: the one place that knows the order of the parts.

Sessions are made when a stage first needs one, so that a process which runs one stage holds one
part. Noise comes from one CPU generator per image in float32, ancestral steps included: every
backend starts from the same bits and an image does not depend on its batch.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch

from backends.pipeline.conditioning import (
    Conditioning,
    Denoised,
    EmbeddingCache,
    Start,
    guidance_embedding,
)
from backends.pipeline.output import Output, Timings
from backends.pipeline.pictures import Picture, read_pictures
from backends.pipeline.prompts import (
    ImageCall,
    check_negative,
    check_prompts,
    check_seeds,
    token_ids,
    warn_of_unknown,
)
from backends.pipeline.recipe import Recipe, check_steps, make_recipe
from backends.pipeline.session import (
    Artifact,
    NonFiniteError,
    Session,
    Shapes,
    UnsupportedError,
    check_encoder,
    encoders,
    stage_parts,
)
from backends.pipeline.start import check_strength
from core import values
from core.errors import PreconditionError
from core.memory import give_memory_back
from export.bundle import Bundle
from export.models import CONTEXT_PART
from export.source.scheduler import step_arguments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from backends.base import Backend

Given = TypeVar("Given", bound=Session)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}


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
    versions: Mapping[str, str] | None = None
    """What it runs on beside the packages of this environment: name -> version."""

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
        self._embedding_cache = EmbeddingCache(embedding_cache) if embedding_cache else None
        self.low_memory = False
        self.encoder: str | None = None
        """What encodes pictures, `vae` or `taesd`; None until one is asked for."""
        self.on_part: Callable[[str, str], None] = lambda doing, part: None
        """Called before a part is compiled (`compiling`) and before it is loaded (`loading`)."""
        self._turn = threading.Lock()
        self._loading_ns = 0

    # ---- lifecycle

    @property
    def parts(self) -> tuple[str, ...]:
        return stage_parts(self.backend.parts(self.bundle), self.decoder, self.encoder)

    @property
    def compile_s(self) -> float:
        return sum(artifact.compile_s for artifact in self.artifacts.values())

    @property
    def compile_cached(self) -> bool | None:
        """Whether all was found compiled; None where the backend keeps nothing compiled."""
        kept = [artifact.cached for artifact in self.artifacts.values() if artifact.path]
        return all(kept) if kept else None

    @property
    def load_s(self) -> float:
        return sum(session.load_s for session in self._sessions.values())

    def use_low_memory(self) -> Self:
        """Let each call load a part when it needs it and release it after, from now on: the peak is
        that of the largest part, and a call takes as much longer as `Timings.load` says.

        Raises:
            UnsupportedError: the backend does not do that.
        """
        self.backend.require_low_memory()
        self.low_memory = True
        return self

    def use_encoder(self, encoder: str | None = None) -> Self:
        """Let the pipeline hold an encoder of pictures from now on; `prepare` loads it, else the
        first call that starts from one.

        Args:
            encoder: `vae` or `taesd`; None for the one that is there, else the decoder's.

        Raises:
            PreconditionError: the bundle has no such encoder.
            UnsupportedError: the backend does not start from a picture.
        """
        self.encoder = self.find_encoder(encoder)
        return self

    def find_encoder(self, encoder: str | None = None) -> str:
        """The name of the encoder that `use_encoder` would hold; raises as that does."""
        self.backend.require_pictures()
        names = encoders(self.bundle)
        usual = self.decoder if self.decoder in names else "vae"
        chosen = encoder or self.encoder or usual
        check_encoder(self.bundle, chosen)
        return chosen

    def prepare(self) -> Self:
        """Compile every part, then load every part: a compile's memory is free before loading.

        In low memory nothing is loaded.
        """
        self._get_ready()
        self._tokenizers = self.bundle.tokenizers()
        self._scheduler = self.bundle.scheduler(self.recipe.scheduler)
        return self

    def _artifact(self, part: str) -> Artifact:
        if part not in self.artifacts:
            self.on_part("compiling", part)
            shapes = self.recipe.shapes(part, self.shapes)
            self.artifacts[part] = self.backend.compile(self.bundle, part, shapes)
        return self.artifacts[part]

    def _get_ready(self) -> None:
        for part in self.parts:
            self._artifact(part)
        for part in () if self.low_memory else self.parts:
            self.session(part)

    def session(self, part: str) -> Session:
        if part not in self._sessions:
            started = time.perf_counter_ns()
            artifact = self._artifact(part)
            self.on_part("loading", part)
            self._sessions[part] = self.backend.load(self.bundle, artifact)
            self._loading_ns += time.perf_counter_ns() - started
        return self._sessions[part]

    def put(self, part: str, session: Given) -> Given:
        """Run `part` by another session from now on; returns it. Close the old one first."""
        self._sessions[part] = session
        return session

    def _release(self) -> None:
        """Give back what is loaded, in low memory, for the next part to be alone."""
        if self.low_memory and self._sessions:
            started = time.perf_counter_ns()
            cyclic = any(session.cyclic for session in self._sessions.values())
            self.close()
            give_memory_back(cycles=cyclic)
            self._loading_ns += time.perf_counter_ns() - started

    def _clock_ns(self) -> int:
        """A clock that stands still while parts are loaded and released."""
        return time.perf_counter_ns() - self._loading_ns

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
        return [token_ids(tokenizer, prompts) for tokenizer in self._tokenizers]

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

    def join(self, encoded: Sequence[Mapping[str, torch.Tensor]]) -> Conditioning:
        """The text encoders' outputs side by side, as SDXL wants them."""
        hidden = torch.cat([outputs["hidden_states"] for outputs in encoded], dim=-1)
        return Conditioning(hidden, encoded[-1].get("text_embeds"), self.context(hidden))

    def encode(self, *texts: Sequence[str]) -> list[Conditioning]:
        """Embeddings of each batch of prompts, one text encoder after the other for all of them."""
        if self._embedding_cache is None:
            return self._encode_all(texts)
        return self._embedding_cache.encode(texts, self._encode_all)

    def _encode_all(self, texts: Sequence[Sequence[str]]) -> list[Conditioning]:
        encoders = [part for part in self.parts if part.startswith("text_encoder")]
        ids = [self.tokenise(prompts) for prompts in texts]
        encoded: list[list[dict[str, torch.Tensor]]] = [[] for _ in texts]
        for place, part in enumerate(encoders):
            for outputs, rows in zip(encoded, ids, strict=True):
                outputs.append(self.run(part, input_ids=rows[place]))
            self._release()
        return [self.join(outputs) for outputs in encoded]

    def condition(
        self, prompts: Sequence[str], negative: Sequence[str] | None = None
    ) -> Conditioning:
        """What the UNet is told of `prompts`, and of the negative ones where guidance needs it;
        None: of the empty prompt, or zeros."""
        if self.recipe.guided and negative is None and not self.bundle.force_zeros:
            negative = [""] * len(prompts)
        return self.with_negative(*self.encode(prompts, *([] if negative is None else [negative])))

    def with_negative(
        self, conditioning: Conditioning, empty: Conditioning | None = None
    ) -> Conditioning:
        """`conditioning` with the embeddings of the negative prompts where guidance needs them.

        As diffusers' pipelines have it: what was asked for, or the empty prompt, encoded once for
        each prompt: `empty`. Where nothing was asked for and the checkpoint's model index says so
        (SDXL), zeros: `empty` is None.
        """
        if not self.recipe.guided:
            return conditioning
        if empty is None:
            batch, pooled = len(conditioning.hidden_states), conditioning.text_embeds
            kept = self._embedding_cache.zeros if self._embedding_cache else {}
            if batch not in kept:
                zeros = torch.zeros_like(conditioning.hidden_states)
                none = None if pooled is None else torch.zeros_like(pooled)
                kept[batch] = Conditioning(zeros, none, self.context(zeros))
            empty = kept[batch]
        return replace(conditioning, negative=empty)

    def context(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a split UNet takes in place of `hidden_states`, by input; {} for a whole one."""
        if CONTEXT_PART not in self.parts:
            return {}
        return self.run(CONTEXT_PART, encoder_hidden_states=hidden_states)

    def unet_inputs(self, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        """What the UNet takes besides sample and timestep, the same at every step; of hidden states
        and context a session picks what it has as input."""
        batch = len(conditioning.hidden_states)
        inputs = {"encoder_hidden_states": conditioning.hidden_states, **conditioning.context}
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

    def encode_pictures(self, pictures: Sequence[Picture], batch: int) -> torch.Tensor:
        """Pictures -> latents, float32 [batch or 1, channels, height/8, width/8] on the host."""
        part = f"{self.encoder}_encoder"
        session = self.session(part)
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
        image = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        if isinstance(session.inputs["image"].shape[0], int):  # compiled for a batch
            image = image.expand(batch, -1, -1, -1)
        latents = self.run(part, image=image.contiguous())["latent_sample"]
        session.synchronize()
        return latents.to("cpu", torch.float32)

    def denoise(
        self,
        conditioning: Conditioning,
        steps: int,
        seeds: Sequence[int],
        start: Start | None = None,
    ) -> Denoised:
        """Seeds -> final latents. The negative embeddings are those of `conditioning`.

        From a picture as diffusers' pipelines have it: the first noise of each generator is added
        to its latents as the scheduler adds it at the first step that runs.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if self._scheduler is None:
            self._scheduler = self.bundle.scheduler(self.recipe.scheduler)
        scheduler = self._scheduler
        scheduler.set_timesteps(steps)  # also forgets the previous call: steps, index, history
        first = start.first if start else 0
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        timesteps = scheduler.timesteps[first:]
        extra = step_arguments(scheduler, generators)
        scale = self.bundle.vae_scale
        shape = (
            1,
            self.bundle.latent_channels,
            self.shapes.height // scale,
            self.shapes.width // scale,
        )
        noise = [torch.randn(shape, generator=g, dtype=torch.float32) for g in generators]
        if start is None:
            latents = torch.cat(noise) * scheduler.init_noise_sigma
        else:
            given = start.latents.expand(len(seeds), -1, -1, -1)
            at = timesteps[:1].repeat(len(seeds))
            latents = scheduler.add_noise(given, torch.cat(noise), at)
        calls = self._unet_calls(conditioning)
        copies = len(calls[0]["encoder_hidden_states"]) // len(seeds)
        session = self.session("unet")
        seconds, predictions = [], 0
        for timestep in timesteps:
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
        self,
        prompts: str | Sequence[str],
        *,
        steps: int,
        seed: int | Sequence[int] = 0,
        images: Any = None,
        strength: float | None = None,
        negative: str | Sequence[str] | None = None,
    ) -> Output:
        """Generate an image for each prompt, from noise or from a picture.

        Args:
            prompts: 1 to N prompts; empty ones are allowed.
            steps: denoising steps, at least 1; some models take few counts only.
            seed: one seed per image; an integer n means n, n+1, ...
            images: pictures to start from (`backends.pipeline.pictures` says what is read): one for
                all prompts, one for each prompt, or several for one prompt.
            strength: the share of the steps that run, 0 to 1: floor(steps x strength), at least
                one. 1 is text to image, bit for bit.
            negative: what guidance leads away from, one for all prompts or one for each; for models
                with guidance.

        Threads may share a pipeline: their calls take turns, and each gets its own images. Draw
        on several pipelines to work at the same time.
        """
        call = self._check(prompts, steps, seed, images, strength, negative)
        with self._turn:
            if call.starts:
                self.use_encoder()
            output = self._draw(call)
        return replace(output, pictures=tuple(picture.done for picture in call.pictures))

    def frames(
        self,
        pictures: Iterable[Any],
        prompts: str | Sequence[str],
        *,
        steps: int,
        strength: float,
        seed: int | Sequence[int] = 0,
        negative: str | Sequence[str] | None = None,
    ) -> Iterator[Output]:
        """Draw from each of many pictures in turn, as they come: a camera's, or a sketch's states.

        What does not change from frame to frame is done once: the prompt is encoded with the first
        one, and the seed is held, so that equal frames give equal images.

        Args:
            pictures: each is what `images` of a call may be. The next one is asked for when the
                image of the last has been taken: a source that has several waiting gives the
                newest.
        """
        call: ImageCall | None = None
        for picture in pictures:
            if call is None:
                call = self._check(prompts, steps, seed, picture, strength, negative)
            else:
                read = read_pictures(picture, self.shapes.width, self.shapes.height)
                call = replace(call, pictures=tuple(read))
            with self._turn, torch.inference_mode():
                if call.starts:
                    self.use_encoder()
                if call.conditioning is None:
                    told = self.condition(call.prompts, call.negative)
                    call = replace(call, conditioning=told)
                output = self._draw(call)
            yield replace(output, pictures=tuple(each.done for each in call.pictures))

    def _check(
        self,
        prompts: str | Sequence[str],
        steps: int,
        seed: int | Sequence[int],
        images: Any,
        strength: float | None,
        negative: str | Sequence[str] | None,
    ) -> ImageCall:
        """What `__call__` is asked for, or PreconditionError: before any work."""
        values.count("steps", steps)
        prompts = check_prompts(prompts)
        pictures: list[Picture] = []
        if images is None and strength not in (None, 1):
            raise PreconditionError(
                f"strength={strength} changes no picture: there is none",
                "it says how much of a picture is changed",
                "pass images=... (--image FILE), or leave strength out",
            )
        if images is not None:
            self.find_encoder()  # it is not loaded before it must
            pictures = read_pictures(images, self.shapes.width, self.shapes.height)
        if len(prompts) == 1:
            prompts = prompts * max(1, len(pictures))
        if pictures and len(pictures) not in (1, len(prompts)):
            raise PreconditionError(
                f"{len(pictures)} pictures do not fit {len(prompts)} prompts",
                "one picture is for all prompts, one prompt for all pictures, or each has its own",
                f"pass 1 or {len(prompts)} pictures",
            )
        seeds = check_seeds(seed, len(prompts))
        check_steps(self.bundle, self.recipe, steps)
        share = check_strength(self.bundle, self.recipe, steps, strength) if pictures else 1.0
        refused = check_negative(self.bundle, self.recipe, negative, len(prompts))
        warn_of_unknown(self.bundle.model, prompts)
        return ImageCall(prompts, steps, seeds, refused, tuple(pictures), share)

    def _draw(self, call: ImageCall) -> Output:
        """The images of one call, whose arguments are checked; no other call is under way."""
        self._get_ready()
        loaded = self._loading_ns
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            stack.callback(self._release)  # a call that fails releases too
            started = self._clock_ns()
            conditioning = call.conditioning or self.condition(call.prompts, call.negative)
            for part in self.parts[: self.parts.index("unet")]:
                if part in self._sessions:
                    self._sessions[part].synchronize()
            self._release()
            told, start = self._clock_ns(), None
            if call.starts:
                start = Start(self.encode_pictures(call.starts, len(call.prompts)), call.first)
                self._release()
            encoded = self._clock_ns()
            latents, unet, nfe = self.denoise(conditioning, call.steps, call.seeds, start)
            self._release()
            denoised = self._clock_ns()
            sample = self.decode(latents)
            self._release()
            decoded = self._clock_ns()
            images = self.to_uint8(sample)
            ended = self._clock_ns()
        load = (self._loading_ns - loaded) / 1e9
        text, decode = (told - started) / 1e9, (decoded - denoised) / 1e9
        encode, total = (encoded - told) / 1e9, (ended - started) / 1e9
        rest = total - text - encode * bool(start) - decode - sum(unet)
        timings = Timings(text, unet, decode, rest, total + load, load, encode if start else None)
        return Output(images, timings, nfe=nfe, provenance=self.backend.provenance)


def non_finite() -> NonFiniteError:
    return NonFiniteError(
        "the image holds NaN or infinity",
        "an op overflowed, in FP16 most likely, or the weights are damaged",
        "run `addbench parity` on the bundle: it names the part and the op",
    )
