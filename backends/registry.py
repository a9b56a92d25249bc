"""BACKENDS, a line each, and how a name on the command line becomes one of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from backends.base import Backend, Capability, OptionError, UnavailableError, UnsupportedError
from core.devices import devices
from core.errors import PreconditionError

BACKENDS = {
    "ort": "backends.ort:OrtBackend",
    "torch": "backends.torch:TorchBackend",
    "openvino": "backends.openvino:OpenVinoBackend",
    "optimum": "backends.optimum:OptimumBackend",
    "ep": "backends.ep:EpBackend",
    "qnn": "backends.qnn:QnnBackend",
    "cuda": "backends.cuda:CudaBackend",
    "trt": "backends.trt:TrtBackend",
    "qaic": "backends.qaic:QaicBackend",
    "web": "backends.web:WebBackend",
    "null": "backends.null:NullBackend",
}
"""name -> "module:Class", imported only when the backend is asked for."""
CARDS = {"qaic": "backends.modelled.backend:ModelledBackend"}
"""name -> the class for a card that is given by its name (`qaic:device=ai100-ultra`, a line of
devices.csv). It is modelled; an id is a card that is here, and neither stands in for the other."""


def named_options(text: str) -> tuple[str, dict[str, str]]:
    """`name[:key=value,...]` -> the name of a backend that there is, and options, not looked at.

    No backend is imported.
    """
    name, _, rest = text.partition(":")
    if name not in BACKENDS:
        raise PreconditionError(
            f"there is no backend called {name!r}",
            f"known backends: {', '.join(BACKENDS)}",
            "`addbench backends` lists them and says which can be used here",
        )
    options: dict[str, str] = {}
    for piece in rest.split(",") if rest else ():
        key, equals, value = piece.partition("=")
        if not equals or not key or not value or key in options:
            raise PreconditionError(
                f"{text!r} is not a backend",
                f"the piece {piece!r} is not key=value, or its key stands twice",
                f"write {name}:key=value,key=value",
            )
        options[key] = value
    return name, options


def parse_backend(text: str) -> Backend:
    """`name[:key=value,...]` -> an instance. A backend whose module fails to import says why."""
    name, options = named_options(text)
    named_card = name in CARDS and options.get("device") in devices()
    cls = backend_class(name, (CARDS if named_card else BACKENDS)[name])
    try:
        return cls(options)
    except OptionError as error:
        refused = {key: value for key, value in options.items() if not takes(cls, key, value)}
        error.next += "".join(f"; or use {other}" for other in _others(name, refused))
        raise


def backend_class(name: str, place: str) -> type[Backend]:
    """The class at `module:Class`.

    Raises:
        UnavailableError: its module does not import.
    """
    module, _, cls = place.partition(":")
    try:
        backend: type[Backend] = getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise UnavailableError(
            f"backend {name} cannot be used: its module does not import",
            str(error),
            "install what is missing, or pick another backend",
        ) from error
    return backend


def takes(cls: type[Backend], key: str, value: str) -> bool:
    """Whether the backend has the option, and the option the value."""
    option = cls.option_types.get(key)
    return option is not None and (not option.texts or value in option.texts)


def each_backend() -> Iterator[tuple[str, Backend | None, Capability]]:
    """Every line of BACKENDS with what its probe says; a broken module is an unusable entry."""
    for name in BACKENDS:
        try:
            backend = parse_backend(name)
        except UnavailableError as error:
            yield name, None, Capability(False, error.what, error.why, error.next)
        else:
            yield name, backend, backend.probe()


def with_precision(text: str, precision: str | None) -> str:
    """`text`, as `--backend` takes it, with the option that gives `precision` (None: as it is).

    Raises:
        UnsupportedError: the backend has no such option, or was asked for another precision.
    """
    if precision is None:
        return text
    backend = parse_backend(text)
    option, given = backend.option_types.get("precision"), backend.given.get("precision")
    if option is None or precision not in option.texts:
        others = _others(backend.name, {"precision": precision})
        raise UnsupportedError(
            f"backend {backend.name} has no precision {precision}",
            f"it can be asked for {', '.join(option.texts)}"
            if option
            else "it computes in what its model and its other options say",
            " or ".join([*(f"use --backend {other}" for other in others), "drop --precision"]),
        )
    if given is not None and given != precision:
        raise UnsupportedError(
            f"--precision {precision} contradicts --backend {text}", f"it says precision={given}",
            "drop one of them",
        )  # fmt: skip
    if given is not None or precision == option.text:
        return text
    return f"{text}{',' if ':' in text else ':'}precision={precision}"


def _others(name: str, options: Mapping[str, str]) -> list[str]:
    """The other backends that take one of these options, as `--backend` writes it."""
    able = []
    for other, place in BACKENDS.items():
        try:
            types = backend_class(other, place).option_types if other != name else {}
        except UnavailableError:
            continue
        able += [
            f"{other}:{key}={value}"
            for key, value in options.items()
            if key in types and value in types[key].texts
        ]
    return able
