"""SDK stand-in (a test double): runs what the stand-in's compiler wrote, through onnxruntime."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import numpy as np
import onnxruntime

HEADER = struct.Struct("<IBBHQQ")
_LOCK = threading.Lock()


class Engine:
    """A 'QPC' on a device; `meta` describes its buffers."""

    def __init__(self, file: Path, root: Path) -> None:
        content = file.read_bytes()
        magic, major, _minor, _, size, _ = HEADER.unpack_from(content)
        if magic != 0x00A1CD7C or major:
            raise RuntimeError("not a program container of this version")
        self.meta = json.loads(content[HEADER.size : HEADER.size + size])
        self.root = root
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            content[HEADER.size + size :], options, ["CPUExecutionProvider"]
        )
        self.graph_types = {
            value.name: {"tensor(float)": np.float32, "tensor(int64)": np.int64}[value.type]
            for value in self.session.get_inputs()
        }

    def state(self) -> dict:
        return json.loads((self.root / "standin.json").read_text())

    def count_call(self, device: int) -> None:
        """One call fewer until the device is lost, where a test asked for that."""
        with _LOCK:
            state = self.state()
            if "reset_after" in state:
                state["reset_after"] -= 1
                if state["reset_after"] < 0:
                    for card in state["cards"]:
                        if card["id"] == device:
                            card["status"] = "Error"
                (self.root / "standin.json").write_text(json.dumps(state))
        for card in state["cards"]:
            if card["id"] == device and card["status"] != "Ready":
                raise RuntimeError("execution failed: device went away")

    def run(self, arrays: dict, device: int) -> dict:
        self.count_call(device)
        feeds = {}
        for name, buffer in self.meta["inputs"].items():
            array = arrays[name]
            if list(array.shape) != buffer["shape"] or array.dtype != np.dtype(buffer["dtype"]):
                raise ValueError(f"{name}: {array.dtype} {array.shape} is not {buffer}")
            feeds[name] = array.astype(self.graph_types[name])
        names = list(self.meta["outputs"])
        results = dict(zip(names, self.session.run(names, feeds), strict=True))
        return {
            name: results[name].astype(buffer["dtype"])
            for name, buffer in self.meta["outputs"].items()
        }
