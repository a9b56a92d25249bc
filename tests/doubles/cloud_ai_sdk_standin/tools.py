"""SDK stand-in (a test double): qaic-util -q and qaic-runner."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def util(state: dict) -> int:
    if state.get("util_fails"):
        print("Failed to open device: Permission denied", file=sys.stderr)
        return 1
    print("SDK stand-in qaic-util: a test double")
    for card in state["cards"]:
        print(
            f"QID {card['id']}\n\tStatus:{card['status']}\n\tPCI Address:0000:{card['id']:02x}:00.0"
        )
        if card["status"] == "Ready":
            print(f"\tNsp Total:{card['total']}\n\tNsp Free:{card['free']}")
            print(f"\tBoard serial:{card['board']}\n\tSku Type:{card['sku']}")
            if "watts" in card:
                print(f"\tBoard power(Watts):{card['watts']:.2f}")
                print("\tBoard TDP Cap(Watts):150.00\n\tSOC TDP Cap(Watts):31.00")
    return 0


def runner(words: list[str], state: dict) -> int:
    given = dict(zip(words[::2], words[1::2], strict=True))
    if not (Path(given["-t"]) / "programqpc.bin").is_file():
        print(f"no programqpc.bin in {given['-t']}")
        return 1
    if int(given["-d"]) not in [card["id"] for card in state["cards"]]:
        print(f"no device {given['-d']}")
        return 1
    count = int(given["-n"])
    print(" ---- Stats ----")
    print(f"InferenceCnt {count} TotalDuration {count * 2500}us BatchSize 1 Inf/Sec 400.000")
    return 0


def main() -> int:
    program = Path(sys.argv[0])
    state = json.loads((program.parent.parent / "standin.json").read_text())
    if program.name == "qaic-util":
        return util(state) if sys.argv[1:] == ["-q"] else 2
    return runner(sys.argv[1:], state)
