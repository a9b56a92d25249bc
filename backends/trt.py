"""TensorRT 10.1 and newer: one plan for each part, built on the GPU that will run it.

The rest of its code is in backends/tensorrt/.

No GPU was at hand when this was written. What ran on a CPU: every line of it against a test double
of TensorRT's API, and that double against NVIDIA's type stubs; all calls against those stubs and
against the sources of the Python bindings from 10.1 to 11.1. What did not run: TensorRT itself. So
whether its parser takes every node, whether a capture works, and any speed are still to be seen.

`precision=fp8` and `int8`: Q/DQ pairs around the UNet's large layers (export/quantize/qdq.py), what
else there is stays FP16. The pairs are as the sources of NVIDIA's parser want them: a constant,
positive scale in the dtype of what it scales, a zero point in that of the stored numbers. What they
cost in accuracy is measured on the CPU (backends/check/scales_parity.py) and lies beside the plan.

`context=split` is the default, since a plan does not know the step count that it will run: SDXL's
keys and values take a step 0.68 GB of weights to read (0.16 ms at an H200's 4.3 TB/s), and 26 MB an
image where they are handed over. At one step the handing over is what it costs, from the second on
it pays.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from backends.artifacts import split_unet
from backends.artifacts.split_unet import HALVES
from backends.base import (
    IN_ONE_GO,
    Artifact,
    Backend,
    BackendError,
    Capability,
    Option,
    Session,
    Shapes,
    UnsupportedError,
)
from backends.check.scales_parity import PARITY, report
from backends.nvidia.driver import Gpu
from backends.quantised.scales import (
    Quantisation,
    calibration_file,
    comparison,
    known_comparison,
    quantisation,
    scales,
)
from backends.tensorrt.probe import (
    ATTENTION,
    OLDEST_FOR,
    capability,
    library_version,
    loaded_version,
    modelopt_problems,
    release,
    require_gpu,
)
from backends.tensorrt.request import (
    GRAPH,
    LOG,
    PAIRS,
    PLAN,
    RECORD,
    lower_command,
    make_request,
    parse_batch,
    parse_gigabytes,
    profile_for,
    scales_command,
    trtexec,
)
from core.files import build_root, read_json, require_disk, write_json
from core.memory import give_memory_back, require_memory
from export.lower import Profile, lower
from export.quantize.calibration import command as calibrate_command
from export.quantize.qdq import SCALES, insert, scheme_of

if TYPE_CHECKING:
    from backends.pipeline.pipeline import Pipeline
    from backends.tensorrt.device import CudaDevice, Scratch
    from export.bundle import Bundle

SMALL = 256 * 2**20
"""Bytes of a build beside the weights: TensorRT's libraries and kernels."""


class TrtBackend(Backend):
    name = "trt"
    summary = "TensorRT on an NVIDIA GPU, in the graph's dtypes, the image as one CUDA graph"
    device = "cuda"
    resident = IN_ONE_GO
    option_types: ClassVar[Mapping[str, Option]] = {
        "batch": Option(
            "static", "static: a plan for each batch size; 1-4: one plan for a range", parse_batch
        ),
        "level": Option(3, "builder optimisation level", int, ("0", "1", "2", "3", "4", "5")),
        "workspace": Option(
            "auto", "scratch memory of one layer, in GiB (auto: the GPU's memory)", parse_gigabytes
        ),
        "graph": Option(
            "image",
            "one CUDA graph for the whole image, one for each part, or none",
            choices=("image", "part", "none"),
        ),
        "streams": Option(True, "text encoders beside each other, on two streams"),
        "attention": Option(
            "auto",
            "form in the graph (auto: the operator from TensorRT 10.14 on)",
            choices=("auto", "op", "matmul"),
        ),
        "refit": Option(False, "plans without weights, put in from the bundle at load"),
        "hardware": Option(
            "none", "plans for other GPUs too, not as fast", choices=("none", "ampere+")
        ),
        "version_compatible": Option(
            False, "plans for other versions of TensorRT too, not as fast"
        ),
        "context": replace(split_unet.OPTION, default="split"),
        "precision": Option(
            "auto",
            "of the UNet's large layers (auto: the graph's dtype); fp8 and int8 by nvidia-modelopt"
            " from a calibration file, not run on hardware",
            choices=("auto", "fp16", "fp8", "int8"),
        ),
        "calibration": Option(
            "auto",
            "the file (auto: where `addbench calibrate` puts the bundle's)",
        ),
    }

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        check_precision(self.options)
        self._cuda: CudaDevice | None = None
        self._scratch: dict[str, Scratch] = {}

    def probe(self) -> Capability:
        return capability(self.summary, self.options["precision"])

    def lacks(self) -> list[str]:
        return [
            f"precision=fp8 and int8: {problem.why}: {problem.next}"
            for problem in modelopt_problems()
        ]

    def release(self) -> tuple[int, int]:
        """(10, 14) for 10.14; the newest that is known here where TensorRT is not installed."""
        found = library_version()
        if found is None:
            return ATTENTION
        return release(loaded_version() if found == "unknown" else found)

    def profile(self, part: str) -> Profile:
        return profile_for(part, self.release(), self.options)

    def parts(self, bundle: Bundle) -> tuple[str, ...]:
        return split_unet.with_context(super().parts(bundle), self.options["context"])

    def precision(self, bundle: Bundle) -> str:
        asked = str(self.options["precision"])
        return bundle.dtype if asked == "auto" else asked

    def storage(self, bundle: Bundle) -> str:
        """Quantised weights are folded: a plan holds the UNet's large layers in 8 bits."""
        return self.precision(bundle)

    def fingerprint(self) -> dict[str, str]:
        gpu = require_gpu()
        return {
            "tensorrt": loaded_version(),
            "gpu": gpu.name,
            "compute_capability": gpu.architecture,
        }

    def depends_on(self, bundle: Bundle, part: str, shapes: Shapes) -> Mapping[str, str]:
        """Precision is in the scales, the context in the profile: parts that they do not touch
        share their plans."""
        elsewhere = ("graph", "streams", "precision", "calibration", "context")
        options = {key: text for key, text in self.texts.items() if key not in elsewhere}
        asked = self.quantisation(bundle)
        return options | asked.key if asked and part in HALVES else options

    def quantisation(self, bundle: Bundle) -> Quantisation | None:
        """Scheme and calibration file that the options ask for; None for the graph as it is.

        Raises:
            PreconditionError: it cannot be had for `bundle`, see `scales.quantisation`.
        """
        precision = self.options["precision"]
        if precision in ("auto", bundle.dtype):
            return None
        if precision == "fp16":
            raise UnsupportedError(
                f"precision=fp16 does not fit {bundle.path.name}",
                f"a plan computes in the graph's dtypes, and they are {bundle.dtype} here",
                f"addbench export --model {bundle.name} --dtype fp16",
            )
        return quantisation(bundle, precision, self.options["calibration"])

    # ---- building

    def dry_run(self, bundle: Bundle, part: str, shapes: Shapes) -> list[list[str]]:
        """What `compile` does for `part`, as commands: lower the graph, `trtexec`, clear up.

        The lowered graph's weights are a hard link to the bundle's, which onnx does not read from
        a file with several names: it is not to stay.
        """
        source, version = bundle.source(part).graph, self.release()
        request = make_request(bundle, part, shapes, self.options, version)
        where = self.texts["batch"] if request.shapes else f"batch{shapes.batch}"
        precision = self.options["precision"]
        quantised = part in HALVES and precision in OLDEST_FOR
        where = f"{precision}-{where}" if quantised else where
        root = build_root() / "trtexec"
        folder, timing = root / f"{bundle.path.name}-{part}-{where}", root / "timing.cache"
        graph = folder / GRAPH
        if not quantised:
            return [
                lower_command(source, request.profile, graph),
                trtexec(request, version, graph, folder / PLAN, timing),
                ["rm", "-f", str(graph), f"{graph}.data"],
            ]
        recorded = calibration_file(bundle, self.options["calibration"])
        made = root / f"{bundle.path.name}-{precision}"
        scales = [
            [*shlex.split(calibrate_command(bundle)), "--out", str(recorded)],
            scales_command(source, scheme_of(precision).name, recorded, made),
        ]
        first = next(one for one in self.parts(bundle) if one in HALVES)
        return [
            *(scales if part == first else []),  # the other half takes them too
            lower_command(source, request.profile, graph, made / SCALES),
            trtexec(request, version, graph, folder / PLAN, timing),
            ["rm", "-rf", str(graph), f"{graph}.data", str(folder / PAIRS)],
        ]

    def dry_run_into(
        self, bundle: Bundle, parts: Sequence[tuple[str, Shapes]], folder: Path
    ) -> list[str]:
        from backends.tensorrt.dryrun import write

        return write(self, bundle, parts, folder)

    def compile(self, bundle: Bundle, part: str, shapes: Shapes) -> Artifact:
        """Compile as every backend; a comparison that a plan lacks is made once it can be."""
        artifact = super().compile(bundle, part, shapes)
        record = artifact.folder / PARITY
        if artifact.cached and record.exists() and "skipped" in read_json(record):
            key = read_json(record.with_name(RECORD))["scales"]
            made, asked = artifact.folder.with_name(key), self.quantisation(bundle)
            if asked and made.exists() and known_comparison(key) is None:
                comparison(bundle, asked, made)
        return artifact

    def timing_cache(self, gpu: Gpu) -> Path:
        name = f"trt-{loaded_version()}-{gpu.name}-{gpu.architecture}".replace(" ", "_")
        return build_root() / "timing" / f"{name.replace('/', '_')}.cache"

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        version, gpu = loaded_version(), require_gpu()  # imports tensorrt, or says why not
        from backends.tensorrt.build import build
        from backends.tensorrt.log import Log

        doing = f"building {bundle.name} {part} with TensorRT"
        weights = split_unet.stored_bytes(bundle, part, self.options["context"])
        require_disk(folder, weights + SMALL, doing)
        # The parser's copy and the builder's; not measured.
        require_memory(2 * weights + SMALL, doing)
        request = make_request(bundle, part, shapes, self.options, release(version))
        asked = self.quantisation(bundle) if part in HALVES else None
        made = scales(bundle, asked) if asked else None
        # Of the whole UNet: it lies beside the plan of what runs at every step.
        compared = comparison(bundle, asked, made) if asked and made and part == "unet" else None
        log, started = Log(folder / LOG), time.perf_counter()
        try:
            with lowered(bundle, part, request.profile, made) as graph:
                build(request, graph, folder / PLAN, self.timing_cache(gpu), log)
        except BackendError as error:
            kept = build_root() / "logs" / f"trt-{bundle.path.name}-{part}.log"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text((folder / LOG).read_text())
            raise type(error)(error.what, error.why, f"{error.next}; the log is {kept}") from error
        finally:
            log.close()
            give_memory_back()
        record = {
            "schema": 1,
            "request": request.record(),
            "shapes": [shapes.batch, shapes.width, shapes.height],
            "fingerprint": self.fingerprint(),
            "driver_cuda": ".".join(map(str, gpu.cuda)),
            "seconds": round(time.perf_counter() - started, 3),
        }
        if asked and made:
            record |= {"quantisation": asked.key, "scales": made.name}
        if compared:
            write_json(folder / PARITY, compared)
        write_json(folder / RECORD, record)

    def remark(self, artifact: Artifact) -> str:
        """What the CPU made of the quantised UNet, where that is what the plan is of."""
        folder = artifact.folder
        if not (folder / PARITY).exists():
            return ""
        later = known_comparison(read_json(folder / RECORD)["scales"])  # it may have been left out
        return report(later or read_json(folder / PARITY))

    # ---- running

    def load(self, bundle: Bundle, artifact: Artifact) -> Session:
        """Load as every backend; a plan that TensorRT does not take is built again, once."""
        loaded_version()
        from backends.artifacts.cache import ArtifactCache
        from backends.tensorrt.session import StalePlanError

        path = artifact.folder
        inode, (batch, width, height) = path.stat().st_ino, read_json(path / RECORD)["shapes"]
        try:
            return super().load(bundle, artifact)
        except StalePlanError as error:
            print(f"{artifact.part}: {error.what} ({error.why}); built again", file=sys.stderr)
        ArtifactCache().discard(path, inode)
        again = self.compile(bundle, artifact.part, Shapes(batch, width, height))
        return super().load(bundle, again)

    def pipeline(self, bundle: Bundle, decoder: str, shapes: Shapes, **rest: Any) -> Pipeline:
        """All stages on the device without waiting in between; by default as one CUDA graph."""
        from backends.pipeline.captured import DevicePipeline

        self.quantisation(bundle)  # refused before a plan is built
        return DevicePipeline(
            self,
            bundle,
            decoder,
            shapes,
            capture=self.options["graph"] == "image",
            parallel_text=self.options["streams"],
            **rest,
        )

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        from backends.tensorrt.device import CudaDevice, Scratch
        from backends.tensorrt.log import Log
        from backends.tensorrt.session import TrtSession, load_engine, refit

        path, part, log = artifact.folder, artifact.part, Log()
        engine = load_engine(path / PLAN, log, foreign_code=self.options["version_compatible"])
        if self.options["refit"]:
            profile = Profile(**read_json(path / RECORD)["request"]["profile"])
            with lowered(bundle, part, profile) as graph:
                refit(engine, graph, log)
            give_memory_back()
        if self._cuda is None:
            self._cuda = CudaDevice()
        # The text encoders may run side by side; UNet and decoder follow one another.
        lane = part if part.startswith("text_encoder") else "main"
        scratch = self._scratch.setdefault(lane, Scratch(self._cuda))
        return TrtSession(
            engine,
            self._cuda,
            scratch,
            log,
            graph=self.options["graph"] == "part",
        )


@contextmanager
def lowered(
    bundle: Bundle, part: str, profile: Profile, scales: Path | None = None
) -> Iterator[Path]:
    """The graph of `part` in the form of `profile`, for as long as the block runs.

    The same each time, with the same names of weights: what a stripped plan is refitted from.

    Args:
        scales: folder of those that it is quantised with.
    """
    root = build_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".lowered-") as folder:
        graph, source = Path(folder) / GRAPH, bundle.source(part).graph
        if scales is not None:
            source = Path(folder) / PAIRS / GRAPH
            insert(bundle.source(part).graph, scales / SCALES, source)
        lower(source, profile, graph)
        yield graph


def check_precision(options: Mapping[str, Any]) -> None:
    """Refuse what goes with no quantised plan, before work starts."""
    precision = options["precision"]
    if precision not in OLDEST_FOR:
        return
    if options["refit"]:
        raise UnsupportedError(
            f"trt:refit=1 does not go with precision={precision}",
            "TensorRT folds the quantised weights into its plan, and not one for one from the file",
            f"drop refit, or use trt:refit=1 without precision={precision}",
        )
    if options["hardware"] == "ampere+" and precision == "fp8":
        raise UnsupportedError(
            "trt:hardware=ampere+ does not go with precision=fp8",
            "Ampere has no FP8 arithmetic (compute capability 8.9 has it)",
            "drop hardware, or use trt:hardware=ampere+,precision=int8",
        )
