"""What is wanted of a cell: limits as people write them (`latency<=4s memory<=8GB`), and the best
of what."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from core.errors import PreconditionError


@dataclass(frozen=True)
class Quantity:
    """Something that cells have, and that limits and choices are about.

    Attributes:
        unit: the unit that its values are in, as a reader sees it; "" for none.
        units: what may stand behind a number, and how many `unit` it is.
        less: whether less is better.
        timed: whether a clock is behind it: its values scatter from process to process as a
            factor, and rounds of one run can be held against each other.
        most: the largest value that there can be.
        better: what more of the good side is called, `worse` the other.
        doc: what of a row it is.
    """

    name: str
    unit: str
    units: Mapping[str, float]
    less: bool
    timed: bool
    better: str
    worse: str
    doc: str
    most: float = math.inf

    @property
    def sign(self) -> str:
        """The only direction in which a limit on it makes sense."""
        return "<=" if self.less else ">="

    @property
    def example(self) -> str:
        """A limit as it is typed."""
        return f"{self.name}{self.sign}{EXAMPLES[self.name]}"

    def text(self, value: float) -> str:
        """A value for people."""
        unit, scale = self.shown_in(value)
        return f"{self.number(value / scale)}{'' if unit == '%' else ' '}{unit}".rstrip()

    def shown_in(self, value: float) -> tuple[str, float]:
        """The unit in which a value is shown, in the unit that values are in."""
        large = LARGE.get(self.name)
        return large if large and abs(value) >= large[1] else (self.unit, 1.0)

    def number(self, value: float) -> str:
        """The digits of a value in the unit that it is shown in."""
        if self.unit in ("%", "dB"):
            return f"{value:.1f}"
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"

    def change_text(self, advantage: float) -> str:
        """An advantage as words: a factor's logarithm (`12% faster`), or a difference."""
        word = self.better if advantage >= 0 else self.worse
        if self.unit in ("%", "dB"):
            unit = "points" if self.unit == "%" else self.unit
            return f"{abs(advantage):.1f} {unit} {word}"
        factor = math.expm1(-abs(advantage) if self.less == (advantage >= 0) else abs(advantage))
        return f"{abs(factor):.0%} {word}"


LARGE = {"latency": ("s", 1e3), "memory": ("GB", 1e3)}
"""The unit of large values, and how many of the quantity's own it is."""
EXAMPLES = {
    "latency": "4s", "memory": "8GB", "psnr": "40dB", "images/s": "2", "joule/image": "5",
    "captions": "97%", "usd/1000": "0.2",
}  # fmt: skip
QUANTITIES = {
    each.name: each
    for each in (
        Quantity("latency", "ms", {"s": 1e3, "ms": 1.0}, True, True, "faster", "slower",
                 "median of a warm call, prompts in and pictures out"),
        Quantity("images/s", "images/s", {"": 1.0}, False, True, "more images/s", "fewer images/s",
                 "the batch over the latency: calls one after the other"),
        Quantity("usd/1000", "USD for 1000 images", {"": 1.0, "USD": 1.0}, True, True, "cheaper",
                 "dearer", "--price over images/s"),
        Quantity("joule/image", "J", {"": 1.0, "J": 1.0}, True, True, "less energy",
                 "more energy", "energy of a call over its images, where it can be read"),
        Quantity("memory", "MB", {"MB": 1.0, "GB": 1e3, "MiB": 1.048576, "GiB": 1073.741824},
                 True, False, "smaller", "larger",
                 "peak of the worker; on a GPU or a card that tells it, of the device"),
        Quantity("captions", "%", {"%": 1.0}, False, False, "better", "worse",
                 "held-out captions drawn right (sweep --quality)", most=100.0),
        Quantity("psnr", "dB", {"dB": 1.0}, False, False, "closer to FP32", "farther from FP32",
                 "image 0 against torch FP32 of the same steps and decoder", most=100.0),
    )
}  # fmt: skip
"""Every quantity by its name, in the order in which the best of one is looked for."""
PIECE = re.compile(
    r"([A-Za-z/][\w/]*)\s*(<=|>=|≤|≥|==|=|<|>)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)"
    r"\s*([A-Za-z%]*)(?![\w/%]|\s*[<>=≤≥])"  # a name before a sign is no unit
)
NEVER = "nothing can be chosen by it"


@dataclass(frozen=True)
class Limit:
    """A bound on a quantity, in the unit of its values."""

    name: str
    value: float

    @property
    def quantity(self) -> Quantity:
        """The quantity that it bounds."""
        return QUANTITIES[self.name]

    def __str__(self) -> str:
        quantity = self.quantity
        unit = quantity.unit if quantity.unit in quantity.units else ""
        return f"{self.name}{quantity.sign}{self.value:.15g}{unit}"


@dataclass(frozen=True)
class Wants:
    """What is asked of a choice.

    Attributes:
        best: the quantity of which the best is taken; "" for the first that has no limit.
        price: USD an hour of the machine; None where no price was given.
    """

    limits: tuple[Limit, ...] = ()
    best: str = ""
    price: float | None = None

    @property
    def text(self) -> str:
        """The limits as they are typed."""
        return " ".join(map(str, self.limits))

    def asks(self, name: str) -> bool:
        """Whether a quantity is limited, or the best of it is taken."""
        return name == self.best or any(limit.name == name for limit in self.limits)

    def objective(self, known: Collection[str]) -> Quantity:
        """The quantity of which the best is taken, among those that cells have."""
        limited = {limit.name for limit in self.limits}
        free = [name for name in QUANTITIES if name in known and name not in limited]
        return QUANTITIES[self.best or next(iter(free), "latency")]


def wants_of(within: str = "", best: str = "", price: float | None = None) -> Wants:
    """Read what is wanted: `wants_of("latency<=4s memory<=8GB", best="images/s")`.

    Raises:
        PreconditionError: a quantity, unit, direction or number makes no sense, limits contradict
            each other, or money is asked for without a price.
    """
    if best and best not in QUANTITIES:
        raise unknown(best, f"--best {best}")
    if price is not None and not (math.isfinite(price) and price > 0):
        raise PreconditionError(
            f"--price {price:g} is no price", "it is USD an hour, above 0", "use --price 1.20"
        )
    wants = Wants(limits_of(within), best, price)
    if wants.asks("usd/1000") and price is None:
        raise PreconditionError(
            "usd/1000 has no price", "money is the machine's price an hour over its images",
            "add --price 1.20, in USD an hour",
        )  # fmt: skip
    return wants


def limits_of(within: str) -> tuple[Limit, ...]:
    """Every limit of a text, pieces parted by white space, commas or `and`."""
    limits: dict[str, Limit] = {}
    place = 0
    for match in PIECE.finditer(within):
        refuse_rest(within[place : match.start()])
        place = match.end()
        limit = limit_of(match)
        if limit.name in limits:
            other = limits[limit.name]
            raise PreconditionError(
                f"{limit.name} has two limits: {other} and {limit}",
                "one of them says nothing" if other == limit else "one makes the other useless",
                f"keep one of them: --within '{stricter(other, limit)}'",
            )
        limits[limit.name] = limit
    refuse_rest(within[place:])
    return tuple(limits.values())


def refuse_rest(between: str) -> None:
    """Refuse what stands between limits and is none."""
    words = [word for word in re.split(r"[\s,]+", between) if word and word != "and"]
    if not words:
        return
    if words[0] in QUANTITIES:
        raise PreconditionError(
            f"{words[0]} has no limit in --within", "a limit is a quantity, <= or >=, and a number",
            f"write it like {QUANTITIES[words[0]].example}",
        )  # fmt: skip
    raise PreconditionError(
        f"{words[0]!r} in --within is not understood",
        "a limit is a quantity, <= or >=, and a number with its unit",
        "write them like --within 'latency<=4s memory<=8GB psnr>=40dB'",
    )


def limit_of(match: re.Match[str]) -> Limit:
    """One limit of the language, in the unit of its quantity's values."""
    name, sign, number, unit = match.groups()
    if name not in QUANTITIES:
        raise unknown(name, match[0].strip())
    quantity = QUANTITIES[name]
    text, sign = match[0].strip(), sign.replace("≤", "<=").replace("≥", ">=")
    if sign not in ("<=", ">="):
        raise PreconditionError(
            f"{text!r} is no limit", f"a limit on {name} is written with {quantity.sign}",
            f"write {name}{quantity.sign}{number}{unit}",
        )  # fmt: skip
    if sign != quantity.sign:
        side = "less" if quantity.less else "more"
        raise PreconditionError(
            f"{text!r} asks for the wrong side",
            f"of {name} {side} is better, and {NEVER} that has to be worse",
            f"write {name}{quantity.sign}{number}{unit}, or drop it",
        )
    if unit not in quantity.units:
        takes = " or ".join(each or "none" for each in quantity.units)
        raise PreconditionError(
            f"{text!r} has no unit" if not unit else f"{text!r} has a unit that {name} has not",
            f"its unit is {takes}",
            f"write it like {quantity.example}",
        )
    try:
        value = float(number) * quantity.units[unit]
    except ValueError:
        value = math.nan
    if not 0 < value <= quantity.most or not math.isfinite(value):
        most = f" and at most {quantity.text(quantity.most)}" if quantity.most < math.inf else ""
        raise PreconditionError(
            f"{text!r} can never be met" if value <= 0 or value > quantity.most
            else f"{text!r} holds no number",
            f"{name} is above 0{most}",
            f"write it like {quantity.example}",
        )  # fmt: skip
    return Limit(name, value)


def stricter(one: Limit, other: Limit) -> Limit:
    """The limit of two on the same quantity that holds both."""
    by_value = sorted((one, other), key=lambda limit: limit.value)
    return by_value[0] if one.quantity.less else by_value[-1]


def unknown(name: str, text: str) -> PreconditionError:
    """Return the refusal of a quantity that there is not."""
    near = difflib.get_close_matches(name, QUANTITIES, 1, 0.5)
    return PreconditionError(
        f"there is no quantity {name!r}" + ("" if text == name else f" ({text})"),
        f"quantities: {', '.join(QUANTITIES)}",
        f"did you mean {near[0]}? write it like {QUANTITIES[near[0]].example}"
        if near
        else "write one of them, like latency<=4s",
    )
