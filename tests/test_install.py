"""`make install` in a small checkout of its own: real environments, real pip, no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from core.files import ROOT

THIS = "{}.{}".format(*sys.version_info)
BACKEND = """
import zipfile

def build_editable(folder, settings=None, metadata=None):
    name, place = "addbench-0-py3-none-any.whl", "addbench-0.dist-info"
    files = {
        "addbench.pth": __file__.rpartition("/")[0] + "\\n",
        place + "/METADATA": "Metadata-Version: 2.1\\nName: addbench\\nVersion: 0\\n"
        "Provides-Extra: none\\nProvides-Extra: dev\\n",
        place + "/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    with zipfile.ZipFile(folder + "/" + name, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        wheel.writestr(place + "/RECORD", "".join(f + ",,\\n" for f in [*files, place + "/RECORD"]))
    return name
"""


class Checkout:
    """The files that `make install` reads, and a project without dependencies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "core/interpreter.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "addbench").mkdir()
        (folder / "addbench" / "__init__.py").touch()
        (folder / "constraints.txt").touch()
        (folder / "backend.py").write_text(BACKEND)
        self.take(f">={THIS},<4.0")

    def take(self, versions: str) -> None:
        """Write a project that takes these Pythons."""
        (self.folder / "pyproject.toml").write_text(
            f'[project]\nname = "addbench"\nversion = "0"\nrequires-python = "{versions}"\n'
            "optional-dependencies = { none = [], dev = [] }\n"
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )

    def install(
        self, *variables: str, first_on_path: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTHON", "PIP"))}
        path = f"{first_on_path}:{kept['PATH']}" if first_on_path else kept["PATH"]
        return subprocess.run(
            ["make", "install", "EXTRA=none", *variables],
            cwd=self.folder,
            env=kept | {"PIP_NO_INDEX": "1", "PATH": path},
            capture_output=True,
            text=True,
        )

    def succeed(self, *variables: str, first_on_path: Path | None = None) -> str:
        """Run `make install` and return what it printed."""
        done = self.install(*variables, first_on_path=first_on_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def python(self) -> Path:
        return self.folder / ".venv" / "bin" / "python"

    def place(self) -> Path:
        """The folder of the addbench that its environment imports."""
        code = "import addbench; print(addbench.__path__[0])"
        done = subprocess.run([self.python, "-Ic", code], capture_output=True, text=True)
        return Path(done.stdout.strip()).parent


def test_an_environment_from_the_first_try_to_a_stolen_one(tmp_path: Path) -> None:
    """One story for one environment: each costs seconds to make."""
    checkout, other = (Checkout(tmp_path / name) for name in ("here", "other"))
    checkout.take(">=3.98,<3.99")
    refused = checkout.install(f"PYTHON={sys.executable}")
    assert refused.returncode == 2
    assert f"error: addbench cannot run on Python {THIS}\n  why:  " in refused.stderr
    assert "\n  next: make install PYTHON=python3.98\n" in refused.stderr
    assert not (checkout.folder / ".venv").exists(), "refused before anything was made"

    # What a wrong Python left behind, with an interpreter that the project does not take.
    checkout.take(f">={THIS},<4.0")
    left = pretend(checkout.python)
    checkout.succeed(f"PYTHON={sys.executable}")
    assert checkout.place() == checkout.folder
    assert left not in checkout.python.read_bytes(), "cleared: venv would keep the interpreter"
    assert "Nothing to be done" in checkout.succeed()

    # Newer requirements, and a `python3` that would not do: the environment stays as it was chosen.
    pretend(tmp_path / "old" / "python3")
    (checkout.folder / "constraints.txt").touch()
    assert "pip install" in checkout.succeed(first_on_path=tmp_path / "old")

    # Another checkout installs itself into the same environment, and goes away.
    other.succeed(f"VENV={checkout.folder / '.venv'}")
    assert checkout.place() == other.folder
    shutil.rmtree(other.folder)
    assert "pip install" in checkout.succeed()
    assert checkout.place() == checkout.folder
    assert "Nothing to be done" in checkout.succeed()

    missing = checkout.install("PYTHON=no-such-python")
    assert missing.returncode == 2
    assert "no-such-python" in missing.stderr
    assert checkout.place() == checkout.folder, "and the environment is still there"


def pretend(python: Path) -> bytes:
    """Write an interpreter that every question fails in, and return its text."""
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 2\n")
    python.chmod(0o755)
    return python.read_bytes()
