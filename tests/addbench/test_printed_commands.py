"""Every command that a message, a page or the docs print is one that its own parser takes."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from addbench.verbs import VERBS
from core.cli import Parser
from core.errors import PreconditionError
from core.files import ROOT

ROOMS = ("addbench", "core", "distill", "export", "backends", "serve", "bench")
PAGES = ("README.md", "docs/*.md", "results/README.md", "bench/**/*.html",
         ".github/workflows/*.yml", ".ci/run")  # fmt: skip
OPEN = "OPEN"
"""Stands for what a message fills in."""
KEPT = {"bench.sweep": "sweep", "export": "export", "backends": "backends"}
"""Spellings with `python -m` that stay; `python -m bench.worker` is for the program itself."""
INNER = ("bench.worker", "bench.traffic.generator", "backends.check.parity",
         "backends.commands.parity", "bench.gpu.checks",
         "export.quantize.modelopt", "pip", "venv", "pytest", "mypy", "ruff", "basedpyright",
         "tests.backends.test_qaic_tools")  # fmt: skip
COMMAND = re.compile(
    r"(?<![\w/.-])(?:(?:\.venv/bin/)?python3?(?:\.\d+)? -m )?(?:\.venv/bin/)?"
    r"(?P<what>addbench|bench\.[\w.]+|backends(?:\.[\w.]+)?|export(?:\.[\w.]+)?|distill\.[\w.]+)"
    r"(?P<rest>(?: [^\n`]*)?)"
)
MAKE = re.compile(r"(?<![\w-])make ([a-z-]+)((?: [A-Z_]+=(?:'[^']*'|\S+))*)")


# ---- where commands are printed


def strings(file: Path) -> Iterator[str]:
    """Texts in a module, docstrings too, with OPEN for what a message fills in."""
    inner: set[ast.AST] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            inner.update(ast.walk(node))
            yield "".join(
                str(piece.value) if isinstance(piece, ast.Constant) else OPEN
                for piece in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            yield node.value


def texts() -> Iterator[tuple[str, str]]:
    """(file, text) of everything in which a command may be printed."""
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            for text in strings(file):
                yield str(file.relative_to(ROOT)), text
    for pattern in PAGES:
        for file in sorted(ROOT.glob(pattern)):
            yield str(file.relative_to(ROOT)), file.read_text().replace("\\\n", " ")


def spans(text: str) -> Iterator[tuple[str, bool]]:
    """(piece of text, whether all of it is a command) of code spans, code lines and prose."""
    for fence in re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL):
        for line in fence.splitlines()[1:-1]:
            yield line.strip().removeprefix("$ "), True
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", text):
        yield " ".join(span.split()), True
    for line in re.sub(r"`[^`]*`", " ", text).splitlines():
        yield line, False


@cache
def commands() -> list[tuple[str, str, str, bool]]:
    """(file, verb or module, arguments, whether nothing but the command is in them)."""
    gathered = []
    for file, text in texts():
        for piece, whole in spans(text):
            for match in COMMAND.finditer(piece):
                what, rest = match["what"], match["rest"].strip()
                spelled = " -m " in match[0].split(what)[0]
                if what != "addbench" and not spelled:
                    continue
                if what == "addbench":
                    what, _, rest = rest.partition(" ")
                    second, _, after = rest.partition(" ")
                    if f"{what} {second}" in VERBS:
                        what, rest = f"{what} {second}", after
                    if not re.fullmatch(r"[a-z -]+[,.;:]?", what) or not (
                        whole or match.start() == 0
                    ):
                        whole = False
                gathered.append((file, what.rstrip(",.;:"), rest, whole and match.start() < 40))
    return gathered


@cache
def parser_of(verb: str) -> Parser:
    made: Parser = VERBS[verb].load().parser()
    return made


def flags_of(verb: str) -> set[str]:
    """Every flag of a verb, those of its actions too."""
    flags: set[str] = set()
    parsers = [parser_of(verb)]
    while parsers:
        for action in parsers.pop()._actions:
            flags.update(action.option_strings)
            if isinstance(action.choices, dict):
                parsers.extend(action.choices.values())
    return flags


def plain(rest: str) -> str:
    """Arguments as they would be typed: the first of several ways, the optional ones too."""
    rest = re.split(r" (?:\||&&|;|>|#|2>) ?", f"{rest} ")[0]
    rest = re.sub(r"(?<=[a-z])(?:\|[a-z]+)+", "", rest)
    rest = re.sub(r"[\[\])]", " ", rest).replace("...", " ").replace("…", " ")
    return re.sub(r"\{\{.*?\}\}", OPEN, rest)


def wrong(verb: str, rest: str, whole: bool) -> str | None:
    """What the verb's parser has against these arguments; None if it takes them."""
    if verb in ("help", "--version", "--help", "VERB", "") or verb.startswith(OPEN):
        return None
    if verb not in VERBS:  # in prose the word is the name of the project
        return f"there is no verb {verb!r}" if whole else None
    if not whole:
        unknown = set(
            re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest.split(" addbench ")[0])
        ) - flags_of(verb)
        return f"no flags {sorted(unknown)}" if unknown else None
    try:
        words = [word for word in shlex.split(plain(rest), comments=True) if word != "--help"]
    except ValueError:  # a quote that the line breaks: flags are all that can be told
        return wrong(verb, rest, False)
    try:
        parser_of(verb).parse_args(words)
    except PreconditionError as error:
        message = str(error.what)
        if "are required" in message and (not words or "..." in rest):
            return None  # the verb is named, or the line says that it goes on
        value = re.search(r"argument \S+(?:/\S+)?: (?!expected|ignored)", message)
        upper = re.search(r"\b[A-Z][A-Z:=|@]+\b", rest)
        return None if value and upper else message
    return None


def test_commands_are_found_where_they_are_printed() -> None:
    found = {(file, verb) for file, verb, _, _ in commands()}
    assert len(found) > 60
    assert ("bench/verdict/compare.py", "ab") in found
    assert ("export/__main__.py", "parity") in found


@pytest.mark.parametrize(
    ("verb", "rest", "whole"),
    [
        ("compare", "BASE --maximal-slowdown 3", True),
        ("compare", "can be told --maximal-slowdown", False),
        ("dance", "", True),
        ("image", "--steps", True),
        ("cache", "grow", True),
    ],
)
def test_a_wrong_command_is_seen(verb: str, rest: str, whole: bool) -> None:
    assert wrong(verb, rest, whole) is not None


def test_every_printed_command_is_taken_by_its_parser() -> None:
    refused = []
    for file, what, rest, whole in commands():
        if "." in what or what in KEPT:
            if what in INNER:
                continue
            if what not in KEPT and what not in VERBS:
                refused.append(f"{file}: python -m {what} {rest}: not a spelling that stays")
                continue
        verb = KEPT.get(what, what)
        if what == "backends" and rest.startswith("compile"):
            verb, rest = "compile", rest.removeprefix("compile")
        if what == "export" and rest.startswith("verify"):
            verb, rest = "verify", rest.removeprefix("verify")
        if (why := wrong(verb, rest, whole)) is not None:
            refused.append(f"{file}: {verb} {rest[:100]}: {why}")
    assert not refused, "\n".join(refused)


def test_every_printed_make_is_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"\b([A-Z_]+) \?=|\$\((?:foreach run,\$\()?([A-Z_]+)\b", makefile))
    names = {name for pair in variables for name in pair if name}
    refused = []
    for file, text in texts():
        for piece, whole in spans(text):
            for target, settings in MAKE.findall(piece) if whole else ():
                unknown = set(re.findall(r"([A-Z_]+)=", settings)) - names
                if target not in targets or unknown:
                    refused.append(f"{file}: make {target}{settings}")
    assert not refused, "\n".join(refused)
