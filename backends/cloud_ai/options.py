"""What a person may set of the backend `qaic`, and which devices a word means."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from backends.base import Option
from backends.cloud_ai.presets import CORES, SPLITS
from backends.cloud_ai.probe import RUNTIMES
from backends.cloud_ai.spec import DIALECTS
from core.devices import devices as known_devices
from core.errors import PreconditionError


def parse_devices(text: str) -> tuple[int, ...]:
    """`0`, `0-3` or `0+2` -> ids. A name of devices.csv is a modelled card, and refused here."""
    if text in known_devices():
        raise PreconditionError(
            f"qaic:device={text} is the name of a modelled card",
            "this option takes ids of real devices, and neither stands in for the other",
            f"addbench sweep --backend qaic --device {text} models it; qaic:device=0 runs",
        )
    cards = [card.name for card in known_devices().values() if card.name.startswith("ai100-")]
    found: list[int] = []
    for piece in text.split("+"):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if match is None:
            raise PreconditionError(
                f"qaic:device={text} is no list of devices",
                "ids are whole numbers, as `qaic-util -q` lists them after QID; the names of"
                f" modelled cards are {', '.join(cards)}",
                "use device=0, device=0-3 or device=0+2, or one of these names",
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found or len(set(found)) < len(found):
        raise PreconditionError(
            f"qaic:device={text} names no device, or one twice",
            "every device runs one pipeline",
            "use device=0-3",
        )
    return tuple(found)


def number(key: str, lowest: int) -> Callable[[str], int | None]:
    """What reads the option `key`: `auto` -> None, or a whole number of at least `lowest`."""

    def parse(text: str) -> int | None:
        if text == "auto":
            return None
        if text.isdigit() and int(text) >= lowest:
            return int(text)
        raise PreconditionError(
            f"qaic:{key}={text} is not a number",
            f"it is auto, or a whole number of at least {lowest}",
            f"use {key}=auto",
        )

    return parse


OPTIONS: Mapping[str, Option] = {
    "device": Option(
        "0",
        "ids of real devices: 0, or 0-3 for an Ultra's SoCs; a card's name is modelled",
        parse_devices,
    ),
    "split": Option(
        "pipelines",
        "over several devices: a batch-1 pipeline on each, a whole batch on each, or the parts"
        " spread out",
        choices=SPLITS,
    ),
    "card": Option(
        "auto",
        "which card's presets (auto: the device's own, else ultra)",
        choices=("auto", *CORES),
    ),
    "runtime": Option(
        "auto",
        "what runs it: the first of these that is here",
        choices=("auto", *RUNTIMES),
    ),
    "compiler": Option("auto", "by the SDK's version, or insist", choices=("auto", *DIALECTS)),
    "cores": Option("auto", "AI cores of each program (auto: the preset's)", number("cores", 1)),
    "block": Option(
        "auto",
        "queries of self-attention at a time (auto: the preset's; 0: all)",
        number("block", 0),
    ),
    "vae": Option(
        "as-is",
        "scaled: for a VAE that does not fit FP16, its last block divided by 128",
        choices=("as-is", "scaled"),
    ),
    "norms": Option(
        "instance",
        "as torch's old exporter wrote them, or in elementary operators",
        choices=("instance", "decomposed"),
    ),
    "buffers": Option("fp16", "type of the programs' float buffers", choices=("fp16", "fp32")),
}
