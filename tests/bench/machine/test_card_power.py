"""What a Cloud AI 100 draws, on the SDK stand-in and a sysfs tree like its driver's: no card."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from made import cell, make_run, row

from backends.base import Backend
from backends.cloud_ai import power as sensors
from backends.cloud_ai.power import Board, boards, hardware
from backends.cloud_ai.probe import ROOT_VARIABLE, look
from bench.limits.claims import judge
from bench.limits.ledger import hardware_of, measured, read_claims
from bench.machine import power
from bench.machine.environment import with_hardware
from bench.machine.power import Gauge, Sensors
from bench.rows.summary import by_cell
from bench.run.plan import Candidate, probe
from bench.show.columns import columns_for
from tests.doubles.cloud_ai_sdk_standin import ULTRA, make_sdk, make_sensors, set_state


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in with an Ultra."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "sdk"))
    monkeypatch.setattr("backends.cloud_ai.probe.runtimes", lambda root: ("qaic",))
    return make_sdk(tmp_path / "sdk")


@dataclass(frozen=True)
class Scripted(Board):
    """A test double of a board: (watts, None for silence) in order; the last one stays."""

    told: list[float | None] = field(default_factory=list)

    def watts(self) -> float | None:
        return self.told.pop(0) if len(self.told) > 1 else self.told[0]


def scripted(*told: Sequence[float | None]) -> list[Board]:
    return [Scripted((), True, list(each)) for each in told]


# --- whose power a sensor tells


def test_a_board_limit_makes_four_sensors_one_reading(sdk: Path, tmp_path: Path) -> None:
    places = make_sensors(sdk, tmp_path / "pci", watts=96.0, limit_w=150.0)
    (board,) = boards(look(), range(4), tmp_path / "pci")
    assert board.whole
    assert board.watts() == 96.0, "the board's, four times told and never added up"
    assert board.temperature_c() == 43.0
    (places[2] / "power1_input").write_text("0\n")
    assert board.watts() == 96.0, "0 is a failed reading"
    for place in places.values():
        (place / "power1_input").unlink()
    assert board.watts() is None


@pytest.mark.parametrize(
    ("limit_w", "cards", "whole"),
    [
        (31.0, {}, False),  # an SoC's own limit
        (None, {}, False),
        (None, {"watts": 48.0}, True),  # the limit is in qaic-util's words
        (150.0, {"sku": "Pcie Ultra"}, True),
        (150.0, {"sku": "PCIe Ultra 080"}, False),  # no card of devices.csv
        (150.0, {"board": ""}, False),  # nothing tells the cards apart
    ],
)
def test_without_a_sure_limit_a_shared_boards_power_is_unknown(
    limit_w: float | None, cards: dict[str, object], whole: bool, sdk: Path, tmp_path: Path
) -> None:
    set_state(sdk, {"cards": [{"id": each, **ULTRA, **cards} for each in range(4)]})
    make_sensors(sdk, tmp_path / "pci", watts=20.0, limit_w=limit_w)
    (board,) = boards(look(), (0,), tmp_path / "pci")
    assert board.whole == whole
    assert (board.watts() is None) != whole


def test_a_card_of_one_soc_needs_no_limit_and_cards_are_told_apart(
    sdk: Path, tmp_path: Path
) -> None:
    cards = [{**ULTRA, "id": n, "sku": "PCIe Pro", "board": f"B{n}"} for n in range(2)]
    set_state(sdk, {"cards": cards})
    make_sensors(sdk, tmp_path / "pci", watts=60.0)
    assert [each.watts() for each in boards(look(), (0, 1), tmp_path / "pci")] == [60.0, 60.0]
    assert boards(look(), (0, 9), tmp_path / "pci") == []
    assert boards(look(), (0,), tmp_path / "elsewhere") == []


# --- energy of it


def test_energy_is_the_integral_of_all_cards() -> None:
    now = 0.0
    source = Sensors(scripted([100, 100, 200], [50]), look_s=None, clock=lambda: now)
    for now in (0.0, 0.5, 1.0):  # noqa: B007 (the clock reads it)
        source.look()
    # 0.5 s at 150 W, then 0.5 s from 150 to 250 W
    assert source.joules == pytest.approx(0.5 * 150 + 0.5 * 200)
    assert source.read().power_w == 250


def test_a_silent_moment_is_bridged_and_a_long_one_is_not() -> None:
    now = 0.0
    source = Sensors(
        scripted([100, None, 100, None, None, None, 100]), look_s=None, clock=lambda: now
    )
    for now in (0.0, 0.4, 0.8):  # noqa: B007
        source.look()
    assert source.joules == pytest.approx(80.0)
    for now in (1.2, 1.9):  # noqa: B007
        source.look()
    assert source.read().power_w is None, "the latest reading is old"
    now = 2.0
    assert source.read().joules is None
    source.others()  # the next cell
    for now in (3.0, 3.5):  # noqa: B007
        source.look()
    assert source.joules == pytest.approx(50.0)


def test_a_gauge_reads_a_card_while_it_works(
    sdk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sensors(sdk, tmp_path / "pci", watts=80.0, limit_w=150.0)
    monkeypatch.setattr(sensors.boards, "__defaults__", (tmp_path / "pci",))
    source = power.source_of("qaic:0-3")
    assert isinstance(source, Sensors)
    monkeypatch.setattr(power, "SHORTEST_S", 0.3)
    gauge = Gauge(source)
    for count in range(1, 5):
        gauge.sampled(count)
        time.sleep(0.25)  # the call
    found = gauge.columns()
    began, ended = gauge.looks[0][0], gauge.looks[-1][0]
    assert found["energy_j"] == pytest.approx(80.0 * (ended - began) / 3, rel=0.2)
    assert found["accelerator"]["power_w"] == 80.0
    assert found["accelerator"]["temperature_c"] == 43.0
    assert found["accelerator"]["clock_mhz"] is None
    assert any(thread.name == "power" for thread in threading.enumerate())
    del gauge, source
    gc.collect()
    deadline = time.monotonic() + 5
    while any(thread.name == "power" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread ends with its source"
        time.sleep(0.05)


def test_no_sensor_or_an_unsure_one_is_no_source(
    sdk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors.boards, "__defaults__", (tmp_path / "pci",))
    assert power.source_of("qaic:0") is None
    make_sensors(sdk, tmp_path / "pci", watts=20.0, limit_w=31.0)
    assert power.source_of("qaic:0-3") is None
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "none"))
    assert power.source_of("qaic:0") is None


# --- and whose it is, in a run


def usable(candidates: list[Candidate]) -> list[Backend]:
    return [each.backend for each in candidates if each.backend and each.found.usable]


@pytest.mark.parametrize(
    ("ids", "name"),
    [
        ("0-3", "ai100-ultra"),
        ("0-1", "2 SoCs of 1 PCIe Ultra"),
        ("0-7", "8 Cloud AI 100 devices (PCIe Ultra)"),
    ],
)
def test_a_run_says_which_card_its_devices_are(ids: str, name: str, sdk: Path) -> None:
    candidates = probe([f"qaic:device={ids}", "null"])
    environment = with_hardware({"accelerators": {"cuda": "NVIDIA L4"}}, usable(candidates))
    assert environment["accelerators"]["cuda"] == "NVIDIA L4"
    found = hardware(look(), candidates[0].backend.devices)  # type: ignore[union-attr]
    assert found == name
    if name.endswith("(PCIe Ultra)"):
        assert f"qaic:{ids}" not in environment["accelerators"], "it is not usable"
    else:
        assert hardware_of(environment, f"qaic:{ids}") == name


def test_an_sku_that_is_not_known_gets_no_cards_name(sdk: Path) -> None:
    set_state(sdk, {"cards": [{"id": 0, **ULTRA, "sku": "M.2"}]})
    assert hardware(look(), (0,)) == "1 Cloud AI 100 devices (M.2)"


def test_measured_rows_of_a_card_judge_the_claim_and_show_their_joules(
    sdk: Path, tmp_path: Path
) -> None:
    """What somebody with an Ultra sends back stands where the model stood."""
    (claim,) = [each for each in read_claims() if each.id == "ai100-ultra-4img"]
    of = cell(model="sdxl-turbo", backend="qaic", options="device=0-3", device="qaic:0-3",
              precision="fp16", size="512x512", batch=4, steps=1)  # fmt: skip
    made = make_run(tmp_path, [row(of, [180.0] * 3, period_ms=170.0, energy_j=20.0)])
    assert judge(claim, [claim], measured([made])).verdict == "consistent", "by the model"
    environment = made.header.environment
    candidates = probe(["qaic:device=0-3"])
    environment |= with_hardware({**environment, "accelerators": {}}, usable(candidates))
    found = judge(claim, [claim], measured([made]))
    assert found.verdict == "beaten"
    assert "170.0 ms" in found.reason
    assert found.nearest is not None
    assert found.nearest.images_per_joule == pytest.approx(0.2)
    printed = {column.header: column for column in columns_for(by_cell(made.rows()))[0]}
    assert printed["images/J"].text(by_cell(made.rows())[0]) == "0.200"
    assert "images/J at TDP" not in printed
