"""Every command in the README runs. Large models give way to the tiny one, sweeps are short."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core.files import ROOT
from export.bundle import Bundle

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
ELSEWHERE = {
    "make test": "the test runs inside it",
    "make test-slow": "the test may run inside it",
    "make lint": "run by the CI script before the tests",
}
"""Commands that some other run covers."""
SHORT = "--steps 1 --batch 1 --decoder taesd --min-samples 3 --min-time 0.2 --max-time 2"


def tiny(command: str, folder: Path) -> list[str]:
    """The command with the tiny model in place of the full-size one."""
    words = shlex.split(command)
    if words[0] == "make":
        if any(word.startswith("MODEL=") for word in words):
            words = [w for w in words if not w.startswith(("MODEL=", "WEIGHTS="))]
            words += ["MODEL=tiny-sdxl", "WEIGHTS=random"]
        return [*words, "STEPS=1", "BATCH=1", "DECODER=taesd", "SWEEP_FLAGS=--quick"]
    words[0] = sys.executable
    for flag, value in {"--model": "tiny-sdxl", "--weights": "random", "--out": "pig.png"}.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    for flag in ("--vae", "--taesd"):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    if words[2] == "bench.sweep" and "--resume" not in words:
        words += shlex.split(SHORT)
    return words


@pytest.fixture(scope="module")
def clone(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle, shapes_bundle: Bundle
) -> Path:
    """A copy of the checkout with bundles of the default model and of the tiny one in place."""
    folder = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    subprocess.run(["git", *author, "commit", "-qm", "clone"], cwd=folder, check=True)
    shutil.copytree(tiny_bundle.path, folder / "build" / "tiny-sdxl-random-fp16")
    shutil.copytree(shapes_bundle.path, folder / "build" / "shapes-turbo-folder-fp16")
    return folder


def environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ADDBENCH_", "MAKE"))}
    return kept | {"VENV": str(Path(sys.prefix)), "PYTHONPATH": str(folder)}


def test_the_readme_has_commands() -> None:
    assert {"make sweep", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ELSEWHERE])
def test_command(command: str, clone: Path) -> None:
    done = subprocess.run(
        tiny(command, clone),
        cwd=clone,
        env=environment(clone),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        cwd=clone,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "publish" not in command:
        assert not changed, f"{command} changed committed files"
