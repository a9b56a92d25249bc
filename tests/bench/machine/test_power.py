"""Energy, clocks and neighbours: the gauge on a scripted source, NVML on a double, RAPL on files.

`NvmlDouble` stands for the module pynvml: what it knows and what a card refuses to tell.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.machine import power
from bench.machine.power import Gauge, Nvml, Rapl, Reading
from bench.rows.fields import FLAGS


@dataclass
class Scripted:
    """A test double of a source: what it is told, reading after reading."""

    readings: list[Reading]
    accelerator: bool = True
    clock_limit_mhz: float | None = 2000.0
    shares: list[float | None] = field(default_factory=lambda: [0.0, 0.0])
    taken: int = 0

    def read(self) -> Reading:
        self.taken += 1
        return self.readings[min(self.taken, len(self.readings)) - 1]

    def others(self) -> float | None:
        return self.shares.pop(0)


def sampled(source: Scripted, seconds: list[float]) -> Gauge:
    """A gauge after one sample at each moment."""
    moments = iter(seconds)
    gauge = Gauge(source, clock=lambda: next(moments))
    for number in range(len(seconds)):
        gauge.sampled(number + 1)
    return gauge


@given(
    watts=st.floats(1, 1000),
    call_s=st.floats(0.001, 5),
    count=st.integers(2, 200),
    start=st.floats(0, 1e6),
)
def test_energy_is_of_one_call(watts: float, call_s: float, count: int, start: float) -> None:
    """A device that draws so many watts, whatever the number and the length of the samples."""
    moments = [call_s * (n + 1) for n in range(count)]
    now = iter(moments)
    gauge = Gauge(None)
    gauge.source = source = Scripted([])
    clock = 0.0

    def read() -> Reading:
        return Reading(joules=start + watts * clock)

    source.read = read  # type: ignore[method-assign]
    gauge.clock = lambda: clock
    for number, moment in enumerate(now, start=1):
        clock = moment
        gauge.sampled(number)
    found = gauge.energy_j()
    if gauge.looks[-1][0] - gauge.looks[0][0] < power.SHORTEST_S:
        assert found is None
    else:
        assert found == pytest.approx(watts * call_s, rel=1e-3, abs=1e-5)
    assert len(gauge.looks) <= 1 + moments[-1] / power.LOOK_S


def test_no_counter_no_energy() -> None:
    gauge = sampled(Scripted([Reading(clock_mhz=1900.0)]), [0.0, 1.0, 2.0])
    assert gauge.columns()["energy_j"] is None
    assert Gauge(None).columns() == {"energy_j": None, "accelerator": None, "flags": []}


def test_what_a_row_says_of_its_gpu() -> None:
    readings = [
        Reading(100.0, 1980, 40, 300.0, 9000.0),
        Reading(400.0, 1950, 61, 500.0, 9500.0),
        Reading(700.0, 1980, 60, 400.0, 9400.0),
    ]
    found = sampled(Scripted(readings), [0.0, 1.0, 2.0]).columns()
    assert found["energy_j"] == 300.0
    assert found["flags"] == []
    assert found["accelerator"] == {
        "clock_mhz": 1980,
        "clock_lowest_mhz": 1950,
        "clock_limit_mhz": 2000.0,
        "temperature_c": 61,
        "power_w": 400.0,
        "peak_memory_mb": 9500.0,
        "other_use": 0.0,
    }


@pytest.mark.parametrize(
    ("lowest", "share", "flags"),
    [
        (1500.0, 0.0, []),
        (1499.0, 0.0, ["throttled"]),
        (1980.0, 0.06, ["disturbed"]),
        (1400.0, None, ["throttled"]),
    ],
)
def test_flags(lowest: float, share: float | None, flags: list[str]) -> None:
    source = Scripted([Reading(clock_mhz=1980.0), Reading(clock_mhz=lowest)], shares=[None, share])
    found = sampled(source, [0.0, 1.0]).columns()["flags"]
    assert found == flags
    assert set(found) <= set(FLAGS)


def test_a_cpu_has_energy_only() -> None:
    source = Scripted([Reading(5.0), Reading(9.0)], accelerator=False, clock_limit_mhz=None)
    assert sampled(source, [0.0, 2.0]).columns() == {
        "energy_j": 4.0,
        "accelerator": None,
        "flags": [],
    }


# ---- RAPL


def zone(root: Path, name: str, microjoules: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


def test_rapl_adds_packages_up_and_follows_a_counter_around(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", 900_000)
    second = zone(tmp_path, "intel-rapl:1", 10)
    zone(tmp_path, "intel-rapl:0:0", 5)  # the cores' own counter is in their package's
    rapl = Rapl(tmp_path)
    assert rapl.read().joules == 0.0
    (first / "energy_uj").write_text("100000\n")
    (second / "energy_uj").write_text("20\n")
    assert rapl.read().joules == pytest.approx(0.20001)


def test_rapl_that_may_not_be_read_is_no_source(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # as unreadable as root's, even for root
    assert Rapl(tmp_path).zones == []
    assert Rapl(tmp_path).read() == Reading()


# ---- NVML


class NvmlDouble:
    """A test double of pynvml. `silent`: functions that this card does not support."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def answer(*_: Any) -> Any:
            if name not in self.answers:
                raise self.NVMLError(f"{name} is not supported")
            return self.answers[name]

        return answer


def process(pid: int, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, **more)


def test_a_gpu_is_read_in_our_units() -> None:
    double = NvmlDouble(
        nvmlDeviceGetMaxClockInfo=1980,
        nvmlDeviceGetClockInfo=1935,
        nvmlDeviceGetTotalEnergyConsumption=123_456,
        nvmlDeviceGetPowerUsage=345_600,
        nvmlDeviceGetTemperature=55,
        nvmlDeviceGetComputeRunningProcesses=[process(os.getpid(), usedGpuMemory=7_000_000_000)],
        nvmlDeviceGetProcessUtilization=[
            process(os.getpid(), smUtil=90, timeStamp=5),
            process(1, smUtil=20, timeStamp=6),
            process(1, smUtil=40, timeStamp=7),
            process(2, smUtil=10, timeStamp=7),
        ],
    )
    gpu = Nvml(double, object())
    assert gpu.clock_limit_mhz == 1980
    assert gpu.read() == Reading(123.456, 1935, 55, 345.6, 7000.0)
    assert gpu.others() == pytest.approx(0.4)
    assert gpu.last_seen == 7


def test_in_a_container_memory_is_what_the_gpu_gained_and_neighbours_are_unknown() -> None:
    used = SimpleNamespace(used=2_000_000_000)
    double = NvmlDouble(nvmlDeviceGetMemoryInfo=used, nvmlDeviceGetComputeRunningProcesses=[])
    gpu = Nvml(double, object())
    double.answers["nvmlDeviceGetMemoryInfo"] = SimpleNamespace(used=9_500_000_000)
    assert gpu.read() == Reading(memory_mb=7500.0)
    assert gpu.others() is None


def test_a_card_that_tells_nothing_is_no_error() -> None:
    gpu = Nvml(NvmlDouble(), object())
    assert gpu.read() == Reading()
    assert sampled(Scripted([gpu.read()]), [0.0, 2.0]).columns()["energy_j"] is None


def test_the_double_has_the_functions_of_the_real_module() -> None:
    """What is asked for exists in nvidia-ml-py under that name."""
    if importlib.util.find_spec("pynvml") is None:
        pytest.skip("nvidia-ml-py is not installed")
    import re

    import pynvml

    source = Path(power.__file__).read_text()
    for name in set(re.findall(r"nvml\.(nvml\w+|NVML\w+)", source)):
        assert hasattr(pynvml, name), name


def test_without_a_gpu_there_is_no_source() -> None:
    if power.first_bus_id() is None:
        assert power.source_of("cuda") is None
        assert power.accelerators() == {"accelerators": {}, "accelerator_state": None}
    assert power.source_of("ai100") is None
