"""A compile as data, and its exact argument list in either compiler's dialect.

The compiler was renamed: `qaic-exec` up to SDK 1.21, `qaic-compile` from 1.22 on, with another
name for the hardware and without `-compile-only`. Symbols are defined one by one: the schema of
the JSON alternative changed between those two versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Dialect:
    """How one generation of the compiler is called; `program` is below the SDK's root.

    Attributes:
        since, until: SDK versions (major, minor) that it goes with; None for no bound.
        target: the arguments that name the hardware.
        ending: what only this one takes.
    """

    name: str
    program: str
    target: tuple[str, ...]
    ending: tuple[str, ...] = ()
    since: tuple[int, int] | None = None
    until: tuple[int, int] | None = None

    def speaks(self, version: tuple[int, ...]) -> bool:
        return (self.since is None or version >= self.since) and (
            self.until is None or version <= self.until
        )


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "qaic-compile",
            "exec/qaic-compile",
            ("-aic-hw", "-aic-hw-version=ai100"),
            since=(1, 22),
        ),
        Dialect(
            "qaic-exec",
            "exec/qaic-exec",
            ("-aic-hw", "-aic-hw-version=2.0"),
            ("-compile-only",),
            until=(1, 21),
        ),
    )
}
"""Newest first: what is tried where no version is known."""


@dataclass(frozen=True)
class CompileSpec:
    """Everything that one call of the compiler is told. None leaves a flag out.

    Attributes:
        model, binary_dir: the ONNX file, and the folder that the compiler makes for its QPC.
        cores: AI cores (NSPs) that the program runs on.
        batch: images per inference, for the compiler's statistics.
        symbols: a number for each named axis of the graph.
        mos, ols: -mos and -ols, as the public recipe sets them.
        depth_first_mem: megabytes for depth-first scheduling, 8 to 32; turns it on.
        io_list: a YAML that gives buffers their type.
        node_precision: a YAML of nodes that keep FP32.
        partition: a JSON that spreads one graph over several devices.
    """

    model: Path
    binary_dir: Path
    cores: int
    batch: int
    symbols: tuple[tuple[str, int], ...] = ()
    mos: int | None = None
    ols: int | None = None
    depth_first_mem: int | None = None
    convert_to_fp16: bool = True
    multicast_weights: bool = False
    mxfp6_matmul: bool = False
    io_list: Path | None = None
    node_precision: Path | None = None
    partition: Path | None = None
    perf: bool = True

    def arguments(self, dialect: Dialect) -> list[str]:
        """What follows the program's name."""
        found = list(dialect.target)
        if self.perf:
            found += ["-aic-perf-warnings", "-aic-perf-metrics"]
        if self.convert_to_fp16:
            found.append("-convert-to-fp16")
        found.append(f"-m={self.model}")
        found += [f"-onnx-define-symbol={name},{value}" for name, value in self.symbols]
        found += [f"-stats-batchsize={self.batch}", f"-aic-num-cores={self.cores}"]
        for flag, value in (("-mos", self.mos), ("-ols", self.ols)):
            if value is not None:
                found.append(f"{flag}={value}")
        if self.depth_first_mem is not None:
            found += ["-aic-enable-depth-first", f"-aic-depth-first-mem={self.depth_first_mem}"]
        if self.multicast_weights:
            found.append("-multicast-weights")
        if self.mxfp6_matmul:
            found.append("-mxfp6-matmul")
        for flag, file in (
            ("-custom-IO-list-file", self.io_list),
            ("-node-precision-info", self.node_precision),
            ("-mdp-load-partition-config", self.partition),
        ):
            if file is not None:
                found.append(f"{flag}={file}")
        return [*found, *dialect.ending, f"-aic-binary-dir={self.binary_dir}"]

    def command(self, dialect: Dialect, root: Path) -> list[str]:
        return [str(root / dialect.program), *self.arguments(dialect)]
