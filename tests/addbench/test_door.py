"""The front door: its verbs, their help, its version, completion in a real shell."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from addbench import __main__ as door
from addbench.verbs import GROUPS, VERBS, Verb
from core.cli import Parser, run
from core.errors import PreconditionError
from core.files import ROOT

HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxruntime", "pandas", "numpy", "scipy",
         "matplotlib"}  # fmt: skip


def addbench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "addbench", *words], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_quick_and_imports_nothing_heavy(verb: str) -> None:
    code = (
        "import sys\nfrom addbench.__main__ import main\n"
        f"try: main([*{verb!r}.split(), '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        f"sys.exit(' '.join({HEAVY!r} & set(sys.modules)) or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: addbench {verb} ")
    # Processor time: what it takes alone on the machine, whatever else runs.
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took < 0.5


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_verb_has_a_parser_of_its_name_and_one_line_of_help(verb: Verb) -> None:
    parser = verb.load().parser()
    assert isinstance(parser, Parser)
    assert parser.prog == f"addbench {verb.name}"
    assert len(verb.help) <= 66
    for name in verb.needs:
        assert PathFinder.find_spec(name), f"{name}: what make install brings"


def test_the_list_is_in_the_order_of_work() -> None:
    text = addbench().stdout
    assert text == addbench("help").stdout == addbench("--help").stdout
    places = [text.index(f"\n{title}\n") for title in GROUPS]
    assert places == sorted(places)
    assert "ablate" not in text
    assert "ADDBENCH_CACHE_GB" not in text
    everything = addbench("help", "--all").stdout
    for verb in VERBS.values():
        assert f"  {verb.name:<{door.WIDTH}} {verb.help}\n" in everything
    assert addbench("help", "compare").stdout == addbench("compare", "--help").stdout
    assert addbench("help", "export", "web").stdout == addbench("export", "web", "-h").stdout


def test_every_variable_that_is_read_is_documented() -> None:
    rooms = ("addbench", "core", "export", "backends", "serve", "bench", "distill", "tests")
    text = "".join(file.read_text() for room in rooms for file in (ROOT / room).rglob("*.py"))
    names = set(re.findall(r'"(ADDBENCH_[A-Z_]+)"', text))
    assert names == set(door.ENVIRONMENT)


def test_what_is_missing_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    verb = Verb("dance", "no_such_module.dance", "turn around", ("no_such_package", "sys"))
    monkeypatch.setitem(door.GROUPS, "look", (verb,))
    text = door.help_text()
    assert "not usable here: no_such_package not installed" in text
    with pytest.raises(PreconditionError, match="addbench dance needs the package no_such_module"):
        verb.load()


def test_a_package_that_is_missing_in_the_middle_is_no_bug(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(argv: object) -> int:
        import no_such_package  # noqa: F401

        return 0

    assert run(main) == 2
    assert "needs the package no_such_package" in capsys.readouterr().err

    def ours(argv: object) -> int:
        import bench.no_such_module  # noqa: F401

        return 0

    assert run(ours) == 1
    assert "this is a bug" in capsys.readouterr().err


def test_an_unknown_verb_names_the_nearest() -> None:
    done = addbench("compre", "a", "b")
    assert done.returncode == 2
    assert "did you mean compare?" in done.stderr
    assert "next: addbench compare --help" in done.stderr
    assert "its verbs: export, export web, export triton, verify," in addbench("xyzzy").stderr


def test_the_version_names_the_revision(tmp_path: Path) -> None:
    text = addbench("--version").stdout
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert text.startswith("addbench ")
    if head.returncode == 0:
        assert f"revision {head.stdout[:12]}" in text


# ---- completion


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers for `line`, asked as its own completion asks."""
    bin_ = folder / "bin"
    bin_.mkdir(exist_ok=True)
    script = bin_ / "addbench"
    script.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m addbench "$@"\n')
    script.chmod(0o755)
    words = line.split(" ")
    asked = (
        "source <(addbench completion bash)\n"
        f"COMP_WORDS=({' '.join(word or repr('') for word in words)})\n"
        f"COMP_CWORD={len(words) - 1} COMP_LINE='{line}' COMP_POINT={len(line)} COMP_TYPE=9\n"
        "function=$(complete -p addbench | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        f"$function addbench '{words[-1]}' '{words[-2]}'\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", asked], capture_output=True, text=True,
        env=os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in done.stdout.splitlines() if word.strip()]


def test_bash_completes_verbs_and_their_flags(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    assert {"compare", "completion", "compile"} == set(completed("addbench comp", tmp_path))
    assert {name.split()[0] for name in VERBS} <= set(completed("addbench ", tmp_path))
    assert "--ort" in completed("addbench export web --or", tmp_path)
    assert "--lora" in completed("addbench export --lo", tmp_path)
    assert "--max-slowdown" in completed("addbench compare --max", tmp_path)
    assert completed("addbench compare --format j", tmp_path) == ["json"]
    assert completed("addbench cache pr", tmp_path) == ["prune"]
    assert completed("addbench xyzzy --", tmp_path) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_read_its_completion(shell: str, tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    done = addbench("completion", shell)
    assert done.returncode == 0
    assert "addbench" in done.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    script = tmp_path / "completion"
    script.write_text(done.stdout)
    assert subprocess.run([shell, "-n", script]).returncode == 0


def test_completion_is_paid_only_when_a_shell_asks() -> None:
    code = "import sys, addbench.__main__; sys.exit('argcomplete' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
