"""`addbench cache ls|verify|prune`: the compiled artifacts, which any later run takes from disk.

They lie in build/cache (below ADDBENCH_BUILD), 30 GB at most (ADDBENCH_CACHE_GB): beyond that the
least recently used go.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from core.amounts import bytes_text, count_text
from core.cli import Parser
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError


def parser() -> Parser:
    top = Parser(
        prog="addbench cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = top.add_subparsers(dest="action", metavar="ls|verify|prune", required=True)
    actions.add_parser("ls", help="what it holds")
    actions.add_parser("verify", help="hash every file, and the operators that were built")
    prune = actions.add_parser("prune", help="drop least recently used artifacts")
    prune.add_argument("--max-gb", type=float, metavar="GB", help="keep at most that (the cap)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.action == "prune" and args.max_gb is not None and args.max_gb < 0:
        raise PreconditionError("--max-gb is negative", "it is a size", "use 0 to drop all")
    from backends.artifacts.cache import ArtifactCache, disk_bytes
    from backends.onnxrt import libraries

    store = ArtifactCache()
    if args.action == "prune":
        before = disk_bytes(store.entries())
        removed = store.prune(store.cap_gb if args.max_gb is None else args.max_gb)
        for entry in removed:
            print(f"{entry.key}  {bytes_text(entry.bytes):>9}  {entry.label}")
        freed = before - disk_bytes(store.entries())
        print(f"removed {len(removed)}, {bytes_text(freed)}")
        return EXIT_OK
    if args.action == "verify":
        verified = store.verify()
        for key, sound in verified.items():
            print(f"{key}  {'sound' if sound else 'damaged: removed, compile it again'}")
        built = libraries.verify()
        for file, sound in built.items():
            state = "sound" if sound else "not what was built: removed, built again when needed"
            print(f"{file}  {state}")
        return EXIT_OK if all((*verified.values(), *built.values())) else EXIT_FAILED
    entries = store.entries()
    for entry in entries:
        print(f"{entry.key}  {bytes_text(entry.bytes):>9}  {entry.label}")
    total = disk_bytes(entries)
    shared = sum(entry.bytes for entry in entries) - total
    print(
        f"{count_text(len(entries), 'artifact')}, {bytes_text(total)} of {store.cap_gb:g} GB"
        + (f" ({bytes_text(shared)} more if none shared its files)" if shared else "")
        + f", in {store.root}"
    )
    return EXIT_OK
