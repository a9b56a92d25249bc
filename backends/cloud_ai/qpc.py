"""The compiled file, `programqpc.bin`: checked before it is believed.

The header is that of the open runtime: magic, major and minor version, compression, size, base.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from backends.base import BackendError

FILE = "programqpc.bin"
MAGIC = 0x00A1CD7C
MAJOR = 0
"""The one major version that the open runtime reads."""
HEADER = struct.Struct("<IBBHQQ")


class QpcError(BackendError):
    """The file is no QPC, or one that the runtime here does not read."""


@dataclass(frozen=True)
class QpcHeader:
    major: int
    minor: int
    size: int


def read_header(folder: Path) -> QpcHeader:
    """Check `folder`/programqpc.bin.

    Raises:
        QpcError: it is missing, cut, not a QPC, or of another format version.
    """
    file = folder / FILE
    again = "`addbench cache verify`, then compile it again"
    try:
        with file.open("rb") as opened:
            head = opened.read(HEADER.size)
    except OSError as error:
        raise QpcError(f"there is no {FILE}", str(error), again) from error
    if len(head) < HEADER.size:
        raise QpcError(f"{FILE} is cut", f"it has {len(head)} bytes", again)
    magic, major, minor, _compression, size, _base = HEADER.unpack(head)
    if magic != MAGIC:
        raise QpcError(
            f"{FILE} is not a QPC", f"it starts with {magic:#010x}, a QPC with {MAGIC:#010x}", again
        )
    if major != MAJOR:
        raise QpcError(
            f"{FILE} is a QPC of another version",
            f"its format is {major}.{minor}, the runtime reads {MAJOR}.x",
            "compile it with the Apps SDK of the same version as the Platform SDK",
        )
    return QpcHeader(major, minor, size)
