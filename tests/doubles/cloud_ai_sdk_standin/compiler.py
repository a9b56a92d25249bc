"""SDK stand-in (a test double): the compiler. Checks its arguments and graph, writes a 'QPC'."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import sys
from pathlib import Path

import onnx
from onnx import TensorProto

HEADER = struct.Struct("<IBBHQQ")
VALUES = {"-m", "-aic-binary-dir", "-aic-num-cores", "-aic-hw-version", "-stats-batchsize", "-mos",
          "-ols", "-onnx-define-symbol", "-aic-depth-first-mem", "-custom-IO-list-file",
          "-node-precision-info", "-mdp-load-partition-config"}  # fmt: skip
SWITCHES = {"-aic-hw", "-aic-perf-warnings", "-aic-perf-metrics", "-convert-to-fp16",
            "-aic-enable-depth-first", "-multicast-weights", "-mxfp6-matmul"}  # fmt: skip
HALF = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT64: "int64"}


def refuse(words: str) -> None:
    print(words)
    raise SystemExit(1)


def main() -> int:
    program, root = Path(sys.argv[0]).name, Path(sys.argv[0]).parent.parent
    state = json.loads((root / "standin.json").read_text())
    print(f"SDK stand-in {program}: a test double")
    if state.get("compiler_dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    old = program == "qaic-exec"
    known = VALUES | SWITCHES | ({"-compile-only"} if old else set())
    given: dict[str, list[str]] = {}
    for word in sys.argv[1:]:
        name, _, value = word.partition("=")
        if name not in known or name in state.get("unknown_flags", ()):
            refuse(f"{program}: Unknown command line argument '{word}'. Try: '{program} --help'")
        if (name in VALUES) != bool(value):
            refuse(f"{program}: {name} {'takes' if name in VALUES else 'takes no'} value")
        given.setdefault(name, []).append(value)
    target = "2.0" if old else "ai100"
    if given.get("-aic-hw-version") != [target] or "-aic-hw" not in given:
        refuse(f"{program}: hardware {given.get('-aic-hw-version')} is not {target}")
    if old and "-compile-only" not in given:
        refuse("no -compile-only, and no inputs to execute with")
    if not 1 <= int(given["-aic-num-cores"][0]) <= 16:
        refuse("the number of cores is beyond the device")
    source, out = Path(given["-m"][0]), Path(given["-aic-binary-dir"][0])
    model = onnx.load(source, load_external_data=False)
    symbols = dict(pair.split(",") for pair in given.get("-onnx-define-symbol", []))
    check(model, {name: int(value) for name, value in symbols.items()}, state)
    constants = embed(model, source.parent)
    if out.exists():
        refuse(f"{out} exists")
    halves = set()
    if "-custom-IO-list-file" in given:
        text = Path(given["-custom-IO-list-file"][0]).read_text()
        halves = set(re.findall(r"IOName: (\S+)\n\s+Precision: float16", text))
    meta = {
        "symbols": {name: int(value) for name, value in symbols.items()},
        "cores": int(given["-aic-num-cores"][0]),
        "inputs": buffers(model.graph.input, symbols, halves),
        "outputs": buffers(model.graph.output, symbols, halves),
    }
    if "-aic-perf-metrics" in given:
        metrics(constants, meta["cores"])
    out.mkdir(parents=True)
    if state.get("no_output"):
        return 0
    if wrong := state.get("wrong_shape"):
        meta["outputs"][wrong]["shape"][-1] += 1
    described, graph = json.dumps(meta).encode(), model.SerializeToString()
    magic = 0 if state.get("bad_magic") else 0x00A1CD7C
    head = HEADER.pack(magic, state.get("qpc_major", 0), 1, 0, len(described), 0)
    (out / "programqpc.bin").write_bytes(head + described + graph)
    print(f"Generated binary is present at {out}")
    return 0


def check(model: onnx.ModelProto, symbols: dict[str, int], state: dict) -> None:
    """What the compiler of that time takes: old opset, no late operators, no free axis."""
    if model.opset_import[0].version > 17:
        refuse(f"opset {model.opset_import[0].version} is not supported")
    late = {"Attention", "GroupNormalization", "LayerNormalization", "Gelu"}
    found = late & {node.op_type for node in model.graph.node}
    if found:
        refuse(f"unsupported operators: {sorted(found)}")
    free = {
        dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim
    }
    for name in sorted((free - {""}) | {state.get("extra_symbol", "")} - {""}):
        if name not in symbols:
            refuse(f"Error: onnx symbol '{name}' is not defined")


def embed(model: onnx.ModelProto, folder: Path) -> int:
    """Weights into the model; their bytes. Read by hand: onnx refuses files with several links."""
    total = 0
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            where = {each.key: each.value for each in tensor.external_data}
            with (folder / where["location"]).open("rb") as file:
                file.seek(int(where.get("offset", 0)))
                tensor.raw_data = file.read(int(where["length"]))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
        total += len(tensor.raw_data)
    return total


def buffers(values: list, symbols: dict[str, str], halves: set[str]) -> dict[str, dict]:
    made = {}
    for value in values:
        kind = value.type.tensor_type
        shape = [dim.dim_value or int(symbols[dim.dim_param]) for dim in kind.shape.dim]
        dtype = "float16" if value.name in halves else HALF[kind.elem_type]
        made[value.name] = {"shape": shape, "dtype": dtype}
    return made


def metrics(constants: int, cores: int) -> None:
    """As SDK 1.10 prints them; the numbers are made up from the size of the constants."""
    print("AIC WARNING: MAC estimate does not yet handle all operations")
    print(f"Original MAC estimate: {2**64 - 1}")
    print(f"AIC HMX MAC estimate:  {1000 * constants}\nAIC non-HMX MAC estimate:  0")
    print(f"preD32 constants size: {2 * constants} B\nfinal constants size: {constants} B")
    print(f"Constants size: {constants} (bytes)\nCompiler estimated memory traffic:")
    for core in range(cores):
        print(f"    c{core:02}: DDR traffic  read: {constants / cores / 1e3:10.0f} KB (first-inf")
    print(f"  total: DDR traffic  read: {constants / 1e3:10.0f} KB (first-inf 0 KB)")
    print(f"  total: DDR traffic write: {1:10} KB\n  total: MC  traffic  read: 4 KB")
