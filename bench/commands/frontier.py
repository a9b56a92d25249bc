"""`addbench frontier`: quality against latency of few-step methods on one hardware.

After Fig. 5 of the ADD paper (Sauer et al., arXiv 2311.17042), with the zero-shot FID-5k of its
Table 2 in place of its ELO score; FIDs are published, latencies are ours:

    measured   a cell of ours is that method: model, scheduler and steps
    modelled   there is no model of it here: what is paid once an image and the UNet evaluations of
               sd15, measured here (RUN...), or FLOPs and bytes of its parts against the peaks of a
               known card (--device), times the method's NFE

One labelled point a method, as SVG and PNG, and a table of them as Markdown and CSV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from core.cli import Parser, add_out_argument, add_published_argument, add_runs_argument
from core.errors import EXIT_OK, PreconditionError
from core.files import build_root


def parser() -> Parser:
    top = Parser(
        prog="addbench frontier",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "run", nargs="*", metavar="RUN|latest", help="runs to take latencies from (the published)"
    )
    top.add_argument("--device", metavar="NAME", help="a known card instead: modelled latencies")
    top.add_argument("--backend", metavar="NAME[:KEY=VALUE,...]", help="of the runs (the newest)")
    add_runs_argument(top)
    add_published_argument(top)
    add_out_argument(top, "STEM", "files are STEM.svg, ... (build/frontier/HARDWARE)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.device and (args.run or args.backend):
        raise PreconditionError(
            "--device and runs exclude each other",
            "a chart shows one hardware",
            "drop --device, or drop the runs and --backend",
        )
    from bench.limits.frontier import from_device, from_runs, markdown, nothing_to_draw
    from bench.rows.store import open_run, run_names
    from bench.show.frontier import write

    if args.device:
        chart = from_device(args.device)
    else:
        folder, names = (args.runs, args.run) if args.run else (args.published, None)
        names = names or run_names(folder)
        drawn = from_runs([open_run(name, folder) for name in names], args.backend)
        if drawn is None:
            raise nothing_to_draw("these runs have" if args.run else "no published run has")
        chart = drawn
    name = "-".join("".join(c if c.isalnum() else " " for c in chart.hardware).split()).lower()
    stem = args.out or build_root() / "frontier" / name
    files = write(chart, stem, stem)
    print(markdown(chart))
    for file in files:
        print(file, file=sys.stderr)
    return EXIT_OK
