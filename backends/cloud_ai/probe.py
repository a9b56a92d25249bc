"""What this host has of Cloud AI 100: SDK, compiler, cards, permissions, Python runtimes.

Looks, and asks `qaic-util -q`; never runs as root, changes nothing. What cannot be found out is
unknown, and stays so. (A program called `qaic` on PATH is another company's tool; it is not asked.)
"""

from __future__ import annotations

import grp
import importlib.util
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from backends.base import Capability
from backends.cloud_ai.spec import DIALECTS, Dialect

DEFAULT_ROOT = Path("/opt/qti-aic")
ROOT_VARIABLE = "QAIC_SDK_ROOT"
PCI_IDS = {("0x17cb", "0xa100"): "AIC100", ("0x17cb", "0xa080"): "AIC080"}
PCI_FILES = ("vendor", "device")
PCI_DEVICES = Path("/sys/bus/pci/devices")
GROUP = "qaic"
UTIL_TIMEOUT_S = 30
READY = "Ready"
RUNTIMES = ("qaic", "qaicrt", "ep")
"""Python module qaic, Python module qaicrt, ONNX Runtime's QAicExecutionProvider."""
MODELLED = (
    "without a card: `addbench compile --backend qaic --dry-run` writes the commands, "
    "`addbench sweep --backend qaic --device ai100-ultra` models one"
)


@dataclass(frozen=True)
class Card:
    """One device as `qaic-util -q` lists it: an SoC; an Ultra shows as four. None: not said.

    Attributes:
        board: serial number of the card; for telling cards apart, never for a file.
        power_w, tdp_w: of the board, by its name; `backends.cloud_ai.power` says how sure that is.
    """

    id: int
    status: str
    cores_total: int | None
    cores_free: int | None
    sku: str
    board: str
    pci: str
    power_w: float | None
    tdp_w: float | None

    def __str__(self) -> str:
        free, total = ("?" if n is None else n for n in (self.cores_free, self.cores_total))
        return (
            f"{self.id}: {self.sku or 'SKU unknown'}, {self.status}, {free} of {total} cores free"
        )


@dataclass(frozen=True)
class Sdk:
    """The SDK below one root. `version` is "" where nothing says it; a missing tool is None."""

    root: Path
    dialect: Dialect | None
    version: str
    util: Path | None
    runner: Path | None

    @property
    def compiler(self) -> Path | None:
        return self.root / self.dialect.program if self.dialect else None


@dataclass(frozen=True)
class Findings:
    """All of it. `pci`: addresses of Cloud AI devices on the bus; `closed`: device nodes that this
    process may not open; `util_error`: why qaic-util listed nothing."""

    sdk: Sdk
    cards: tuple[Card, ...]
    pci: tuple[str, ...]
    closed: tuple[str, ...]
    runtimes: tuple[str, ...]
    util_error: str = ""

    def card(self, device: int) -> Card | None:
        return next((card for card in self.cards if card.id == device), None)


def sdk_root() -> Path:
    return Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def look(
    dialect: str = "auto",
    nodes: Path = Path("/dev/accel"),
    pci: Path = PCI_DEVICES,
) -> Findings:
    """Look around once. `dialect` other than `auto` insists on one compiler program."""
    sdk = find_sdk(sdk_root(), dialect)
    cards, error = query(sdk.util)
    on_bus = pci_devices(pci)
    closed = [
        str(node) for node in sorted(nodes.glob("accel*")) if not os.access(node, os.R_OK | os.W_OK)
    ]
    # Other vendors' accelerators have such nodes too: without a card on the bus they say nothing.
    return Findings(sdk, cards, on_bus, tuple(closed if on_bus else ()), runtimes(sdk.root), error)


def find_sdk(root: Path, dialect: str = "auto") -> Sdk:
    """What lies below `root`. The compiler goes by the SDK's version, else by what is there."""
    found = sdk_version(root)
    there = [one for one in DIALECTS.values() if is_program(root / one.program)]
    if dialect != "auto":
        there = [one for one in there if one.name == dialect]
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    fitting = [one for one in there if len(numbers) == 2 and one.speaks(numbers)]
    tools = [root / "tools" / "qaic-util", root / "exec" / "qaic-runner"]
    util, runner = (tool if is_program(tool) else None for tool in tools)
    return Sdk(root, next(iter(fitting or there), None), found, util, runner)


def is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def sdk_version(root: Path) -> str:
    """`1.20.4.0` as versions/apps.xml has it (base version and build), or ""."""
    file = root / "versions" / "apps.xml"
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return ""
    pieces = [
        match[1] for tag in ("base_version", "build_id")
        if (match := re.search(rf"<{tag}>\s*([\d.]+)\s*</{tag}>", text))
    ]  # fmt: skip
    return ".".join(pieces)


def query(util: Path | None) -> tuple[tuple[Card, ...], str]:
    """The devices that `qaic-util -q` lists, and why there are none."""
    if util is None:
        return (), "there is no tools/qaic-util"
    try:
        done = subprocess.run(
            [str(util), "-q"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=UTIL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), str(error)
    cards = parse_util(done.stdout)
    if cards:
        return cards, ""
    said = (done.stderr or done.stdout).strip()[-300:]
    return (), f"qaic-util -q lists no device (exit code {done.returncode}){said and ': '}{said}"


def parse_util(text: str) -> tuple[Card, ...]:
    """`QID <n>` and the `Name:value` lines below it; a line that is not there is unknown."""
    cards = []
    for block in re.split(r"^(?=QID\s+\d+)", text, flags=re.MULTILINE):
        head = re.match(r"QID\s+(\d+)", block)
        if head is None:
            continue
        fields = {
            name.strip().lower(): value.strip()
            for name, value in re.findall(r"^\s+([^:\n]+):(.*)$", block, flags=re.MULTILINE)
        }
        cards.append(
            Card(
                id=int(head[1]),
                status=fields.get("status", "unknown"),
                cores_total=whole(fields.get("nsp total")),
                cores_free=whole(fields.get("nsp free")),
                sku=fields.get("sku type", ""),
                board=fields.get("board serial", ""),
                pci=fields.get("pci address", ""),
                power_w=number(fields.get("board power(watts)")),
                # Newer SDKs list the SoC's beside the board's, and so name both.
                tdp_w=number(fields.get("board tdp cap(watts)", fields.get("tdp cap(watts)"))),
            )
        )
    return tuple(cards)


def whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def pci_devices(folder: Path) -> tuple[str, ...]:
    """Addresses on the PCI bus that carry one of Cloud AI's ids."""
    found = []
    for device in sorted(folder.glob("*")):
        try:
            ids = tuple((device / name).read_text().strip().lower() for name in PCI_FILES)
        except OSError:
            continue
        if ids in PCI_IDS:
            found.append(device.name)
    return tuple(found)


def runtimes(root: Path) -> tuple[str, ...]:
    """Which of RUNTIMES this Python can use, without importing any."""
    found = []
    if importlib.util.find_spec("qaic") is not None:
        found.append("qaic")
    if importlib.util.find_spec("qaicrt") is not None or list(library(root).glob("qaicrt*")):
        found.append("qaicrt")
    try:
        version("onnxruntime_qaic")
    except PackageNotFoundError:
        return tuple(found)
    return (*found, "ep")


def library(root: Path) -> Path:
    """Where the platform SDK keeps its Python extension modules."""
    return root / "dev" / "lib" / platform.machine()


def compiler_capability(found: Findings) -> Capability:
    """Can this host compile?"""
    sdk = found.sdk
    if sdk.dialect is None:
        programs = " nor ".join(one.program for one in DIALECTS.values())
        return Capability(
            False,
            "there is no Cloud AI SDK" if not sdk.root.is_dir() else "the SDK has no compiler",
            f"{sdk.root} has neither {programs}",
            f"install Qualcomm's Apps SDK (its compiler needs no card), or set {ROOT_VARIABLE};"
            f" {MODELLED}",
        )
    said = sdk.version or "version unknown"
    # Without its folder: this stands in the header of runs that are published.
    return Capability(True, f"{sdk.dialect.name} ({said})", version=sdk.version)


def capability(found: Findings, devices: tuple[int, ...]) -> Capability:
    """Can this host compile, and run on `devices`? If not: the first thing that is missing."""
    compiles = compiler_capability(found)
    if not compiles.usable:
        return compiles
    missing = _missing(found, devices)
    if missing is None:
        return Capability(
            True,
            f"{compiles.what}; over {'/'.join(found.runtimes)}; "
            + "; ".join(map(str, found.cards)),
            version=compiles.version,
            devices=tuple(str(card.id) for card in found.cards),
        )
    what, why, then = missing
    return Capability(False, f"{what}; it compiles: {compiles.what}", why, then, compiles.version)


def _missing(found: Findings, devices: tuple[int, ...]) -> tuple[str, str, str] | None:
    """(what, why, next) of the first thing that running lacks, or None."""
    if not found.cards and not found.pci:
        ids = ", ".join(":".join(pair).replace("0x", "") for pair in PCI_IDS)
        return (
            "compiler only: no card",
            f"no PCI device {ids}; {found.util_error}",
            f"compile here and run where a card is; {MODELLED}",
        )
    if not found.cards and found.closed:
        return (
            "no permission for the card",
            f"{', '.join(found.closed)} cannot be opened; this user is {_group_words()}",
            f"sudo usermod -aG {GROUP} $USER, then log in again",
        )
    if not found.cards:
        return (
            "the card does not answer",
            f"PCI {', '.join(found.pci)} is there, but {found.util_error}",
            "install the Platform SDK, look for the qaic driver with `lsmod`",
        )
    for device in devices:
        card = found.card(device)
        if card is None or card.status != READY:
            return (
                f"device {device} is {'not there' if card is None else card.status}",
                "; ".join(map(str, found.cards)),
                "pick a ready one: --backend qaic:device=0, or qaic:device=0-3 for four",
            )
    if not found.runtimes:
        return (
            "no Python runtime",
            f"this Python ({platform.python_version()}) has none of {', '.join(RUNTIMES)}",
            f"pip install {library(found.sdk.root)}/qaic-*.whl (of the Platform SDK)",
        )
    return None


def _group_words() -> str:
    try:
        members = grp.getgrnam(GROUP)
    except KeyError:
        return f"in no group {GROUP}: this system has none"
    return f"{'in' if members.gr_gid in os.getgroups() else 'not in'} the group {GROUP}"
