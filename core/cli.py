"""The shell around every command: errors to exit codes, the flags that all commands share.

A command module defines `main(argv: Sequence[str] | None = None) -> int` with an argparse parser
built before anything heavy is imported, and ends with `raise SystemExit(run(main))`.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from core.errors import (
    EXIT_BUG,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    AddbenchError,
    PreconditionError,
    no_text,
)
from core.files import ROOT
from core.table import FORMATS

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8")
RUNS = ROOT / "results" / "runs"
PUBLISHED = ROOT / "results" / "published"
ROOMS = ("core", "distill", "export", "backends", "serve", "bench", "addbench", "tests")
"""Packages of the checkout: one that is missing is a bug, not a package to install."""
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
Main = Callable[[Sequence[str] | None], int]


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run `main` and turn what it raises into an exit code and a message on stderr."""
    warnings.formatwarning = warning_text
    try:
        return main(argv)
    except AddbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `... | head`: what was left to do is not done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ROOMS:
            return bug()
        missing = missing_package("this", error)
        print(f"error: {missing}", file=sys.stderr)
        return missing.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            return bug()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        failed = AddbenchError(
            f"{error.filename or 'a file'} could not be written",
            "the disk is full" if full else str(error.strerror),
            "free some room and run it again" if full else "mend that, or choose another folder",
        )
        print(f"error: {failed}", file=sys.stderr)
        return failed.exit_code
    except Exception:
        return bug()


def missing_package(what: str, error: ModuleNotFoundError) -> PreconditionError:
    """The refusal of `what`, which imports a package that is not installed."""
    return PreconditionError(
        f"{what} needs the package {(error.name or '').split('.')[0]}, which is not installed",
        "the environment is not complete, or another Python runs",
        "make install, then .venv/bin/addbench; or `pip install -e .` in the checkout",
    )


_PYTHON_S_OWN = warnings.formatwarning


def warning_text(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    line: str | None = None,
) -> str:  # fmt: skip
    """The line of a warning that the project itself gives; a library's keeps its file and line."""
    place = Path(filename)
    if place.is_relative_to(ROOT) and place.relative_to(ROOT).parts[0] in ROOMS:
        return f"warning: {message}\n"
    return _PYTHON_S_OWN(message, category, filename, lineno, line)


def bug() -> int:
    """Print what Python says of a fault of ours."""
    traceback.print_exc()
    print("error: this is a bug in addbench; the lines above say where", file=sys.stderr)
    return EXIT_BUG


class Parser(argparse.ArgumentParser):
    """argparse with its own errors in the three-part form; arguments that are no text are one."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:
            if why := no_text(argument):
                raise PreconditionError(
                    f"{self.prog}: the argument {argument!a} is not valid text",
                    f"{why}; arguments end up in headers, pages and pictures, which are UTF-8",
                    "write it in UTF-8; rename a file or folder whose name is not",
                )
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise PreconditionError(
            f"{self.prog}: {message}", "the command line is not valid", f"{self.prog} --help"
        )


# ---- arguments that mean the same in every verb


def add_model_arguments(parser: argparse._ActionsContainer, default: str) -> None:
    """`--model NAME|PATH`, `--weights`, `--dtype`: which bundle a command works on."""
    parser.add_argument(
        "--model", default=default, metavar="NAME|PATH",
        help=f"model name or a bundle's folder ({default})",
    )  # fmt: skip
    parser.add_argument(
        "--weights", default=None, help="hub, random or folder: which bundle of that model"
    )
    parser.add_argument("--dtype", default=None, choices=("fp16", "fp32"), help="weights' dtype")


def add_precision_argument(parser: argparse._ActionsContainer) -> None:
    """`--precision NAME`: the precision of the arithmetic, for every backend of the command."""
    parser.add_argument(
        "--precision", choices=PRECISIONS,
        help="of the arithmetic, for backends that can choose (each one's own)",
    )  # fmt: skip


def add_backend_argument(
    parser: argparse._ActionsContainer, default: str | None = "ort", *, many: bool = False
) -> None:
    """`--backend NAME[:KEY=VALUE,...]`; with `many` it may be repeated and is a list or None."""
    parser.add_argument(
        "--backend", action="append" if many else "store", default=None if many else default,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"{'repeatable ' * many}({default})" if default else None,
    )  # fmt: skip


def add_cell_arguments(
    parser: argparse._ActionsContainer,
    steps: Sequence[int] | int,
    batch: Sequence[int] | int,
    decoder: Sequence[str] | str,
) -> None:
    """`--steps`, `--batch` and `--decoder`; each a comma list where its default is a sequence."""
    for flag, default, what in (
        ("--steps", steps, "denoising steps"),
        ("--batch", batch, "images of a call"),
    ):
        many = not isinstance(default, int)
        parser.add_argument(
            flag, type=int_list if many else count, default=default,
            metavar="1,2,4" if many else "N", help=f"{what} ({_default_text(default)})",
        )  # fmt: skip
    many = not isinstance(decoder, str)
    parser.add_argument(
        "--decoder", type=word_list if many else str, default=decoder,
        metavar="vae,taesd" if many else "vae|taesd", help=f"({_default_text(decoder)})",
    )  # fmt: skip


def add_runs_argument(parser: argparse._ActionsContainer, *old: str) -> None:
    """`--runs DIR`: where runs are, read and written. `old`: spellings that are still taken."""
    parser.add_argument(
        "--runs", *old, type=Path, default=RUNS, metavar="DIR", dest="runs",
        help="where runs are (results/runs)",
    )  # fmt: skip


def add_published_argument(parser: argparse._ActionsContainer) -> None:
    """`--published DIR`: where the published runs are."""
    parser.add_argument(
        "--published", type=Path, default=PUBLISHED, metavar="DIR",
        help="where published runs are (results/published)",
    )  # fmt: skip


def add_recipe_argument(parser: argparse._ActionsContainer) -> None:
    """`--recipe FILE`: what `addbench choose --save FILE` wrote, in place of the flags it says."""
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE",
        help="of addbench choose --save FILE: model, backend, decoder, batch, steps and the rest",
    )  # fmt: skip


def add_out_argument(
    parser: argparse._ActionsContainer, metavar: str = "FILE", help: str = "write it there"
) -> None:
    """`--out FILE`: what the command writes."""
    parser.add_argument("--out", type=Path, metavar=metavar, help=help)


def add_format_argument(
    parser: argparse._ActionsContainer, formats: Sequence[str] = FORMATS
) -> None:
    """`--format table|markdown|json`: for the terminal, for a page, for a program."""
    parser.add_argument("--format", choices=formats, default=formats[0], help=f"({formats[0]})")


def _default_text(default: Sequence[object] | int) -> str:
    if isinstance(default, int | str):
        return str(default)
    return ",".join(str(value) for value in default)


def duration(text: str) -> float:
    """`90s`, `30m`, `1h`, `1h30m` -> seconds; a number without a unit is refused."""
    pieces = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = sum(float(number) * UNITS[unit] for number, unit in pieces)
    if "".join(number + unit for number, unit in pieces) != text or seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time with its unit: 90s, 30m or 1h")
    return seconds


def count(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """An integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def share(text: str) -> float:
    """`15` or `15%` -> 0.15."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage") from None
    if not 0.01 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 1000 (percent)")
    return value


def image_size(text: str) -> tuple[int, int]:
    """`512` or `768x512` -> width and height in pixels."""
    width, cross, height = text.partition("x")
    sides = (width, height if cross else width)
    if not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: 512, or 768x512 for WIDTHxHEIGHT"
        )
    return int(sides[0]), int(sides[1])


def png_file(text: str) -> Path:
    """`x.png` -> its path: for what is written as PNG whatever the name says."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text} is not a PNG file's name, as image.png is")
    return Path(text)


def int_list(text: str) -> list[int]:
    """`1,2,4` -> [1, 2, 4]; positive, no duplicates."""
    try:
        values = [int(piece) for piece in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma list of integers") from None
    if not values or min(values) < 1 or len(set(values)) != len(values):
        raise argparse.ArgumentTypeError(f"{text!r} wants distinct integers of at least 1")
    return values


def word_list(text: str) -> list[str]:
    """`vae,taesd` -> ["vae", "taesd"]; no empties, no duplicates."""
    words = [piece.strip() for piece in text.split(",")]
    if not all(words) or len(set(words)) != len(words):
        raise argparse.ArgumentTypeError(f"{text!r} wants distinct, non-empty words")
    return words


def share_list(text: str) -> list[float]:
    """Numbers with commas between them; what takes them says which are strengths."""
    return [float(word) for word in text.split(",")]
