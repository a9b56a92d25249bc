"""What a backend is. A new one is one file with `_compile` and `_load`, and a line in BACKENDS.

The public methods own the guards, the cache and the lifecycle; subclasses write only the
underscored ones.
"""

from __future__ import annotations

import importlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from core.errors import AddbenchError, PreconditionError

if TYPE_CHECKING:
    import torch

    from backends.pipeline.pipeline import Pipeline
    from backends.pipeline.recipe import Recipe
    from export.bundle import Bundle, Spec
    from export.lower import Profile


class BackendError(AddbenchError):
    """A compile, a load or a run failed."""


class OutOfMemoryError(BackendError):
    """Host or device memory ran out; a sweep records it as `oom`."""


class NonFiniteError(BackendError):
    """The output holds NaN or infinity; a sweep records it as `non_finite`."""


class UnsupportedError(PreconditionError):
    """A combination that this backend or card does not do; says the nearest that works."""


class UnavailableError(PreconditionError):
    """The backend cannot be used on this machine; carries the probe's words."""


@dataclass(frozen=True)
class Capability:
    """What `probe` found. `why` and `next` speak when `usable` is False."""

    usable: bool
    what: str
    why: str = ""
    next: str = ""
    version: str = ""
    devices: tuple[str, ...] = ()

    def require(self, name: str) -> None:
        if not self.usable:
            raise UnavailableError(
                f"backend {name} cannot be used: {self.what}", self.why, self.next
            )


@dataclass(frozen=True)
class Option:
    """A backend option: its default, what it means and the values it takes (None: any text)."""

    default: str
    help: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Shapes:
    """The sizes one compile is for. A backend with named axes may ignore `batch`."""

    batch: int
    width: int
    height: int


@dataclass(frozen=True)
class Artifact:
    """What a backend compiled for one part: a folder in the cache, or None when nothing is kept."""

    backend: str
    part: str
    key: str
    path: Path | None
    compile_s: float
    cached: bool


IN_ONE_GO = "its parts run without waiting in between, and so lie on the device together"
"""Why a backend whose images are drawn by `backends.pipeline.captured` has no low memory."""


class Session(ABC):
    """A loaded artifact that runs one part: tensors in, tensors out, on `device`."""

    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    device: str = "cpu"
    load_s: float = 0.0
    cyclic: ClassVar[bool] = False
    """Whether closing it leaves its memory in reference cycles, which have to be looked for."""

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if inputs.keys() != self.inputs.keys():
            raise BackendError(
                f"the inputs {sorted(inputs)} do not fit",
                f"this graph takes {sorted(self.inputs)}",
                "pass exactly these",
            )
        return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...

    def holding(self, prompt: torch.Tensor) -> AbstractContextManager[None]:
        """A block in which every run has `prompt` as its `encoder_hidden_states`: a session may
        compute once what depends on it alone. This one does nothing of the kind."""
        return nullcontext()

    def synchronize(self) -> None:
        """Wait for the device. Nothing to wait for on synchronous backends."""

    def close(self) -> None:
        """Release what the session holds. Called once, by the pipeline or the `with` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Backend(ABC):
    """A compiler plus its runtime. Cheap to construct; nothing heavy before `probe` said usable."""

    name: ClassVar[str]
    summary: ClassVar[str]
    option_types: ClassVar[Mapping[str, Option]] = {}
    keeps_artifacts: bool = True
    """False where a compile leaves nothing on disk (torch runs the checkpoint's own modules)."""
    package: ClassVar[str | None] = None
    """Where the rest of its code is (`backends.tensorrt`), if not all is in its own file."""
    static: ClassVar[bool] = False
    """True where an artifact is for one batch though its profile keeps the axis named: the compiler
    is told the number."""
    interpreter: Path | None = None
    """Another environment's python, for packages that clash; the worker runs there."""
    device: str = "cpu"
    asynchronous: bool = False
    resident: str = ""
    """Why a pipeline of it holds all parts as long as it lives; "" where it may load each when it
    is needed and release it after."""
    provenance: ClassVar[str] = "measured"
    """`emulated`: numerics without a speed, and no figure of it is in seconds."""

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        given = dict(options or {})
        for key, value in given.items():
            known = self.option_types.get(key)
            if known is None:
                raise PreconditionError(
                    f"backend {self.name} has no option {key!r}",
                    f"its options: {', '.join(self.option_types) or 'none'}",
                    f"write --backend {self.name}:key=value with one of these{others(key, value)}",
                )
            if known.choices is not None and value not in known.choices:
                raise PreconditionError(
                    f"{self.name}:{key}={value} is not a value of this option",
                    f"it takes: {', '.join(known.choices)}",
                    f"write --backend {self.name}:{key}={known.choices[0]}{others(key, value)}",
                )
        self.given = dict(sorted(given.items()))
        """The options as the user wrote them, sorted: part of a cell's name."""
        self.options = {
            key: given.get(key, option.default) for key, option in sorted(self.option_types.items())
        }

    def effective_options(self) -> dict[str, str]:
        """Every option with the value that counts here: defaults filled in, `auto` resolved."""
        return {
            key: str(thread_count(value)) if key == "threads" else value
            for key, value in self.options.items()
        }

    @abstractmethod
    def probe(self) -> Capability:
        """Usable here? Imports nothing heavy, needs no privileges, never raises."""

    def probe_compiler(self) -> Capability:
        """As `probe`, for compiling alone: a compiler may be where its device is not."""
        return self.probe()

    def parts(self, bundle: Bundle) -> tuple[str, ...]:
        """What it compiles of `bundle`, in the order in which a pipeline runs it: the parts, and
        CONTEXT_PART where it splits the UNet."""
        return tuple(bundle.parts)

    def hardware(self) -> str:
        """What `device` is: a name of devices.csv, or what it calls itself; "" where the machine's
        own record says so (CPU, NVIDIA GPU)."""
        return ""

    def require_low_memory(self) -> None:
        """Refuse to load parts on demand where `resident` says why they stay."""
        if self.resident:
            raise UnsupportedError(
                f"backend {self.name} does not load parts on demand as it was asked for",
                self.resident,
                "drop --low-memory, or use ort or openvino",
            )

    @abstractmethod
    def profile(self, part: str) -> Profile:
        """The form of the graph that this compiler wants."""

    @abstractmethod
    def precision(self, bundle: Bundle) -> str:
        """Dtype of the arithmetic: `fp32`, `fp16`, `int8`."""

    def storage(self, bundle: Bundle) -> str:
        """Dtype of the stored weights."""
        return bundle.dtype

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What an artifact depends on beside graph, profile and options: compiler version, ISA."""

    def depends_on(self, bundle: Bundle, part: str) -> Mapping[str, str]:
        """What an artifact depends on beside the graph and weights of its part, where it is
        quantised: the rest of the bundle, a scheme, its scales."""
        return {}

    def compile_options(self) -> Mapping[str, str]:
        """The options that change the compiled result, and so the cache key."""
        return self.options

    def compile(self, bundle: Bundle, part: str, shapes: Shapes) -> Artifact:
        """Compile one part, or find it in the cache. Locked: two processes compile it once."""
        from backends.artifacts.cache import ArtifactCache

        self.probe_compiler().require(self.name)
        if self.keeps_artifacts and not bundle.has_graphs:
            raise PreconditionError(
                f"backend {self.name} cannot run {bundle.path.name}",
                "it compiles graphs, and this bundle has none: its weights are drawn on the device",
                f"addbench export --model {bundle.name} --weights random",
            )
        started = time.perf_counter()
        cache = ArtifactCache()
        key = cache.key(self, bundle, part, shapes)
        if not self.keeps_artifacts:
            return Artifact(self.name, part, key, None, 0.0, True)
        path, cached = cache.get_or_make(
            key,
            label=f"{bundle.name} {part}",
            make=lambda folder: self._compile(bundle, part, shapes, folder),
        )
        return Artifact(self.name, part, key, path, time.perf_counter() - started, cached)

    def dry_run(self, bundle: Bundle, part: str, shapes: Shapes) -> list[list[str]]:
        """What `compile` does for `part`, as commands of the vendor's own tools: words of each.

        Needs neither the device nor its libraries.
        """
        raise UnsupportedError(
            f"backend {self.name} has no dry run",
            "what it compiles with is not a command-line tool",
            "leave --dry-run out",
        )

    def dry_run_model(
        self,
        model: str,
        weights: str | None,
        dtype: str | None,
        decoders: Sequence[str],
        batches: Sequence[int],
    ) -> list[str] | None:
        """The dry run of a whole model, with or without a bundle: lines to print.

        None for backends that have none but `dry_run`, part by part.
        """
        return None

    def lacks(self) -> list[str]:
        """Values of options that cannot be used here though the backend can: why, what to do."""
        return []

    def remark(self, artifact: Artifact) -> str:
        """What else is known of a compiled part, for a person; "" where nothing is."""
        return ""

    def load(self, bundle: Bundle, artifact: Artifact) -> Session:
        """A session over `artifact`; its `load_s` says how long that took."""
        started = time.perf_counter()
        session = self._load(bundle, artifact)
        session.load_s = time.perf_counter() - started
        return session

    def pipeline(
        self,
        bundle: Bundle,
        decoder: str,
        shapes: Shapes,
        *,
        embedding_cache: int = 0,
        recipe: Recipe | None = None,
    ) -> Pipeline:
        """Prompts to images over sessions, in the backend's `pipeline_class`.

        Args:
            shapes: `batch` is that of the prompts; the pipeline knows which part takes twice that.
            recipe: scheduler and guidance; None for the model's own.
        """
        return self.pipeline_class()(
            self, bundle, decoder, shapes, embedding_cache=embedding_cache, recipe=recipe
        )

    def pipeline_class(self) -> type[Pipeline]:
        """A backend that owns the order of the parts has one of its own."""
        from backends.pipeline.pipeline import Pipeline

        return Pipeline

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        """Write the artifact of `part` into the empty `folder` (backends that keep artifacts)."""
        raise BackendError(f"{self.name} compiles nothing", "it keeps no artifacts", "load it")

    @abstractmethod
    def _load(self, bundle: Bundle, artifact: Artifact) -> Session: ...


def parse_backend(text: str) -> Backend:
    """`name[:key=value,...]` -> an instance. A backend whose module fails to import says why."""
    from backends import BACKENDS

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
    module, _, cls = BACKENDS[name].partition(":")
    try:
        backend: type[Backend] = getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise UnavailableError(
            f"backend {name} cannot be used: its module does not import",
            str(error),
            "install what is missing, or pick another backend",
        ) from error
    return backend(options)


def others(key: str, value: str) -> str:
    """Which backends do take `key=value`, as the end of a sentence; "" where none does."""
    from backends import BACKENDS

    known = []
    for name, place in BACKENDS.items():
        module, _, cls = place.partition(":")
        try:
            types = getattr(importlib.import_module(module), cls).option_types
        except (ImportError, AttributeError):  # not importable here, or made by a function
            continue
        if key in types and value in (types[key].choices or ()):
            known.append(f"{name}:{key}={value}")
    return f"; or use {' or '.join(known)}" if known else ""


def physical_cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0))
    try:
        import psutil
    except (
        ImportError
    ):  # it comes with the project, not with torch: see bench/commands/gpu_check.py
        return allowed
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def thread_count(text: str) -> int:
    """`auto` or a positive number, as the `threads` option of the CPU backends takes it."""
    if text == "auto":
        return physical_cores()
    if not text.isdigit() or int(text) < 1:
        raise PreconditionError(
            f"threads={text} is not a number of threads",
            "it is auto or a positive integer",
            "use threads=auto",
        )
    return int(text)


def each_backend() -> Iterator[tuple[str, Backend | None, Capability]]:
    """Every registered backend with what its probe says; a broken module is an unusable entry."""
    from backends import BACKENDS

    for name in BACKENDS:
        try:
            backend = parse_backend(name)
        except UnavailableError as error:
            yield name, None, Capability(False, error.what, error.why, error.next)
        else:
            yield name, backend, backend.probe()


def stage_parts(parts: Sequence[str], decoder: str) -> tuple[str, ...]:
    """The parts one pipeline needs: every text encoder, the UNet and one decoder."""
    other = {"vae": "taesd_decoder", "taesd": "vae_decoder"}[decoder]
    return tuple(part for part in parts if part != other)


def check_decoder(bundle: Bundle, decoder: str) -> None:
    known = [part.removesuffix("_decoder") for part in bundle.parts if part.endswith("_decoder")]
    if decoder not in known:
        raise PreconditionError(
            f"there is no decoder called {decoder!r} in {bundle.name}",
            f"its decoders: {', '.join(known)}",
            f"use --decoder {known[0]}",
        )
