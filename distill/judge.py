"""Does a picture show what its caption says? Read back from pixels, by no network.

A caption that says less is asked for less: what it does not name may be anything, as long as the
picture is a scene.

The background is the border's colour; what differs from it falls into connected components; each
component's colour is its core's, its coverage is compared with drawn templates of every shape.
So a student cannot please the judge by pleasing the network that it was trained against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from distill.captions import Mention, Said, within_words
from distill.shapes import (
    ANCHORS,
    AREA,
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    RADIUS,
    SHAPES,
    Array,
    Pictures,
    Scene,
    coverage,
)

ATTRIBUTES = ("background", "count", "shape", "colour", "size", "position")

MIN_AREA = 20.0
"""Smaller specks (pixels of a 64 px picture) are flaws, not objects; two tell a bad picture."""
MIN_OVERLAP = 0.75
"""Intersection over union with the best template, below which a blob has no shape."""
MAX_COLOUR_DISTANCE = 75.0
"""Euclidean in 8-bit RGB; the closest two colours of the palette are 120 apart."""
MAX_ANCHOR_DISTANCE = 9.0
MAX_OBJECTS = 5
"""Objects of a picture that are looked at in every order; more are the debris of a bad one."""


@dataclass(frozen=True)
class SeenObject:
    """One object read from a picture; `shape`, `colour` and `size` are "" where unreadable."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def readable(self) -> bool:
        return bool(self.shape and self.colour and self.size)


@dataclass(frozen=True)
class Verdict:
    """`right`: per attribute that the caption names, true when right for every object it names it
    of. `valid`: one to three objects that can be read, on a background that can."""

    right: dict[str, bool]
    valid: bool

    @property
    def all_right(self) -> bool:
        return all(self.right.values())


Reading = tuple[str, list[SeenObject]]
"""The background of a picture and its objects."""


def nearest_colour(rgb: Array, palette: dict[str, tuple[int, int, int]]) -> str:
    """The name of the palette's nearest colour, "" when none is near."""
    distances = {
        name: float(np.linalg.norm(rgb - np.array(value))) for name, value in palette.items()
    }
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= MAX_COLOUR_DISTANCE else ""


def read_picture(picture: Pictures) -> Reading:
    """Background and objects of a picture [size, size, 3], lengths in 64 px units."""
    pixel = CANVAS / picture.shape[0]
    image = picture.astype(np.float32)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(border, axis=0)
    away = np.linalg.norm(image - ground, axis=-1)
    labels, count = ndimage.label(away > 40, structure=np.ones((3, 3)))
    objects = []
    for label in range(1, count + 1):
        inside = labels == label
        if inside.sum() * pixel**2 >= MIN_AREA:
            objects.append(_read_object(image, ground, away, inside, pixel))
    return nearest_colour(ground, BACKGROUNDS), objects


def _read_object(
    image: Array, ground: Array, away: Array, inside: NDArray[np.bool_], pixel: float
) -> SeenObject:
    core = inside & (away >= np.quantile(away[inside], 0.6))
    colour = np.median(image[core], axis=0)
    step = colour - ground
    # Share of the object's colour in each pixel, in the component and the blurred rim around it.
    near = ndimage.binary_dilation(inside, iterations=2)
    share = np.clip((image - ground) @ step / max(float(step @ step), 1.0), 0, 1) * near
    area = float(share.sum())
    middle = (np.arange(image.shape[0], dtype=np.float32) + 0.5) * pixel
    x = float(share.sum(0) @ middle) / area
    y = float(share.sum(1) @ middle) / area
    overlap, shape, radius = _best_template(share, middle - x, middle - y, pixel)
    small, large = RADIUS["small"], RADIUS["large"]
    size = "" if not 0.75 * small < radius < 1.3 * large else "small"
    if size and radius > (small * large) ** 0.5:
        size = "large"
    return SeenObject(
        shape=shape if overlap >= MIN_OVERLAP else "",
        colour=nearest_colour(colour, COLOURS),
        size=size,
        x=x,
        y=y,
    )


def _best_template(
    share: NDArray[Any], dx: Array, dy: Array, pixel: float
) -> tuple[float, str, float]:
    """Overlap, shape and radius of the drawn template that fits a coverage map best."""
    rows, columns = share.any(1), share.any(0)
    crop = share[np.ix_(rows, columns)]
    best = (0.0, "", 0.0)
    for shape in SHAPES:
        by_area = (float(share.sum()) * pixel**2 / AREA[shape]) ** 0.5
        radii = (by_area * np.array([0.9, 0.95, 1.0, 1.05, 1.1], np.float32))[:, None, None]
        drawn = coverage(shape, dx[columns][None, None], dy[rows][None, :, None], radii, pixel)
        overlap = np.minimum(drawn, crop).sum((1, 2)) / np.maximum(drawn, crop).sum((1, 2))
        index = int(overlap.argmax())
        if overlap[index] > best[0]:
            best = (float(overlap[index]), shape, float(radii[index, 0, 0]))
    return best


def judge(picture: Pictures, asked: Scene | Said) -> Verdict:
    """Which attributes of a scene, or of what a caption says of one, the picture shows.

    Objects are assigned to the named ones in the way that gets most right; a missing object is
    wrong in all its attributes, a surplus one in `count`.
    """
    said = Said.of(asked) if isinstance(asked, Scene) else asked
    ground, objects = read_picture(picture)
    # A relation speaks of two objects, also before it has named the second.
    wanted = said.mentions + (Mention(),) * (bool(said.relation) and len(said.mentions) == 1)
    padded: list[SeenObject | None] = [*objects, *[None] * (len(wanted) - len(objects))]
    best: dict[str, bool] = {}
    best_score = -1
    for order in permutations(padded[:MAX_OBJECTS], len(wanted)):
        flags: dict[str, list[bool]] = {
            name: [
                item is not None and getattr(item, name) == getattr(mention, name)
                for mention, item in zip(wanted, order, strict=True)
                if getattr(mention, name) is not None
            ]
            for name in ("shape", "colour", "size")
        }
        flags["position"] = _positions_right(said, order)
        score = sum(sum(values) for values in flags.values())
        if score > best_score:
            best_score = score
            best = {name: all(values) for name, values in flags.items() if values}
    right = best | ({"background": ground == said.background} if said.background else {})
    if said.counted:
        right["count"] = len(objects) == len(wanted)
    valid = bool(ground) and 1 <= len(objects) <= 3 and all(item.readable for item in objects)
    return Verdict({name: right[name] for name in ATTRIBUTES if name in right}, valid)


def _positions_right(said: Said, order: Sequence[SeenObject | None]) -> list[bool]:
    if said.relation is not None:
        first, second = order[:2]
        if first is None or second is None:
            return [False]
        dx, dy = second.x - first.x, second.y - first.y
        seen = ("left of" if dx > 0 else "right of") if abs(dx) > abs(dy) else None
        seen = seen or ("above" if dy > 0 else "below")
        return [seen == said.relation]
    return [
        item is not None and _near_anchor(item, mention.place)
        for item, mention in zip(order, said.mentions, strict=True)
        if mention.place is not None
    ]


def _near_anchor(item: SeenObject, place: str) -> bool:
    distances = {name: float(np.hypot(item.x - x, item.y - y)) for name, (x, y) in ANCHORS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest == place and distances[nearest] <= MAX_ANCHOR_DISTANCE


def following(pictures: Pictures, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of pictures [n, size, size, 3] with each attribute right, and with all right.

    `all_1`, `all_2`, `all_3` are the shares among scenes of that many objects (absent if none).
    """
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    shares = {"all": float(np.mean([verdict.all_right for verdict in verdicts]))}
    for name in ATTRIBUTES:
        # A caption may leave the position of its object open: anywhere is right.
        shares[name] = float(np.mean([verdict.right.get(name, True) for verdict in verdicts]))
    for count in (1, 2, 3):
        subset = [
            verdict.all_right
            for verdict, scene in zip(verdicts, scenes, strict=True)
            if len(scene.objects) == count
        ]
        if subset:
            shares[f"all_{count}"] = float(np.mean(subset))
    return shares


def saying(pictures: Pictures, captions: Sequence[Said]) -> dict[str, float]:
    """Shares of pictures judged by what their captions say.

    `all`: pictures with everything right that is said; `stated`: attributes right, of all that are
    named; `valid`: pictures that are a scene; and each attribute's share where it is named.
    """
    verdicts = [judge(picture, said) for picture, said in zip(pictures, captions, strict=True)]
    named = [(name, right) for verdict in verdicts for name, right in verdict.right.items()]
    shares: dict[str, Sequence[bool]] = {
        "all": [verdict.all_right for verdict in verdicts],
        "stated": [right for _, right in named],
        "valid": [verdict.valid for verdict in verdicts],
        **{name: [right for other, right in named if other == name] for name in ATTRIBUTES},
    }
    return {name: float(np.mean(values)) for name, values in shares.items() if values}


def same_scene(reading: Reading, other: Reading) -> bool:
    """Whether two pictures show the same: background, and objects of a kind at the same places.

    Pictures of more than `MAX_OBJECTS` are none.
    """

    def kind(item: SeenObject) -> tuple[str, str, str]:
        return item.shape, item.colour, item.size

    (ground, first), (other_ground, second) = reading, other
    if ground != other_ground or len(first) != len(second) or len(first) > MAX_OBJECTS:
        return False
    return any(
        all(
            kind(a) == kind(b) and np.hypot(a.x - b.x, a.y - b.y) <= MAX_ANCHOR_DISTANCE
            for a, b in zip(first, order, strict=True)
        )
        for order in permutations(second)
    )


def steadiness(typed: Sequence[tuple[str, Sequence[Pictures]]]) -> float:
    """How still pictures hold while captions are typed: the mean over captions.

    typed: captions with the pictures of their prefixes, from none to all of the letters, of one
    seed. Of each caption the share of letters typed within a word that leave the picture the same
    scene.
    """
    shares = []
    for text, pictures in typed:
        readings = [read_picture(picture) for picture in pictures]
        shares.append(
            np.mean([same_scene(readings[k], readings[k + 1]) for k in within_words(text)])
        )
    return float(np.mean(shares))
