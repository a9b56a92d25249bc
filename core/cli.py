"""The shell around every command: errors to exit codes, the flags that all commands share.

A command module defines `main(argv: Sequence[str] | None = None) -> int` with an argparse parser
built before anything heavy is imported, and ends with `raise SystemExit(run(main))`.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
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

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8")
Main = Callable[[Sequence[str] | None], int]


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run `main` and turn what it raises into an exit code and a message on stderr."""
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


def bug() -> int:
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


def add_model_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """`--model NAME|PATH`, `--weights`, `--dtype`: which bundle a command works on."""
    parser.add_argument(
        "--model", default=default, metavar="NAME|PATH", help="model name or a bundle's folder"
    )
    parser.add_argument(
        "--weights", default=None, help="hub, random or folder: which bundle of that model"
    )
    parser.add_argument("--dtype", default=None, choices=("fp16", "fp32"), help="weights' dtype")


def add_precision_argument(parser: argparse._ActionsContainer) -> None:
    """`--precision NAME`: of the arithmetic, for every backend of the command."""
    parser.add_argument(
        "--precision", choices=PRECISIONS,
        help="of the arithmetic, for backends that can choose (each one's own)",
    )  # fmt: skip


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
