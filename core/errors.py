"""One error family: what happened, why, what to do next."""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_REGRESSION = 3
EXIT_FAILED = 4
EXIT_INCONCLUSIVE = 5
EXIT_INTERRUPTED = 130


class AddbenchError(Exception):
    """Work that started and failed (exit code 4). Subclasses change the exit code.

    Args:
        what: what happened, one sentence without a full stop.
        why: the cause, as far as it is known.
        next: what to do about it, with the flag, package or file to use.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, why: str = "", next: str = "") -> None:
        super().__init__(what, why, next)
        self.what, self.why, self.next = what, why, next

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.next:
            lines.append(f"  next: {self.next}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str]:
        return {
            "type": type(self).__name__,
            "what": self.what,
            "why": self.why,
            "next": self.next,
        }


class PreconditionError(AddbenchError):
    """Usage, or something unmet before work starts: package, device, checkpoint, disk (exit 2)."""

    exit_code = EXIT_USAGE


def no_text(text: str) -> str | None:
    """Why this is no text that a file or a page can hold; None if it is.

    JSON writes half a character as `"\\ud800"`; in an argument it is a byte that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = error.object[error.start]
        return f"it holds {where!a}: half of a character, or a byte that is not UTF-8"
    return None
