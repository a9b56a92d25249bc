"""The page's files and what they are told; the grammar that the page suggests from."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import MODEL, Running

from core.files import ROOT
from distill.captions import random_caption
from distill.shapes import WORDS
from serve.grammar import Node, grammar, page_grammar
from serve.pages import FOLDER, page_facts

Start = Callable[..., Running]
SHAPES = replace(MODEL, name="shapes-turbo", judge="shapes")


def test_the_page_is_files_of_its_own_under_a_strict_policy(server: Running) -> None:
    status, headers, html = server.call("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "unsafe" not in policy
    links = re.findall(r'(?:src|href)="([^"]+)"', html.decode())
    assert set(links) == {"page.css", "page.js", "icon.svg"}
    assert not re.search(rb"<script(?![^>]*src=)|style=|\son\w+=", html)
    for link in links:
        status, headers, body = server.call("GET", f"/{link}")
        assert (status, body) == (200, (FOLDER / link).read_bytes())
        assert headers["content-security-policy"] == policy
    for file in FOLDER.iterdir():
        outside = re.findall(r"https?://[^\s\"')]+", file.read_text())
        assert set(outside) <= {"http://www.w3.org/2000/svg"}


def test_facts_of_the_page(server: Running) -> None:
    facts = server.call("GET", "/page.json")[2]
    assert facts == page_facts(MODEL)
    assert (facts["name"], facts["tree"], facts["pictures"]) == ("double", None, False)
    shapes = page_facts(SHAPES)
    assert shapes["sentence"] == "It draws circles, squares, triangles and stars, and nothing else."
    assert shapes["tree"]["next"]


def test_the_token_in_the_address_becomes_a_cookie(start: Start) -> None:
    server = start(token="s3cret").wait_ready()
    assert server.call("GET", "/")[0] == 401
    assert server.call("GET", "/?token=wrong")[0] == 401
    assert server.call("GET", "/page.js?token=s3cret")[0] == 401
    status, headers, _ = server.call("GET", "/?token=s3cret")
    assert (status, headers["location"]) == (303, "/")
    cookie, *rest = headers["set-cookie"].split("; ")
    assert "HttpOnly" in rest
    assert "SameSite=strict" in rest
    assert server.call("GET", "/", Cookie=cookie)[0] == 200
    assert server.call("GET", "/page.json", Cookie=cookie)[0] == 200


# ---- the grammar


def matches(node: Node, rest: str) -> bool:
    """Whether a text is a walk through the tree to an end."""
    if not rest:
        return node.end
    return any(
        matches(child, rest[len(word) :].lstrip(" "))
        for child in node.next.values()
        for word in child.words
        if rest.startswith(word)
    )


TREE = grammar()


@given(st.integers(0, 2**32))
def test_every_caption_of_the_grammar_is_a_walk_through_the_tree(seed: int) -> None:
    text = random_caption(np.random.default_rng(seed), "full").text
    assert matches(TREE, text)


def test_the_tree_has_no_word_that_the_model_was_not_shown() -> None:
    def words(node: Node) -> set[str]:
        own = {word for text in node.words for word in text.replace(",", "").split()}
        return own.union(*(words(child) for child in node.next.values()))

    assert words(TREE) <= set(WORDS)
    assert not matches(TREE, "a large red dragon on a black background")


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here; the browser test runs it")
def test_suggestions_as_one_types() -> None:
    code = """
      globalThis.document = { getElementById: () => null, querySelector: () => null };
      const { suggestions, completed } = await import(process.argv[1]);
      const { tree, texts } = JSON.parse(process.argv[2]);
      console.log(JSON.stringify(texts.map((text) => {
        const offers = suggestions(tree, text);
        return [offers.map((offer) => offer.word), offers.length ? completed(text, offers[0]) : ""];
      })));
    """
    texts = [
        "", "a", "a large r", "A Large Red", "a large red circle ",
        "a large red circle on the l", "a large red circle left of a small blue star on a ",
        "two red cir", "zzz",
    ]  # fmt: skip
    given_json = json.dumps({"tree": page_grammar()["tree"], "texts": texts})
    done = subprocess.run(
        ["node", "--input-type=module", "-e", code, str(FOLDER / "page.js"), given_json],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    offers = json.loads(done.stdout)
    assert offers[0] == [["a"], "a "]
    assert offers[1][0] == ["small", "large"]
    assert offers[2] == [["red"], "a large red "]
    assert set(offers[3][0]) == {"circle", "square", "triangle", "star"}
    assert offers[3][1] == "A Large Red circle "
    assert {"left of", "above", "on the", "on"} <= set(offers[4][0])
    assert offers[5][1] == "a large red circle on the left "
    assert {"black", "cyan"} <= set(offers[6][0])
    assert offers[7] == [["circle"], "two red circle "]
    assert offers[8][0] == []
