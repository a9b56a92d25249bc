"""Every command of README and its pages runs: tiny models for large, what is here for hardware."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from clones import run_in

from core.files import ROOT

PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in
                               ("models", "cpu", "nvidia", "few-step"))]  # fmt: skip
TEXT = "\n".join(page.read_text() for page in PAGES)
FENCED = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in FENCED if kind == "sh" for line in block.splitlines()]
ELSEWHERE = {
    "addbench gpu-check": "up to its refusal below; without a GPU in its own tests",
}
"""Commands that some other run covers."""

REPEATS = [
    r"^addbench export --model sdxl-turbo",  # as the hub's, from folders: test_export_command.py
    r"lcm-lora",  # the fused weights: test_models.py
]
"""Commands that take half a minute to repeat at full length what quicker tests hold."""

SHORT = "--min-samples 3 --min-time 0.2 --max-time 2"
STAND_INS = {
    # Models: whole words, so that a name with a typing error stays one.
    r"(?<=--model )sdxl-turbo(?= |$)": "tiny-sdxl",
    r"(?<=--model )(sd15|sdxl-base)(?=[ +]|$)": "tiny-sd",
    r"MODEL=sdxl-turbo\b": "MODEL=tiny-sdxl",
    r"WEIGHTS=hub\b": "WEIGHTS=test/tiny",
    # Fewer cells, short ones.
    r"--steps (1,2,4|20)(?= |$)": "--steps 1",
    r"--batch 1,4(?= |$)": "--batch 1",
    r"--decoder vae,taesd(?= |$)": "--decoder taesd",
    r"(?<=addbench sweep )(?!--resume)": f"{SHORT} ",
    r"(?<=addbench sweep )(?!--resume)(?!.*--steps)": "--steps 1 ",
    r"(?<=addbench sweep )(?!--resume)(?!.*--decoder)": "--decoder taesd ",
    r"(?<=addbench sweep )(?=.*--scheduler )": "--no-roofline ",
    r"--quality(?= |$)": "--quality --dry-run",
    r"^(make sweep)$": r"\1 STEPS=1 BATCH=1 DECODER=taesd SWEEP_FLAGS=--quick",
    # Parity has tests of its own.
    r"(?<=addbench export )(?=--)": "--no-parity ",
    r"^(make export .*)$": r"\1 EXPORT_FLAGS=--no-parity",
    # What is not here: planned for something that is. The refusals are tested below.
    r"(?<=addbench sweep )(.*)--backend trt(?= |$)": r"\1--backend null --dry-run",
    r"--backend torch:device=cuda,(\S+)": r"--backend torch:device=cpu,\1 --dry-run",
    r"--backend trt:precision=fp8(?= |$)": "--backend trt:precision=fp8 --dry-run",
    r"^pip install --extra-index-url \S+": "python -m pip install "
    "--dry-run --no-index --no-deps --no-build-isolation",
}
"""Pattern -> what takes its place, one after the other; all else runs as the README says it."""

REFUSALS = {
    r"--backend trt(?= |$)(?!.*--dry-run)": "backend trt cannot be used: ",
    r"--backend trt:precision=fp8": "backend trt cannot be used: ",
    r"torch:device=cuda": "backend torch:device=cuda,mode=graph cannot be used: ",
    r"addbench gpu-check": "gpu_check cannot run: ",
}
"""Commands for an NVIDIA GPU -> how they end where there is none."""
REFUSED = [
    (command, words)
    for command in COMMANDS
    for pattern, words in REFUSALS.items()
    if re.search(pattern, command)
]


def stand_in(command: str) -> list[str]:
    """The command as it is run here."""
    for pattern, text in STAND_INS.items():
        command = re.sub(pattern, text, command)
    return shlex.split(command)


def test_every_command_is_marked_as_one() -> None:
    assert {"make sweep", "addbench backends"} <= set(COMMANDS)
    other = [line for kind, block in FENCED if kind != "sh" for line in block.splitlines()]
    assert not [
        line for line in other if line.startswith(("python ", "make ", "pip ", "addbench "))
    ]


@pytest.mark.parametrize("pattern", [*STAND_INS, *REFUSALS])
def test_every_stand_in_has_a_command(pattern: str) -> None:
    """As it stands on a page, or as the ones before it in the table leave it."""
    assert any(re.search(pattern, command) for command in COMMANDS)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=pytest.mark.slow if any(re.search(p, c) for p in REPEATS) else ())
        for c in COMMANDS
        if c not in ELSEWHERE
    ],
)
def test_command(command: str, clone: Path) -> None:
    done = run_in(clone, stand_in(command))
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


@pytest.mark.parametrize(("command", "words"), REFUSED)
def test_without_the_hardware_it_ends_at_once(command: str, words: str, clone: Path) -> None:
    done = run_in(clone, shlex.split(command))
    assert (done.returncode, f"error: {words}" in done.stderr) == (2, True), done.stderr
    assert "\n  next: " in done.stderr


def test_what_the_text_names_exists() -> None:
    """Commands in sentences, which no test runs as they stand; and what is linked."""
    text = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    spans = " ; ".join(re.findall(r"`([^`]+)`", text))
    modules = set(re.findall(r"-m ((?:bench|backends|export|distill)[.\w]*)(?= |$)", spans))
    assert not [name for name in modules if importlib.util.find_spec(name) is None]
    verbs = set(re.findall(r"\bmake ([\w-]+)", spans))
    assert {"publish", "env-optimum", "lint", "test", "test-slow"} <= verbs
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert verbs <= set(known)


def test_what_is_linked_exists() -> None:
    pages = [PAGES[0], *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages
             for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())]  # fmt: skip
    assert len(links) > 20
    assert not [(page.name, link) for page, link in links if not (page.parent / link).exists()]


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"-e '\.\[(.*?)\]'", TEXT)
    assert {"gpu", "cuda", "cpu,trt,modelopt"} <= set(named)
    assert {one for many in named for one in many.split(",")} <= set(
        project["optional-dependencies"]
    )
