"""Triton's `triton_python_backend_utils`, as far as a model uses it: a test double."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
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

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor]
    error: TritonError | None = None


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
