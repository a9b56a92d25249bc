"""The judge reads drawn pictures right, and says no to wrong ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distill.judge import ATTRIBUTES, following, judge, read_picture
from distill.shapes import BACKGROUNDS, COLOURS, SHAPES, Object, Scene, draw, scenes


@pytest.mark.parametrize("count", [1, 2, 3])
def test_reads_thousands_of_drawn_pictures(count: int) -> None:
    items = scenes(800, seed=11, held_out=True, count=count)
    shares = following(draw(items, 2), items)
    assert min(shares.values()) >= 0.99, shares


def test_reads_larger_pictures() -> None:
    items = scenes(200, seed=4, held_out=False)
    assert following(draw(items, 2, size=128), items)["all"] >= 0.99


def test_reads_noisy_and_slightly_blurred_pictures() -> None:
    from scipy import ndimage

    items = scenes(300, seed=5, held_out=False)
    drawn = draw(items, 2).astype(np.float32)
    blurred = ndimage.gaussian_filter(drawn, (0, 0.6, 0.6, 0))
    noisy = blurred + np.random.default_rng(0).normal(0, 6, drawn.shape)
    assert following(noisy.clip(0, 255).astype(np.uint8), items)["all"] >= 0.95


def test_strongly_blurred_pictures_lose_their_shapes() -> None:
    from scipy import ndimage

    items = scenes(200, seed=5, held_out=False)
    blurred = ndimage.gaussian_filter(draw(items, 2).astype(np.float32), (0, 3, 3, 0))
    assert following(blurred.astype(np.uint8), items)["shape"] < 0.6


CIRCLE = Object("large", "red", "circle")
ONE = Scene((CIRCLE,), "black", ("left",))
TWO = Scene((CIRCLE, Object("small", "blue", "star")), "gray", relation="left of")


def others(words: object, but: str) -> list[str]:
    return [word for word in words if word != but]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("attribute", "shown"),
    [
        *[
            ("shape", replace(ONE, objects=(replace(CIRCLE, shape=s),)))
            for s in others(SHAPES, "circle")
        ],
        *[
            ("colour", replace(ONE, objects=(replace(CIRCLE, colour=c),)))
            for c in others(COLOURS, "red")
        ],
        ("size", replace(ONE, objects=(replace(CIRCLE, size="small"),))),
        *[("position", replace(ONE, positions=(p,))) for p in ("right", "top", "bottom", "middle")],
        *[("background", replace(ONE, background=b)) for b in others(BACKGROUNDS, "black")],
    ],
)
def test_only_the_wrong_attribute_is_wrong(attribute: str, shown: Scene) -> None:
    verdict = judge(draw([shown], 0)[0], ONE)
    assert not verdict.all_right
    assert [name for name in ATTRIBUTES if not verdict.right[name]] == [attribute]


def test_relations_are_told_apart() -> None:
    for relation in ("right of", "above", "below"):
        verdict = judge(draw([replace(TWO, relation=relation)], 0)[0], TWO)
        assert [name for name in ATTRIBUTES if not verdict.right[name]] == ["position"]


def test_swapped_objects_are_not_right() -> None:
    assert not judge(draw([replace(TWO, objects=TWO.objects[::-1])], 0)[0], TWO).all_right


def test_missing_and_surplus_objects_are_counted() -> None:
    assert not judge(draw([replace(ONE, background="gray")], 0)[0], TWO).right["count"]
    verdict = judge(draw([TWO], 0)[0], replace(ONE, background="gray", positions=(None,)))
    assert not verdict.right["count"]


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_picture_is_wrong(value: int) -> None:
    ground, found = read_picture(np.full((64, 64, 3), value, np.uint8))
    assert found == []
    assert ground
    assert not judge(np.full((64, 64, 3), value, np.uint8), ONE).right["shape"]


def test_noise_is_wrong() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not judge(noise, ONE).all_right


def test_shares_by_number_of_objects() -> None:
    shares = following(np.concatenate([draw([ONE], 0), draw([ONE], 0)]), [ONE, TWO])
    assert shares["all"] == 0.5
    assert shares["all_1"] == 1.0
    assert shares["all_2"] == 0.0
    assert "all_3" not in shares
