"""A bundle and a backend by name, as a pipeline that is ready to be called."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from backends.locked import LockedRecipe, refuse_beside
from backends.pipeline.recipe import make_recipe
from backends.pipeline.session import Shapes, check_decoder, decoders
from backends.registry import parse_backend
from core import values
from export.bundle import find_bundle

if TYPE_CHECKING:
    from backends.pipeline.pipeline import Pipeline


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    decoder: str | None = None,
    *,
    recipe: str | os.PathLike[str] | None = None,
    batch: int | None = None,
    weights: str | None = None,
    dtype: str | None = None,
    size: int | tuple[int, int] | None = None,
    embedding_cache: int = 0,
    low_memory: bool = False,
    scheduler: str | None = None,
    guidance: float | None = None,
    guidance_mode: str | None = None,
    encoder: str | None = None,
    on_part: Callable[[str, str], None] | None = None,
) -> Pipeline:
    """Load a pipeline for a model's name or a bundle's folder, ready to be called.

    Args:
        model: needed without a recipe.
        backend: as `--backend` takes it; None for `ort`.
        recipe: a file of `addbench choose --save FILE`, which says all the rest; where it was
            measured on something else a warning says so. Its steps are
            `LockedRecipe.read(recipe).steps`.
        decoder: `vae` or `taesd`, the tiny one; None for the best that the bundle has: the VAE
            that the model was trained with.
        batch: prompts of a call, for backends whose graphs have a fixed batch; None for 1.
        size: pixels of a side, or width and height; None for the model's own.
        low_memory: load each part when a call needs it, see `Pipeline.use_low_memory`.
        encoder: of pictures, `vae` or `taesd`, loaded with the rest; None for none until a call
            starts from a picture, which then takes that of the decoder.
        scheduler, guidance, guidance_mode: see `backends.pipeline.recipe.make_recipe`.
        on_part: called as `Pipeline.on_part` is: ("compiling" or "loading", part) before each.

    Raises:
        PreconditionError: the backend cannot be used (checked first), or there is no such bundle;
            the message names the command that makes it.
    """
    if recipe is not None:
        own = {
            "model": model, "backend": backend, "decoder": decoder, "batch": batch,
            "weights": weights, "dtype": dtype, "size": size, "low_memory": low_memory or None,
            "scheduler": scheduler, "guidance": guidance, "guidance_mode": guidance_mode,
        }  # fmt: skip
        refuse_beside(f"{name}=" for name, value in own.items() if value is not None)
        locked = LockedRecipe.read(recipe)
        pipe = load_pipeline(
            **locked.arguments(), embedding_cache=embedding_cache, encoder=encoder, on_part=on_part
        )
        if text := locked.elsewhere(pipe.bundle.hash):
            warnings.warn(text, stacklevel=2)
        return pipe
    name = values.path_text("model", model)
    batch = 1 if batch is None else values.count("batch", batch)
    chosen = parse_backend(values.path_text("backend", "ort" if backend is None else backend))
    chosen.probe().require(chosen.name)
    if low_memory:
        chosen.require_low_memory()
    bundle = find_bundle(name, weights, dtype, None if size is None else values.pixels(size))
    decoder = decoder or decoders(bundle)[0]
    check_decoder(bundle, decoder)
    made = chosen.pipeline(
        bundle,
        decoder,
        Shapes(batch, *bundle.size),
        embedding_cache=embedding_cache,
        recipe=make_recipe(bundle, scheduler, guidance, guidance_mode),
    )
    if on_part is not None:
        made.on_part = on_part
    if encoder is not None:
        made.use_encoder(encoder)
    return (made.use_low_memory() if low_memory else made).prepare()
