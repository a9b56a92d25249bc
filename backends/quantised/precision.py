"""`--precision`: the arithmetic that every backend of a command is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from backends.base import UnavailableError, UnsupportedError, parse_backend

QUANTISED = ("fp8", "int8", "int4")
"""Dtypes of stored weights that are quantised."""
RANDOM_WORDS = (
    "8 or 4 bits in place of random weights: that the image is the reference's shows that the"
    " kernels compute what they should. It says little of the precision: random numbers have none"
    " of the outliers of trained weights, and the prompt hardly changes their image"
)


def with_precision(text: str, precision: str | None) -> str:
    """`text`, as `--backend` takes it, with the option that gives `precision` (None: as it is).

    Raises:
        UnsupportedError: the backend has no such option, or was asked for another precision.
    """
    from backends import BACKENDS

    if precision is None:
        return text
    backend = parse_backend(text)
    option, given = backend.option_types.get("precision"), backend.given.get("precision")
    choices = (option.choices or ()) if option else ()
    if precision not in choices:
        others = [
            name for name in BACKENDS
            if name != backend.name and precision in _precisions(name)
        ]  # fmt: skip
        raise UnsupportedError(
            f"backend {backend.name} has no precision {precision}",
            f"it can be asked for {', '.join(choices)}"
            if choices
            else "it computes in what its model and its other options say",
            " or ".join(
                [f"use --backend {name}:precision={precision}" for name in others]
                + ["drop --precision"]
            ),
        )
    if given is not None and given != precision:
        raise UnsupportedError(
            f"--precision {precision} contradicts --backend {text}", f"it says precision={given}",
            "drop one of them",
        )  # fmt: skip
    if given is not None or (option and precision == option.default):
        return text
    return f"{text}{',' if ':' in text else ':'}precision={precision}"


def _precisions(name: str) -> Sequence[str]:
    """What a backend's option `precision` takes; nothing where it has none or cannot be had."""
    try:
        option = parse_backend(name).option_types.get("precision")
    except UnavailableError:
        return ()
    return (option.choices or ()) if option else ()
