"""The arguments that the measuring verbs share: axes, method, budget, patience, where runs are."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows.store import RUNS
from bench.run.request import Request, Sampling
from core.cli import (
    PRECISIONS,
    UNITS,
    add_model_arguments,
    count,
    duration,
    image_size,
    int_list,
    natural,
    share_list,
    word_list,
)
from core.errors import PreconditionError
from export.models import DEFAULT_MODEL, SCHEDULERS

FRAMES = 100
"""The number of frames that `--frames` asks for by itself."""


def positive(text: str) -> float:
    """A number of seconds above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def switch_list(text: str) -> list[bool]:
    """`0`, `1` or `0,1` as off, on or both."""
    words = text.split(",")
    if not {*words} <= {"0", "1"} or len({*words}) != len(words):
        raise argparse.ArgumentTypeError(f"{text} is not 0, 1 or both")
    return [word == "1" for word in words]


def seconds(bare: str) -> Callable[[str], float]:
    """The type of a time with its unit, in seconds; `bare`: the unit of a number alone."""

    def read(text: str) -> float:
        try:
            return positive(text) * UNITS[bare]
        except ValueError:
            return duration(text)

    return read


def patience(text: str) -> float:
    """`60s`, `2m`, or 0 for none, in seconds."""
    return 0.0 if text in ("0", "0s") else seconds("s")(text)


# ---- the axes of the cells


@dataclass(frozen=True)
class Axis:
    """A flag and the field of a `Request` that it fills.

    Attributes:
        read: the flag's text as the field's value.
        more: what else argparse is told.
    """

    field: str
    read: Callable[[str], Any]
    metavar: str | None
    help: str
    more: Mapping[str, Any]


AXES: dict[str, Axis] = {
    "backend": Axis("backends", str, "NAME[:KEY=VALUE,...]", "repeatable (ort)",
                    {"action": "append"}),
    "precision": Axis("precision", str, "|".join(PRECISIONS),
                      "of the arithmetic, for backends that can choose (each one's own)", {}),
    "device": Axis("devices", word_list, "NAME|ID[,...]",
                   "repeatable, for backends that take one; a card's name is modelled, an id is"
                   " here", {"action": "extend"}),
    "steps": Axis("steps", int_list, "1,2,4", "denoising steps (1,2,4, or the model's)", {}),
    "batch": Axis("batches", int_list, "1,4", "images per call (1)", {}),
    "decoder": Axis("decoders", word_list, "vae,taesd", "(those that the bundle has)", {}),
    "scheduler": Axis("schedulers", word_list, "dpm++2m,unipc",
                      f"{', '.join(SCHEDULERS)} (the model's own)", {}),
    "guidance": Axis("guidance", float, "SCALE", "(the model's own)", {}),
    "guidance-mode": Axis("guidance_modes", word_list, "batch,calls",
                          "both evaluations of a step as one batch of two, or one after the other"
                          " (batch)", {}),
    "low-memory": Axis("low_memory", switch_list, "0,1",
                       "a call loads each part when it needs it and releases it after (without a"
                       " value: 1; default: 0)", {"nargs": "?", "const": [True]}),
    "strength": Axis("strengths", share_list, "0.5,1",
                     "share of the steps that run on a picture to start from (images from noise)",
                     {}),
    "encoder": Axis("encoders", word_list, "vae,taesd", "of that picture (that of the decoder)",
                    {}),
    "negative": Axis("negatives", str, "PROMPT",
                     "repeatable; what guidance leads away from ('' for none, the default)",
                     {"action": "append"}),
    "size": Axis("size", image_size, "PIXELS|WxH",
                 "which bundle, by the size it was exported for (the model's own)", {}),
}  # fmt: skip
WHICH = ("weights", "dtype")
"""Flags that say which bundle of a model, and are fields of a `Request` by the same name."""


def add_axis_arguments(parser: argparse.ArgumentParser, *flags: str) -> None:
    """`--model` and the axes, or those of them that `flags` names."""
    add_model_arguments(parser, DEFAULT_MODEL)
    parser.set_defaults(model=None)
    group = parser.add_argument_group("what to measure")
    for flag in flags or AXES:
        axis = AXES[flag]
        group.add_argument(
            f"--{flag}", dest=axis.field, type=axis.read, metavar=axis.metavar, help=axis.help,
            **axis.more,
        )  # fmt: skip


def axes_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `Request` that were given, by name."""
    names = ("model", *WHICH, *(axis.field for axis in AXES.values()))
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def keys_of(spec: str, usual: Mapping[str, str]) -> dict[str, str]:
    """`MODEL key=value ...` by flag, `model` first; `usual` where a key is not given.

    Raises:
        PreconditionError: it names no model, a word is no `key=value`, or a key is no axis.
    """
    words = shlex.split(spec)
    if not words or "=" in words[0]:
        raise PreconditionError(
            f"{spec!r} names no model",
            "the first word is a model's name or a bundle's folder, then come key=value",
            'write it like "sdxl-turbo steps=1 decoder=taesd"',
        )
    keys = {"model": words[0], **usual}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in (*WHICH, *AXES) or not value:
            raise PreconditionError(
                f"{word!r} in {spec!r} is not understood",
                "after the model's name come words key=value, with the keys"
                f" {', '.join((*WHICH, *AXES))}",
                "how both cells are measured is said by the flags of `addbench versus`",
            )
        keys[key] = value
    return keys


def axes_of_keys(keys: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a `Request` by name, from the texts of flags.

    Raises:
        PreconditionError: a text is not what its flag takes.
    """
    fields: dict[str, Any] = {}
    for key, text in keys.items():
        axis = AXES.get(key)
        if axis is None:
            fields[key] = text
            continue
        try:
            value = axis.read(text)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise PreconditionError(
                f"{key}={text} is not understood", str(error), "addbench sweep --help"
            ) from error
        fields[axis.field] = [value] if axis.read is str and axis.more else value
    return fields


# ---- how they are measured


def add_method_arguments(group: argparse._ArgumentGroup, usual: Sampling, rounds: str) -> None:
    """`--rounds`, `--min-samples`, `--min-time`, `--max-time`, `--warmup`; all None if not given.

    Args:
        usual: what is said to be the default of each.
        rounds: the default number of rounds in words.
    """
    rule = usual.rule
    group.add_argument(
        "--rounds", type=count, metavar="N", help=f"fresh processes a cell ({rounds})"
    )
    group.add_argument(
        "--min-samples", type=count, metavar="N",
        help=f"samples a cell and round, at least ({rule.min_samples})",
    )  # fmt: skip
    group.add_argument(
        "--min-time", type=positive, metavar="S", help=f"sampling, at least ({rule.min_time:g})"
    )
    group.add_argument(
        "--max-time", type=positive, metavar="S",
        help=f"wins once a cell has 3 samples ({rule.max_time:g})",
    )  # fmt: skip
    group.add_argument(
        "--warmup", type=natural, metavar="N", help=f"calls after the cold one ({rule.warmup})"
    )


METHOD = ("rounds", "min_samples", "min_time", "max_time", "warmup")


def method_of(args: argparse.Namespace) -> dict[str, Any]:
    """What of the method was given, by name."""
    return {name: value for name in METHOD if (value := getattr(args, name)) is not None}


def add_limit_arguments(
    group: argparse._ArgumentGroup, *, bare: str, usual: str | None, timeout_s: float
) -> None:
    """`--budget` and `--timeout`.

    Args:
        bare: unit of a budget without one, `s` or `m`.
        usual: the default budget as it is typed.
    """
    unit = {"s": "seconds", "m": "minutes"}[bare]
    read = seconds(bare)
    group.add_argument(
        "--budget", type=read, default=usual and read(usual), metavar="90s|30m|1h",
        help=f"for all of it; a number alone is in {unit} ({usual or 'none'})",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=positive, default=timeout_s, metavar="S",
        help=f"per load and cell ({timeout_s:g})",
    )  # fmt: skip


def price_of(text: str) -> tuple[str, float]:
    """`machine=USD/h`: what an hour of a machine costs, as the person who types it says."""
    name, equals, price = text.rpartition("=")
    try:
        return name, positive(price.removesuffix("/h")) if name and equals else positive("")
    except (argparse.ArgumentTypeError, ValueError):
        why = f"{text} is not machine=USD/h: a machine of the table and a price above 0"
        raise argparse.ArgumentTypeError(why) from None


def add_price_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--price`, repeatable."""
    parser.add_argument(
        "--price", type=price_of, action="append", default=[], metavar="MACHINE=USD/h",
        help="an hour of a machine of the table, for images a dollar; repeatable",
    )  # fmt: skip


def add_runs_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """`--runs DIR`, and `--out`, its name of before, which is still taken."""
    group = parser.add_argument_group("where")
    group.add_argument(
        "--runs", type=Path, default=RUNS, metavar="DIR",
        help="where runs are, read and written (results/runs)",
    )  # fmt: skip
    group.add_argument("--out", type=Path, dest="runs", default=RUNS, help=argparse.SUPPRESS)
    return group


def request_of(args: argparse.Namespace, usual: Sampling) -> Request:
    """The request of a command's arguments."""
    rest = {name: value for name in ("quality", "frames", "images")
            if (value := getattr(args, name, None)) is not None}  # fmt: skip
    return Request(**axes_of(args), **rest, method=usual.but(**method_of(args)))
