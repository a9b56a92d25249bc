"""The operators without onnxruntime, by a stand-in (bare_runner.cc): under the sanitizers, and as
another CPU computes them.

Under an emulator it is numerics that are tested, and no speed: no ARM CPU has run them here.
"""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from backends.onnxrt import operators
from core.files import ROOT
from core.isa import isa
from export.lower import convolutions, linear
from export.quantize.integers import quantise_blocks, restore_blocks
from export.quantize.rewrite import pack_bytes

pytestmark = pytest.mark.slow
TYPES = {np.dtype(np.float32): 1, np.dtype(np.int8): 3, np.dtype(np.float16): 10}


@dataclass
class Call:
    """A call of an operator: what it is given, and what it should give, as far as `far`."""

    operator: str
    attributes: dict[str, float]
    inputs: list[np.ndarray | None]
    wanted: np.ndarray
    far: float | np.ndarray
    overwritten: int = -1

    def message(self) -> bytes:
        parts = [_text(self.operator), struct.pack("<I", len(self.attributes))]
        for name, value in self.attributes.items():
            parts += [_text(name), struct.pack("<d", value)]
        parts.append(struct.pack("<iI", self.overwritten, len(self.inputs)))
        for array in self.inputs:
            if array is None:
                parts.append(struct.pack("<i", 0))
                continue
            dims = struct.pack(f"<{array.ndim}q", *array.shape)
            parts += [struct.pack("<iI", TYPES[array.dtype], array.ndim), dims, array.tobytes()]
        return b"".join(parts)


@dataclass
class Runner:
    """The stand-in as a process, with some threads."""

    command: Sequence[str]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def _read(self, count: int) -> bytes:
        assert self.process.stdout is not None
        data = self.process.stdout.read(count)
        if len(data) != count:
            assert self.process.stderr is not None
            said = self.process.stderr.read().decode(errors="replace")
            pytest.fail(f"it ended with {self.process.wait()}:\n{said[-6000:]}")
        return data

    def run(self, call: Call) -> np.ndarray | str:
        """What the operator gives, or what it refuses with."""
        assert self.process.stdin is not None
        self.process.stdin.write(call.message())
        self.process.stdin.flush()
        (length,) = struct.unpack("<I", self._read(4))
        if length:
            return self._read(length).decode()
        (rank,) = struct.unpack("<I", self._read(4))
        dims = struct.unpack(f"<{rank}q", self._read(8 * rank))
        return np.frombuffer(self._read(4 * int(np.prod(dims))), np.float32).reshape(dims)

    def close(self) -> str:
        """End it; what it said, which of a sanitizer is what is wrong."""
        _, said = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, said.decode(errors="replace")[-6000:]
        return said.decode(errors="replace")


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


# ---- calls at random, with what they should give


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def group_norm(random: np.random.Generator) -> Call:
    n, groups, per_group = (int(random.integers(low, 5)) for low in (0, 1, 1))
    inner = [int(random.integers(0, 70)) for _ in range(random.integers(0, 3))]
    silu = int(random.integers(2))
    x, channels = normal(random, n, groups * per_group, *inner), groups * per_group
    scale, bias = normal(random, channels), normal(random, channels)
    wide = x.astype(np.float64).reshape(n, groups, per_group * int(np.prod(inner)))
    if wide.size:
        wide = wide - wide.mean(2, keepdims=True)
        wide = wide / np.sqrt((wide**2).mean(2, keepdims=True) + 1e-5)
    each = (-1, *[1] * len(inner))
    y = wide.reshape(x.shape) * scale.reshape(each) + bias.reshape(each)
    y = y / (1 + np.exp(-y)) if silu else y
    attributes = {"groups": groups, "silu": silu, "epsilon": 1e-5}
    return Call("GroupNorm", attributes, [x, scale, bias], y, 5e-6, int(random.integers(2)) - 1)


def product(random: np.random.Generator, *, small: bool = False) -> Call:
    """With FP16 weights; `small`, in 8 bits."""
    rows = [int(random.integers(0, 30)) for _ in range(random.integers(0, 3))]
    depth, columns = int(random.integers(1, 700)), int(random.integers(1, 150))
    x = normal(random, *rows, depth)
    weights = (depth**-0.5 * normal(random, depth, columns)).astype(np.float16)
    bias = normal(random, columns) if random.integers(2) else None
    added = normal(random, *rows, columns) if random.integers(2) else None
    laid_out, operator, attributes = [linear.pack(weights)], "Linear", {"bf16": 0}
    if small:
        block = 2 ** int(random.integers(4, 9))
        numbers, scales = quantise_blocks(weights.astype(np.float32), 8, block)
        weights = restore_blocks(numbers, scales, 8, depth)
        laid_out, operator = list(pack_bytes(numbers, scales)), "LinearBytes"
        attributes = {"block": block}
    y = x.astype(np.float64) @ weights.astype(np.float64)
    y = y + (0 if bias is None else bias) + (0 if added is None else added)
    inputs = [x, *laid_out, bias, added]
    return Call(operator, {"features": columns, **attributes}, inputs, y, 1e-5)


def product_of_bytes(random: np.random.Generator) -> Call:
    return product(random, small=True)


def attention(random: np.random.Generator) -> Call:
    n, queries = int(random.integers(0, 3)), int(random.integers(1, 150))
    heads, size, causal = (int(random.integers(*ends)) for ends in ((1, 4), (1, 257), (0, 2)))
    keys = queries if causal else int(random.integers(1, 150))
    q, k, v = (normal(random, n, length, heads * size) for length in (queries, keys, keys))

    def apart(array: np.ndarray) -> np.ndarray:
        return (
            array.astype(np.float64).reshape(n, array.shape[1], heads, size).transpose(0, 2, 1, 3)
        )

    scores = apart(q) @ apart(k).swapaxes(-1, -2) * size**-0.5
    if causal:
        scores = np.where(np.tri(queries, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ apart(v)
    attributes = {"heads": heads, "causal": causal, "bf16": 0, "scale": size**-0.5}
    wanted = y.transpose(0, 2, 1, 3).reshape(n, queries, heads * size)
    return Call("FusedAttention", attributes, [q, k, v], wanted, 1e-5)


def convolution(random: np.random.Generator, wild: Sequence[float] = ()) -> Call:
    """A 3x3 one by Winograd; what is `wild` stands at a few places of the image."""
    n, channels, blocks = (int(random.integers(*ends)) for ends in ((0, 3), (1, 40), (1, 6)))
    sides = [int(random.integers(1, 50)) for _ in range(2)]
    enlarged, relu = (int(random.integers(2)) for _ in range(2))
    x = normal(random, max(n, int(bool(wild))), channels, *sides)
    for value in wild:
        x[tuple(int(random.integers(side)) for side in x.shape)] = value
    spread = (9 * channels) ** -0.5
    # Multiples of a power of 2, so that what the transform keeps of them is exact.
    plain = np.round(spread * normal(random, 8 * blocks, channels, 3, 3) * 1024) / 1024
    matrix = convolutions.ENLARGED if enlarged else convolutions.WEIGHTS
    weights = convolutions._transformed(matrix, plain)
    large = x.repeat(2, 2).repeat(2, 3) if enlarged else x
    wanted = direct(large.astype(np.float64), plain.astype(np.float64))
    bias = normal(random, 8 * blocks) if random.integers(2) else None
    added = normal(random, *wanted.shape) if random.integers(2) else None
    with np.errstate(invalid="ignore"):
        wanted = wanted + (0 if bias is None else bias[:, None, None])
        wanted = wanted + (0 if added is None else added)
        wanted = np.where(wanted < 0, 0, wanted) if relu else wanted
    inputs = [x, weights, bias, added]
    overwritten = 3 if added is not None and random.integers(2) else -1
    attributes = {"upsample": enlarged, "relu": relu}
    # What cancels in the sum, as 9e37 against -9e37, leaves what its order makes of the rest.
    sizes = direct(np.abs(large).astype(np.float64), np.abs(plain).astype(np.float64))
    far = np.where(np.isfinite(sizes) & (sizes > 1e9), 1e-6 * sizes, 1e-5)
    return Call("WinogradConv", attributes, inputs, wanted, far, overwritten)


def direct(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    n, _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.zeros((n, len(weights), height, width))
    with np.errstate(invalid="ignore"):
        for row in range(3):
            for column in range(3):
                window = padded[:, :, row : row + height, column : column + width]
                # Term by term: a product of matrices makes infinities of its own order.
                for channel in range(x.shape[1]):
                    each = weights[:, channel, row, column][None, :, None, None]
                    y += each * window[:, channel : channel + 1]
    return y


def infinite(random: np.random.Generator) -> Call:
    kinds = [[np.inf], [-np.inf, np.inf], [np.nan], [3e38, -2e38], [9e37] * 3]
    return convolution(random, kinds[int(random.integers(len(kinds)))])


MAKERS: list[Callable[[np.random.Generator], Call]] = [
    group_norm, product, product_of_bytes, attention, convolution, infinite]  # fmt: skip


def check(command: Sequence[str], count: int) -> str:
    """Run `count` calls of each operator with 1 and with 3 threads; return what it said."""
    said = ""
    for threads in (1, 3):
        runner = Runner([*command, str(threads)])
        for maker in MAKERS:
            for seed in range(count):
                call = maker(np.random.default_rng([threads, seed]))
                result = runner.run(call)
                where = f"{maker.__name__} {seed}, {threads} threads: {call.attributes}"
                assert not isinstance(result, str), f"{where}: {result}"
                assert result.shape == call.wanted.shape, where
                with np.errstate(over="ignore"):
                    wanted = call.wanted.astype(np.float32)
                finite = np.abs(wanted[np.isfinite(wanted)])
                usual = finite[finite < 1e30]
                far = call.far * max(1.0, float(usual.max(initial=0)))
                wrong = ~np.isclose(result, wanted, rtol=1e-5, atol=far, equal_nan=True)
                assert not wrong.any(), f"{where}: {result[wrong]}, not {wanted[wrong]}"
        assert "wants" in str(runner.run(Call("Linear", {"features": 3, "bf16": 0},
            [np.zeros((2, 3), np.float32), np.zeros((1, 1, 1, 1), np.float16)],
            np.zeros(0), 0)))  # fmt: skip
        said += runner.close()
    return said


# ---- builds of it


def build(compiler: str, flags: Sequence[str], out: Path) -> Path:
    units = [source for source in operators.SOURCES if source.suffix == ".cc"]
    command = [
        compiler, "-std=c++17", *flags, "-Wall", f"-I{ROOT}/backends/onnxrt",
        *map(str, units), str(ROOT / "tests" / "backends" / "bare_runner.cc"),
        "-pthread", "-o", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


def sanitized(flag: str, folder: Path) -> None:
    """Skip where the compiler has no such sanitizer, or the kernel does not let it run."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    source = folder / "empty.cc"
    source.write_text("int main() { return 0; }\n")
    made = ["g++", flag, str(source), "-o", str(folder / "empty")]
    for command in (made, [*RANDOM_PLACES, str(folder / "empty")]):
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
        if tried.returncode:
            pytest.skip(f"{flag} does not run here: {tried.stderr.strip()[-200:]}")


RANDOM_PLACES = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
"""ThreadSanitizer of older compilers wants memory where it was before it was placed at random."""


def here() -> Iterator[list[str]]:
    """The flags of the instruction sets that this CPU has; the portable path first."""
    yield []
    for needed, flags in reversed(operators.VECTORS):
        if needed <= set(isa().split()):
            yield flags


@pytest.mark.parametrize("flag", ["-fsanitize=address,undefined", "-fsanitize=thread"])
@pytest.mark.parametrize("vectors", list(here()), ids=lambda flags: "".join(flags) or "portable")
def test_sanitizers_find_nothing(flag: str, vectors: list[str], tmp_path: Path) -> None:
    sanitized(flag, tmp_path)
    flags = ["-O1", "-g", flag, "-fno-sanitize-recover=all", *operators.BASELINE, *vectors]
    runner = build("g++", flags, tmp_path / "runner")
    assert check([*RANDOM_PLACES, str(runner)], 12).strip() == ""


def test_arm_gives_it_under_an_emulator(tmp_path: Path) -> None:
    """NEON's vectors: numerics, not speed."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not there: apt install g++-aarch64-linux-gnu qemu-user-static")
    runner = build(compiler, ["-O2", "-static", "-march=armv8-a"], tmp_path / "runner")
    check([emulator, str(runner)], 25)
