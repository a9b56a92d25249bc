"""What a waiting sweep shows: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.rows.cell import Cell
from bench.rows.fields import OK
from bench.rows.store import Row, is_timed

if TYPE_CHECKING:
    from rich.progress import Progress

REDRAW_S = 1.0
"""The parent shares the machine with what it measures: it redraws no more often than this."""
LOG_S = 10.0
"""How often a log says how far the judging of captions is."""


def line_of(row: Row) -> str:
    """A finished row in one line."""
    cell = Cell.of(row)
    if row["status"] != OK:
        return f"{cell}: {row['status']}: {(row['error'] or {}).get('what', '')}"
    if not is_timed(row):
        return f"{cell}: image check {row['image_check']['status']}, {row['provenance']}: no speed"
    if row["low_ms"] is not None:
        span = f"{row['low_ms']:.0f} to {row['high_ms']:.0f}"
        return f"{cell}: {row['median_ms']:.1f} ms ({row['provenance']}: {span})"
    rate = "" if row["images_per_s"] is None else f", {row['images_per_s']:.3g} images/s"
    cv = "" if row["cv"] is None else f", CV {row['cv']:.1%}"
    flags = "".join(f", {flag}" for flag in row["flags"])
    count = len(row["samples_ms"])
    return f"{cell}: {row['median_ms']:.1f} ms{rate} ({count} samples{cv}{flags})"


class Display:
    """A `spawn.View`. Use as a context manager.

    Args:
        place: the machine that is spoken of, before every line; several share the terminal then,
            and there is no bar.

    Attributes:
        side: whose cells are measured, where there are two sides.
    """

    def __init__(self, total: int, rounds: int, place: str = "") -> None:
        self.total, self.rounds, self.done = total, rounds, 0
        self.side, self.place = "", place
        self.redraws = sys.stdout.isatty() and not place
        self.drawn = 0.0
        self.doing, self.count = "", 0
        self.captions: int | None = None
        self.progress: Progress | None = None
        if self.redraws:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

            self.progress = Progress(
                BarColumn(20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                "{task.description}",
                auto_refresh=False,
            )
            self.task = self.progress.add_task("", total=total)

    def say(self, text: str) -> None:
        if self.progress:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            self.draw()
        else:
            print(f"{self.place}: {text}" if self.place else text, flush=True)

    def loading(self, cells: Sequence[Cell], round_: int) -> None:
        again, number = divmod(round_, self.rounds)
        once_more = ", once more" if again else ""
        of = f" (round {number + 1} of {self.rounds}{once_more})" if self.rounds > 1 else ""
        first, side = cells[0], self.side and f"{self.side} "
        self.count = 0
        self.doing = f"loading {side}{first.backend_text} {first.decoder} batch {first.batch}{of}"
        if self.progress:
            self.draw()
        else:
            self.say(f"[{self.done}/{self.total}] {self.doing}")

    def more(self, cells: int) -> None:
        """Count cells that were not planned."""
        self.total += cells
        if self.progress:
            self.progress.update(self.task, total=self.total)

    def waiting(self, text: str) -> None:
        """Say in the progress line what is waited for; in a log nothing more is said."""
        self.doing, self.count = text, 0
        self.tick()

    def begin(self, cell: Cell) -> None:
        self.doing, self.count = str(cell), 0

    def sampled(self, count: int, captions: int | None = None) -> None:
        """Show how far a cell is; in a log, how far the judging of its captions is, now and then.

        Args:
            captions: of how many `count` have a picture to be judged; None: they are samples.
        """
        self.count, self.captions = count, captions
        if captions and not self.progress and time.monotonic() - self.drawn >= LOG_S:
            self.drawn = time.monotonic()
            self.say(f"[{self.done}/{self.total}] {self.doing}: {count} of {captions} captions")

    def finished(self, row: Row) -> None:
        self.done += 1
        if self.progress:
            self.progress.update(self.task, completed=self.done)
        self.say(f"[{self.done}/{self.total}] {line_of(row)}")

    def tick(self) -> None:
        if self.progress and time.monotonic() - self.drawn >= REDRAW_S:
            self.draw()

    def draw(self) -> None:
        if self.progress:
            of = f"of {self.captions} captions" if self.captions else "samples"
            count = f" ({self.count} {of})" if self.count else ""
            self.progress.update(self.task, description=self.doing + count)
            self.progress.refresh()
            self.drawn = time.monotonic()

    def __enter__(self) -> Display:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.doing, self.count = "", 0
            self.draw()
            self.progress.stop()
