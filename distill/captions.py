"""What people type: captions that are cut off, loose or half said, and the scene each one draws.

A caption is a row of pieces, and a piece may claim something of the scene. Cutting a caption drops
the claims whose piece has not begun. What is not said is drawn plainly most of the time
(`complete`): a large red circle in the middle, on black. So a picture does not jump while its
caption is typed. Now and then it is drawn as it comes, or a picture that is handed to the model
would lose what its caption leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from distill.shapes import (
    BACKGROUNDS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    Object,
    Scene,
    random_scene,
)

Rng = np.random.Generator
Wording = Literal["full", "loose", "cut"]

CHECKED: dict[Wording, float] = {"full": 0.4, "loose": 0.3, "cut": 0.3}
"""What sample grids are drawn of while a stage trains."""

PLAIN_COLOURS = ("red", "blue", "yellow", "green", "purple", "white")
"""Colours of the first, second and third object where nothing is said, less the background."""
PLAIN_PLACES = ("left", "right", "top", "bottom")
"""Places of several objects where nothing is said; a single one is in the middle."""
PLAIN_SHARE = 0.7
"""Share of captions of which what is not said is drawn plainly."""
ACROSS = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
NUMBERS = {2: "two", 3: "three"}
ALIKE_SHARE = 0.08
"""Share of scenes of several objects whose objects are alike, so that a number can say them."""
EMPTY_SHARE = 0.08
"""Share of cut captions of which nothing is left."""


@dataclass(frozen=True)
class Mention:
    """What a caption says of one object; None where it says nothing."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Said:
    """What a caption says of a scene; `counted`: it names every object."""

    mentions: tuple[Mention, ...]
    background: str | None = None
    relation: str | None = None
    counted: bool = True

    @classmethod
    def of(cls, scene: Scene) -> Self:
        """Everything that the caption of the grammar says of a scene."""
        places = scene.positions or (None,) * len(scene.objects)
        mentions = tuple(
            Mention(item.size, item.colour, item.shape, place)
            for item, place in zip(scene.objects, places, strict=True)
        )
        return cls(mentions, scene.background, scene.relation)


def complete(said: Said, rng: Rng | None = None) -> Scene:
    """The scene that is drawn of what a caption says: plainly, or with `rng` as it comes."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.random() * len(options)) if rng is not None else 0]

    mentions = list(said.mentions) or [Mention()]
    if said.relation and len(mentions) == 1:
        mentions.append(Mention())
    taken = {mention.colour for mention in mentions}
    background = said.background or pick([name for name in BACKGROUNDS if name not in taken])
    colours = [name for name in PLAIN_COLOURS if name != background]
    objects = tuple(
        Object(
            mention.size or pick(("large", "small")),
            mention.colour or pick(colours[index:] + colours[:index]),
            mention.shape or pick(SHAPES),
        )
        for index, mention in enumerate(mentions)
    )
    said_places = [mention.place for mention in mentions]
    if len(objects) == 1:
        return Scene(objects, background, (said_places[0] or pick(("middle", *PLAIN_PLACES)),))
    if len(objects) == 2 and (said.relation or not any(said_places)):
        return Scene(objects, background, relation=said.relation or pick(RELATIONS))
    places: list[str] = []
    for place in said_places:
        used = {*places, *filter(None, said_places)}
        # Of two objects the one stands across from the other.
        across = [ACROSS[other] for other in used if other in ACROSS and len(objects) == 2]
        free = [name for name in (*across, *PLAIN_PLACES) if name not in used]
        places.append(place or pick(free))
    return Scene(objects, background, tuple(places))


Claim = tuple[str, int, str]
"""What is claimed (`object`, `size`, `colour`, `shape`, `place`, `background` or `relation`), of
which object, and the value."""
Piece = tuple[str, tuple[Claim, ...]]


@dataclass(frozen=True)
class Caption:
    """Pieces of text with their claims; only the first `shown` characters are there (None: all)."""

    pieces: tuple[Piece, ...]
    shown: int | None = None

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)[: self.shown]

    @property
    def said(self) -> Said:
        """What it says in whole words; a caption that was cut does not say how many objects."""
        return self._said(whole_words=True)

    @property
    def scene(self) -> Scene:
        """What is plainly drawn of it: a word that has begun counts."""
        return complete(self.begun)

    @property
    def begun(self) -> Said:
        """What it says, with the word that has only begun as it goes on."""
        return self._said(whole_words=False)

    def cut(self, shown: int) -> Caption:
        return replace(self, shown=shown)

    def prefixes(self) -> list[Caption]:
        """The caption as it is typed, letter by letter, from nothing to all of it."""
        return [*(self.cut(shown) for shown in range(len(self.text))), self]

    def _said(self, whole_words: bool) -> Said:
        length = len(self.text)
        claims: list[Claim] = []
        end = 0
        for text, told in self.pieces:
            begin = end + len(text) - len(text.lstrip())
            end += len(text)
            if end <= length if whole_words else begin < length:
                claims += told
        facts = {(name, index): value for name, index, value in claims}
        count = len({index for name, index in facts if name == "object"})
        mentions = tuple(
            Mention(*(facts.get((name, index)) for name in ("size", "colour", "shape", "place")))
            for index in range(count)
        )
        background, relation = facts.get(("background", 0)), facts.get(("relation", 0))
        return Said(mentions, background, relation, counted=self.shown is None)


@dataclass(frozen=True)
class Style:
    """How a scene is put in words; the defaults are the grammar's own.

    `sizes`, `colours`: which objects' are said. `article`: "a", "one" or none. `place`: "on the
    left" (`phrase`), "on the left side" (`side`), "left" (`bare`), or not said. `commas`: between
    the first objects of three, else "and". `ground`: "a black background" (`phrase`), "black"
    (`bare`), or not said. `numbers`: "two red circles" of objects that are alike.
    """

    sizes: tuple[bool, bool, bool] = (True, True, True)
    colours: tuple[bool, bool, bool] = (True, True, True)
    article: str = "a"
    place: Literal["phrase", "side", "bare", ""] = "phrase"
    relation: bool = True
    commas: bool = True
    ground: Literal["phrase", "bare", ""] = "phrase"
    numbers: bool = False


def caption_of(scene: Scene, style: Style | None = None) -> Caption:
    """A scene's caption, of the grammar unless a style says otherwise."""
    style = style or Style()
    pieces: list[Piece] = []

    def add(text: str, *claims: Claim) -> None:
        space = "" if not pieces or text == "," else " "
        pieces.append((space + text, claims))

    def name(indices: Sequence[int], plural: str = "") -> None:
        item, first = scene.objects[indices[0]], indices[0]
        words = [
            *([("size", item.size)] if style.sizes[first] else []),
            *([("colour", item.colour)] if style.colours[first] else []),
            ("shape", item.shape),
        ]
        begun = tuple(("object", index, "") for index in indices)
        article = NUMBERS.get(len(indices), style.article)
        if article:
            add(article, *begun)
        for kind, value in words:
            ending = plural if kind == "shape" else ""
            told = tuple((kind, index, value) for index in indices)
            add(value + ending, *told, *(() if article else begun))

    count = len(scene.objects)
    placed = False
    if style.numbers and count > 1 and len(set(scene.objects)) == 1:
        name(range(count), plural="s")
    else:
        for index in range(count):
            if index and scene.relation and style.relation:
                add(scene.relation, ("relation", 0, scene.relation))
            elif index:
                add("," if style.commas and index < count - 1 else "and")
            name([index])
            place = scene.positions[index] if scene.positions else None
            if place and style.place:
                claim = ("place", index, place)
                if style.place == "bare":
                    add(place, claim)
                else:
                    add(POSITIONS[place].rpartition(" ")[0])
                    add(place, claim)
                    placed = style.place == "phrase"
                    if style.place == "side":
                        add("side")
    if style.ground:
        add("of" if placed else "on")
        if style.ground == "phrase":
            add("a")
        add(scene.background, ("background", 0, scene.background))
        if style.ground == "phrase":
            add("background")
    return Caption(tuple(pieces))


def loosened(scene: Scene, rng: Rng) -> Caption:
    """A whole caption of a scene in looser words than the grammar's, never in its own."""

    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    def three(share: float) -> tuple[bool, bool, bool]:
        return chance(share), chance(share), chance(share)

    def pick(*choices: str) -> str:
        return choices[int(rng.random() * len(choices))]

    plain, written = caption_of(scene).text, str.lower
    while True:
        style = Style(
            sizes=three(0.7),
            colours=three(0.92),
            article=pick("a", "a", "a", "", "", "one"),
            place=pick("phrase", "phrase", "side", "bare", ""),  # type: ignore[arg-type]
            relation=chance(0.75),
            commas=chance(0.6),
            ground=pick("phrase", "phrase", "bare", ""),  # type: ignore[arg-type]
            numbers=chance(0.7),
        )
        caption = caption_of(scene, style)
        if chance(0.25):
            written = (str.upper, str.title, str.capitalize)[int(rng.random() * 3)]
        caption = _written(caption, written)
        if chance(0.1):
            caption = Caption((*caption.pieces, (".", ())))
        if caption.text != plain:
            return caption


def _written(caption: Caption, change: Callable[[str], str]) -> Caption:
    """The caption in other letters, of the same number."""
    whole = change(caption.text)
    pieces, start = [], 0
    for text, claims in caption.pieces:
        pieces.append((whole[start : start + len(text)], claims))
        start += len(text)
    return Caption(tuple(pieces))


def random_caption(rng: Rng, wording: Wording, count: int | None = None) -> Caption:
    """A caption of a scene on any background, of any split."""
    scene = random_scene(rng, count, tuple(BACKGROUNDS))
    if wording == "full":
        return caption_of(scene)
    if len(scene.objects) > 1 and rng.random() < ALIKE_SHARE:
        scene = replace(scene, objects=scene.objects[:1] * len(scene.objects))
    if wording == "loose":
        return loosened(scene, rng)
    caption = caption_of(scene) if rng.random() < 0.5 else loosened(scene, rng)
    if rng.random() < EMPTY_SHARE:
        return caption.cut(0)
    return caption.cut(int(rng.random() * len(caption.text)))


def drawn_scene(caption: Caption, rng: Rng) -> Scene:
    """The scene that a caption's training picture shows, of the caption's own split."""
    plain = caption.scene
    if rng.random() < PLAIN_SHARE:
        return plain
    # A caption that leaves little open may allow no other scene of its split.
    others = (complete(caption.begun, rng) for _ in range(8))
    return next((scene for scene in others if scene.held_out == plain.held_out), plain)


def captions(n: int, seed: int, held_out: bool, shares: dict[Wording, float]) -> list[Caption]:
    """`n` captions whose plain scene is of one split, in each wording a share; by seed."""
    rng = np.random.default_rng([seed, held_out, 2])
    wordings, weights = list(shares), np.cumsum(list(shares.values()))
    kept: list[Caption] = []
    while len(kept) < n:
        wording = wordings[int(np.searchsorted(weights / weights[-1], rng.random(), "right"))]
        caption = random_caption(rng, wording)
        if caption.scene.held_out == held_out:
            kept.append(caption)
    return kept


def within_words(text: str) -> list[int]:
    """The lengths k for which the first k and k + 1 characters end inside the same word."""
    return [k for k in range(1, len(text)) if text[k - 1].isalnum() and text[k].isalnum()]
