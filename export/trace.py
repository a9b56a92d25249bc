"""Adds up the heavy functions of a torch module as it runs, on any device, meta included."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FunctionTally(TorchFunctionMode):
    """Counts `linear`, `conv2d` and `scaled_dot_product_attention` calls inside its `with` block.

    Attributes:
        flops: by kind, 2 per multiply-add.
        operators: calls, by kind.
        moved: by kind, bytes of the activations that calls read and wrote, weights apart.
        scores: of attention: one for each query, key and head.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = {"linear": 0.0, "conv": 0.0, "attention": 0.0}
        self.operators = dict.fromkeys(self.flops, 0)
        self.moved = dict.fromkeys(self.flops, 0)
        self.scores = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            source, weight = args[:2]  # weight [out, in] or [out, in/groups, height, width]
            kind = "linear" if func is F.linear else "conv"
            self._count(kind, 2.0 * result.numel() * math.prod(weight.shape[1:]), source, result)
        elif func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            query, key, value = named["query"], named["key"], named["value"]
            # [..., L, D] x [..., S, D] -> scores, and scores x [..., S, E] -> [..., L, E]
            flops = 2.0 * key.shape[-2] * (query.numel() + result.numel())
            self._count("attention", flops, query, key, value, result)
            self.scores += math.prod(query.shape[:-1]) * key.shape[-2]
        return result

    def _count(self, kind: str, flops: float, *moving: Tensor) -> None:
        self.flops[kind] += flops
        self.operators[kind] += 1
        self.moved[kind] += sum(tensor.numel() * tensor.element_size() for tensor in moving)
