"""The grammar, the split and the pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import PreconditionError
from distill.shapes import (
    ANCHORS,
    BACKGROUNDS,
    COLOURS,
    EXTENT,
    GAP,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    Object,
    Scene,
    coverage,
    draw,
    layout,
    parse_caption,
    random_scene,
    scenes,
)

seeds = st.integers(0, 2**32 - 1)


def scene_of(seed: int) -> Scene:
    return random_scene(np.random.default_rng(seed))


@settings(deadline=None)
@given(seeds)
def test_caption_and_scene_are_one(seed: int) -> None:
    scene = scene_of(seed)
    assert parse_caption(scene.caption) == scene
    assert parse_caption(f"  {scene.caption.upper()}. ") == scene


def test_the_example_of_the_grammar() -> None:
    scene = Scene((Object("large", "red", "circle"),), "black", ("left",))
    assert scene.caption == "a large red circle on the left of a black background"
    anywhere = parse_caption("a small red circle on a white background")
    assert anywhere.positions == (None,)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a circle",
        "a large orange circle on a black background",
        "a large red circle left of a black background",
        "a large red circle on the left, a small blue star at the top of a black background",
    ],
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(PreconditionError, match="not in the grammar"):
        parse_caption(caption)


@settings(deadline=None)
@given(seeds)
def test_both_captions_of_a_picture_are_in_one_split(seed: int) -> None:
    scene = random_scene(np.random.default_rng(seed), 2)
    assert scene.relation is not None
    other = Scene(scene.objects[::-1], scene.background, relation=OPPOSITE[scene.relation])
    assert other.combination == scene.combination
    assert other.held_out == scene.held_out


@settings(deadline=None)
@given(seeds)
def test_the_order_of_three_does_not_change_the_split(seed: int) -> None:
    scene = random_scene(np.random.default_rng(seed), 3)
    pairs = list(zip(scene.objects, scene.positions, strict=True))
    for order in itertools.permutations(pairs):
        objects, positions = zip(*order, strict=True)
        assert Scene(objects, scene.background, positions).held_out == scene.held_out


def test_splits_are_disjoint_and_complete() -> None:
    train = scenes(3000, seed=0, held_out=False)
    held = scenes(1000, seed=0, held_out=True)
    assert not {s.combination for s in train} & {s.combination for s in held}
    share = np.mean([scene_of(seed).held_out for seed in range(3000)])
    assert 0.15 < share < 0.25
    # Every word is learnt somewhere.
    words = {word for scene in train for word in scene.caption.replace(",", "").split()}
    assert words >= {*COLOURS, *BACKGROUNDS, *SHAPES, "small", "large"}


def test_the_same_seed_gives_the_same_pictures() -> None:
    items = scenes(20, seed=3, held_out=False)
    assert items == scenes(20, seed=3, held_out=False)
    assert np.array_equal(draw(items, 5), draw(items, 5))
    assert not np.array_equal(draw(items, 5), draw(items, 6))


@settings(deadline=None)
@given(seeds)
def test_objects_stand_apart_inside_the_picture_and_where_the_caption_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    centres, radii = layout(scene, rng)
    reach = [r * EXTENT[o.shape] for o, r in zip(scene.objects, radii, strict=True)]
    assert all(
        r - 1e-3 <= v <= 64 - r + 1e-3 for c, r in zip(centres, reach, strict=True) for v in c
    )
    for a, b in itertools.combinations(range(len(radii)), 2):
        assert np.hypot(*(centres[a] - centres[b])) >= reach[a] + reach[b] + GAP - 1e-3
    if scene.relation is not None:
        (dx, dy) = centres[1] - centres[0]
        wanted = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.relation]
        other = dy if scene.relation in RELATIONS[:2] else dx
        assert wanted > abs(other)
    for centre, place in zip(centres, scene.positions, strict=False):
        assert np.hypot(*(centre - np.array(ANCHORS[place or "middle"]))) < 6


def test_two_objects_may_have_a_place_each() -> None:
    scene = parse_caption(
        "a large red star at the top and a small blue star at the bottom of a white background"
    )
    assert scene.positions == ("top", "bottom")
    assert parse_caption(scene.caption) == scene


def test_a_scene_without_room_is_refused() -> None:
    crowded = parse_caption(
        "a large red star on the left and a large blue star in the middle of a white background"
    )
    with pytest.raises(PreconditionError, match="no room for 'a large red star"):
        layout(crowded, np.random.default_rng(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pixel", [1.0, 0.5])
def test_coverage_is_the_shape_s_area_anti_aliased(shape: str, pixel: float) -> None:
    from distill.shapes import AREA

    grid = np.arange(-20, 20, pixel, dtype=np.float32) + pixel / 2
    drawn = coverage(shape, grid[None], grid[:, None], np.float32(8.5), pixel)
    assert drawn.sum() * pixel**2 == pytest.approx(AREA[shape] * 8.5**2, rel=0.03)
    assert drawn[drawn.shape[0] // 2, drawn.shape[1] // 2] == 1
    assert ((drawn > 0) & (drawn < 1)).any()
    assert abs((drawn.sum(0) * grid).sum()) < 1  # symmetric left to right


def test_a_larger_picture_shows_the_same() -> None:
    items = scenes(8, seed=1, held_out=False)
    small, large = draw(items, 0), draw(items, 0, size=128)
    shrunk = large.reshape(8, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(shrunk - small).mean() < 1
