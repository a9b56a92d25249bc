"""`python -m backends compile` and `python -m backends`: as revisions that are compared call them.

People write `addbench compile` and `addbench backends`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from backends.commands import backends, compile
from core.cli import run


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["compile"]:
        return compile.main(arguments[1:])
    return backends.main(arguments)


if __name__ == "__main__":
    raise SystemExit(run(main))
