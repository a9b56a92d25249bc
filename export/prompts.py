"""What models are asked to draw when timed, compared and judged: a prime number of prompts each, so
that every batch size meets them all."""

GENERAL = (
    "a lighthouse at dusk, long exposure",
    "an origami pig on fire",
    "a bowl of ramen on a wooden table, top view",
    "portrait of an old sailor, oil painting",
    "a red bicycle leaning against a yellow wall",
    "the skyline of a city made of glass, in fog",
    "a fox asleep in the snow",
    "macro photograph of a dew drop on a leaf",
    "an astronaut riding a horse through a desert canyon",
    "a stained glass window showing a whale",
    "isometric drawing of a small library",
    "a thunderstorm over a field of sunflowers",
    "a cup of coffee beside an open notebook, morning light",
)
SHAPES = (
    "a large white star above a large green triangle on a black background",
    "a small purple triangle at the top of a cyan background",
    "a large red star at the bottom, a small purple star at the top and a large white circle on the"
    " right of a cyan background",
    "a large green square at the bottom of a white background",
    "a large yellow square right of a large red star on a gray background",
    "a large yellow triangle on the left, a small yellow star at the bottom and a large white"
    " square at the top of a cyan background",
    "a small purple star in the middle of a black background",
    "a small green circle above a small green square on a cyan background",
    "a large blue square on the left of a gray background",
    "a large red star at the bottom, a large yellow star on the right and a small green star on the"
    " left of a white background",
    "a large purple square on the right of a white background",
    "a large blue circle above a large yellow star on a cyan background",
    "a large blue circle in the middle of a white background",
)
"""Captions of distill/shapes.py of combinations that were held out of training."""
