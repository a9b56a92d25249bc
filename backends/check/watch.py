"""The largest values inside a torch module: what an FP16 run of it would overflow on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Watch:
    """Largest absolute output of every op, by module path; the FP16 overflow judgement.

    A dispatch mode sees each aten op; forward hooks say in which module it ran.
    """

    def __init__(self) -> None:
        self.largest: dict[tuple[str, str], float] = {}
        self._stack: list[str] = [""]
        self._hooks: list[Any] = []
        self._mode: Any = None

    def attach(self, module: torch.nn.Module) -> None:
        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self._stack.append(name)

        def leave(*_: object) -> None:  # a value returned here would replace the output
            self._stack.pop()

        for name, child in module.named_modules():
            self._hooks.append(child.register_forward_pre_hook(enter(name)))
            self._hooks.append(child.register_forward_hook(leave, always_call=True))

    def __enter__(self) -> Watch:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        watch = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                result = func(*args, **(kwargs or {}))
                # Views repeat what an op gave; only ops inside the part count.
                if len(watch._stack) > 1 and not func.is_view:
                    for value in result if isinstance(result, tuple | list) else (result,):
                        if isinstance(value, torch.Tensor) and value.is_floating_point():
                            watch._see(str(func.name()), value)
                return result

        if self._hooks:
            self._mode = Mode()
            self._mode.__enter__()
        return self

    def _see(self, op: str, value: torch.Tensor) -> None:
        import torch

        if value.numel() == 0:
            return
        low, high = torch.aminmax(value)
        largest = max(abs(float(low)), abs(float(high)))
        key = (self._stack[-1], op)
        if not largest <= self.largest.get(key, 0.0):  # NaN counts as larger
            self.largest[key] = largest

    def __exit__(self, *error: object) -> None:
        if self._mode is not None:
            self._mode.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def report(self, keep: int = 5) -> list[dict[str, Any]]:
        """The ops with the largest outputs, largest first."""
        ranked = sorted(self.largest.items(), key=lambda item: -rank(item[1]))
        return [
            {"module": module, "op": op, "largest": value} for (module, op), value in ranked[:keep]
        ]


def rank(value: float) -> float:
    """Return a value to sort by: NaN, of an op that overflowed, counts as the largest."""
    return value if value == value else float("inf")
