"""The judge reads drawn pictures right, and says no to wrong ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distill.captions import Mention, Said, caption_of, captions
from distill.judge import (
    ATTRIBUTES,
    following,
    judge,
    read_picture,
    same_scene,
    saying,
    steadiness,
)
from distill.shapes import BACKGROUNDS, COLOURS, SHAPES, Object, Scene, draw, render, scenes


@pytest.mark.parametrize("count", [1, 2, 3])
def test_reads_thousands_of_drawn_pictures(count: int) -> None:
    items = scenes(800, 11, held_out=True, count=count, backgrounds=tuple(BACKGROUNDS))
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
        *[
            ("background", replace(ONE, background=b))
            for b in others(BACKGROUNDS, "black")
            if b != "red"
        ],
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


@pytest.mark.parametrize("wording", ["full", "loose", "cut"])
def test_drawn_pictures_show_what_is_said(wording: str) -> None:
    typed = captions(300, 3, True, {wording: 1.0})  # type: ignore[dict-item]
    shares = saying(draw([caption.scene for caption in typed], 1), [c.said for c in typed])
    assert min(shares.values()) >= 0.99, shares
    assert ("count" in shares) == (wording != "cut")


def test_only_what_is_said_is_judged() -> None:
    picture = draw([ONE], 0)[0]
    said = Said((Mention(colour="red"),), counted=False)
    assert judge(picture, said).right == {"colour": True}
    assert judge(picture, Said((), counted=False)).right == {}
    assert judge(picture, Said((), counted=False)).all_right
    wrong = judge(picture, Said((Mention(colour="red", place="right"),), "black"))
    assert wrong.right == {"background": True, "count": True, "colour": True, "position": False}
    # A relation wants two objects, even when the second has no word yet.
    assert not judge(picture, Said((Mention(),), relation="above", counted=False)).all_right


def test_a_blank_picture_and_noise_are_no_scene() -> None:
    nothing = Said((), counted=False)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not judge(np.full((64, 64, 3), 128, np.uint8), nothing).valid
    assert not judge(noise, nothing).valid
    assert judge(draw([TWO], 0)[0], nothing).valid
    four = draw([TWO], 0)[0]
    four[:, 32:] = four[:, :32][:, ::-1]
    four[32:] = four[:32][::-1]
    assert not judge(four, nothing).valid or len(read_picture(four)[1]) <= 3


def test_stated_attributes_are_counted_over_all_pictures() -> None:
    one, three = Said((Mention(colour="red"),), counted=False), Said.of(ONE)
    shown = draw([ONE, replace(ONE, positions=("right",))], 0)
    shares = saying(shown, [one, three])
    assert shares["all"] == 0.5
    assert shares["stated"] == pytest.approx(6 / 7)
    assert shares["position"] == 0.0
    assert shares["colour"] == shares["valid"] == 1.0


def test_scenes_are_the_same_but_for_their_jitter() -> None:
    first, second = (read_picture(picture) for picture in draw([ONE, ONE], 0))
    assert same_scene(first, second)
    for other in (
        replace(ONE, background="gray"),
        replace(ONE, positions=("right",)),
        replace(ONE, objects=(replace(CIRCLE, size="small"),)),
        replace(TWO, background="black"),
    ):
        assert not same_scene(first, read_picture(draw([other], 0)[0]))


def test_a_picture_that_jumps_at_every_letter_is_not_steady() -> None:
    caption = caption_of(ONE)
    place = (np.array([[12.0, 32.0]], np.float32), np.array([8.5], np.float32))
    still = [render([ONE], [place])[0]] * len(caption.prefixes())
    assert steadiness([(caption.text, still)]) == 1.0
    jumping = [draw([ONE, TWO], 0)[k % 2] for k in range(len(still))]
    assert steadiness([(caption.text, jumping)]) == 0.0


def test_debris_is_no_scene_to_hold() -> None:
    many = np.zeros((64, 64, 3), np.uint8)
    for x in range(4, 64, 16):
        many[4:12, x : x + 8] = many[40:48, x : x + 8] = 255
    reading = read_picture(many)
    assert len(reading[1]) == 8
    assert not same_scene(reading, reading)
