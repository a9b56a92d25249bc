"""SDK stand-in for Cloud AI 100: a test double of Qualcomm's SDK, never of its speed or accuracy.

`make_sdk` lays out a folder like /opt/qti-aic whose programs are the scripts in here: a compiler
that checks its arguments and its graph and writes a file with a QPC's header, `qaic-util`,
`qaic-runner`, and the Python modules `qaic`, `qaicrt` and `QAicApi_pb2`, which compute on the CPU
through onnxruntime. `standin.json` in that folder says which devices there are and what goes wrong.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STATE = "standin.json"
OLD, NEW = "1.21.2", "1.22.0"
ULTRA = {"status": "Ready", "total": 16, "free": 16, "sku": "PCIe Ultra", "board": "SDK-STAND-IN"}

_PROGRAM = """\
#!{python}
# SDK stand-in: a test double, not Qualcomm's program.
import sys
sys.path.insert(0, {folder!r})
import {module}
raise SystemExit({module}.main())
"""


def make_sdk(
    root: Path,
    version: str = OLD,
    devices: int = 4,
    runtime: bool = True,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Lay the stand-in out below `root`.

    Args:
        version: of the SDK, as versions/apps.xml states it; it decides the compiler's name.
        devices: SoCs that `qaic-util` lists, of one Ultra.
        runtime: whether the Platform SDK is there too.
        state: keys of `standin.json` to replace: `cards`, or failures:
            `unknown_flags` (list), `extra_symbol`, `compiler_dies`, `bad_magic`, `no_output`,
            `wrong_shape` (an output's name), `reset_after` (calls until a device is lost).
    """
    base, _, build = version.rpartition(".")
    xml = f"<image><base_version>{base}</base_version>\n<build_id>{build}</build_id></image>\n"
    (root / "versions").mkdir(parents=True)
    (root / "versions" / "apps.xml").write_text(xml)
    compiler = "qaic-exec" if tuple(map(int, version.split(".")[:2])) < (1, 22) else "qaic-compile"
    _program(root / "exec" / compiler, "compiler.py")
    if runtime:
        _program(root / "exec" / "qaic-runner", "tools.py")
        _program(root / "tools" / "qaic-util", "tools.py")
        _module(root, root / "dev" / "lib" / platform.machine() / "qaicrt.py", "rt.py")
        _module(root, root / "dev" / "python" / "QAicApi_pb2.py", "api.py")
        _module(root, python_modules(root) / "qaic.py", "high.py")
    cards = [{"id": number, **ULTRA} for number in range(devices)]
    set_state(root, {"cards": cards, **(state or {})})
    return root


def make_sensors(
    root: Path, pci: Path, watts: float, limit_w: float | None = None
) -> dict[int, Path]:
    """What a kernel driver shows below `pci` of the devices of the stand-in at `root`.

    Args:
        limit_w: of each sensor; None: it has no such file.

    Returns:
        The sensors' folders by device.
    """
    found = {}
    for number, card in enumerate(json.loads((root / STATE).read_text())["cards"]):
        folder = pci / f"0000:{card['id']:02x}:00.0" / "hwmon" / f"hwmon{7 + number}"
        folder.mkdir(parents=True)
        (folder / "power1_input").write_text(f"{round(1e6 * watts)}\n")
        (folder / "temp2_input").write_text(f"{40000 + 1000 * number}\n")
        if limit_w is not None:
            (folder / "power1_max").write_text(f"{round(1e6 * limit_w)}\n")
        found[card["id"]] = folder
    return found


def python_modules(root: Path) -> Path:
    """Where the module `qaic` is, as if it were installed: a folder for sys.path."""
    return root / "site"


def set_state(root: Path, state: Mapping[str, Any]) -> None:
    """Replace keys of the stand-in's state; None removes one."""
    file = root / STATE
    known = json.loads(file.read_text()) if file.exists() else {}
    merged = {key: value for key, value in {**known, **state}.items() if value is not None}
    file.write_text(json.dumps(merged))


def _program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    module = script.removesuffix(".py")
    path.write_text(_PROGRAM.format(python=sys.executable, folder=str(HERE), module=module))
    path.chmod(0o755)


def _module(root: Path, path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "# SDK stand-in: a test double, not Qualcomm's module.\n"
        f"import sys\nsys.path.append({str(HERE / 'modules')!r})\n"
        f"ROOT = {str(root)!r}\n"
        f"exec(compile(open({str(HERE / 'modules' / source)!r}).read(), {source!r}, 'exec'))\n"
    )
