"""diffusers' own pipeline over a bundle's checkpoint: what a bundle's images are held against.

Nothing of ours takes part in the drawing: the pipeline class is the one that the checkpoint is for,
its scheduler and tokenizers are opened by diffusers from the checkpoint's own files, and only the
prompt, the seed, the step count and the guidance scale are handed over. It runs in two phases, text
and image, with the modules of one phase in memory: the peak is the UNet's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from backends.check.watch import Watch
from backends.pipeline.recipe import Recipe
from backends.pipeline.session import stage_parts
from core.memory import give_memory_back
from export.source.configs import IGNORED_COMPONENTS, SDXL, index_class
from export.source.layout import COMPONENTS
from export.source.quiet import quiet_libraries
from export.source.reader import tokenizer_names

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from export.bundle import Bundle, Redraw
    from export.source.checkpoint import Checkpoint

Images = dict[tuple[str, int], "NDArray[np.uint8]"]


class Oracle:
    """The pipeline of one bundle's checkpoint in FP32.

    Attributes:
        watch: the largest values that every op gave in a part, when it was made with `watched`.
    """

    def __init__(self, bundle: Bundle, recipe: Recipe, watched: bool = False) -> None:
        import diffusers

        self.bundle, self.recipe = bundle, recipe
        opened = bundle.checkpoint()
        self.checkpoint: Checkpoint = replace(opened, embeddings=())
        self.embeddings = opened.embeddings  # diffusers puts them in by itself
        self.cls: Any = getattr(diffusers, self.checkpoint.pipeline_class)
        self.largest: dict[str, list[dict[str, Any]]] = {}
        self.watched = watched

    def describe(self) -> dict[str, Any]:
        """Return which pipeline of which release this is, for a record."""
        import diffusers
        import transformers

        return {
            "pipeline": self.cls.__name__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "scheduler": self.recipe.scheduler,
            "size": list(self.bundle.size),
        }

    def draw(self, prompt: str, steps: Sequence[int], seed: int) -> Images:
        """Return uint8 [height, width, 3] by (decoder, steps)."""
        import torch

        with torch.inference_mode(), quiet_libraries():
            encoded = self._encode(prompt)
            give_memory_back()
            return self._images(encoded, steps, seed)

    def redraw(
        self,
        prompt: str,
        picture: NDArray[np.uint8],
        pairs: Sequence[tuple[int, int]],
        encoders: Sequence[str],
        seed: int,
    ) -> dict[Redraw, NDArray[np.uint8]]:
        """Return what is drawn from a picture, uint8 [height, width, 3], by decoder, steps, encoder
        and steps that run.

        The pipeline is diffusers' from pictures, and is handed the mean of the posterior where it
        would draw a sample of it.

        Args:
            picture: uint8 [height, width, 3] of the bundle's size.
            pairs: steps, and how many of them run.
        """
        import torch

        with torch.inference_mode(), quiet_libraries():
            encoded = self._encode(prompt)
            give_memory_back()
            pipe = self._pipeline(["unet", "vae_decoder"])
            modules = self._decoders(pipe)
            redrawing = from_pictures(pipe, pooled=self.bundle.pooled)
            redrawing.set_progress_bar_config(disable=True)
            images: dict[Redraw, NDArray[np.uint8]] = {}
            for encoder in encoders:
                latents = mean_latents(modules[encoder], picture)
                for steps, kept in pairs:
                    drawn = self._each_decoder(
                        redrawing, modules, seed,
                        dict(encoded, image=latents, num_inference_steps=steps,
                             strength=min(1.0, (kept + 0.01) / steps)),
                    )  # fmt: skip
                    images |= {
                        (decoder, steps, encoder, kept): image for decoder, image in drawn.items()
                    }
            return images

    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        encoders = [part for part in self.bundle.parts if part.startswith("text_encoder")]
        pipe = self._pipeline(encoders)
        for embedding in self.embeddings:
            for part, vectors in embedding.vectors.items():
                pipe.load_textual_inversion(
                    {embedding.token: vectors},
                    token=embedding.token,
                    text_encoder=getattr(pipe, part),
                    tokenizer=getattr(pipe, part.replace("text_encoder", "tokenizer")),
                )
        for encoder in (getattr(pipe, part) for part in encoders):
            if not hasattr(encoder, "text_model"):
                # Where diffusers 0.42 looks for the last norm; transformers 5 has one level less.
                object.__setattr__(encoder, "text_model", encoder)
        with self._watching({part: getattr(pipe, part) for part in encoders}):
            results = pipe.encode_prompt(
                prompt=prompt,
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=self.recipe.guided,
                clip_skip=self.checkpoint.model.clip_skip or None,
            )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
                 "negative_pooled_prompt_embeds")  # fmt: skip
        named = dict(zip(names, results, strict=False))
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _images(self, encoded: dict[str, torch.Tensor], steps: Sequence[int], seed: int) -> Images:
        pipe = self._pipeline(["unet", "vae_decoder"])
        pipe.set_progress_bar_config(disable=True)
        decoders = self._decoders(pipe)
        width, height = self.bundle.size
        images: Images = {}
        watched = {f"{name}_decoder": module for name, module in decoders.items()}
        with self._watching({"unet": pipe.unet} | watched):
            for count in steps:
                asked = dict(encoded, width=width, height=height, num_inference_steps=count)
                drawn = self._each_decoder(pipe, decoders, seed, asked)
                images |= {(name, count): image for name, image in drawn.items()}
        return images

    def _decoders(self, pipe: Any) -> dict[str, Any]:
        """The whole autoencoders of the bundle's decoders, by name; `pipe` has loaded the VAE."""
        decoders = {
            part.removesuffix("_decoder"): self._module(part)
            for part in self.bundle.parts
            if part.endswith("_decoder") and part != "vae_decoder"
        }
        own = {"vae": pipe.vae} if "vae_decoder" in self.bundle.parts else {}
        return own | decoders

    def _each_decoder(
        self, pipe: Any, decoders: dict[str, Any], seed: int, asked: dict[str, Any]
    ) -> dict[str, NDArray[np.uint8]]:
        """What a call of diffusers' pipeline draws with each decoder, of the same latents."""
        import numpy as np
        import torch

        images = {}
        with replayed(pipe.unet) as rewind:
            for name, module in decoders.items():
                rewind()
                pipe.vae = module
                drawn = pipe(
                    **asked,
                    guidance_scale=self.recipe.guidance,
                    generator=[torch.Generator("cpu").manual_seed(seed)],
                )
                images[name] = np.asarray(drawn.images[0])
        return images

    # ---- loading

    def _pipeline(self, parts: Sequence[str]) -> Any:
        """The pipeline with the modules of `parts` alone, loaded by diffusers wherever it can."""
        checkpoint = self.checkpoint
        named = {
            COMPONENTS[part].folder: part for part in stage_parts(tuple(self.bundle.parts), "vae")
        }
        takes = inspect.signature(self.cls).parameters
        given: dict[str, Any] = {name: None for name in IGNORED_COMPONENTS if name in takes}
        if "requires_safety_checker" in takes:
            given["requires_safety_checker"] = False
        by_itself = checkpoint.kind in ("hub", "folder") and not checkpoint.is_single
        by_itself = by_itself and bool(checkpoint.index)
        variant = next((o.stored.variant for o in checkpoint.origins.values() if o.stored), None)
        for name, part in named.items():
            if part not in parts:
                given[name] = None
            elif not (by_itself and self._is_plain(part, variant)):
                given[name] = self._module(part)
        scheduler = self._scheduler(by_itself)
        if scheduler is not None:
            given["scheduler"] = scheduler
        if by_itself:
            import torch

            return self.cls.from_pretrained(
                checkpoint.root,
                variant=variant,
                torch_dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                **given,
            )
        tokenizers = zip(tokenizer_names(checkpoint.model), checkpoint.tokenizers(), strict=True)
        if checkpoint.pipeline_class == SDXL:
            given["force_zeros_for_empty_prompt"] = checkpoint.force_zeros
        return self.cls(**given, **dict(tokenizers))

    def _is_plain(self, part: str, variant: str | None) -> bool:
        """Whether diffusers' pipeline finds the module of `part` in the checkpoint's own folder."""
        checkpoint, origin = self.checkpoint, self.checkpoint.origins[part]
        stored = origin.stored
        return (
            stored is not None
            and origin.file is None
            and not checkpoint.loras
            and origin.folder == checkpoint.root / COMPONENTS[part].folder
            and (stored.variant, stored.pickle) == (variant, False)
        )

    def _module(self, part: str) -> Any:
        import torch

        with torch.inference_mode(False):
            return self.checkpoint.module(part, torch.float32)

    def _scheduler(self, by_itself: bool) -> Any:
        """The scheduler where the recipe wants another than the checkpoint's; None where not.

        Made as the model cards say: `SomeScheduler.from_config(own.config, timestep_spacing=...)`.
        """
        import diffusers

        from core.files import read_json

        model = self.checkpoint.model
        stored = read_json(self.checkpoint.find("scheduler") / "scheduler_config.json")
        own = index_class(self.checkpoint.index, "scheduler") or stored.get("_class_name")
        entry = {"timestep_spacing": model.spacing, "prediction_type": model.prediction}
        entry = {key: value for key, value in entry.items() if value}
        if by_itself and own == self.recipe.scheduler and entry.items() <= stored.items():
            return None
        scheduler = getattr(diffusers, own or self.recipe.scheduler).from_config(stored)
        return getattr(diffusers, self.recipe.scheduler).from_config(scheduler.config, **entry)

    @contextmanager
    def _watching(self, modules: dict[str, Any]) -> Iterator[None]:
        if not self.watched:
            yield
            return
        watches = {part: Watch() for part in modules}
        with ExitStack() as stack:
            for part, watch in watches.items():
                watch.attach(modules[part])
                stack.enter_context(watch)
            yield
        self.largest |= {part: watch.report() for part, watch in watches.items()}


def from_pictures(pipe: Any, *, pooled: bool) -> Any:
    """diffusers' pipeline from pictures over the components of one from text alone.

    Of latent consistency models too it is Stable Diffusion's: theirs spreads all of the steps over
    the part of the schedule that is left.
    """
    import diffusers

    cls: Any = (
        diffusers.StableDiffusionXLImg2ImgPipeline
        if pooled
        else diffusers.StableDiffusionImg2ImgPipeline
    )
    takes = inspect.signature(cls).parameters
    given = {name: part for name, part in pipe.components.items() if name in takes}
    if pooled:
        given["add_watermarker"] = False
    else:
        given["requires_safety_checker"] = False
    return cls(**given)


def mean_latents(autoencoder: Any, picture: NDArray[np.uint8]) -> torch.Tensor:
    """A picture's latents, scaled as diffusers' pipelines do; of a VAE the posterior's mean."""
    import torch
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    pixels = VaeImageProcessor(do_resize=False).preprocess(Image.fromarray(picture))
    encoded = autoencoder.encode(pixels)
    latents: torch.Tensor = (
        encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    )
    config = autoencoder.config
    shift, deviation = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
    if shift is not None and deviation is not None:
        channels = (1, len(shift), 1, 1)
        latents = (latents - torch.tensor(shift).view(channels)) / torch.tensor(deviation).view(
            channels
        )
    return latents * config.scaling_factor


@contextmanager
def replayed(unet: Any) -> Iterator[Callable[[], None]]:
    """Make a UNet give its answers again after a rewind, in order: for another decoder of the same
    latents. Yields the rewind."""
    answers: list[Any] = []
    position, forward = 0, unet.forward

    def answer(*arguments: Any, **named: Any) -> Any:
        nonlocal position
        if position == len(answers):
            answers.append(forward(*arguments, **named))
        position += 1
        return tuple(tensor.clone() for tensor in answers[position - 1])

    def rewind() -> None:
        nonlocal position
        position = 0

    unet.forward = answer
    try:
        yield rewind
    finally:
        del unet.forward
