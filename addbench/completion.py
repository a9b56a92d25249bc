"""`addbench completion bash|zsh|fish`: what a shell needs to complete verbs and flags.

In bash: `source <(addbench completion bash)`, in ~/.bashrc for every shell. In fish:
`addbench completion fish | source`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from addbench.verbs import VERBS
from core.cli import Parser
from core.errors import EXIT_OK

SHELLS = ("bash", "zsh", "fish")


def parser() -> Parser:
    top = Parser(
        prog="addbench completion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("shell", choices=SHELLS)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from argcomplete.shell_integration import shellcode

    print(shellcode(["addbench"], shell=args.shell))
    return EXIT_OK


def complete() -> None:
    """Answer the shell that asks (`_ARGCOMPLETE` is set), and end the process.

    Only the parser of the verb on the line is built: a key pressed twice waits for no other.
    """
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    top = argparse.ArgumentParser(prog="addbench", add_help=False)
    verbs = top.add_subparsers()
    typed = next((two for two in (" ".join(words[1:3]),) if two in VERBS), "".join(words[1:2]))
    for name, verb in VERBS.items():
        first, _, second = name.partition(" ")
        if typed == name and second:
            inner = verbs.add_parser(first, add_help=False).add_subparsers()
            inner.add_parser(second, parents=[verb.load().parser()], add_help=False)
        elif typed == name:
            verbs.add_parser(name, parents=[verb.load().parser()], add_help=False)
        elif not second and typed.partition(" ")[0] != name:
            verbs.add_parser(name, add_help=False)
    verbs.add_parser("help", add_help=False).add_argument("verb", choices=[*VERBS, "--all"])
    argcomplete.autocomplete(top)
