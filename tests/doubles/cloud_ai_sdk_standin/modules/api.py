# SDK stand-in (a test double) of QAicApi_pb2: as much as a program's description needs.
import json

BUFFER_IO_TYPE_INPUT, BUFFER_IO_TYPE_OUTPUT = 0, 1
FLOAT_TYPE, FLOAT_16_TYPE, INT32_I_TYPE, INT64_I_TYPE, INT8_TYPE = 0, 1, 6, 7, 8
_TYPES = {"float32": (FLOAT_TYPE, 4), "float16": (FLOAT_16_TYPE, 2), "int64": (INT64_I_TYPE, 8)}


class _Binding:
    def __init__(self, index, name, direction, buffer):
        self.index, self.name, self.dir, self.dims = index, name, direction, buffer["shape"]
        self.type, size = _TYPES[buffer["dtype"]]
        for side in self.dims:
            size *= side
        self.size = size


class _Set:
    bindings = ()


class IoDesc:
    def __init__(self):
        self.selected_set = _Set()

    def ParseFromString(self, data):
        meta = json.loads(data)
        named = [(n, BUFFER_IO_TYPE_INPUT, b) for n, b in meta["inputs"].items()]
        named += [(n, BUFFER_IO_TYPE_OUTPUT, b) for n, b in meta["outputs"].items()]
        self.selected_set.bindings = [_Binding(i, *each) for i, each in enumerate(named)]
