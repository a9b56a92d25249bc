"""What `addbench cards` says of modelled cards in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backends.modelled.card import Interval
    from backends.modelled.fit import Kind
    from bench.limits.cards import Option
    from core.devices import Device
    from export.cost import Cost

FITS, SPARE, BEYOND, IMPOSSIBLE = "fits", "time to spare", "beyond the range", "impossible"
PHRASES = {
    FITS: "fits",
    SPARE: "leaves time to spare",
    BEYOND: "is out of the range",
    IMPOSSIBLE: "is impossible",
}


def span(interval: Interval, digits: int = 0) -> str:
    """`100 (87 to 146)` in milliseconds."""
    mid, low, high = (1e3 * value for value in (interval.mid, interval.low, interval.high))
    return f"{mid:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def joule_span(option: Option) -> str:
    """Images per joule at the TDP; the long end of the period is the low one."""
    period = option.found.period
    mid, low, high = (option.per_joule(each) for each in (period.mid, period.high, period.low))
    return f"{mid:.3f} ({low:.3f} to {high:.3f})"


def answer(found: Sequence[Option], target_ms: float) -> list[str]:
    """Which ways make the target plausible, in a sentence for each verdict."""
    lines = []
    for switching, title in (
        (False, "with all parts resident"),
        (True, "if programs are switched"),
    ):
        by_verdict: dict[str, dict[str, list[Option]]] = {}
        for one in found:
            ways = by_verdict.setdefault(one.verdict(target_ms, switching=switching), {})
            ways.setdefault(one.split, []).append(one)
        lines += [
            f"{title} it {PHRASES[verdict]}: {ways_words(by_verdict[verdict])}"
            for verdict in PHRASES
            if verdict in by_verdict
        ]
    return lines


def ways_words(ways: Mapping[str, Sequence[Option]]) -> str:
    """`pipelines (2 steps vae, 2 steps taesd); ...`"""
    return "; ".join(
        f"{split} ({', '.join(f'{named(one.steps)} {one.decoder}' for one in those)})"
        for split, those in ways.items()
    )


def decoder_words(found: Sequence[Option]) -> list[str]:
    """What the tiny decoder buys on each card: an image after the other on each SoC."""
    lines = []
    known = {
        (one.device.name, one.decoder, one.steps): one for one in found if one.split == "pipelines"
    }
    for name in dict.fromkeys(one.device.name for one in found):
        pairs = [
            (one, known[name, "taesd", one.steps])
            for (card, decoder, steps), one in known.items()
            if card == name and decoder == "vae" and (name, "taesd", steps) in known
        ]
        if pairs:
            saved = ", ".join(
                f"{1 - tiny.found.period.mid / vae.found.period.mid:.0%} at {named(tiny.steps)}"
                for vae, tiny in pairs
            )
            vae, tiny = pairs[0]
            lines.append(
                f"{name}: an image is decoded in {decode_span(vae)} ms by the VAE and in"
                f" {decode_span(tiny)} ms by TAESDXL, which shortens the period of a pipeline by"
                f" {saved}; it loses fine detail"
            )
    return lines


def named(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"


def decode_span(option: Option) -> str:
    """Of one image."""
    from backends.modelled.card import Interval

    turns = -(-option.batch // option.device.socs)
    decode = option.found.stages["decode"]
    return span(Interval(*(value / turns for value in vars(decode).values())), 1)


def fit_words() -> list[str]:
    """How good the fits are, and what speaks for and against their assumptions."""
    from backends.modelled.card import CENTRAL, INTERVAL
    from backends.modelled.fit import KINDS, WIDE, coverage, fits, rows, samples, without_sdxl
    from backends.modelled.fit import Rows as Published

    published, every, central = rows(), samples(), fits()[CENTRAL]
    sdxl = published.is_sdxl
    off = max(math.exp(abs(math.log(e))) for fit in fits().values() for e in fit.held_out[sdxl])
    inside = coverage(INTERVAL)
    of_sdxl = [each for each, mine in zip(inside, sdxl, strict=True) if mine]
    alone = without_sdxl().values()
    narrow = Published([s for s in every if s.hidden is not None and s.hidden < WIDE], [])
    errors = narrow.seconds / narrow.predict(central.parameters, central.ddr)
    streaming = max(s.streamed for s in every if not s.on_chip)
    return [
        *(
            fit_line(name, kind)
            for kind, name in zip(KINDS, ("matrix products", "convolutions"), strict=True)
        ),
        f"SDXL base at 1024 px on Pro and Ultra cards (MLPerf v4.0, {sdxl.sum()} rows): a card that"
        f" was left out is predicted from the other within {off - 1:.0%}; with none of these rows"
        f" the model would be {min(alone):.1f} to {max(alone):.1f} times too fast for them",
        f"{sum(each.inside for each in inside)} of {len(inside)} published rows are inside 8 of 10"
        " draws of a model that never saw their family, and"
        f" {sum(each.inside for each in of_sdxl)} of {len(of_sdxl)} of SDXL",
        f"transformers narrower than {WIDE}, in no fit, take {errors.min():.1f} to"
        f" {errors.max():.1f} times what the model says",
        "a check of what is assumed of the DDR: rows whose weights do not fit on the chip read up"
        f" to {streaming:.0%} of its bandwidth, if they read them once an inference",
    ]


def reading_words(device: Device, unet: Cost, size: str, measured: bool) -> list[str]:
    """What a UNet step takes by each reading of SDXL's published times, and what that is worth.

    Args:
        unet: one evaluation at batch 1.
        measured: whether this size is the one that was published.
    """
    from backends.modelled.fit import DDR, fits
    from backends.modelled.program import READINGS, Place, Work, seconds

    names = {"scores": "the scores of attention", "exchange": "activations exchanged among cores"}
    steps = {}
    for reading in READINGS:
        fitted = [fits()[reading, ddr] for ddr in DDR]
        took = [
            1e3 * float(seconds(Work.of(unet), Place.soc(device), each.parameters, each.ddr))
            for each in fitted
        ]
        steps[reading] = f"{min(took):.0f} to {max(took):.0f} ms if it is {names[reading]}"
    asked = [fits()["scores", ddr].parameters.matmul for ddr in DDR]
    return [
        "what SDXL at 1024 px spends most of its time on is not known: neither its multiply-adds"
        " nor the DDR nor the number of its operators, but one published size of one network does"
        f" not tell the rest apart. A UNet step at {size} on {device.name} takes"
        f" {' and '.join(steps.values())}. The middle of the ranges is the second: networks of the"
        f" Standard card show it too, and the first asks for matrix products at {min(asked):.0%}"
        f" to {max(asked):.0%} of the peak",
        f"{size} is the size that was published"
        if measured
        else f"{size} is extrapolated: published are 1024 px on Pro and Ultra cards. Inferred is"
        " what both readings share, the range of a step; which end of it is not. A UNet step"
        f" measured at {size} would settle it",
    ]


def fit_line(name: str, kind: Kind) -> str:
    from backends.modelled.card import CENTRAL
    from backends.modelled.fit import errors_of, factor, fits, of_kind, rows

    central, mine = fits()[CENTRAL], of_kind(kind)
    outside, weights = errors_of(central, kind)
    inside = central.errors[mine]
    off = [[factor(each, weights, share) for share in (0.5, 0.9)] for each in (inside, outside)]
    shares = sorted(getattr(fit.parameters, kind) for fit in fits().values())
    return (
        f"{name}: {getattr(central.parameters, kind):.0%} of the peak"
        f" ({shares[0]:.0%} to {shares[-1]:.0%} over the assumptions), from {mine.sum()} of"
        f" {len(rows().names)} published rows, with {central.ddr:.0%} of the DDR's bandwidth; off"
        f" by a factor of {off[0][0]:.2f} (median) and {off[0][1]:.2f} (90th percentile) on these"
        f" rows, of {off[1][0]:.2f} and {off[1][1]:.2f} on families held out"
    )
