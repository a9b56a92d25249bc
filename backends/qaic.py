"""Cloud AI 100 through Qualcomm's own toolchain: compiled here, run where a card is.

Its code is in backends/cloud_ai/; docs/cloud-ai-100.md tells a person with a card what to do. It
has not met one: what was run is the stand-in of the SDK in tests/doubles.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import (
    Artifact,
    Backend,
    Capability,
    Session,
    Shapes,
    UnsupportedError,
    stage_parts,
)
from backends.cloud_ai import qpc
from backends.cloud_ai.compiler import QPC, RECORD, compile_graph, half_buffers, io_list
from backends.cloud_ai.options import OPTIONS
from backends.cloud_ai.presets import CORES, SKUS, VAE_DIVISOR, Preset, preset, preset_for
from backends.cloud_ai.probe import Findings, capability, compiler_capability, look
from backends.cloud_ai.spec import DIALECTS, CompileSpec
from core.errors import PreconditionError
from core.files import read_json, require_disk, sha256_file
from export.lower import Profile, lower

if TYPE_CHECKING:
    from backends.pipeline.pipeline import Pipeline
    from backends.pipeline.recipe import Recipe
    from export.bundle import Bundle

GRAPH, IO_LIST = "model.onnx", "buffers.yaml"
RECIPE = Profile(
    "cloud-ai-100",
    opset=16,
    attention="matmul",
    norms="instance",
    dtype="float32",
    constants="fp16-range",
)
"""The form that torch exported at opset 16: FP32, which the compiler converts to FP16. The batch
stays a named axis, which the compiler is given a number for."""
HALF_MAX = 65504.0
SMALL = 64 * 2**20
"""Bytes that a compile writes beside the weights."""


class QaicBackend(Backend):
    name = "qaic"
    summary = "Qualcomm Cloud AI 100, FP16, compiled by the vendor's SDK"
    resident = "its programs lie in the card's memory, and take none of the host's"
    option_types = OPTIONS

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self.devices: tuple[int, ...] = self.options["device"]
        self.device = f"qaic:{self.texts['device']}"
        self._held: dict[int, int] = {}
        """Sessions of ours by device: they hold cores that are not another process's."""

    # ---- what is here

    @cached_property
    def found(self) -> Findings:
        """One look around for the life of this object."""
        return look(self.options["compiler"])

    def probe(self) -> Capability:
        return capability(self.found, self.devices)

    def probe_compiler(self) -> Capability:
        return compiler_capability(self.found)

    @property
    def card(self) -> str:
        """The card whose presets count: as asked for, by the first device's SKU, else the Ultra."""
        if self.options["card"] != "auto":
            return str(self.options["card"])
        there = self.found.card(self.devices[0])
        if there is None:
            return "ultra"
        # A SKU that is none of these: by its cores, as far as they tell.
        by_cores = "standard" if there.cores_total == CORES["standard"] else "ultra"
        return SKUS.get(there.sku.lower(), by_cores)

    def hardware(self) -> str:
        from backends.cloud_ai.power import hardware

        return hardware(self.found, self.devices)

    @property
    def runtime(self) -> str:
        if self.options["runtime"] != "auto":
            return str(self.options["runtime"])
        return next(iter(self.found.runtimes), "qaic")

    def half(self) -> bool:
        """Whether buffers are FP16. The QAic EP's are of the graph's types: FP32."""
        return self.options["buffers"] == "fp16" and self.runtime != "ep"

    def effective_options(self) -> dict[str, str]:
        found = super().effective_options()
        dialect = self.found.sdk.dialect
        found |= {"card": self.card, "runtime": self.runtime}
        found["compiler"] = dialect.name if dialect else found["compiler"]
        return found | {"buffers": "fp16" if self.half() else "fp32"}

    def precision(self, bundle: Bundle) -> str:
        return "fp16"

    def storage(self, bundle: Bundle) -> str:
        return "fp16"

    # ---- compiling

    def preset(self, part: str, batch: int) -> Preset:
        """The preset, with the options that replace its values."""
        found = preset(self.card, part, batch)
        if self.options["cores"] is not None:
            found = replace(found, cores=self.options["cores"], follows="derived",
                            note=f"{found.note}; cores as asked for")  # fmt: skip
        if self.options["block"] is not None and found.block:
            found = replace(found, block=self.options["block"], follows="derived",
                            note=f"{found.note}; block as asked for")  # fmt: skip
        return found

    def form(self, part: str, batch: int) -> Profile:
        """The graph that a program of this batch is compiled from."""
        scaled = part == "vae_decoder" and self.options["vae"] == "scaled"
        return replace(
            RECIPE,
            norms="instance" if self.options["norms"] == "instance" else "decomposed",
            attention_block=self.preset(part, batch).block,
            vae_divisor=VAE_DIVISOR if scaled else 1,
        )

    def profile(self, part: str) -> Profile:
        return self.form(part, 1)

    def spec(self, part: str, batch: int, folder: Path, scratch: Path) -> CompileSpec:
        """The compile of `part`: its graph and settings from `scratch`, its QPC to `folder`."""
        chosen = self.preset(part, batch)
        return CompileSpec(
            model=scratch / GRAPH,
            binary_dir=folder / QPC,
            cores=chosen.cores,
            batch=batch,
            symbols=(("batch", batch),),
            mos=chosen.mos,
            ols=chosen.ols,
            depth_first_mem=chosen.depth_first_mem,
            io_list=scratch / IO_LIST if self.half() else None,
        )

    def depends_on(self, bundle: Bundle, part: str, shapes: Shapes) -> Mapping[str, str]:
        """What the arguments follow from: the compiler is told a batch, though the graph names
        the axis."""
        options = self.effective_options() | {"batch": str(shapes.batch)}
        return {
            key: options[key] for key in sorted(options.keys() - {"device", "split", "runtime"})
        }

    @cached_property
    def compiler_version(self) -> str:
        """The SDK's version; where none is stated, a hash of the compiler itself."""
        sdk = self.found.sdk
        if sdk.version or sdk.compiler is None:
            return sdk.version or "none"
        return f"unknown, sha256 {sha256_file(sdk.compiler)[:16]}"

    def fingerprint(self) -> dict[str, str]:
        return {"qaic-compiler": self.compiler_version}

    def compile(self, bundle: Bundle, part: str, shapes: Shapes) -> Artifact:
        """Compile as every backend; what the cache holds and is no QPC is made again, once."""
        from backends.artifacts.cache import ArtifactCache

        self._require_half_range(bundle, part)
        artifact = super().compile(bundle, part, shapes)
        path = artifact.folder
        inode = path.stat().st_ino
        try:
            qpc.read_header(path / QPC)
        except qpc.QpcError:
            if not artifact.cached:
                raise
            ArtifactCache().discard(path, inode)
            artifact = super().compile(bundle, part, shapes)
        return artifact

    def _require_half_range(self, bundle: Bundle, part: str) -> None:
        """Refuse a VAE that parity saw beyond FP16's range, unless it is scaled."""
        from export.bundle import PARITY

        record = bundle.path / PARITY
        scaled = part == "vae_decoder" and self.options["vae"] == "scaled"
        if part not in ("vae_decoder", "vae_encoder") or scaled or not record.is_file():
            return
        seen = read_json(record).get("parts", {}).get(part, {}).get("largest_values", [])
        largest = max((op["largest"] for op in seen), default=0.0)
        if not largest <= HALF_MAX:
            raise PreconditionError(
                f"the {part.replace('vae_', 'VAE ')} of {bundle.path.name} does not fit FP16",
                f"parity saw {largest:.0f} in it; FP16 ends at {HALF_MAX:.0f}",
                ("add vae=scaled to the backend's options, or " if part == "vae_decoder" else "")
                + "export an FP16-safe one with --vae",
            )

    def _compile(self, bundle: Bundle, part: str, shapes: Shapes, folder: Path) -> None:
        info, batch = bundle.parts[part], shapes.batch
        require_disk(folder, 2 * info.weight_bytes + SMALL, f"compiling {bundle.name} {part}")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lower-") as scratch:
            spec = self.spec(part, batch, folder, Path(scratch))
            lower(info.graph, self.form(part, batch), spec.model)
            if spec.io_list is not None:
                names = half_buffers((*info.inputs, *info.outputs))
                spec.io_list.write_text(io_list(names))
            facts = {
                "part": part,
                "batch": batch,
                "size": [shapes.width, shapes.height],
                "preset": asdict(
                    preset_for(
                        self.preset(part, batch), bundle.model.name, (shapes.width, shapes.height)
                    )
                ),
                "profile": asdict(self.form(part, batch)),
                **self.fingerprint(),
            }
            kept = f"qaic-{bundle.path.name}-{part}-batch{batch}"
            compile_graph(spec, self.found.sdk, part, folder, facts, kept)

    def remark(self, artifact: Artifact) -> str:
        """What the compiler estimates of an artifact, and where its settings are from."""
        record = read_json(artifact.folder / RECORD)
        estimate, chosen = record["estimate"], record["preset"]
        macs, constants = estimate["macs"], estimate["constants_mb"]
        words = [
            f"preset: {chosen['follows']} ({chosen['note']})",
            f"{estimate['provenance']}: "
            + f"{'MACs not said' if macs is None else f'{macs / 1e9:.1f} GMAC'}, "
            + f"{'constants not said' if constants is None else f'{constants:.1f} MB constants'}",
        ]
        total = estimate["ddr_read_mb"].get("total")
        if total is not None:
            words[-1] += f", {total:.1f} MB read from DDR"
        return "; ".join(words)

    # ---- running

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        return self._load_on(bundle, artifact, self.devices[0])

    def load_on(self, bundle: Bundle, artifact: Artifact, device: int) -> Session:
        """`load`, on one of the devices."""
        started = time.perf_counter()
        session = self._load_on(bundle, artifact, device)
        session.load_s = time.perf_counter() - started
        return session

    def _load_on(self, bundle: Bundle, artifact: Artifact, device: int) -> Session:
        from backends.cloud_ai.runtimes import CLASSES, Program
        from backends.cloud_ai.session import QaicSession

        self.probe().require(self.name)
        path, sdk = artifact.folder, self.found.sdk
        qpc.read_header(path / QPC)
        record: dict[str, Any] = read_json(path / RECORD)
        spec = self.spec(artifact.part, record["batch"], path, path)
        card = self.found.card(device)
        total = card.cores_total if card else None
        self._require_cores(artifact.part, spec.cores, device)
        with tempfile.TemporaryDirectory(prefix="addbench-qaic-") as scratch:
            graph = None
            if self.runtime == "ep":
                graph = Path(scratch) / GRAPH
                lower(bundle.parts[artifact.part].graph, Profile(**record["profile"]), graph)
            program = Program(path / QPC, device, spec, total, sdk.root, graph)
            session = QaicSession(
                CLASSES[self.runtime], program, bundle.parts[artifact.part], sdk.util
            )
        self._held[device] = self._held.get(device, 0) + 1
        return session

    def _require_cores(self, part: str, cores: int, device: int) -> None:
        """Refuse a program that needs more cores than the device has, or others left free."""
        card = self.found.card(device)
        if card is None:
            return
        if card.cores_total is not None and cores > card.cores_total:
            raise UnsupportedError(
                f"the program of {part} does not fit device {device}",
                f"it was compiled for {cores} cores, the device ({card.sku or 'SKU unknown'}) has"
                f" {card.cores_total}",
                f"use qaic:card=standard, or qaic:cores={card.cores_total}",
            )
        if card.cores_free is not None and cores > card.cores_free and not self._held.get(device):
            raise PreconditionError(
                f"device {device} has too few free cores for {part}",
                f"it needs {cores}, {card.cores_free} of {card.cores_total} are free: another"
                " process holds the others",
                f"end that process, pick another device, or compile with qaic:cores="
                f"{max(1, card.cores_free)}",
            )

    def pipeline(
        self,
        bundle: Bundle,
        decoder: str,
        shapes: Shapes,
        *,
        embedding_cache: int = 0,
        recipe: Recipe | None = None,
    ) -> Pipeline:
        from backends.cloud_ai.lanes import LanesPipeline
        from backends.pipeline.recipe import make_recipe

        recipe = recipe or make_recipe(bundle)
        each = replace(shapes, batch=1) if self.options["split"] == "pipelines" else shapes
        for part in stage_parts(tuple(bundle.parts), decoder):
            # Before the compiler, which may take an hour.
            cores = self.preset(part, recipe.shapes(part, each).batch).cores
            for device in self.devices:
                self._require_cores(part, cores, device)
        return LanesPipeline(
            self,
            bundle,
            decoder,
            shapes,
            devices=self.devices,
            split=self.options["split"],
            embedding_cache=embedding_cache,
            recipe=recipe,
        )

    def dry_run(self, bundle: Bundle, part: str, shapes: Shapes) -> list[list[str]]:
        """The compiler's command for one part; a whole model's is `dry_run_model`."""
        sdk = self.found.sdk
        dialect = sdk.dialect or next(iter(DIALECTS.values()))
        return [self.spec(part, shapes.batch, Path(), Path()).command(dialect, sdk.root)]

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
        from backends.cloud_ai.dryrun import write

        return write(self, model, weights, dtype, decoders, batches, folder, encoders)
