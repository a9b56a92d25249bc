"""ONNX Runtime on the CPU: the embedded default.

Compiling optimises the graph once, in a process of its own, and stores it with its weights
(`prepack=1`: also as they are laid out for this CPU's kernels, to be mapped into memory).
FP16 weights are computed in FP32, and become that where onnxruntime's own kernels read them;
`precision=int8` and `storage` make the large ones integers (backends/quantised). 3x3 convolutions,
products with FP16 weights, attention and group norms are operators of our own, where a C++ compiler
can build them (backends/onnxrt).
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from backends.artifacts import split_unet
from backends.artifacts.child import run_child, serve
from backends.base import (
    Artifact,
    Backend,
    BackendError,
    Capability,
    Option,
    Session,
    Shapes,
    UnsupportedError,
    installed,
    thread_count,
)
from backends.onnxrt import operators
from backends.onnxrt.libraries import say_once
from backends.onnxrt.session import (
    LEVELS,
    MODEL,
    OrtSession,
    open_session,
    plain_options,
    session_options,
    translate,
)
from backends.quantised import schemes
from core.amounts import bytes_text
from core.files import require_disk
from core.isa import isa
from core.memory import drop_cached, reading_ahead, require_memory
from export.lower import CPU, Profile, lower
from export.models import CONTEXT_PART

if TYPE_CHECKING:
    from backends.pipeline.pipeline import Pipeline
    from export.bundle import Bundle
    from export.lower import Attention, Convolutions, Norms, Products
    from export.lower.convolutions import Sizes

FUSED = replace(CPU, name="ort", attention="multihead", norms="layer")
"""The kernels that onnxruntime has: attention that reads heads where they lie, in place of three
transposes before it and one after; LayerNormalization, in place of nine operators a group norm."""
SMALL = 64 * 2**20
"""Fixed memory of a compile or load beside the weights (bytes)."""
COPIES = 700 * 10**6
"""Bytes for the largest weights while they are laid out for own operators, and for libraries."""


PLAIN_KERNELS = (
    "no C++ compiler, so that convolutions, products, attention and group norms are onnxruntime's"
    " own, which are slower"
)


class OrtBackend(Backend):
    name = "ort"
    package = "backends.onnxrt"
    summary = "ONNX Runtime on the CPU, FP32 arithmetic unless told otherwise: the embedded default"
    option_types: ClassVar[Mapping[str, Option]] = {
        "threads": Option("auto", "intra-op threads (auto: physical cores)", thread_count),
        "level": Option("all", "graph optimisation level", choices=tuple(LEVELS)),
        "prepack": Option(
            False, "keep weights in the kernels' layout: mapped and shared, twice the disk"
        ),
        "arena": Option(True, "keep freed memory for the next call"),
        "spin": Option(
            "in-call",
            "threads spin while they wait for work: in a part's call, always, never",
            choices=("in-call", "always", "never"),
        ),
        "context": split_unet.OPTION,
        "convolutions": Option(
            "auto",
            "by operators that your C++ compiler builds: winograd, those of 3x3 in 16 products for"
            " 36 (F(2x2, 3x3)); tiles, those with FP16 weights on AMX; op, onnxruntime's own",
            choices=("auto", "op", "winograd", "tiles"),
        ),
        "products": Option(
            "auto",
            "linear: those with FP16 weights, which stay so in memory, by an operator that your C++"
            " compiler builds; op, onnxruntime's own, whose weights are FP32",
            choices=("auto", "op", "linear"),
        ),
        "attention": Option(
            "auto",
            "operator: by one that your C++ compiler builds; multihead, onnxruntime's",
            choices=("auto", "multihead", "operator"),
        ),
        "norms": Option(
            "auto",
            "operator: group norms and the SiLU behind them, by an operator that your C++ compiler"
            " builds; layer, onnxruntime's LayerNormalization and what it takes around it",
            choices=("auto", "layer", "operator"),
        ),
        "graph": Option(
            "optimised",
            "optimised: compiled once, as above; canonical: the bundle's own file in a session with"
            " onnxruntime's defaults, as most people run it",
            choices=("optimised", "canonical"),
        ),
        **schemes.OPTIONS,
        "precision": Option(
            "fp32",
            "of products with large weights; int8: activations quantised as they come; bf16: both"
            " sides rounded, with sums in FP32, on AMX or AVX-512-BF16, where weights are stored in"
            " FP16",
            choices=("fp32", "bf16", "int8"),
        ),
        "rest": Option(
            "fp32",
            "at precision=int8, of convolutions and attention, which stay out of the integers: bf16"
            " rounds both sides of their products, on AMX or AVX-512-BF16",
            choices=("fp32", "bf16"),
        ),
    }

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self.plain = self.options["graph"] == "canonical"
        if self.plain:
            self.keeps_artifacts = False
            self.options |= {"spin": "always"}  # onnxruntime's default
            others = sorted(self.given.keys() - {"graph", "threads"})
            if others:
                raise UnsupportedError(
                    f"ort:graph=canonical takes no option {', '.join(others)}",
                    "it is a session with onnxruntime's defaults, to be measured against",
                    f"drop {', '.join(others)}, or drop graph=canonical",
                )
        self.scheme = schemes.scheme_of(self.given, self.options, isa())
        self._choose_operators()

    def _choose_operators(self) -> None:
        """Operators of our own where they can be built and pay; refused where they cannot be had.

        Weights that are laid out when the graph is lowered cannot become integers after it, and
        Winograd's, which grow, are not for those who want a small memory.
        """
        integers = self.scheme is not None and self.scheme.convolutions
        small = self.scheme is not None and not self.scheme.dynamic
        built = operators.compiler() is not None and not self.plain
        vectors = built and {"avx2", "fma", "f16c"} <= set(isa().split())
        tiles = built and operators.may_use_tiles()
        best = "tiles" if tiles else "winograd" if vectors and not small else "op"
        linear, attention = ("linear", "operator") if vectors else ("op", "multihead")
        # Tiles multiply numbers of 16 bits: there onnxruntime's kernel of 8-bit weights stays.
        whole = self.scheme is not None and (tiles or self.scheme.name != "weight-int8")
        for key, chosen, refused in (
            ("convolutions", best, integers),
            ("products", linear, whole),
            ("attention", attention, False),
            ("norms", "operator" if vectors else "layer", False),
        ):
            asked = self.options[key]
            if asked == "auto":
                self.options[key] = "op" if refused else chosen
            elif asked == "tiles" and not tiles:
                raise UnsupportedError(
                    f"ort:{key}=tiles cannot be had",
                    "this CPU has no AMX, Linux does not let it be used, or there is no C++"
                    " compiler",
                    ("apt install g++, or " if operators.no_compiler() else "")
                    + f"drop {key}=tiles",
                )
            elif asked != "op" and refused and self.scheme is not None:
                raise UnsupportedError(
                    f"ort:{key}={asked} does not go with {self.scheme.name}",
                    "the operator takes weights that this makes integers",
                    f"drop {key}={asked}, or drop precision, storage and conv",
                )
        if self.options["precision"] == "bf16":
            wanted = {"convolutions": best, "products": linear, "attention": attention}
            self._check_bf16("precision", built, wanted)
        elif self.options["rest"] == "bf16":
            self._check_bf16("rest", built, {"convolutions": best, "attention": attention})

    def _check_bf16(self, key: str, built: bool, wanted: Mapping[str, str]) -> None:
        """Refuse it where it cannot be had, or where something would compute otherwise."""
        why = None
        if not (built and operators.may_multiply_bf16()):
            why = (
                "this CPU has neither AMX nor AVX-512-BF16, or there is no C++ compiler that knows"
                " them"
            )
        elif key == "precision" and self.scheme is not None:
            why = "with storage, weights are integers, and products in FP32"
        elif key == "rest" and self.options["precision"] != "int8":
            why = "it is of what precision=int8 leaves out, and the precision is another"
        elif any(self.options[key] != value for key, value in wanted.items()):
            named = ", ".join(f"{key}={value}" for key, value in wanted.items())
            why = f"on this CPU what computes in it at its best are {named}"
        if why is not None:
            raise UnsupportedError(
                f"ort:{key}=bf16 cannot be had", why,
                ("apt install g++, or " if operators.no_compiler() else "")
                + ("drop rest=bf16, or add precision=int8" if key == "rest" else
                   "use precision=int8, or drop precision: FP32 is the default"),
            )  # fmt: skip

    @property
    def own_operators(self) -> bool:
        """Whether graphs hold operators of our own."""
        return operators.are_in(self.options)

    def probe(self) -> Capability:
        cpu, gpu = installed("onnxruntime"), installed("onnxruntime-gpu")
        if cpu and gpu:
            return Capability(
                False,
                "onnxruntime and onnxruntime-gpu are both installed",
                "they are the same module: whichever came last has overwritten the other's files",
                "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install -e '.[cpu]'",
            )
        if importlib.util.find_spec("onnxruntime") is None:
            return Capability(
                False, "the package onnxruntime is missing", "", "pip install -e '.[cpu]'"
            )
        if self.scheme and self.scheme.dynamic and "x86_64" in isa() and "avx2" not in isa():
            return Capability(
                False, "this CPU has no fast INT8 arithmetic", "it lacks avx2",
                "drop precision: FP32 is the default",
            )  # fmt: skip
        slower = f"; {PLAIN_KERNELS}: {self.no_compiler}" if self.no_compiler else ""
        return Capability(
            True, self.summary + slower, version=cpu or gpu or "unknown", devices=("cpu",)
        )

    @property
    def no_compiler(self) -> str:
        """Why the kernels are onnxruntime's own where nobody asked for them; "" otherwise."""
        return "" if self.plain or self.own_operators else operators.no_compiler()

    @property
    def row_flags(self) -> tuple[str, ...]:
        return ("no_compiler",) if self.no_compiler else ()

    def build_operators(self) -> None:
        """Have the operators of our own built; where that fails, onnxruntime's kernels stay, as
        without a compiler.

        Raises:
            BackendError: it fails, and they, or BF16, were asked for by name.
        """
        if not self.own_operators:
            return
        try:
            operators.library()
        except BackendError as error:
            if operators.compiler() is not None:
                operators.give_up(error.why)
            self.options |= {key: self.texts[key] for key in operators.PLAIN}
            self._choose_operators()
            if self.own_operators:
                raise

    def compile(self, bundle: Bundle, part: str, shapes: Shapes) -> Artifact:
        self.build_operators()
        return super().compile(bundle, part, shapes)

    def pipeline(self, bundle: Bundle, decoder: str, shapes: Shapes, **rest: Any) -> Pipeline:
        self.build_operators()
        if self.no_compiler:
            say_once(f"ort: {PLAIN_KERNELS}: {self.no_compiler}; apt install g++")
        return super().pipeline(bundle, decoder, shapes, **rest)

    def parts(self, bundle: Bundle) -> tuple[str, ...]:
        return split_unet.with_context(super().parts(bundle), self.options["context"])

    def profile(self, part: str) -> Profile:
        # The integer kernels want a weight whole: one that is cut is not theirs any more.
        form = FUSED if self.scheme else replace(FUSED, gates="halves")
        form = replace(
            form,
            attention=cast("Attention", self.options["attention"]),
            convolutions=cast("Convolutions", self.options["convolutions"]),
            # What becomes integers is laid out after it has.
            products=cast("Products", "op" if self.scheme else self.options["products"]),
            norms=cast("Norms", self.options["norms"]),
            arithmetic="bf16"
            if "bf16" in (self.options["precision"], self.options["rest"])
            else "fp32",
        )
        return replace(form, context=split_unet.form_of(part, self.options["context"]))

    def precision(self, bundle: Bundle) -> str:
        precision = str(self.options["precision"])
        rounded = [key for key in ("precision", "rest") if self.options[key] == "bf16"]
        if rounded and bundle.dtype != "fp16":
            raise UnsupportedError(
                f"ort:{rounded[0]}=bf16 does not go with {bundle.name}",
                f"the operators that compute in it take FP16 weights, and its are {bundle.dtype}",
                "export the model with --dtype fp16",
            )
        return precision

    def storage(self, bundle: Bundle) -> str:
        return bundle.dtype if self.scheme is None else self.scheme.storage

    def remark(self, artifact: Artifact) -> str:
        return schemes.remark(artifact)

    def fingerprint(self) -> dict[str, str]:
        found = {"onnxruntime": self.probe().version, "isa": isa()}
        return found | ({"operators": operators.digest()} if self.own_operators else {})

    def depends_on(self, bundle: Bundle, part: str, shapes: Shapes) -> Mapping[str, str]:
        options = {key: self.texts[key] for key in ("level", "prepack")}
        if self.scheme is None:
            return options
        if self.options["products"] == "linear":  # of the scheme, not of the profile
            options["products"] = "linear"
        # Layers are measured on an image of the whole bundle.
        return options | {"scheme": str(self.scheme), "bundle": bundle.hash}

    def effective_options(self) -> dict[str, str]:
        chosen = (*operators.PLAIN, "spin")
        return super().effective_options() | {key: self.options[key] for key in chosen}

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        require_disk(folder, self.disk_need(bundle, part), f"compiling {bundle.name} {part}")
        require_memory(self.memory_need(bundle, part), f"compiling {bundle.name} {part}")
        job = {
            "graph": str(bundle.source(part).graph),
            "folder": str(folder),
            "options": self.options,
            "profile": asdict(self.profile(part)),
            "bundle": str(bundle.path),
            "part": part,
            "scheme": asdict(self.scheme) if self.scheme else None,
        }
        run_child(
            "backends.ort",
            job,
            folder,
            doing=f"compiling {part} for onnxruntime",
            need_bytes=self.memory_need(bundle, part),
            advice="try ort:level=basic; `addbench verify` checks the bundle",
        )

    def _laid_out(self, bundle: Bundle, part: str) -> Sizes:
        """Weights of convolutions that operators of our own take."""
        from export.lower import convolutions

        form = self.profile(part)
        if form.convolutions == "op" or part == CONTEXT_PART:
            return convolutions.Sizes(0, 0)
        bf16 = form.arithmetic == "bf16"
        return convolutions.sizes(bundle.source(part).graph, form.convolutions, bf16=bf16)

    def _weight_bytes(self, bundle: Bundle, part: str) -> int:
        """Return the bytes of a compiled part's weights."""
        from export.lower import linear

        added = self._laid_out(bundle, part).added
        if self.scheme is not None:
            return added + schemes.weight_bytes(bundle, part, self.scheme)
        stored = split_unet.stored_bytes(bundle, part, self.options["context"])
        widened = stored * (2 if bundle.dtype == "fp16" else 1)
        if self.options["products"] == "op":
            return added + widened
        whole = bundle.source(part)  # of half a UNet: in proportion
        return added + widened - linear.saved(whole.graph) * stored // whole.weight_bytes

    def disk_need(self, bundle: Bundle, part: str) -> int:
        """Bytes a compile writes: the weights, integers and convolutions' twice; then the kernels'
        layout too."""
        copies = 3 if self.options["prepack"] else 1
        weights = (copies + (self.scheme is not None)) * self._weight_bytes(bundle, part)
        return weights + self._laid_out(bundle, part).laid_out + SMALL

    def memory_need(self, bundle: Bundle, part: str) -> int:
        """Peak bytes of a compile.

        Weights that operators of our own take are copied one after another; onnxruntime folds the
        others, in FP32 (SDXL's UNet: 0.7 GB, or 14.1 for 10.3 GB of them).
        """
        from export.lower import linear

        kept = self._laid_out(bundle, part).laid_out
        if self.scheme is None and self.options["products"] == "linear":
            kept += linear.saved(bundle.source(part).graph)
        folded = max(0, self._weight_bytes(bundle, part) - kept)
        need = int(1.4 * folded) + COPIES + SMALL
        if self.scheme is None:
            return need
        return max(need, schemes.recording_bytes(bundle, part, self.scheme))

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        if self.plain:
            return self._load_plain(bundle, artifact.part)
        path = artifact.folder
        weights, mapped = path / f"{MODEL}.data", self.options["prepack"]
        if not mapped:  # mapped weights are the system's to drop
            need = sum(file.stat().st_size for file in path.glob(f"{MODEL}*"))
            require_memory(need, f"loading {bundle.name} {artifact.part}")
        try:
            with contextlib.nullcontext() if mapped else reading_ahead(weights):
                opened = open_session(path / MODEL, self.options)
        except Exception as error:
            raise translate(error, f"loading {artifact.part}") from error
        if mapped:
            # Those are the plain weights, read once and as large as the mapped ones: on a machine
            # with 24 GB they push SDXL's mapped weights out, and the first images wait for disk.
            drop_cached(weights)
        return OrtSession(opened, bundle, artifact.part)

    def _load_plain(self, bundle: Bundle, part: str) -> Session:
        """A session that optimises the bundle's graph itself, each time it is made.

        FP16 weights become FP32 ones while it does: both are in memory for a while (SDXL's UNet:
        13.3 GB).
        """
        import onnxruntime

        doing = f"loading {bundle.name} {part}"
        need = self._weight_bytes(bundle, part)
        instead = f"drop graph=canonical, to load compiled graphs in {bytes_text(need)}"
        require_memory(int(1.3 * need) + SMALL, doing, instead)
        made = plain_options(self)
        graph = str(bundle.parts[part].graph)
        try:
            session = onnxruntime.InferenceSession(graph, made, ["CPUExecutionProvider"])
            return OrtSession(session, bundle, part)
        except Exception as error:
            raise translate(error, doing) from error


def optimise(job: Mapping[str, Any]) -> None:
    """Child process: lower the graph, let onnxruntime optimise it, and write what it made.

    Packing the weights is a second step, from a mapped file: one that does both holds the weights
    twice (SDXL's UNet: 19 GB, not 12).
    """
    folder, options = Path(job["folder"]), job["options"]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lower-") as scratch:
        lowered, plain = Path(scratch) / "lowered", Path(scratch) / "plain"
        prepack = options["prepack"]
        lower(Path(job["graph"]), Profile(**job["profile"]), lowered / MODEL)
        if job["scheme"]:
            small = Path(scratch) / "quantised"
            schemes.quantise(job, lowered / MODEL, small / MODEL)
            shutil.rmtree(lowered)
            lowered = small
        write_optimised(lowered, plain if prepack else folder, options, prepacked=False)
        shutil.rmtree(lowered)
        if prepack:
            write_optimised(plain, folder, options, prepacked=True)


def write_optimised(
    source: Path, target: Path, options: Mapping[str, Any], *, prepacked: bool
) -> None:
    import onnxruntime

    target.mkdir(exist_ok=True)
    made = session_options({**options, "arena": False}, optimise=not prepacked)
    made.optimized_model_filepath = str(target / MODEL)
    # onnxruntime cannot load a Split whose sizes lie outside of the graph; SDXL's context has 140.
    for key, value in {
        "session.optimized_model_external_initializers_file_name": f"{MODEL}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": "16384",
        "session.save_external_prepacked_constant_initializers": str(int(prepacked)),
        "session.disable_prepacking": str(int(not prepacked)),
    }.items():
        made.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(source / MODEL), made, ["CPUExecutionProvider"])


if __name__ == "__main__":
    serve(optimise)
