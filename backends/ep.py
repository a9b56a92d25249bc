"""Any execution provider of ONNX Runtime: one that is built in, or a plugin.

`ep:provider=webgpu` takes the provider by its name, `ep:library=PATH,name=NAME` a plugin that
nobody here has heard of, and `set.KEY=VALUE` hands it an option of its own. A part is lowered to
the form that the provider takes, in a process of its own, where the provider compiles it (kept,
where it gives that back as EPContext) and where what it leaves to the CPU is counted.

Tensors come from the host's memory and go back to it with every part; a backend that is written for
one device (cuda, trt) keeps them there.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from backends.artifacts.child import run_child, serve
from backends.base import (
    Artifact,
    Backend,
    BackendError,
    Capability,
    Option,
    OptionError,
    Session,
    Shapes,
    UnavailableError,
    UnsupportedError,
    installed,
    thread_count,
)
from backends.onnxrt import providers
from backends.onnxrt.providers import PROVIDERS, Placement, Provider
from backends.onnxrt.session import MODEL, OrtSession, translate
from backends.onnxrt.vulkan import vulkan_devices
from core.errors import AddbenchError
from core.files import read_json, require_disk, sha256_file, write_json
from core.isa import isa
from core.memory import require_memory
from export.lower import CANONICAL_OPSET, Profile, lower

if TYPE_CHECKING:
    from export.bundle import Bundle
    from export.lower import Attention, Norms

PLACEMENT = "placement.json"
OWN = "set."
"""What an option of the provider's own begins with."""
NEEDS = {("attention", "op"): 23, ("norms", "op"): 21, ("norms", "layer"): 17}
"""(option, value) -> the first opset that has the operators."""
OLDER = {"attention": ("matmul",), "norms": ("layer", "decomposed")}
"""Option -> its forms for an opset that has no operator for it, the best first."""
SMALL = 64 * 2**20
"""Fixed memory of a compile or load beside the weights (bytes)."""


def opset_number(text: str) -> int | None:
    """`auto` (None) or an opset that graphs can be lowered to."""
    if text == "auto":
        return None
    if text.isdigit() and 16 <= int(text) <= CANONICAL_OPSET:
        return int(text)
    raise OptionError(
        f"opset={text} is not an opset that graphs are lowered to",
        f"those are 16 to {CANONICAL_OPSET}",
        "write opset=17, or leave it out for the provider's own",
    )


@dataclass(frozen=True)
class Target:
    """A provider as it is here.

    Attributes:
        device: the plugin's device; None for a provider that is built in.
        version: of the package, the plugin or onnxruntime, whichever brings it.
        runtime: the version of onnxruntime, whichever package installed it.
        software: the name of the software device that computes for it; "" on a real one.
    """

    ep: str
    device: Any
    version: str
    runtime: str
    software: str = ""

    @property
    def kind(self) -> str:
        """`cpu`, `gpu`, `npu`; "" where onnxruntime does not say."""
        if self.device is None:
            return "cpu" if self.ep == providers.HOST else ""
        return providers.kind(self.device)

    @property
    def text(self) -> str:
        """What it computes on."""
        if self.software or self.device is None:
            return self.software or self.ep
        return providers.device_text(self.device)


class EpBackend(Backend):
    name = "ep"
    summary = "any execution provider of ONNX Runtime, built in or a plugin, by its name"
    option_types: ClassVar[Mapping[str, Option]] = {
        "provider": Option("cpu", f"its name: {', '.join(PROVIDERS)}, or any that is built in"),
        "library": Option("", "the library of a plugin, in place of a provider's name"),
        "name": Option("", "the provider's name in that library, where it has several"),
        "device": Option("auto", "gpu, npu, cpu or a number of those that the provider offers"),
        "fallback": Option(
            "yes",
            "what the provider does not take runs on the CPU, and is counted; no: it is refused",
            choices=("yes", "no"),
        ),
        "precision": Option(
            "auto",
            "of the arithmetic: FP32, that of the bundle's graph, or what suits the provider",
            choices=("auto", "fp32", "graph"),
        ),
        "opset": Option("auto", "of the graphs, 16 to 23", opset_number),
        "attention": Option(
            "auto",
            "ONNX's operator (opset 23), spelt out, or onnxruntime's own MultiHeadAttention",
            choices=("auto", "op", "matmul", "multihead"),
        ),
        "norms": Option(
            "auto",
            "group norms: ONNX's operator (opset 21), by LayerNormalization, or spelt out",
            choices=("auto", "op", "layer", "decomposed", "instance"),
        ),
        "batch": Option(
            "auto", "a number in the graph, or a named axis", choices=("auto", "fixed", "named")
        ),
        "context": Option(
            "auto",
            "keep what the provider compiled (EPContext)",
            choices=("auto", "yes", "no"),
        ),
        "threads": Option("auto", "of what runs on the CPU (auto: physical cores)", thread_count),
    }

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        own = {key: Option("", "the provider's own") for key in options or {} if is_own(key)}
        self.option_types = {**type(self).option_types, **own}  # type: ignore[misc]
        super().__init__(options)
        self.own = {key.removeprefix(OWN): self.options[key] for key in own}
        self.provider = self._named_provider()
        self.form = self._form()
        self.placements: dict[str, Placement] = {}
        """Where the nodes of each part that was compiled went."""
        self.told: set[str] = set()
        """Parts of which it was said, when they were loaded, that nodes of them run on the CPU."""

    def _named_provider(self) -> Provider:
        library, name = self.options["library"], self.options["name"]
        if library and "provider" in self.given:
            raise OptionError(
                "ep takes a provider or a library",
                f"provider={self.options['provider']} says where the library is, and so does"
                f" library={library}",
                "drop one of them",
            )
        if name and not library:
            raise OptionError(
                f"ep:name={name} has no library",
                "it is the name of a provider in the library that is given by its path",
                f"write ep:library=PATH,name={name}, or ep:provider={name}",
            )
        if not library:
            return providers.find_provider(self.options["provider"])
        listed = next((each for each in PROVIDERS.values() if each.ep == name), None)
        return listed or Provider(name or Path(library).stem, name, precision="fp32")

    def _form(self) -> Profile:
        """The provider's profile with what was asked for; refused where they do not go together."""
        form, asked = self.provider.profile, self.options
        limit, forms = asked["opset"] or CANONICAL_OPSET, {}
        for key, own in (("attention", form.attention), ("norms", form.norms)):
            choices = (own, *OLDER[key]) if asked[key] == "auto" else (asked[key],)
            able = (each for each in choices if NEEDS.get((key, each), 16) <= limit)
            forms[key] = next(able, choices[0])
        attention, norms = forms["attention"], forms["norms"]
        least = max(NEEDS.get((key, value), 16) for key, value in forms.items())
        opset = asked["opset"] or max(form.opset, least)
        if opset < least:
            raise UnsupportedError(
                f"ep:opset={opset} does not go with attention={attention},norms={norms}",
                f"opset {least} is the first that has these operators",
                "use attention=matmul,norms=decomposed, which every opset has",
            )
        fp32 = asked["precision"] == "fp32" or (
            asked["precision"] == "auto" and self.provider.precision == "fp32"
        )
        named = asked["batch"] == "named" or (asked["batch"] == "auto" and form.batch is None)
        return replace(
            form,
            name=f"ep-{self.provider.name}",
            opset=opset,
            attention=cast("Attention", attention),
            norms=cast("Norms", norms),
            dtype="float32" if fp32 else "as-is",
            batch=None if named else 1,
        )

    # ---- what it is here

    @cached_property
    def target(self) -> Target:
        """The provider as it is here.

        Raises:
            UnavailableError: it is not installed, or there is nothing that it could run on.
            BackendError: its library is none for this onnxruntime.
            UnsupportedError: it has no such device.
        """
        if importlib.util.find_spec("onnxruntime") is None:
            raise UnavailableError(
                "the package onnxruntime is missing", "", "pip install -e '.[cpu]'"
            )
        import onnxruntime

        provider, asked, runtime = self.provider, self.options["device"], onnxruntime.__version__
        library = self._library()
        if library is None:
            if provider.ep not in onnxruntime.get_available_providers():
                raise UnavailableError(
                    f"the provider {provider.name} is not installed",
                    f"it is not built into this onnxruntime {runtime}"
                    + (f", and its plugin's package {provider.package} is missing"
                       if provider.package else "")
                    + (f"; it needs {provider.where}" if provider.where else ""),
                    provider.how,
                )  # fmt: skip
            host = provider.ep == providers.HOST
            if asked != "auto" and not (asked == "cpu" if host else asked.isdigit()):
                raise UnsupportedError(
                    f"the provider {provider.name} has no device {asked}",
                    "it computes on the host's CPU" if host
                    else "it is built into onnxruntime, which tells its devices by number alone",
                    "drop device" if host else "use device=0",
                )  # fmt: skip
            return Target(provider.ep, None, runtime, runtime)
        offered = providers.plugin_devices(
            provider.ep or provider.name, library, tuple(provider.environment.items())
        )
        wanted = self.options["name"] or provider.ep or (offered[0].ep_name if offered else "")
        devices = [each for each in offered if each.ep_name == wanted]
        if not devices:
            names = sorted({each.ep_name for each in offered})
            raise UnavailableError(
                f"the provider {wanted or provider.name} offers no device here",
                f"the library has {', '.join(names)}" if names
                else f"{library.name} was loaded, and takes none of the devices here"
                + (f"; it needs {provider.where}" if provider.where else ""),
                f"write name={names[0]}" if names
                else "use the backend openvino, which is OpenVINO itself on any x86-64 CPU"
                if provider.name == "openvino"
                else "`addbench backends` says which providers there are",
            )  # fmt: skip
        device = providers.pick_device(devices, asked)
        version = installed(provider.package) if provider.package else None
        version = version or dict(device.ep_metadata).get("version", "") or runtime
        return Target(wanted, device, version, runtime, self._software(device))

    def _library(self) -> Path | None:
        """The plugin's library; None where the provider is built in, or not here."""
        if not self.options["library"]:
            return providers.plugin_library(self.provider)
        library = Path(self.options["library"]).expanduser().resolve()
        if library.is_file():
            return library
        raise UnavailableError(
            f"there is no library at {library}",
            "library is the path of a plugin's .so, .dylib or .dll",
            "give the file's path, or the provider's name: `addbench backends` lists them",
        )

    def _software(self, device: Any) -> str:
        """The name of what computes on the host's CPU for a provider of another device."""
        if not self.provider.emulated:
            return ""
        if self.provider.name != "webgpu":
            return self.provider.emulated if providers.kind(device) == "cpu" else ""
        if sys.platform != "linux":
            return ""
        offered = vulkan_devices()
        able = [each for each in offered if not each.lacks]
        if not able:
            raise UnavailableError(
                "WebGPU has no device of Vulkan to run on",
                "; ".join(f"{each.name} lacks {', '.join(each.lacks)}" for each in offered)
                or "the loader libvulkan.so.1 or a driver is missing",
                "install your GPU's Vulkan driver, or a software one: mesa-vulkan-drivers of"
                " Mesa 25 (Debian 12 has it in backports)",
            )
        return able[0].name if all(each.software for each in able) else ""

    def probe(self) -> Capability:
        try:
            target = self.target
        except AddbenchError as error:
            return Capability(False, error.what, error.why, error.next)
        except Exception as error:  # a plugin's package may raise anything
            return Capability(
                False, f"the provider {self.provider.name} does not load",
                f"{type(error).__name__}: {error}"[:500],
                f"pip install --upgrade onnxruntime {self.provider.package}".rstrip(),
            )  # fmt: skip
        emulated = ", emulated on this CPU: numerics, never a speed" if target.software else ""
        summary = self.summary if not self.given else f"{target.ep} on {target.text}{emulated}"
        return Capability(True, summary, version=target.version, devices=(self.device,))

    @property
    def provenance(self) -> str:  # type: ignore[override]
        return "emulated" if self.probe().usable and self.target.software else "measured"

    @property
    def device(self) -> str:  # type: ignore[override]
        try:
            target = self.target
        except Exception:  # the probe says why
            return "unknown"
        if target.software:
            return self.provider.emulated
        return self.provider.device or target.kind or self.provider.name

    def hardware(self) -> str:
        """What the device calls itself; "" for the host's CPU, which the environment names."""
        if not self.probe().usable or self.device == "cpu":
            return ""
        return "" if self.target.device is None else self.target.text

    def lacks(self) -> list[str]:
        """A line for each provider: the package or build that has it, or what brings it."""
        lines = []
        for name, provider in PROVIDERS.items():
            probe = EpBackend({"provider": name}).probe()
            if probe.usable:
                lines.append(f"provider={name}: {probe.version}, {', '.join(probe.devices)}")
            else:
                here = f" ({probe.why})" if providers.plugin_library(provider) else ""
                needs = f"; it needs {provider.where}" if provider.where and not here else ""
                lines.append(f"provider={name}: {probe.what}{here}{needs}; next: {probe.next}")
        return lines

    # ---- what it compiles

    @property
    def row_flags(self) -> tuple[str, ...]:
        return ("cpu_fallback",) if any(each.left for each in self.placements.values()) else ()

    @property
    def keeps_context(self) -> bool:
        """Whether artifacts hold what the provider compiled."""
        asked, plugin = self.options["context"], self.target.device is not None
        return self.provider.context and plugin if asked == "auto" else bool(asked == "yes")

    def profile(self, part: str) -> Profile:
        return self.form

    def precision(self, bundle: Bundle) -> str:
        # onnxruntime's own kernels compute an FP16 graph in FP32, with casts.
        host = self.provider.ep == providers.HOST
        return "fp32" if host or self.form.dtype == "float32" else bundle.dtype

    def own_options(self) -> dict[str, str]:
        """The options of the provider's own: as given, and what it needs to keep to FP32."""
        options = {**self.provider.options}
        number = self.options["device"]
        if self.target.device is None and number.isdigit():
            options["device_id"] = number
        if self.provider.name == "openvino" and self.form.dtype == "float32":
            # Its own choice is BF16 on a CPU that has it, and FP16 on a GPU.
            hint = f'{{"{self.target.kind.upper()}":{{"INFERENCE_PRECISION_HINT":"f32"}}}}'
            plugin = self.target.device is not None
            options |= {"load_config": hint} if plugin else {"precision": "FP32"}
        return options | self.own

    def fingerprint(self) -> dict[str, str]:
        target = self.target
        parts = {
            "onnxruntime": target.runtime,
            "provider": target.ep,
            "version": target.version,
            "device": target.text,
        }
        if self.options["library"] and (library := self._library()):
            parts["library"] = sha256_file(library)
        return parts | ({"isa": isa()} if target.kind == "cpu" else {})

    def depends_on(self, bundle: Bundle, part: str, shapes: Shapes) -> Mapping[str, str]:
        return {"context": str(self.keeps_context), **self.own_options()}

    def compile(self, bundle: Bundle, part: str, shapes: Shapes) -> Artifact:
        artifact = super().compile(bundle, part, shapes)
        placement = self.placement(artifact)
        if self.options["fallback"] == "no":
            placement.require_whole(
                self.target.ep,
                part,
                "drop fallback=no, or try another form: attention=matmul, norms=decomposed,"
                " opset=17",
            )
        self.placements[part] = placement
        return artifact

    def placement(self, artifact: Artifact) -> Placement:
        """Where the nodes of a compiled part went."""
        record = read_json(artifact.folder / PLACEMENT)
        return Placement(record["taken"], record["left"], tuple(record["names"]))

    def remark(self, artifact: Artifact) -> str:
        return self.placement(artifact).text

    def _weight_bytes(self, bundle: Bundle, part: str) -> int:
        wide = self.form.dtype == "float32" and bundle.dtype == "fp16"
        return bundle.parts[part].weight_bytes * (2 if wide else 1)

    def memory_need(self, bundle: Bundle, part: str) -> int:
        """Estimated peak bytes of a compile: the weights, and a provider's own copy of them."""
        return 2 * self._weight_bytes(bundle, part) + 4 * SMALL

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        doing = f"compiling {bundle.name} {part} for {self.target.ep}"
        require_disk(folder, self._weight_bytes(bundle, part) + SMALL, doing)
        require_memory(self.memory_need(bundle, part), doing)
        form = self.profile(part)
        job = {
            "graph": str(bundle.parts[part].graph),
            "folder": str(folder),
            "options": self.given,
            "profile": asdict(form if form.batch is None else replace(form, batch=shapes.batch)),
        }
        run_child(
            "backends.ep",
            job,
            folder,
            doing=doing,
            need_bytes=self.memory_need(bundle, part),
            advice="try another form (attention=matmul, norms=decomposed, opset=17) or context=no",
        )

    def open(self, model: Path) -> Any:
        """An onnxruntime session on the provider."""
        target = self.target
        session = providers.open_session(
            model, target.ep, target.device, self.own_options(), self.options["threads"]
        )
        if target.ep not in session.get_providers():
            raise BackendError(
                f"onnxruntime did not take {target.ep}",
                f"the session has {', '.join(session.get_providers())} alone",
                self.provider.how,
            )
        return session

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        doing = f"loading {bundle.name} {artifact.part}"
        require_memory(self._weight_bytes(bundle, artifact.part), doing)
        try:
            session = self.open(artifact.folder / MODEL)
        except BackendError:
            raise
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise translate(error, doing) from error
        if (placement := self.placement(artifact)).left and artifact.part not in self.told:
            self.told.add(artifact.part)
            print(f"ep: {artifact.part}: {placement.text}", file=sys.stderr, flush=True)
        return EpSession(session, bundle, artifact.part)


class EpSession(OrtSession):
    """An onnxruntime session on host tensors; a graph with a number for its batch says so."""

    def __init__(self, session: Any, bundle: Bundle, part: str) -> None:
        super().__init__(session, bundle, part)
        shapes = {each.name: tuple(each.shape) for each in session.get_inputs()}
        self.inputs = {
            name: replace(spec, shape=(shapes[name][0], *spec.shape[1:]))
            if isinstance(shapes[name][0], int) else spec
            for name, spec in self.inputs.items()
        }  # fmt: skip


def is_own(key: str) -> bool:
    """Whether an option is the provider's own."""
    return key.startswith(OWN) and len(key) > len(OWN)


def compile_part(job: Mapping[str, Any]) -> None:
    """Child process: lower the graph, have the provider take it, and count what it leaves."""
    folder, backend = Path(job["folder"]), EpBackend(job["options"])
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lower-") as scratch:
        lowered = Path(scratch) / MODEL if backend.keeps_context else folder / MODEL
        lower(Path(job["graph"]), Profile(**job["profile"]), lowered)
        if backend.keeps_context:
            keep_context(backend, lowered, folder / MODEL)
        session = backend.open(folder / MODEL)
        write_json(folder / PLACEMENT, asdict(Placement.of(session, backend.target.ep)))


def keep_context(backend: EpBackend, lowered: Path, out: Path) -> None:
    """Write the graph with what the provider compiled in place of the nodes that it took."""
    import onnxruntime

    target, own = backend.target, backend.own_options()
    options = providers.new_options(target.ep, target.device, own)
    if target.device is None:
        options.add_provider(target.ep, own)
    compiler = onnxruntime.ModelCompiler(
        options,
        str(lowered),
        embed_compiled_data_into_model=False,
        external_initializers_file_path=f"{MODEL}.data",
        flags=onnxruntime.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED,
    )
    compiler.compile_to_file(str(out))


if __name__ == "__main__":
    serve(compile_part)
