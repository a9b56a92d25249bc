"""Energy, clocks, temperature, memory and neighbours of what a cell runs on.

A GPU is asked through NVML (nvidia-ml-py), a CPU's packages through RAPL, where the kernel lets
this user read it, a Cloud AI 100 through the sensors of its kernel driver (not run on one yet).
Whatever cannot be had is None, never zero.

A gauge is read between samples, outside of the timed region, five times a second at most. Energy is
the difference of a counter between the first reading and the last, over the samples in between; it
holds the moments between samples too, and for a GPU or a card the card alone, without its host. A
card that has no counter is asked for its power while it works, and the counter is made of that.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from backends.cloud_ai.power import Board

LOOK_S = 0.2
SHORTEST_S = 1.0
"""NVML's energy counter moves some ten times a second: a shorter window says nothing at 10%."""
THROTTLED_BELOW = 0.75
"""The share of the highest clock that the GPU can be set to."""
DISTURBED_ABOVE = 0.05
POWERCAP = Path("/sys/class/powercap")
GAP_S = 1.0
"""Longest time between two readings of a power sensor that its energy is made of."""


@dataclass(frozen=True)
class Reading:
    """One look. Joules count from an arbitrary moment; None is what this source does not tell."""

    joules: float | None = None
    clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    memory_mb: float | None = None


class PowerSource(Protocol):
    """What can be read, and whose it is."""

    accelerator: bool
    clock_limit_mhz: float | None

    def read(self) -> Reading: ...
    def others(self) -> float | None: ...


class Nvml:
    """The GPU that CUDA shows first, through NVML.

    Args:
        nvml: the module pynvml, initialised.
        handle: of the GPU.
    """

    accelerator = True
    clock_limit_mhz: float | None

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle
        self.clock_limit_mhz = self.ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM)
        self.used_before = self.used_mb()
        self.last_seen = 0

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """NVML's answer, or None: cards and containers differ in what they tell."""
        try:
            return question(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None

    def read(self) -> Reading:
        nvml = self.nvml
        millijoules = self.ask(nvml.nvmlDeviceGetTotalEnergyConsumption)
        milliwatts = self.ask(nvml.nvmlDeviceGetPowerUsage)
        return Reading(
            joules=None if millijoules is None else millijoules / 1e3,
            clock_mhz=self.ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            temperature_c=self.ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if milliwatts is None else milliwatts / 1e3,
            memory_mb=self.own_mb(),
        )

    def used_mb(self) -> float | None:
        memory = self.ask(self.nvml.nvmlDeviceGetMemoryInfo)
        return None if memory is None else memory.used / 1e6

    def own_mb(self) -> float | None:
        """Device memory of this process, CUDA context included.

        By process where NVML names it; in a container it does not, and what the whole GPU gained
        since the gauge was made stands for it.
        """
        mine = [process for process in self.processes() if process.pid == os.getpid()]
        if mine and mine[0].usedGpuMemory is not None:
            return float(mine[0].usedGpuMemory) / 1e6
        used = self.used_mb()
        return None if used is None or self.used_before is None else used - self.used_before

    def processes(self) -> Sequence[Any]:
        return self.ask(self.nvml.nvmlDeviceGetComputeRunningProcesses) or ()

    def others(self) -> float | None:
        """Share of the GPU's time that other processes took since the last call, 0 to 1.

        None where NVML does not know this process: then it knows no other one either.
        """
        if os.getpid() not in {process.pid for process in self.processes()}:
            return None
        used = self.ask(self.nvml.nvmlDeviceGetProcessUtilization, self.last_seen) or ()
        shares: dict[int, list[int]] = {}
        for sample in used:
            self.last_seen = max(self.last_seen, sample.timeStamp)
            if sample.pid != os.getpid():
                shares.setdefault(sample.pid, []).append(sample.smUtil)
        return min(1.0, sum(statistics.mean(each) for each in shares.values()) / 100)


class Rapl:
    """The CPU packages' energy counters. All that runs on them counts, not this process alone."""

    accelerator = False
    clock_limit_mhz: float | None = None

    def __init__(self, root: Path = POWERCAP) -> None:
        self.zones = sorted(
            zone
            for zone in root.glob("intel-rapl:*")
            if zone.name.count(":") == 1 and readable(zone / "energy_uj")
        )
        self.last: dict[Path, int] = {}
        self.total_uj = 0

    def read(self) -> Reading:
        if not self.zones:
            return Reading()
        for zone in self.zones:
            now = int((zone / "energy_uj").read_text())
            gained = now - self.last.get(zone, now)
            if gained < 0:  # the counter wraps around, every few minutes under load
                gained += int((zone / "max_energy_range_uj").read_text())
            self.last[zone] = now
            self.total_uj += gained
        return Reading(joules=self.total_uj / 1e6)

    def others(self) -> None:
        return None


class Sensors:
    """Cards that tell their power and no energy: this is its integral, by the trapezoidal rule.

    They are read by a thread, since between samples they rest. It ends with this object.

    Args:
        boards: what is read; their power adds up.
        look_s: between two readings; None: only `look` reads.
    """

    accelerator = True
    clock_limit_mhz: float | None = None

    def __init__(
        self,
        boards: Sequence[Board],
        look_s: float | None = LOOK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.boards, self.clock = boards, clock
        self.turn = threading.Lock()
        self.joules: float | None = 0.0
        self.last: tuple[float, float] | None = None
        """(when, watts) of the latest reading."""
        if look_s is not None:
            keep = (weakref.ref(self), look_s)
            threading.Thread(target=keep_looking, args=keep, name="power", daemon=True).start()

    def look(self) -> None:
        """Read all boards; a moment in which one is silent is bridged, if it is short."""
        with self.turn:
            now, told = self.clock(), [board.watts() for board in self.boards]
            watts = [value for value in told if value is not None]
            if len(watts) < len(self.boards):
                return
            if self.last is not None:
                gap = now - self.last[0]
                lost = self.joules is None or gap > GAP_S
                self.joules = (
                    None if lost else (self.joules or 0.0) + gap * (self.last[1] + sum(watts)) / 2
                )
            self.last = now, sum(watts)

    def read(self) -> Reading:
        self.look()
        hottest = [each for board in self.boards if (each := board.temperature_c()) is not None]
        known = self.last is not None and self.clock() - self.last[0] <= GAP_S
        return Reading(
            joules=self.joules if known else None,
            temperature_c=max(hottest, default=None),
            power_w=self.last[1] if known and self.last else None,
        )

    def others(self) -> None:
        """Nobody says who else uses the cards. A cell begins or is over: the counter restarts."""
        with self.turn:
            self.joules, self.last = 0.0, None


def keep_looking(source: weakref.ref[Sensors], look_s: float) -> None:
    """Read as long as anything else holds `source`."""
    while (alive := source()) is not None:
        alive.look()
        del alive
        time.sleep(look_s)


def readable(file: Path) -> bool:
    try:
        file.read_text()
    except OSError:
        return False
    return True


class Gauge:
    """Readings while one cell is sampled."""

    def __init__(
        self, source: PowerSource | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.source, self.clock = source, clock
        self.looks: list[tuple[float, int, Reading]] = []
        """(when, samples taken so far, what was read)"""
        if source is not None:
            give_device_memory_back()
            source.others()  # from here on

    def sampled(self, count: int) -> None:
        """Call after every sample with the number of samples so far."""
        if self.source is None:
            return
        now = self.clock()
        if not self.looks or now - self.looks[-1][0] >= LOOK_S:
            self.looks.append((now, count, self.source.read()))

    def energy_j(self) -> float | None:
        """Joules of one call, on average; None for less than a second or without a counter."""
        if len(self.looks) < 2:
            return None
        (began, first, start), (ended, last, end) = self.looks[0], self.looks[-1]
        if ended - began < SHORTEST_S or start.joules is None or end.joules is None:
            return None
        used = end.joules - start.joules
        return round(used / (last - first), 6) if used > 0 else None

    def columns(self) -> dict[str, Any]:
        """`energy_j`, `accelerator` (null on a CPU) and the flags that these figures call for."""
        if self.source is None:
            return {"energy_j": None, "accelerator": None, "flags": []}
        energy = self.energy_j()
        if not self.source.accelerator:
            return {"energy_j": energy, "accelerator": None, "flags": []}
        clocks = self.values("clock_mhz")
        limit, others = self.source.clock_limit_mhz, self.source.others()
        found = {
            "clock_mhz": statistics.median(clocks) if clocks else None,
            "clock_lowest_mhz": min(clocks, default=None),
            "clock_limit_mhz": limit,
            "temperature_c": max(self.values("temperature_c"), default=None),
            "power_w": mean(self.values("power_w")),
            "peak_memory_mb": max(self.values("memory_mb"), default=None),
            "other_use": others,
        }
        flags = []
        if clocks and limit and min(clocks) < THROTTLED_BELOW * limit:
            flags.append("throttled")
        if others is not None and others > DISTURBED_ABOVE:
            flags.append("disturbed")
        rounded = {key: None if value is None else round(value, 3) for key, value in found.items()}
        return {"energy_j": energy, "accelerator": rounded, "flags": flags}

    def values(self, name: str) -> list[float]:
        """What was read of one quantity, in order."""
        readings = (getattr(reading, name) for _, _, reading in self.looks)
        return [value for value in readings if value is not None]


def mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def give_device_memory_back() -> None:
    """Let torch give back what it keeps for later, so that a cell's peak is its own."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def source_of(device: str) -> PowerSource | None:
    """What can be read of a row's device; None where nothing can. Never raises."""
    if device.partition(":")[0] == "cuda":
        return nvml_source()
    if device.startswith("qaic:"):
        return card_source(device.removeprefix("qaic:"))
    if device == "cpu":
        rapl = Rapl()
        return rapl if rapl.zones else None
    return None


def card_source(ids: str) -> Sensors | None:
    """None where a device has no sensor, or it is not sure whose power that tells."""
    from backends.cloud_ai.options import parse_devices
    from backends.cloud_ai.power import boards
    from backends.cloud_ai.probe import look

    found = boards(look(), parse_devices(ids))
    return Sensors(found) if found and all(board.whole for board in found) else None


def nvml_source() -> Nvml | None:
    """None where nvidia-ml-py, the driver or the GPU is missing."""
    nvml = started_nvml()
    bus = first_bus_id()
    if nvml is None or bus is None:
        return None
    try:
        return Nvml(nvml, nvml.nvmlDeviceGetHandleByPciBusId(bus))
    except nvml.NVMLError:
        return None


def started_nvml() -> Any:
    """The module pynvml after its nvmlInit, or None."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def first_bus_id() -> bytes | None:
    """PCI address of the GPU that CUDA shows first: NVML knows nothing of CUDA_VISIBLE_DEVICES."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    return None if driver.cuDeviceGetPCIBusId(text, len(text), device) else text.value


def accelerators() -> dict[str, Any]:
    """Return for a run's environment the GPU behind the device `cuda`, and what was set on it.

    `accelerators` maps the rows' device to the driver's name for it, `accelerator_state` has
    driver, memory, power limit and highest clock; null where there is no GPU.
    """
    from backends.nvidia.driver import NoGpu, find_gpu

    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        return {"accelerators": {}, "accelerator_state": None}
    state: dict[str, Any] = {
        "capability": gpu.architecture,
        "cuda_of_driver": ".".join(map(str, gpu.cuda)),
        "memory_gb": round(gpu.memory_bytes / 1e9, 1),
        "driver": None,
        "power_limit_w": None,
        "clock_limit_mhz": None,
    }
    source = nvml_source()
    if source is not None:
        limit = source.ask(source.nvml.nvmlDeviceGetEnforcedPowerLimit)
        state["power_limit_w"] = None if limit is None else limit / 1e3
        state["clock_limit_mhz"] = source.clock_limit_mhz
        version = source.nvml.nvmlSystemGetDriverVersion()
        state["driver"] = version.decode() if isinstance(version, bytes) else version
    return {"accelerators": {"cuda": gpu.name}, "accelerator_state": state}
