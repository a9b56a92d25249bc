"""What the shipped model knows, for a page that helps people write it: read off `distill`'s own
captions, so that it is the grammar and no copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np

from distill.captions import Piece, caption_of, random_caption
from distill.shapes import BACKGROUNDS, COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, Object, Scene

EXAMPLES = 24
LITERAL = "word"


@dataclass
class Node:
    """A place in a caption: the words that may stand there, and what may come after each of them.

    Attributes:
        kind: `size`, `colour`, `shape`, `place`, `relation`, `background`, or `word` where the
            text is always the same.
    """

    kind: str
    words: dict[str, None] = field(default_factory=dict)
    next: dict[str, Node] = field(default_factory=dict)
    end: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "words": list(self.words),
            "next": [node.as_json() for node in self.next.values()],
            "end": self.end,
        }


def scenes() -> Iterator[Scene]:
    """Scenes enough for every caption of the grammar to be a walk through them: all layouts, and
    in each of them every word."""
    fillings = [
        tuple(Object(size, colour, shape) for _ in range(3))
        for size in SIZES
        for colour in COLOURS
        for shape in SHAPES
    ]
    first = fillings[0]
    grounds = tuple(BACKGROUNDS)
    for ground in grounds:
        yield Scene(first[:1], ground, (None,))
    for filling in fillings:
        yield Scene(filling[:1], grounds[0], (None,))
        for place in POSITIONS:
            yield Scene(filling[:1], grounds[0], (place,))
        for relation in RELATIONS:
            yield Scene(filling[:2], grounds[0], relation=relation)
    for ground in grounds:
        for place in POSITIONS:
            yield Scene(first[:1], ground, (place,))
        yield Scene(first[:2], ground, relation=RELATIONS[0])
    for places in permutations(POSITIONS, 3):
        for filling in fillings:
            yield Scene(filling, grounds[0], places)
        for ground in grounds:
            yield Scene(first, ground, places)


def kind_of(piece: Piece) -> str:
    """What a piece of a caption says; a word that is always the same where it says nothing."""
    valued = [kind for kind, _, value in piece[1] if value]
    return valued[0] if valued else LITERAL


def grammar() -> Node:
    """The captions of the grammar as a tree; a node's key is its kind, or its one word."""
    root = Node(LITERAL)
    for scene in scenes():
        node = root
        for piece in caption_of(scene).pieces:
            text, kind = piece[0].strip(), kind_of(piece)
            key = f"{LITERAL} {text}" if kind == LITERAL else kind
            node = node.next.setdefault(key, Node(kind))
            node.words[text] = None
        node.end = True
    return root


def page_grammar() -> dict[str, Any]:
    """The grammar as the page reads it: the tree, what colours look like, and examples."""
    rng = np.random.default_rng(0)
    return {
        "tree": grammar().as_json(),
        "colours": {name: list(rgb) for name, rgb in (BACKGROUNDS | COLOURS).items()},
        "examples": [random_caption(rng, "full").text for _ in range(EXAMPLES)],
    }
