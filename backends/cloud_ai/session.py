"""A part as a session of the pipeline: static shapes, FP16 buffers, a device that may go away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from backends.base import BackendError, Session, UnsupportedError
from backends.cloud_ai.probe import READY, query
from backends.cloud_ai.runtimes import Buffer, Program, Runtime
from core.errors import AddbenchError
from export.bundle import PartInfo, Spec

if TYPE_CHECKING:
    from pathlib import Path

    import torch


class DeviceLostError(BackendError):
    """The device stopped answering, or was reset, while it ran."""


class QaicSession(Session):
    """One part on one device. Tensors are the host's; buffers have the program's types.

    Args:
        load: makes the runtime; its errors become ours.
        info: the part, whose named axes are numbers in `program`.

    Raises:
        DeviceLostError: the device is not ready.
        BackendError: the program does not load, or is not that of this part.
    """

    def __init__(
        self,
        runtime: Callable[[Program], Runtime],
        program: Program,
        info: PartInfo,
        util: Path | None,
    ) -> None:
        self.part, self.program, self.util = info.name, program, util
        self.turn = threading.Lock()  # lanes that share a device's part take turns
        try:
            self.runtime = runtime(program)
        except AddbenchError:
            raise
        except Exception as error:  # the SDK's exceptions are not documented
            raise self._explain(error, "loading") from error
        sizes = dict(program.spec.symbols)
        self.inputs = self._specs(info.inputs, self.runtime.inputs, sizes)
        self.outputs = self._specs(info.outputs, self.runtime.outputs, sizes)

    def _specs(
        self, specs: Sequence[Spec], buffers: Mapping[str, Buffer], sizes: Mapping[str, int]
    ) -> dict[str, Spec]:
        """The part's signature in the program's types; the shapes must be the program's."""
        found = {}
        for spec in specs:
            shape = tuple(sizes.get(d, d) if isinstance(d, str) else d for d in spec.shape)
            buffer = buffers.get(spec.name)
            if buffer is None or buffer.shape != shape:
                has = f"{spec.name} {list(buffer.shape)}" if buffer else ", ".join(buffers)
                batch = program_batch(buffer, spec)
                if batch not in (None, sizes.get(str(spec.shape[0]))):
                    raise UnsupportedError(
                        f"batch {sizes[str(spec.shape[0])]} of {self.part} was not compiled",
                        f"the program takes {batch} at a time",
                        f"use --batch {batch}, or compile again",
                    )
                raise BackendError(
                    f"the program of {self.part} has other buffers than the part",
                    f"the part has {spec.name} {list(shape)}, the program has {has}",
                    "`addbench cache prune --max-gb 0`, then compile it again",
                )
            found[spec.name] = replace(spec, shape=shape, dtype=buffer.dtype.name)
        return found

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        arrays = {
            name: np.ascontiguousarray(
                tensor.numpy().astype(self.runtime.inputs[name].dtype, copy=False)
            )
            for name, tensor in inputs.items()
        }
        try:
            with self.turn:
                # Copied: the runtime may use its buffers again.
                results = {name: array.copy() for name, array in self.runtime.run(arrays).items()}
        except Exception as error:  # the SDK's exceptions are not documented
            raise self._explain(error, "running") from error
        return {name: torch.from_numpy(array) for name, array in results.items()}

    def _explain(self, error: Exception, doing: str) -> BackendError:
        """What happened, as far as the error's words and the device's status tell."""
        device = self.program.device
        card = next((card for card in query(self.util)[0] if card.id == device), None)
        words = f"{type(error).__name__}: {error}"[:2000]
        if self.util is not None and (card is None or card.status != READY):
            state = "is not listed any more" if card is None else f"says {card.status}"
            return DeviceLostError(
                f"device {device} was lost {doing} {self.part}",
                f"qaic-util: it {state}; {words}",
                "wait until `qaic-util -q` says Ready (a reset takes a while), then run again;"
                " `dmesg` has the driver's words",
            )
        return BackendError(
            f"device {device} failed {doing} {self.part}",
            words,
            "`addbench cache verify`; try another runtime with qaic:runtime=...",
        )

    def close(self) -> None:
        self.runtime.close()


def program_batch(buffer: Buffer | None, spec: Spec) -> int | None:
    """The batch of a program's buffer that is the part's in all but that."""
    if buffer is None or not buffer.shape or not isinstance(spec.shape[0], str):
        return None
    return buffer.shape[0] if buffer.shape[1:] == tuple(spec.shape[1:]) else None
