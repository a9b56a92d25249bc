"""The fields of a request, read strictly: what is unknown or not supported is refused by name."""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from core.errors import no_text
from serve.brief import FORMATS, Brief, Format
from serve.errors import ApiError
from serve.model import ServedModel

MOST_PICTURES = 10
LONGEST_PROMPT = 4000
"""Characters; a text encoder reads 77 tokens."""
SEEDS = 2**63
NUMBERS = ("n", "seed", "num_inference_steps", "guidance_scale", "strength")

UNSUPPORTED = {
    "background": "pictures are opaque",
    "input_fidelity": "the model has no such input",
    "mask": "only whole pictures are redrawn",
    "moderation": "nothing is moderated here",
    "negative_prompt": "the model takes none",
    "output_compression": "files are written at one quality",
    "partial_images": "a picture takes few steps and is sent when it is done",
    "quality": "there is one quality; --decoder of the server and num_inference_steps change it",
    "stream": "a picture takes few steps and is sent when it is done",
    "style": "the model has no such input",
}
"""Fields of other servers, with the reason why this one refuses them."""


def refuse(param: str, what: str, why: str, next: str, code: str = "invalid_value") -> NoReturn:
    raise ApiError(what, why, next, param=param, code=code)


def no_such_field(name: str, known: tuple[str, ...]) -> NoReturn:
    shown = name[:40]
    near = difflib.get_close_matches(shown, known, 1)
    if name in UNSUPPORTED:
        refuse(
            name, f"{name} is not supported", UNSUPPORTED[name], f"leave {name} out",
            "unsupported_parameter",
        )  # fmt: skip
    refuse(
        shown, f"there is no field {shown!r}",
        f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}",
        f"send {near[0]}" if near else "leave it out", "unknown_parameter",
    )  # fmt: skip


# ---- single values


def whole(name: str, value: object, least: int, most: int) -> int:
    """A whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        refuse(
            name, f"{name} = {repr(value)[:40]} is not understood",
            f"it is a whole number from {least} to {most}", f"send {name} = {least}",
        )  # fmt: skip
    return value


def from_form(name: str, text: str) -> object:
    """A form's field, which is a text, as JSON would have it."""
    if name in NUMBERS and re.fullmatch(r"-?\d{1,20}", text, re.ASCII):
        return int(text)
    if name in NUMBERS and re.fullmatch(r"\d{0,3}\.\d{1,17}", text, re.ASCII):
        return float(text)
    return text


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices or not isinstance(value, str):
        refuse(name, f"{name} = {repr(value)[:40]} is not supported",
               f"it is {' or '.join(choices)}", f"send {choices[0]}, or leave {name} out",
               "unsupported_value")  # fmt: skip
    return value


def prompt_text(value: object, name: str = "prompt") -> str:
    if not isinstance(value, str):
        refuse(name, f"{name} is not a text", f"it is of type {type(value).__name__}",
               'send "prompt": "a red circle"')  # fmt: skip
    if why := no_text(value):
        refuse(name, f"{name} is not valid text", why, "send valid Unicode")
    if len(value) > LONGEST_PROMPT:
        refuse(name, f"{name} has {len(value)} characters", f"{LONGEST_PROMPT} are taken, and the"
               " text encoders read 77 tokens", "shorten it")  # fmt: skip
    return value


def steps_of(value: object, model: ServedModel, name: str = "num_inference_steps") -> int:
    counts = model.step_counts
    steps = whole(name, value, 1, counts[-1])
    if steps not in counts:
        refuse(name, f"{name} = {steps} is not supported",
               f"{model.name} takes {', '.join(map(str, counts[:12]))}", f"send {model.steps}",
               "unsupported_value")  # fmt: skip
    return steps


def strength_of(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        refuse("strength", f"strength = {repr(value)[:40]} is not understood",
               "it is a number above 0 and at most 1", "send strength = 0.6")  # fmt: skip
    return float(value)


# ---- /v1/images/...


@dataclass(frozen=True)
class Generation:
    """A request for pictures: their briefs, and how they are sent back."""

    briefs: tuple[Brief, ...]
    as_file: bool


GENERATION = ("prompt", "model", "n", "size", "response_format", "output_format", "user", "seed",
              "num_inference_steps", "decoder", "guidance_scale")  # fmt: skip
EDIT = (*GENERATION, "strength")


def read_generation(
    body: Mapping[str, Any], model: ServedModel, picture: bytes | None = None
) -> Generation:
    """The briefs of a request's fields, which are those of an edit where there is a picture.

    Raises:
        ApiError: a field is unknown, not supported or wrong; it is named.
    """
    known = GENERATION if picture is None else EDIT
    for name in body:
        if name not in known:
            no_such_field(name, known)
    given = {name: value for name, value in body.items() if value is not None}
    if "prompt" not in given:
        refuse("prompt", "there is no prompt", "it is the one field that is needed",
               'send {"prompt": "a red circle"}', "missing_parameter")  # fmt: skip
    prompts = given["prompt"] if isinstance(given["prompt"], list) else [given["prompt"]]
    if not 1 <= len(prompts) <= MOST_PICTURES:
        refuse("prompt", f"prompt is a list of {len(prompts)}", f"it holds 1 to {MOST_PICTURES}",
               "send several requests")  # fmt: skip
    texts = [prompt_text(prompt) for prompt in prompts]
    if given.get("model", model.name) != model.name:
        asked = repr(given["model"])[:60]
        raise ApiError(f"there is no model {asked}", f"this server has {model.name}",
                       f"send {model.name}, or leave model out", status=404,
                       code="model_not_found", param="model")  # fmt: skip
    n = whole("n", given.get("n", 1), 1, MOST_PICTURES)
    if n * len(texts) > MOST_PICTURES:
        refuse("n", f"n = {n} for {len(texts)} prompts are {n * len(texts)} pictures",
               f"a request has at most {MOST_PICTURES}", "send several requests")  # fmt: skip
    if given.get("size", "auto") not in ("auto", model.size):
        refuse("size", f"size = {repr(given['size'])[:40]} is not supported",
               f"{model.name} was exported for {model.size}",
               f"send {model.size}, or leave size out", "unsupported_value")  # fmt: skip
    scale = given.get("guidance_scale", model.guidance)
    if isinstance(scale, bool) or scale != model.guidance:
        refuse("guidance_scale", f"guidance_scale = {repr(scale)[:40]} is not supported",
               f"this server draws with {model.guidance:g}", "leave guidance_scale out",
               "unsupported_parameter")  # fmt: skip
    as_file = choice("response_format", given.get("response_format", "b64_json"),
                     ("b64_json", "file")) == "file"  # fmt: skip
    if as_file and n * len(texts) > 1:
        refuse("response_format", "response_format = file is of one picture",
               f"{n * len(texts)} were asked for", "send b64_json, or n = 1")  # fmt: skip
    # Shown to the client again, so that any picture can be drawn once more.
    seed = whole("seed", given.get("seed", secrets.randbelow(2**32)), 0, SEEDS - MOST_PICTURES)
    own_steps, own_strength = (model.steps, None) if picture is None else model.pair
    if "strength" in given:
        own_steps = model.steps
    steps = steps_of(given.get("num_inference_steps", own_steps), model)
    decoder = choice("decoder", given.get("decoder", model.decoders[0]), model.decoders)
    format = cast(
        Format, choice("output_format", given.get("output_format", "png"), tuple(FORMATS))
    )
    strength = None if picture is None else strength_of(given.get("strength", own_strength))
    briefs = tuple(
        Brief(text, seed + index, steps, decoder, format, strength, picture or b"")
        for text in texts
        for index in range(n)
    )
    return Generation(briefs, as_file)


# ---- /live

LIVE: dict[str, Callable[[Any, ServedModel], Any]] = {
    "id": lambda value, _: whole("id", value, 0, 2**53),
    "prompt": lambda value, _: prompt_text(value),
    "seed": lambda value, _: whole("seed", value, 0, SEEDS - 1),
    "steps": lambda value, model: steps_of(value, model, "steps"),
    "decoder": lambda value, model: choice("decoder", value, model.decoders),
    "strength": lambda value, _: strength_of(value),
}
"""The fields of a live message: name -> what reads it."""


def read_live(
    header: Mapping[str, Any], picture: bytes, model: ServedModel, format: Format
) -> Brief:
    """The brief of a live message.

    Raises:
        ApiError: a field is unknown, missing or wrong; it is named.
    """
    for name in header:
        if name not in LIVE:
            no_such_field(name, tuple(LIVE))
    for name in ("id", "prompt"):
        if name not in header:
            refuse(name, f"there is no {name}", "id and prompt are needed", f"send {name}",
                   "missing_parameter")  # fmt: skip
    values = {name: LIVE[name](value, model) for name, value in header.items()}
    if picture and not model.pictures:
        refuse("picture", f"{model.name} does not start from a picture",
               "its bundle has no encoder", "send no bytes after the JSON",
               "unsupported_parameter")  # fmt: skip
    if "strength" in values and not picture:
        refuse("strength", "strength needs a picture", "it says how much of it is redrawn",
               "send a picture, or leave strength out")  # fmt: skip
    return Brief(
        values["prompt"],
        values.get("seed", 0),
        values.get("steps", model.pair[0] if picture and "strength" not in values else model.steps),
        values.get("decoder", model.decoders[0]),
        format,
        values.get("strength", model.pair[1]) if picture else None,
        picture,
    )
