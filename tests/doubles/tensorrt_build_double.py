"""The TensorRT double, first half: values, parser, builder. See tensorrt_double."""

from __future__ import annotations

import hashlib
import json
import pickle
from enum import IntEnum
from pathlib import Path
from typing import Any

import gpu_double as gpu
import onnx
from gpu_double import ApiMisuse, demand


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class NetworkDefinitionCreationFlag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(IntEnum):
    FP16 = 0
    TF32 = 7
    VERSION_COMPATIBLE = 12
    STRIP_PLAN = 17
    REFIT_IDENTICAL = 18


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(IntEnum):
    NONE = 0
    AMPERE_PLUS = 1


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    INT64 = 8


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


FROM_ONNX = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.FLOAT16: DataType.HALF,
    onnx.TensorProto.INT64: DataType.INT64,
}
BYTES = {DataType.FLOAT: 4, DataType.HALF: 2, DataType.INT64: 8}


class Dims:
    """Not iterable by protocol, as the real one: `len` and an index."""

    def __init__(self, shape: list[int]) -> None:
        self._shape = [int(size) for size in shape]

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, arg0: int) -> int:
        return self._shape[arg0]


class IHostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Made:
    """A class whose own `__init__` must have run in a subclass too, as pybind11 demands."""

    _made = False

    def __init__(self) -> None:
        self._made = True


class ILogger(Made):
    Severity = Severity
    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def log(self, severity: Severity, msg: str) -> None:
        raise ApiMisuse("ILogger.log must be overridden")


class IProgressMonitor(Made):
    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        raise ApiMisuse("phase_start must be overridden")

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise ApiMisuse("step_complete must be overridden")

    def phase_finish(self, phase_name: str) -> None:
        raise ApiMisuse("phase_finish must be overridden")


def checked_logger(logger: Any) -> ILogger:
    demand(isinstance(logger, ILogger) and logger._made, "a logger whose __init__ ran is needed")
    return logger


# ---- parsing


def newest_opset() -> int:
    return 23 if gpu.WORLD.release >= (10, 14) else 22 if gpu.WORLD.release >= (10, 9) else 20


class IAttention:
    def __init__(self, head_size: int) -> None:
        self.decomposable, self.head_size = False, head_size


class ILayer:
    def __init__(self, node: onnx.NodeProto) -> None:
        self.name = node.name


class AttentionInputLayer(ILayer):
    """`IAttentionInputLayer` of TensorRT 10.14 and newer."""

    def __init__(self, node: onnx.NodeProto, head_size: int) -> None:
        super().__init__(node)
        self.attention = IAttention(head_size)


class INetworkDefinition:
    def __init__(self, flags: int, logger: ILogger) -> None:
        typed = flags & (1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._strongly_typed = bool(typed) or gpu.WORLD.release >= (11, 0)
        self._logger = logger
        self._model: onnx.ModelProto | None = None
        self._data: dict[str, bytes] = {}
        self._layers: list[ILayer] = []

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]


class ParserError:
    def __init__(self, desc: str, index: int = -1, node: onnx.NodeProto | None = None) -> None:
        self._desc, self._index, self._node = desc, index, node

    def desc(self) -> str:
        return self._desc

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._node.name if self._node else ""

    def node_operator(self) -> str:
        return self._node.op_type if self._node else ""


class Reader:
    """What the parser and its refitter share: a model file, its external data, and the errors."""

    def __init__(self, logger: ILogger) -> None:
        self._logger = checked_logger(logger)
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def _fail(self, desc: str, index: int = -1, node: onnx.NodeProto | None = None) -> None:
        self._errors.append(ParserError(desc, index, node))
        self._logger.log(Severity.ERROR, f"ModelImporter: {desc}")

    def _read(self, model: str) -> tuple[onnx.ModelProto, dict[str, bytes]] | None:
        demand(isinstance(model, str), "the path of a model is a str")
        try:
            proto = onnx.load(model, load_external_data=False)
        except (OSError, ValueError) as error:
            self._fail(f"Failed to parse ONNX model from file: {model}: {error}")
            return None
        names = {
            entry.value
            for tensor in proto.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        missing = [name for name in names if not (Path(model).parent / name).is_file()]
        if missing:
            self._fail(f"Failed to open the external data {missing}")
            return None
        return proto, {name: (Path(model).parent / name).read_bytes() for name in names}


class OnnxParser(Reader):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        super().__init__(logger)
        self._network = network

    def parse_from_file(self, model: str) -> bool:
        read = self._read(model)
        if read is None:
            return False
        proto, data = read
        opset = next(item.version for item in proto.opset_import if item.domain == "")
        shapes = {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*proto.graph.value_info, *proto.graph.input)
        }
        for index, node in enumerate(proto.graph.node):
            why = self._refused(node, opset)
            if why:
                self._fail(why, index, node)
            elif node.op_type == "Attention":
                self._network._layers.append(AttentionInputLayer(node, shapes[node.input[0]][-1]))
            else:
                self._network._layers.append(ILayer(node))
        if opset > newest_opset():
            self._fail(f"opset {opset} is newer than {newest_opset()}")
        self._network._model, self._network._data = proto, data
        return not self._errors

    @staticmethod
    def _refused(node: onnx.NodeProto, opset: int) -> str | None:
        attributes = {attribute.name for attribute in node.attribute}
        if node.op_type in gpu.WORLD.unsupported:
            return f"No importer registered for op: {node.op_type}"
        if node.op_type == "Attention":
            if gpu.WORLD.release < (10, 14):
                return "No importer registered for op: Attention"
            if len(node.output) != 1 or "softmax_precision" in attributes:
                return "TensorRT does not take this Attention"
        if node.op_type == "GroupNormalization" and opset >= 21 and gpu.WORLD.release < (10, 9):
            return "The scale of GroupNormalization must have num_groups elements"
        return None


# ---- building


class ITimingCache:
    def __init__(self, owner: list[str], entries: dict[str, float]) -> None:
        self._owner, self._entries = owner, entries

    def serialize(self) -> IHostMemory:
        return IHostMemory(json.dumps([self._owner, self._entries]).encode())

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if input_cache._owner != self._owner and not ignore_mismatch:
            return False
        self._entries |= input_cache._entries
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, tuple[list[int], list[int], list[int]]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        least, best, most = ([d[i] for i in range(len(d))] for d in (min, opt, max))
        ordered = all(a <= b <= c for a, b, c in zip(least, best, most, strict=True))
        demand(ordered, f"the profile of {input} is not ordered")
        self._shapes[input] = (least, best, most)


class IBuilderConfig:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.progress_monitor: IProgressMonitor | None = None
        self.flags = 1 << int(BuilderFlag.TF32)
        self._limits: dict[MemoryPoolType, int] = {}
        self._cache: ITimingCache | None = None
        self._profiles: list[IOptimizationProfile] = []

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags |= 1 << int(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags &= ~(1 << int(flag))

    def get_flag(self, flag: BuilderFlag) -> bool:
        return bool(self.flags & (1 << int(flag)))

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        demand(isinstance(pool_size, int) and pool_size > 0, "a limit is a number of bytes")
        self._limits[pool] = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        if not serialized_timing_cache:
            return ITimingCache(gpu.WORLD.identity, {})
        try:
            owner, entries = json.loads(bytes(serialized_timing_cache))
        except ValueError:
            self._logger.log(Severity.ERROR, "the timing cache cannot be deserialized")
            return None
        return ITimingCache(owner, entries)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._owner != gpu.WORLD.identity and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = checked_logger(logger)

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags, self._logger)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._logger)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        demand(network._model is not None, "a network is parsed before it is built")
        assert network._model is not None
        demand(network._strongly_typed, "without STRONGLY_TYPED a 10.x build picks its own dtypes")
        gpu.WORLD.builds += 1
        if not self._pass_time(config):
            return self._refuse("Build was cancelled by the progress monitor")
        if gpu.WORLD.build_error:
            return self._refuse(gpu.WORLD.build_error)
        for layer in network._layers:
            if isinstance(layer, AttentionInputLayer):
                attention = layer.attention
                if attention.head_size > 256 and not attention.decomposable:
                    return self._refuse(f"no fused kernel for the attention {layer.name}")
        specs = [_spec(value) for value in network._model.graph.input]
        profiles = config._profiles[0]._shapes if config._profiles else {}
        for name, _, shape in specs:
            if -1 in shape and name not in profiles:
                return self._refuse(f"the input {name} is dynamic and has no profile")
        graph = network._model.SerializeToString()
        digest = hashlib.sha256(graph).hexdigest()
        if config._cache:
            gpu.WORLD.known_timings += digest in config._cache._entries
            config._cache._entries[digest] = 1.0
        stripped = config.get_flag(BuilderFlag.STRIP_PLAN)
        plan = {
            "identity": gpu.WORLD.identity,
            "graph": graph,
            "digest": digest,
            "data": {} if stripped else network._data,
            "stripped": stripped,
            "inputs": specs,
            "outputs": [_spec(value) for value in network._model.graph.output],
            "profiles": profiles,
            "tf32": config.get_flag(BuilderFlag.TF32),
            "level": config.builder_optimization_level,
            "portable": config.get_flag(BuilderFlag.VERSION_COMPATIBLE),
        }
        return IHostMemory(b"PLAN" + pickle.dumps(plan))

    def _refuse(self, why: str) -> None:
        self._logger.log(Severity.ERROR, f"IBuilder::buildSerializedNetwork: {why}")

    def _pass_time(self, config: IBuilderConfig) -> bool:
        self._logger.log(Severity.INFO, "Local timing cache in use")
        self._logger.log(Severity.VERBOSE, "a tactic")
        monitor = config.progress_monitor
        if monitor is None:
            return True
        demand(monitor._made, "a progress monitor whose __init__ ran is needed")
        monitor.phase_start("Building Engine", None, 3)  # type: ignore[arg-type]
        going = all(monitor.step_complete("Building Engine", step) for step in range(3))
        monitor.phase_finish("Building Engine")
        return going


def _spec(value: onnx.ValueInfoProto) -> tuple[str, DataType, list[int]]:
    tensor = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
    return value.name, FROM_ONNX[tensor.elem_type], shape
