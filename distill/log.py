"""Losses and sample grids of a run: JSON lines, TensorBoard where installed, progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.files import write_atomic
from distill.context import Context


class TrainingLog:
    """Rows in `log.jsonl`: stage, step, seconds, s_per_step and the losses' means since the last.

    Only the main process writes.
    """

    def __init__(self, context: Context, stage: str, step: int, total: int) -> None:
        self.stage, self.total = stage, total
        self.main: bool = context.accelerator.is_main_process
        self.every = max(1, min(50, total // 20))
        self.since: dict[str, list[float]] = {}
        self.first = self.last = step
        self.clock_at = time.monotonic()
        self.progress: Any = None
        if not self.main:
            return
        context.folder.mkdir(parents=True, exist_ok=True)
        self.pictures = context.folder / "samples"
        path = context.folder / "log.jsonl"
        truncate_log(path, stage, step)
        self.file = path.open("a", buffering=1)
        self.board = _tensorboard(context)
        if sys.stderr.isatty():
            self._start_bar(step)

    def _start_bar(self, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self.progress = Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "{task.fields[losses]}",
            console=Console(stderr=True),
            refresh_per_second=1,
        )
        self.bar = self.progress.add_task(self.stage, total=self.total, completed=step, losses="")
        self.progress.start()

    def losses(self, step: int, clock: Any, values: dict[str, float]) -> None:
        """Take one step's losses; write their means every few steps."""
        for name, value in values.items():
            self.since.setdefault(name, []).append(value)
        if self.progress is not None:
            self.progress.update(self.bar, completed=step)
        if not self.main or (step % self.every and step != self.first + 1):
            return
        # Some losses are not there in every step.
        means = {name: sum(given) / len(given) for name, given in self.since.items()}
        now = time.monotonic()
        pace = (now - self.clock_at) / max(1, step - self.last)
        self.since, self.clock_at, self.last = {}, now, step
        self._write(
            step, {"seconds": round(clock.seconds, 2), "s_per_step": round(pace, 4), **means}
        )
        text = " ".join(f"{name} {value:.4g}" for name, value in means.items())
        if self.progress is not None:
            self.progress.update(self.bar, losses=text)
        elif step % (self.every * 5) == 0 or step == self.first + 1:
            self._say(f"{self.stage} {step}/{self.total} {pace:.3f} s/step {text}")

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def grid(
        self, step: int, pictures: NDArray[np.uint8] | None, figures: dict[str, float]
    ) -> None:
        """Write sample pictures as one PNG, and what they score."""
        if not self.main:
            return
        if pictures is not None:
            from PIL import Image

            self.pictures.mkdir(exist_ok=True)
            sheet = contact_sheet(pictures)
            Image.fromarray(sheet).save(self.pictures / f"{self.stage}-{step:06d}.png")
            if self.board is not None:
                self.board.add_image(f"{self.stage}/samples", sheet, step, dataformats="HWC")
        if figures:
            self._write(step, {"quality": figures})
            shown = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
            self._say(f"{self.stage} {step}/{self.total} {shown}")
            if self.board is not None:
                for name, value in figures.items():
                    self.board.add_scalar(f"{self.stage}/{name}", value, step)
        self.clock_at = time.monotonic()

    def _write(self, step: int, row: dict[str, Any]) -> None:
        self.file.write(json.dumps({"stage": self.stage, "step": step, **row}) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{self.stage}/{name}", value, step)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        if self.main:
            self.file.close()
            if self.board is not None:
                self.board.close()


def contact_sheet(pictures: NDArray[np.uint8], columns: int = 8) -> NDArray[np.uint8]:
    """[n, height, width, 3] -> one picture, rows of `columns`, white where none is left."""
    n, height, width, _ = pictures.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, height, width, 3), 255, np.uint8)
    sheet[:n] = pictures
    laid = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(laid.reshape(rows * height, columns * width, 3))


def _tensorboard(context: Context) -> Any:
    """A TensorBoard writer, or None and a word when the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            "note: no TensorBoard log (pip install tensorboard); log.jsonl has it all",
            file=sys.stderr,
        )
        return None
    return SummaryWriter(str(context.folder / "tensorboard"))


def truncate_log(path: Path, stage: str, step: int) -> None:
    """Drop a stage's rows after `step`: a killed run logged steps that its checkpoint lacks."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the torn last line of a killed run
        if row["stage"] != stage or row["step"] <= step:
            kept.append(line)
    write_atomic(path, "".join(f"{line}\n" for line in kept))
