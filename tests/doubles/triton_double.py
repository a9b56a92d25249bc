"""Triton's `triton_python_backend_utils`, as far as a model uses it: a test double."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TritonError(Exception):
    INVALID_ARG, INTERNAL = 3, 2

    def __init__(self, text: str, kind: int = INTERNAL) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass
class Tensor:
    name: str
    array: NDArray[Any]

    def is_cpu(self) -> bool:
        return True

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor]
    error: TritonError | None = None

    def has_error(self) -> bool:
        return self.error is not None


REPOSITORY = Path()
"""Where the models lie that a model may ask; a test says it."""


@dataclass
class InferenceRequest:
    """What a model asks of another one, whose graph ONNX Runtime runs as it lies there."""

    model_name: str
    requested_output_names: list[str]
    inputs: list[Tensor]

    def exec(self) -> InferenceResponse:
        session = opened(str(REPOSITORY / self.model_name / "1" / "model.onnx"))
        feeds = {tensor.name: tensor.array for tensor in self.inputs}
        arrays = session.run(self.requested_output_names, feeds)
        named = zip(self.requested_output_names, arrays, strict=True)
        return InferenceResponse([Tensor(name, array) for name, array in named])


@cache
def opened(path: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor:
    return next(tensor for tensor in response.output_tensors if tensor.name == name)


@dataclass
class Request:
    """What Triton hands over: inputs by name, the first axis the batch."""

    inputs: dict[str, NDArray[Any]] = field(default_factory=dict)


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


def asked(prompts: list[str], **rest: list[int]) -> Request:
    texts = np.array([[text.encode()] for text in prompts], dtype=object)
    return Request({"prompt": texts, **{k: np.array(v)[:, None] for k, v in rest.items()}})


def install() -> None:
    """Put this module where a model looks for Triton's."""
    module = ModuleType("triton_python_backend_utils")
    vars(module).update({name: value for name, value in globals().items() if name[0] != "_"})
    sys.modules["triton_python_backend_utils"] = module
