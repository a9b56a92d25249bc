"""`addbench fleet`: the machines of a fleet, their labels and hardware, and what they measure now.

    addbench fleet                       of the Ray cluster that this machine has joined
    addbench fleet 192.0.2.7:6379        of the one at that address
    addbench fleet slurm:gpu             the nodes of a Slurm partition

A machine is in it where its node offers the resource `addbench`; docs/fleet.md says how it is
started. `addbench sweep --fleet ADDRESS --on key=value` measures on those whose labels fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench.fleet.protocol import Machine, select
from core.cli import Parser, add_format_argument
from core.errors import EXIT_OK
from core.table import Column, as_json, draw, markdown_lines, print_json

COLUMNS = (
    Column("machine", lambda each: each.name, whole=True),
    Column("labels", lambda each: each.labels_text),
    Column("hardware", lambda each: each.hardware),
    Column("running", lambda each: "; ".join(each.running)),
)


def parser() -> Parser:
    top = Parser(
        prog="addbench fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("address", nargs="?", default="auto", metavar="ADDRESS",
                     help="of a Ray cluster, slurm:PARTITION, or local (auto)")  # fmt: skip
    top.add_argument("--on", metavar="KEY=VALUE,...", help="only machines with these labels")
    add_format_argument(top)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from bench.fleet.engines import fleet_at

    fleet = fleet_at(args.address)
    try:
        machines: Sequence[Machine] = fleet.machines()
        if args.on:
            machines = select(machines, args.on)
    finally:
        fleet.close()
    if args.format == "json":
        print_json(as_json(COLUMNS, machines))
    elif args.format == "markdown":
        print("\n".join(markdown_lines(COLUMNS, machines)))
    elif machines:
        draw(COLUMNS, machines)
    else:
        print("no machine measures: none of the nodes offers `addbench` (docs/fleet.md)")
    return EXIT_OK
