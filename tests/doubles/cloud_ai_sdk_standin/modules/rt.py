# SDK stand-in (a test double) of the module `qaicrt`: contexts, programs, queues, buffers.
import json
from pathlib import Path

import numpy as np
from standin_engine import Engine


def root():
    return Path(globals()["ROOT"])  # set by the file that runs this one


HELD = {}  # device -> cores that active programs hold


class QStatus:
    QS_SUCCESS, QS_ERROR = 0, 500


class QIDList(list):
    pass


class BufferDimensionsVecRef(list):
    pass


class QAicProgramProperties:
    pass


class QBuffer:
    def __init__(self, data):
        self.data = data

    def __bytes__(self):
        return self.data


class Context:
    def __init__(self, devices):
        self.devices = devices


class Qpc:
    def __init__(self, folder):
        self.engine = Engine(Path(folder) / "programqpc.bin", root())

    def getIoDescriptor(self):
        return QStatus.QS_SUCCESS, json.dumps(self.engine.meta).encode()


class Program:
    def __init__(self, context, device, qpc, properties):
        self.device, self.engine, self.active = device, qpc.engine, False

    def load(self):
        return QStatus.QS_SUCCESS

    def activate(self):
        cores = self.engine.meta["cores"]
        total = next(c["total"] for c in self.engine.state()["cards"] if c["id"] == self.device)
        if HELD.get(self.device, 0) + cores > total:
            return QStatus.QS_ERROR  # two programs would share cores
        HELD[self.device] = HELD.get(self.device, 0) + cores
        self.active = True
        return QStatus.QS_SUCCESS

    def deactivate(self):
        HELD[self.device] -= self.engine.meta["cores"]
        self.active = False
        return QStatus.QS_SUCCESS


class ExecObj:
    def __init__(self, context, program):
        self.program, self.failed = program, False

    def setData(self, buffers, dimensions):
        meta = self.program.engine.meta
        self.inputs = {}
        for (name, buffer), given, (size, shape) in zip(
            meta["inputs"].items(), buffers, dimensions, strict=False
        ):
            dtype = np.dtype(buffer["dtype"])
            if size != dtype.itemsize:
                return QStatus.QS_ERROR
            self.inputs[name] = np.frombuffer(bytes(given), dtype).reshape(shape)
        return QStatus.QS_SUCCESS

    def waitForCompletion(self):
        if not self.program.active:
            return QStatus.QS_ERROR
        try:
            self.results = self.program.engine.run(self.inputs, self.program.device)
        except RuntimeError:
            return QStatus.QS_ERROR
        return QStatus.QS_SUCCESS

    def getData(self):
        held = [QBuffer(b"") for _ in self.inputs]
        return QStatus.QS_SUCCESS, held + [QBuffer(a.tobytes()) for a in self.results.values()]


class Queue:
    def __init__(self, context, device):
        pass

    def enqueue(self, execution):
        return QStatus.QS_SUCCESS
