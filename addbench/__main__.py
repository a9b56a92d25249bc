"""`addbench VERB`: the one command. Verbs in the order of work; each is imported when asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from core.cli import run
from core.errors import EXIT_OK, PreconditionError

VERBS: dict[str, tuple[str, ...]] = {
    "export": ("export.__main__",),
    "verify": ("export.__main__", "verify"),
    "image": ("backends.commands.image",),
    "train": ("distill.train",),
    "sweep": ("bench.sweep",),
    "ab": ("bench.commands.ab",),
    "versus": ("bench.commands.versus",),
    "gpu-check": ("bench.commands.gpu_check",),
    "show": ("bench.commands.show",),
    "gallery": ("bench.commands.gallery",),
    "compare": ("bench.commands.compare",),
    "gates": ("bench.commands.gates",),
    "claims": ("bench.commands.claims",),
    "roofline": ("bench.commands.roofline",),
    "cards": ("bench.commands.cards",),
    "frontier": ("bench.commands.frontier",),
    "publish": ("bench.commands.publish",),
    "compile": ("backends.__main__", "compile"),
    "cache": ("backends.__main__", "cache"),
    "parity": ("backends.__main__", "parity"),
    "backends": ("backends.__main__",),
    "noise": ("bench.commands.noise",),
    "harness": ("bench.commands.harness",),
    "calibrate": ("backends.commands.calibrate",),
    "evaluate": ("distill.evaluate",),
    "ablate": ("distill.ablate",),
}
"""Verb -> the module whose `main` it is, and the words that come before the user's."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: addbench VERB ...\n\n" + "\n".join(f"  {verb}" for verb in VERBS))
        return EXIT_OK
    verb, *rest = arguments
    if verb not in VERBS:
        raise PreconditionError(
            f"addbench has no verb {verb!r}", f"its verbs: {', '.join(VERBS)}", "addbench --help"
        )
    module, *words = VERBS[verb]
    code: int = importlib.import_module(module).main([*words, *rest])
    return code


def command() -> None:
    """The console script."""
    raise SystemExit(run(main))


if __name__ == "__main__":
    command()
