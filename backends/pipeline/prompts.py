"""What a pipeline call may be given: prompts and seeds; prompts as token ids."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from backends.pipeline.session import UnsupportedError
from backends.pipeline.start import kept_steps
from core.errors import PreconditionError, no_text
from distill.shapes import unknown_words

if TYPE_CHECKING:
    import torch

    from backends.pipeline.conditioning import Conditioning
    from backends.pipeline.pictures import Picture
    from backends.pipeline.recipe import Recipe
    from export.bundle import Bundle
    from export.models import Model


@dataclass(frozen=True)
class ImageCall:
    """What one call of a pipeline is asked for, checked.

    Attributes:
        negative: a prompt for each prompt, of what guidance leads away from; None: the model's own
            emptiness, which may be zeros.
        pictures: what the images start from: one for all of them or one for each; none where they
            start from noise alone.
        strength: the share of the steps that run.
        conditioning: what the prompts were encoded to, where that was done before.
    """

    prompts: list[str]
    steps: int
    seeds: list[int]
    negative: list[str] | None = None
    pictures: tuple[Picture, ...] = ()
    strength: float = 1.0
    conditioning: Conditioning | None = None

    @property
    def first(self) -> int:
        """The first step that runs, from 0: those before it would undo the picture."""
        return self.steps - kept_steps(self.steps, self.strength)

    @property
    def starts(self) -> tuple[Picture, ...]:
        """The pictures that are encoded: none at strength 1."""
        return self.pictures if self.first else ()

    def part(self, images: slice) -> ImageCall:
        """The same call for some of its images."""
        return replace(
            self,
            prompts=self.prompts[images],
            seeds=self.seeds[images],
            negative=self.negative and self.negative[images],
            pictures=self.pictures if len(self.pictures) == 1 else self.pictures[images],
            conditioning=self.conditioning if len(self.prompts) == 1 else None,
        )


TOKENS = 77
"""Length of a CLIP prompt in tokens, start and end included."""


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray | memoryview):
        raise PreconditionError(
            f"{prompts!r} is not a prompt",
            f"it is a {type(prompts).__name__}, prompts are strings",
            "pass a string, or a list of strings",
        )
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
        if why := no_text(prompt):
            raise PreconditionError(
                f"the prompt {prompt!a} is not valid text", why, "pass valid Unicode"
            )
    warn_of_weights(listed)
    return listed


def check_negative(
    bundle: Bundle, recipe: Recipe, negative: str | Sequence[str] | None, count: int
) -> list[str] | None:
    """Negative prompts, one for each of `count` prompts; None where there is none.

    Raises:
        UnsupportedError: nothing of this recipe reads a negative prompt.
    """
    if negative is None:
        return None
    if not recipe.guided:
        form = bundle.model.guidance_form
        raise UnsupportedError(
            f"{bundle.name} reads no negative prompt"
            + (" without guidance" if form == "free" else ""),
            {
                "none": "it was distilled without guidance: nothing is evaluated for one",
                "embedding": "its guidance scale is an input of the UNet: nothing is evaluated for"
                " a negative prompt",
                "free": f"guidance {recipe.guidance:g} is none: one evaluation a step, for the"
                " prompt",
            }[form],
            "pass --guidance 7.5 or another scale above 1"
            if form == "free"
            else "drop the negative prompt",
        )
    listed = check_prompts(negative)
    if len(listed) == 1:
        return listed * count
    if len(listed) != count:
        raise PreconditionError(
            f"{len(listed)} negative prompts do not fit {count} prompts",
            "a negative prompt is for all of them, or there is one for each",
            f"pass 1 or {count}",
        )
    return listed


WEIGHTED = re.compile(r"\([^()]*:\s*\d*\.?\d+\)|<lora:[^>]*>")


def warn_of_weights(prompts: Sequence[str]) -> None:
    """Say, once in a process, that weights in a prompt are text like any other."""
    global _warned
    if not _warned and any(WEIGHTED.search(prompt) for prompt in prompts):
        _warned = True
        warnings.warn(
            "weights in a prompt, as in (word:1.3) or <lora:name:1>, are read as text here, as"
            " diffusers' pipelines read them",
            stacklevel=3,
        )


_warned = False


def check_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, Sequence):
        seeds = [_whole(one) for one in seed]
    else:
        seeds = [_whole(seed) + i for i in range(count)]
    if len(seeds) != count:
        raise PreconditionError(
            f"{len(seeds)} seeds do not fit {count} prompts",
            "every image has a generator of its own",
            "pass one seed per prompt, or a single integer",
        )
    for one in seeds:
        if not 0 <= one < 2**63:
            raise _no_seed(one)
    return seeds


def _whole(seed: Any) -> int:
    """numpy's integers are seeds too."""
    try:
        return operator.index(seed)
    except TypeError:
        raise _no_seed(seed) from None


def _no_seed(seed: Any) -> PreconditionError:
    return PreconditionError(
        f"{seed!r} is not a seed", "a seed is an integer from 0 to 2**63 - 1", "pass one"
    )


def warn_of_unknown(model: Model, prompts: Sequence[str]) -> None:
    """Warn of words that a model was never shown: it draws what is left, or nothing."""
    if model.judge != "shapes":
        return
    for prompt in prompts:
        if unknown := unknown_words(prompt):
            warnings.warn(
                f"{model.name} does not know {', '.join(map(repr, unknown))} of {prompt[:60]!r}:"
                f" it draws shapes only, as {model.prompts[0]!r}",
                stacklevel=3,
            )


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """int64 [batch, 77] of a CLIP tokenizer; longer prompts are cut, with a warning."""
    import torch

    learned = tokenizer.added_tokens_encoder
    if any(f"{token}_1" in learned for token in learned):
        from diffusers.loaders import TextualInversionLoaderMixin

        # A token of several vectors stands for all of them: `<x>` is `<x> <x>_1 ...`.
        prompts = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
    cut = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    for prompt, mask in zip(prompts, cut["attention_mask"], strict=True):
        # Only a row without padding may be cut: tokenising each prompt twice is a tenth of a
        # millisecond, a hundredth of a fast GPU's image.
        if mask.all() and (count := len(tokenizer(prompt, verbose=False)["input_ids"])) > TOKENS:
            warnings.warn(
                f"the prompt {prompt[:40]!r}... has {count} tokens; CLIP reads {TOKENS}, the"
                " rest is cut",
                stacklevel=3,
            )
    ids_of: torch.Tensor = cut["input_ids"].to(torch.int64)
    return ids_of
