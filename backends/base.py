"""What a backend is: a compiler plus its runtime. A new one is one file with a class that has
`probe`, `profile`, `precision`, `fingerprint`, `_compile` and `_load`, and one line in
`backends/registry.py`.

The public methods own the guards, the cache and the lifecycle; subclasses write only the
underscored ones. What only some vendors have (a dry run, a compiler without its device) is a small
protocol below: a command asks for it with `isinstance`.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from backends.artifacts.cache import SCHEMA, ArtifactCache
from backends.artifacts.code import code_hash
from backends.pipeline.session import (
    Artifact,
    BackendError,
    NonFiniteError,
    OutOfMemoryError,
    Session,
    Shapes,
    UnsupportedError,
    check_decoder,
    decoders,
    stage_parts,
)
from core.errors import PreconditionError
from core.files import sha256_json

if TYPE_CHECKING:
    from backends.pipeline.pipeline import Pipeline
    from backends.pipeline.recipe import Recipe
    from export.bundle import Bundle
    from export.lower import Profile

__all__ = [
    "Artifact",
    "Backend",
    "BackendError",
    "Capability",
    "NonFiniteError",
    "Option",
    "OptionError",
    "OutOfMemoryError",
    "Session",
    "Shapes",
    "UnavailableError",
    "UnsupportedError",
    "check_decoder",
    "decoders",
    "stage_parts",
]


class UnavailableError(PreconditionError):
    """The backend cannot be used on this machine; carries the probe's reason."""


class OptionError(PreconditionError):
    """A backend has no such option, or the option does not take the text that was given."""


@dataclass(frozen=True)
class Capability:
    """What a probe says. `why` and `next` speak when `usable` is False."""

    usable: bool
    what: str
    why: str = ""
    next: str = ""
    version: str = ""
    devices: tuple[str, ...] = ()

    def require(self, name: str) -> None:
        """Raise UnavailableError where it is not usable."""
        if not self.usable:
            raise UnavailableError(
                f"backend {name} cannot be used: {self.what}", self.why, self.next
            )


@dataclass(frozen=True)
class Option:
    """A backend option: `Option(False, "...")`, `Option(0, "...", int)`, `Option("all", "...",
    choices=...)`.

    Attributes:
        default: its value, or the text that stands for it, where the user gives none.
        help: what it means.
        parse: makes the value of the text; None: the text itself, or 0 and 1 for a bool. It raises
            PreconditionError, or ValueError where there is no more to say.
        choices: the texts that it takes (None: any that `parse` does).
    """

    default: bool | int | float | str
    help: str
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None

    @property
    def text(self) -> str:
        """The default as the command line writes it."""
        if isinstance(self.default, bool):
            return str(int(self.default))
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that it takes; () for any."""
        return self.choices or (("0", "1") if isinstance(self.default, bool) else ())

    def value(self, name: str, text: str) -> Any:
        """The value of `text`, for the option called `name` (`ort:threads`)."""
        if self.texts and text not in self.texts:
            raise OptionError(
                f"{name}={text} is not a value of this option",
                f"it takes: {', '.join(self.texts)}",
                f"write --backend {name}={self.texts[0]}",
            )
        if self.parse is None:
            return text == "1" if isinstance(self.default, bool) else text
        try:
            return self.parse(text)
        except ValueError:
            raise OptionError(
                f"{name}={text} is not a value of this option",
                f"it takes a number, as {self.text}",
                f"write --backend {name}={self.text}",
            ) from None


IN_ONE_GO = "its parts run without waiting in between, and so lie on the device together"
"""Why a backend whose images are drawn by `backends.pipeline.captured` has no low memory."""


class Backend(ABC):
    """A compiler plus its runtime. Cheap to construct; nothing heavy before `probe` said usable."""

    name: ClassVar[str]
    summary: ClassVar[str]
    option_types: ClassVar[Mapping[str, Option]] = {}
    provenance: ClassVar[str] = "measured"
    """`emulated`: numerics without a speed, and no figure of it is in seconds."""
    device: str = "cpu"
    elsewhere: bool = False
    """Whether it computes in other processes, whose memory is not the caller's."""
    keeps_artifacts: bool = True
    """False where a compile leaves nothing on disk (torch runs the checkpoint's own modules)."""
    interpreter: Path | None = None
    """Another environment's python, for packages that clash; the worker runs there."""
    no_pictures: str = ""
    """Why it starts from no picture; "" where it does."""
    resident: str = ""
    """Why a pipeline of it holds all parts as long as it lives; "" where it may load each when it
    is needed and release it after."""

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        given = dict(options or {})
        for key in given.keys() - self.option_types.keys():
            raise OptionError(
                f"backend {self.name} has no option {key!r}",
                f"its options: {', '.join(self.option_types) or 'none'}",
                f"write --backend {self.name}:key=value with one of these",
            )
        self.given = dict(sorted(given.items()))
        """The options as the user wrote them, sorted: part of a cell's name."""
        self.texts = {
            key: given.get(key, option.text) for key, option in sorted(self.option_types.items())
        }
        """Every option as text: as it was written, or its default."""
        self.options: dict[str, Any] = {
            key: self.option_types[key].value(f"{self.name}:{key}", text)
            for key, text in self.texts.items()
        }
        """Every option as a value."""

    @property
    def row_flags(self) -> tuple[str, ...]:
        """What a reader of its rows should know of this machine: flags of `bench.rows.fields`."""
        return ()

    def effective_options(self) -> dict[str, str]:
        """Every option with the value that counts here: defaults filled in, `auto` resolved."""
        threads = {key: str(self.options[key]) for key in self.texts if key == "threads"}
        return self.texts | threads

    # ---- what it says of itself

    @abstractmethod
    def probe(self) -> Capability:
        """Usable here? Imports nothing heavy, needs no privileges, never raises."""

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
        """What an artifact depends on in the machine: compiler version, ISA."""

    def depends_on(self, bundle: Bundle, part: str, shapes: Shapes) -> Mapping[str, str]:
        """What an artifact depends on beside graph, profile and fingerprint: the options that
        change it; where it is quantised, the rest of the bundle too."""
        return self.texts

    def parts(self, bundle: Bundle) -> tuple[str, ...]:
        """What it compiles of `bundle`, in the order in which a pipeline runs it: the parts, and
        CONTEXT_PART where it splits the UNet."""
        return tuple(bundle.parts)

    # ---- what it does

    def compile(self, bundle: Bundle, part: str, shapes: Shapes) -> Artifact:
        """Compile one part, or find it in the cache. Locked: two processes compile it once."""
        probe_compiler(self).require(self.name)
        if self.keeps_artifacts and not bundle.has_graphs:
            raise PreconditionError(
                f"backend {self.name} cannot run {bundle.path.name}",
                "it compiles graphs, and this bundle has none: its weights are drawn on the device",
                f"addbench export --model {bundle.name} --weights random",
            )
        started = time.perf_counter()
        key = artifact_key(self, bundle, part, shapes)
        if not self.keeps_artifacts:
            return Artifact(self.name, part, key, None, 0.0, True)
        path, cached = ArtifactCache().get_or_make(
            key,
            label=f"{bundle.name} {part}",
            make=lambda folder: self._compile(bundle, part, shapes, folder),
        )
        return Artifact(self.name, part, key, path, time.perf_counter() - started, cached)

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
        """Prompts to images over sessions; a backend that owns the order of the parts has a
        pipeline of its own.

        Args:
            shapes: `batch` is that of the prompts; the pipeline knows which part takes twice that.
            recipe: scheduler and guidance; None for the model's own.
        """
        from backends.pipeline.pipeline import Pipeline  # imports torch: not to list backends

        return Pipeline(
            self, bundle, decoder, shapes, embedding_cache=embedding_cache, recipe=recipe
        )

    def require_pictures(self) -> None:
        """Refuse to start from a picture where `no_pictures` says why."""
        if self.no_pictures:
            raise UnsupportedError(
                f"backend {self.name} does not start from a picture",
                self.no_pictures,
                "use ort, openvino or torch",
            )

    def require_low_memory(self) -> None:
        """Refuse to load parts on demand where `resident` says why they stay."""
        if self.resident:
            raise UnsupportedError(
                f"backend {self.name} does not load parts on demand as it was asked for",
                self.resident,
                "drop --low-memory, or use ort or openvino",
            )

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        """Write the artifact of `part` into the empty `folder` (backends that keep artifacts)."""
        raise BackendError(f"{self.name} compiles nothing", "it keeps no artifacts", "load it")

    @abstractmethod
    def _load(self, bundle: Bundle, artifact: Artifact) -> Session: ...


# ---- what some backends do beside that


@runtime_checkable
class CompilesAlone(Protocol):
    """A backend whose compiler may be where its device is not."""

    def probe_compiler(self) -> Capability:
        """Return what `probe` returns, for compiling alone."""


@runtime_checkable
class DryRuns(Protocol):
    """A backend whose compiler is a command-line tool of the vendor's."""

    def dry_run(self, bundle: Bundle, part: str, shapes: Shapes) -> list[list[str]]:
        """The arguments of each command that compiles `part`; needs neither device nor tools."""


@runtime_checkable
class DryRunsModels(Protocol):
    """A backend that writes all that compiling a model takes into one folder."""

    def dry_run_model(
        self,
        model: str,
        weights: str | None,
        dtype: str | None,
        decoders: Sequence[str],
        batches: Sequence[int],
        folder: Path | None = None,
        encoders: Sequence[str] = (),
    ) -> list[str]:
        """Write the folder (None: one below the build root), with or without a bundle; return the
        lines to print."""


@runtime_checkable
class DryRunsInto(Protocol):
    """A backend whose dry run can leave graphs and script in a folder for another machine."""

    def dry_run_into(
        self, bundle: Bundle, parts: Sequence[tuple[str, Shapes]], folder: Path
    ) -> list[str]:
        """Write the folder for parts and their shapes; return the lines to print."""


@runtime_checkable
class NamesHardware(Protocol):
    """A backend whose device the machine's own record does not name."""

    def hardware(self) -> str:
        """A name of devices.csv, or what the device calls itself; "" where it says nothing."""


@runtime_checkable
class Lacks(Protocol):
    """A backend of which some options may be missing though it can be used."""

    def lacks(self) -> list[str]:
        """A line for each value of an option that cannot be used here: why, and what to do. Where
        few can be, those too."""


@runtime_checkable
class Remarks(Protocol):
    """A backend that knows more of a compiled part."""

    def remark(self, artifact: Artifact) -> str:
        """What a person should know of the artifact; "" where that is nothing."""


def probe_compiler(backend: Backend) -> Capability:
    """Whether `backend` can compile here, which may be where its device is not."""
    return backend.probe_compiler() if isinstance(backend, CompilesAlone) else backend.probe()


def artifact_key(backend: Backend, bundle: Bundle, part: str, shapes: Shapes) -> str:
    """The hash of everything that a compiled part depends on."""
    profile = backend.profile(part)
    parts = {
        "schema": SCHEMA,
        "backend": backend.name,
        "graph": bundle.source(part).hash,
        "profile": asdict(profile),
        "fingerprint": dict(backend.fingerprint()),
        "depends_on": dict(backend.depends_on(bundle, part, shapes)),
        "code": code_hash(type(backend).__module__),
        # A profile that keeps the batch axis named gives one artifact for all batches.
        "batch": None if profile.batch is None else shapes.batch,
        "size": [shapes.width, shapes.height],
    }
    return sha256_json(parts)[:24]


# ---- what backends share


def installed(package: str) -> str | None:
    """The version of an installed package; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def physical_cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0))
    try:
        import psutil
    except ImportError:  # it comes with the project, not with torch: bench/commands/gpu_check.py
        return allowed
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def thread_count(text: str | int) -> int:
    """`auto` or a positive number, as the `threads` option of the CPU backends takes it."""
    text = str(text)  # a compile's child process is given a number that was resolved before
    if text == "auto":
        return physical_cores()
    if not text.isdigit() or int(text) < 1:
        raise PreconditionError(
            f"threads={text} is not a number of threads",
            "it is auto or a positive integer",
            "use threads=auto",
        )
    return int(text)


def yes_or_auto(text: str) -> bool | None:
    """`auto`, `0` or `1`: None, False or True."""
    return None if text == "auto" else text == "1"
