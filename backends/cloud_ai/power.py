"""What a Cloud AI 100 card draws: the sensor that its kernel driver has for every SoC.

`power1_input` below a device's hwmon folder is, in the words of the open runtime's header, the
"instantaneous average board power" in microwatt, 0 where it could not be read; `power1_max` is its
limit. An Ultra has a sensor on each of its four SoCs. A public record of one (SERVER_SETUP.md in
Nouman945/efficient-transformers) has 48 W of board power and a board limit of 150 W on an idle
device, beside 11 W and a limit of 31 W of the SoC. So a limit says whose a reading is: at the
card's own TDP it is the board's, and the four say the same thing; at anything less it may be an
SoC's share, and then the card's power is unknown. Readings of one board are never added up.
Nothing here has been run on a card.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.cloud_ai.presets import SKUS
from backends.cloud_ai.probe import PCI_DEVICES, Card, Findings
from core.devices import Device, devices

MICRO, MILLI = 1e-6, 1e-3


@dataclass(frozen=True)
class Board:
    """A card with devices of ours on it.

    Attributes:
        sensors: hwmon folders of these devices.
        whole: whether each of them tells the power of the whole card.
    """

    sensors: tuple[Path, ...]
    whole: bool

    def watts(self) -> float | None:
        """Return the power of the whole card, now; None where its sensors do not say."""
        told = [value for each in self.sensors if (value := sensor(each, "power1_input", MICRO))]
        return statistics.mean(told) if told and self.whole else None

    def temperature_c(self) -> float | None:
        """Return the temperature of its hottest SoC."""
        told = [value for each in self.sensors if (value := sensor(each, "temp2_input", MILLI))]
        return max(told, default=None)


def sensor(folder: Path, name: str, unit: float) -> float | None:
    """A value of the driver's; None for what it does not have, or calls 0: a failed reading."""
    try:
        value = int((folder / name).read_text()) * unit
    except (OSError, ValueError):
        return None
    return value if value > 0 else None


def boards(found: Findings, ids: Iterable[int], pci: Path = PCI_DEVICES) -> list[Board]:
    """The cards that the devices `ids` are on; empty where one of these has no sensor."""
    by_board: dict[str, list[tuple[Card, Path]]] = {}
    for each in ids:
        card = found.card(each)
        places = sorted((pci / card.pci / "hwmon").glob("hwmon*")) if card and card.pci else []
        if card is None or not places:
            return []
        by_board.setdefault(card.board, []).append((card, places[0]))
    return [
        Board(tuple(place for _, place in ours), is_whole(found, *ours[0]))
        for ours in by_board.values()
    ]


def is_whole(found: Findings, card: Card, place: Path) -> bool:
    """Whether a device's sensor tells the power of its whole card."""
    beside = [other for other in found.cards if other.board == card.board]
    if len(beside) == 1:
        return True
    known = card_of(card)
    limit = sensor(place, "power1_max", MICRO) or card.tdp_w
    return bool(card.board) and known is not None and limit is not None and limit >= known.tdp_w


def card_of(card: Card) -> Device | None:
    """The entry of devices.csv for a device's SKU."""
    name = SKUS.get(card.sku.lower())
    return devices()[f"ai100-{name}"] if name else None


def hardware(found: Findings, ids: Sequence[int]) -> str:
    """What runs on the devices `ids` ran on: `ai100-ultra` for all SoCs of one such card.

    Anything else gets a name that is none of devices.csv: half a card is no card.
    """
    cards = [card for each in ids if (card := found.card(each))]
    known = [card_of(card) for card in cards]
    if not known or len(known) < len(ids) or len({*known}) > 1 or known[0] is None:
        skus = dict.fromkeys(card.sku or "SKU unknown" for card in cards)
        return f"{len(ids)} Cloud AI 100 devices ({', '.join(skus) or 'not listed'})"
    serials, device = {card.board for card in cards}, known[0]
    if len(serials) == 1 and len(ids) == device.socs:
        return device.name
    return f"{len(ids)} SoCs of {len(serials)} {cards[0].sku}"
