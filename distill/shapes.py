"""The world of `shapes-turbo`: scenes, their captions in a grammar, their pictures, the split.

A scene has one to three objects on a plain background. The grammar:

    one    a large red circle on the left of a black background
           a large red circle on a black background                      (anywhere)
    two    a large red circle left of a small blue star on a black background
    three  a large red circle on the left, a small blue star at the top and a small green square
           on the right of a black background

`distill/captions.py` says what else people type, and what is drawn of it. Everything is numpy and
seeded; a picture is uint8 [size, size, 3].
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import PreconditionError

Array = NDArray[np.float32]
Pictures = NDArray[np.uint8]

SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 160, 40),
    "blue": (35, 60, 225),
    "yellow": (245, 215, 20),
    "purple": (160, 30, 190),
    "white": (255, 255, 255),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "cyan": (60, 215, 225),
    **{name: rgb for name, rgb in COLOURS.items() if name != "white"},
}
PLAIN_BACKGROUNDS = ("black", "white", "gray", "cyan")
"""Those of the captions that published figures of quality were taken on."""
POSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}

CANVAS = 64
"""Lengths below are pixels of a 64 px picture and scale with the picture."""
ANCHORS = {
    "left": (12, 32),
    "right": (52, 32),
    "top": (32, 12),
    "bottom": (32, 52),
    "middle": (32, 32),
}
RADIUS = {"small": 5.2, "large": 8.5}
EXTENT = {"circle": 1.0, "square": 0.9, "triangle": 1.25, "star": 1.3}
"""Half a side for the square, the circumradius for the rest, in units of the radius."""
AREA = {"circle": 3.1416, "square": 3.24, "triangle": 2.030, "star": 2.235}
"""Area in units of radius squared; triangle and star have smaller areas than their extent says."""
STAR_INNER = 0.45
PATCH = 28
"""Side of the square around an object's centre that holds all of it."""
GAP = 3.0
"""Free pixels between the circumscribed circles of two objects."""
TRIES = 1000
"""Ways of placing a scene's objects before it is given up."""
HELD_OUT_SHARE = 5
"""One combination in five is held out."""


@dataclass(frozen=True)
class Object:
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: objects with a position each, or two of them with a relation.

    One object may have the position None: anywhere.
    """

    objects: tuple[Object, ...]
    background: str
    positions: tuple[str | None, ...] = ()
    relation: str | None = None

    @property
    def caption(self) -> str:
        ground = f"a {self.background} background"
        if self.relation is not None:
            first, second = self.objects
            return f"{first} {self.relation} {second} on {ground}"
        if self.positions == (None,):
            return f"{self.objects[0]} on {ground}"
        placed = [
            f"{item} {POSITIONS[place]}"
            for item, place in zip(self.objects, self.positions, strict=True)
            if place is not None
        ]
        head = ", ".join(placed[:-1])
        return f"{head} and {placed[-1]} of {ground}" if head else f"{placed[-1]} of {ground}"

    @property
    def combination(self) -> str:
        """The same for every caption of the same picture: `A left of B` is `B right of A`."""
        if self.relation in ("right of", "below"):
            flipped = replace(
                self, objects=self.objects[::-1], relation=OPPOSITE[self.relation or ""]
            )
            return flipped.combination
        items = [
            f"{item} {place}" for item, place in zip(self.objects, self.positions, strict=False)
        ]
        if self.relation is not None:
            items = [f"{self.objects[0]} {self.relation} {self.objects[1]}"]
        return f"{', '.join(sorted(items))} on {self.background}"

    @property
    def held_out(self) -> bool:
        """One combination in five, by hash: no network sees it in training."""
        digest = hashlib.sha256(self.combination.encode()).digest()
        return digest[0] % HELD_OUT_SHARE == 0


_OBJECT = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PLACE = rf"({'|'.join(POSITIONS.values())})"
_GROUND = rf"a ({'|'.join(BACKGROUNDS)}) background"
_ANYWHERE = re.compile(rf"{_OBJECT} on {_GROUND}")
_ONE = re.compile(rf"{_OBJECT} {_PLACE} of {_GROUND}")
_TWO = re.compile(rf"{_OBJECT} ({'|'.join(RELATIONS)}) {_OBJECT} on {_GROUND}")
_PAIR = re.compile(rf"{_OBJECT} {_PLACE} and {_OBJECT} {_PLACE} of {_GROUND}")
_THREE = re.compile(rf"{_OBJECT} {_PLACE}, {_OBJECT} {_PLACE} and {_OBJECT} {_PLACE} of {_GROUND}")


def parse_caption(caption: str) -> Scene:
    """The scene of a caption; PreconditionError if the grammar does not know it."""
    text = " ".join(caption.lower().split()).rstrip(".")
    place = {phrase: name for name, phrase in POSITIONS.items()}
    if match := _ANYWHERE.fullmatch(text):
        *item, ground = match.groups()
        return Scene((Object(*item),), ground, (None,))
    if match := _ONE.fullmatch(text):
        *item, where, ground = match.groups()
        return Scene((Object(*item),), ground, (place[where],))
    if match := _TWO.fullmatch(text):
        g = match.groups()
        return Scene((Object(*g[:3]), Object(*g[4:7])), g[7], relation=g[3])
    if match := _PAIR.fullmatch(text):
        g = match.groups()
        pair = (Object(*g[0:3]), Object(*g[4:7]))
        return Scene(pair, g[8], (place[g[3]], place[g[7]]))
    if match := _THREE.fullmatch(text):
        g = match.groups()
        objects = (Object(*g[0:3]), Object(*g[4:7]), Object(*g[8:11]))
        return Scene(objects, g[12], (place[g[3]], place[g[7]], place[g[11]]))
    raise PreconditionError(
        f"the caption {caption!r} is not in the grammar of the shapes",
        "it knows one to three objects with a position or a relation on a plain background",
        "write it like 'a large red circle on the left of a black background'",
    )


WORDS = frozenset(
    word
    for phrase in (
        *SHAPES,
        *(f"{shape}s" for shape in SHAPES),
        *SIZES,
        *COLOURS,
        *BACKGROUNDS,
        *POSITIONS.values(),
        *RELATIONS,
        "a one two three and of background side",
    )
    for word in phrase.split()
)
"""All that captions are made of, in every wording."""


def unknown_words(caption: str) -> list[str]:
    """The words of a caption that no caption of the shapes has; a word that has only begun is
    none of them."""
    words = [word.strip(".,") for word in caption.lower().split()]
    return [word for word in words if not any(known.startswith(word) for known in WORDS)]


def random_scene(
    rng: np.random.Generator,
    count: int | None = None,
    backgrounds: Sequence[str] = PLAIN_BACKGROUNDS,
) -> Scene:
    """A scene of any split; `count` objects, or one to three (40, 30, 30%)."""

    def pick(names: Sequence[str]) -> str:
        return names[int(rng.random() * len(names))]

    count = count or (1, 1, 1, 1, 2, 2, 2, 3, 3, 3)[int(rng.random() * 10)]
    background = pick(backgrounds)
    colours = [name for name in COLOURS if name != background]
    objects = tuple(Object(pick(SIZES), pick(colours), pick(SHAPES)) for _ in range(count))
    if count == 2:
        return Scene(objects, background, relation=pick(RELATIONS))
    # Three large objects fit beside each other only around the middle.
    places = [name for name in POSITIONS if count == 1 or name != "middle"]
    chosen = [places.pop(int(rng.random() * len(places))) for _ in range(count)]
    return Scene(objects, background, tuple(chosen))


def scenes(
    n: int,
    seed: int,
    held_out: bool,
    count: int | None = None,
    backgrounds: Sequence[str] = PLAIN_BACKGROUNDS,
) -> list[Scene]:
    """`n` scenes of one split, the same for the same seed."""
    rng = np.random.default_rng([seed, held_out, count or 0])
    kept: list[Scene] = []
    while len(kept) < n:
        scene = random_scene(rng, count, backgrounds)
        if scene.held_out == held_out:
            kept.append(scene)
    return kept


Layout = tuple[Array, Array]
"""Centres [n, 2] (x, y) and radii [n] of a scene's objects, 64 px units."""


def layout(scene: Scene, rng: np.random.Generator) -> Layout:
    """Where the objects stand and how large.

    Objects never touch: `GAP` pixels stay free between their circumscribed circles.

    Raises:
        PreconditionError: the objects have no room where the scene puts them.
    """
    count = len(scene.objects)
    radii = np.array([RADIUS[item.size] for item in scene.objects], np.float32)
    radii *= rng.uniform(0.96, 1.04, count).astype(np.float32)
    reach = [
        float(radius) * EXTENT[item.shape] * (2**0.5 if item.shape == "square" else 1.0)
        for item, radius in zip(scene.objects, radii, strict=True)
    ]
    for _ in range(TRIES):
        if scene.relation is not None:
            centres = np.stack([rng.uniform((12, 42), (22, 52)), rng.uniform(23, 41, 2)], 1)
            if scene.relation in ("above", "below"):
                centres = centres[:, ::-1]
            if scene.relation in ("right of", "below"):
                centres = centres[::-1]
        else:
            anywhere = tuple(ANCHORS)[int(rng.random() * len(ANCHORS))]
            centres = np.array([ANCHORS[place or anywhere] for place in scene.positions])
            spread = 3.0 if count == 1 else 1.5
            centres = centres + rng.uniform(-spread, spread, (count, 2))
        margin = np.array(reach)[:, None]
        centres = np.minimum(np.maximum(centres, margin), CANVAS - margin)
        if all(
            math.dist(centres[a], centres[b]) >= reach[a] + reach[b] + GAP
            for a, b in combinations(range(count), 2)
        ):
            return centres.astype(np.float32), radii
    raise PreconditionError(
        f"there is no room for {scene.caption!r}",
        f"its objects touch or overlap in {TRIES} ways of placing them",
        "give each object a place of its own, or make those beside the middle small",
    )


def coverage(shape: str, dx: Array, dy: Array, radius: Array, pixel: float = 1.0) -> Array:
    """Anti-aliased coverage in [0, 1] from offsets to the centroid (y down) and the radius.

    The signed distance to the outline, cut one pixel wide: no supersampling, so sharp and cheap.
    `pixel` is the pixel's width in the unit of the offsets.
    """
    reach = radius * EXTENT[shape]
    if shape == "circle":
        distance = np.hypot(dx, dy) - reach
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - reach
    elif shape == "triangle":
        distance = np.maximum(dy, 0.8660254 * abs(dx) - 0.5 * dy) - reach / 2
    else:
        distance = _star_distance(dx, dy, reach)
    return np.clip(0.5 - distance / pixel, 0, 1).astype(np.float32)


def _star_distance(dx: Array, dy: Array, reach: Array) -> Array:
    """Signed distance to a five-pointed star: fold the plane into one sector, then one edge."""
    cos36, sin36 = 0.80901699, 0.58778525
    x: NDArray[Any] = abs(dx)
    y: NDArray[Any] = -dy
    for normal in ((cos36, -sin36), (-cos36, -sin36)):
        beyond = 2 * np.maximum(normal[0] * x + normal[1] * y, 0)
        x, y = x - beyond * normal[0], y - beyond * normal[1]
    x, y = abs(x), y - reach
    edge = (STAR_INNER * sin36, STAR_INNER * cos36 - 1)
    along = (x * edge[0] + y * edge[1]) / (edge[0] ** 2 + edge[1] ** 2)
    along = np.clip(along, 0, reach)
    side = np.sign(y * edge[0] - x * edge[1])
    distance: Array = np.hypot(x - edge[0] * along, y - edge[1] * along) * side
    return distance


def render(items: Sequence[Scene], layouts: Sequence[Layout], size: int = CANVAS) -> Pictures:
    """Pictures uint8 [n, size, size, 3] of scenes, their objects where the layouts say.

    Each object is drawn into a patch around its centre, all objects of one shape at once.
    """
    pixel = CANVAS / size
    half = round(PATCH / 2 / pixel)
    ground = np.array([BACKGROUNDS[scene.background] for scene in items], np.float32)
    # A margin of one patch around the picture spares every patch the clipping.
    padded = np.empty((len(items), size + 2 * half, size + 2 * half, 3), np.float32)
    padded[:] = ground[:, None, None]
    offsets = np.arange(2 * half)
    for shape in SHAPES:
        drawn = [
            (index, centre / pixel, radius, COLOURS[item.colour])
            for index, scene in enumerate(items)
            for item, centre, radius in zip(scene.objects, *layouts[index], strict=True)
            if item.shape == shape
        ]
        if not drawn:
            continue
        numbers, centres, radii, colours = (np.array(column) for column in zip(*drawn, strict=True))
        corner = np.rint(centres).astype(int) - half
        dx = (corner[:, :1] + offsets + 0.5 - centres[:, :1]).astype(np.float32) * pixel
        dy = (corner[:, 1:] + offsets + 0.5 - centres[:, 1:]).astype(np.float32) * pixel
        radii = radii.astype(np.float32)[:, None, None]
        alpha = coverage(shape, dx[:, None, :], dy[:, :, None], radii, pixel)[..., None]
        rows = (corner[:, 1:] + half + offsets)[:, :, None]
        columns = (corner[:, :1] + half + offsets)[:, None, :]
        where = (numbers[:, None, None], rows, columns)
        # Objects never touch, so adding each one's difference to the background draws them all.
        change = alpha * (colours[:, None, None] - ground[numbers][:, None, None])
        np.add.at(padded, where, change.astype(np.float32))
    inner = padded[:, half : half + size, half : half + size]
    return np.rint(inner).clip(0, 255).astype(np.uint8)


def draw(items: Sequence[Scene], seed: int, size: int = CANVAS) -> Pictures:
    """Pictures of scenes, each at a random place its caption allows."""
    rng = np.random.default_rng(seed)
    return render(items, [layout(scene, rng) for scene in items], size)
