"""What `addbench cards` says of modelled cards in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backends.modelled.card import Interval
    from backends.modelled.fit import Fit, Kind
    from bench.limits.cards import CardSetup
    from core.devices import Device
    from export.cost import Cost

FITS, SPARE, BEYOND, IMPOSSIBLE = "fits", "time to spare", "beyond the range", "impossible"
NEAR = 0.15
"""What a prediction of a card from the other may miss by."""
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


def joule_span(option: CardSetup) -> str:
    """Images per joule at the TDP; the long end of the period is the low one."""
    period = option.found.period
    mid, low, high = (option.per_joule(each) for each in (period.mid, period.high, period.low))
    return f"{mid:.3f} ({low:.3f} to {high:.3f})"


def answer(found: Sequence[CardSetup], target_ms: float) -> list[str]:
    """Which ways make the target plausible, in a sentence for each verdict."""
    lines = []
    for switching, title in (
        ("resident", "with all parts resident"),
        ("once", "if a turn of a pipeline switches programs once"),
        ("each", "if it switches at each of its programs"),
    ):
        by_verdict: dict[str, dict[str, list[CardSetup]]] = {}
        for one in found:
            ways = by_verdict.setdefault(one.verdict(target_ms, switching), {})
            ways.setdefault(one.split, []).append(one)
        lines += [
            f"{title} it {PHRASES[verdict]}: {ways_words(by_verdict[verdict])}"
            for verdict in PHRASES
            if verdict in by_verdict
        ]
    return lines


def ways_words(ways: Mapping[str, Sequence[CardSetup]]) -> str:
    """`pipelines (2 steps vae, 2 steps taesd); ...`"""
    return "; ".join(
        f"{split} ({', '.join(f'{named(one.steps)} {one.decoder}' for one in those)})"
        for split, those in ways.items()
    )


def decoder_words(found: Sequence[CardSetup]) -> list[str]:
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


def decode_span(option: CardSetup) -> str:
    """Return the time of one image's decode."""
    from backends.modelled.card import Interval

    turns = -(-option.batch // option.device.socs)
    decode = option.found.stages["decode"]
    return span(Interval(*(value / turns for value in vars(decode).values())), 1)


def fit_words() -> list[str]:
    """How good the fits are, and what speaks for and against their assumptions."""
    from backends.modelled.card import INTERVAL, likeliest_without_sdxl
    from backends.modelled.fit import (
        KINDS,
        WIDE,
        Rows,
        central,
        coverage,
        fastest_share,
        fits,
        rows,
        samples,
        weights,
    )

    published, every, middle = rows(), samples(), central()
    sdxl = published.is_sdxl
    inside = coverage(INTERVAL)
    of_sdxl = [each for each, mine in zip(inside, sdxl, strict=True) if mine]
    of_conv = [each for each, kind in zip(inside, published.kinds, strict=True) if kind == "conv"]
    outside = {each.family: None for each in of_conv if not each.inside}
    alone = likeliest_without_sdxl()
    counts = weights()
    near = sum(counts[f.share, f.ddr] for f in fits().values() if card_left_out(f) <= NEAR)
    narrow = Rows([s for s in every if s.hidden is not None and s.hidden < WIDE], [])
    errors = narrow.seconds / narrow.predict(middle.parameters, middle.ddr)
    streaming = max(s.streamed for s in every if not s.on_chip)
    resting = {name: None for fit in fits().values() for name in fit.at_bounds}
    return [
        *(
            fit_line(name, kind)
            for kind, name in zip(KINDS, ("matrix products", "convolutions"), strict=True)
        ),
        f"SDXL base at 1024 px on Pro and Ultra cards (MLPerf v4.0, {sdxl.sum()} rows): a card that"
        f" was left out is predicted from the other within {card_left_out(middle):.0%} by the"
        f" likeliest fit, and within {NEAR:.0%} by fits of {near:.1%} of the weight; with none of"
        f" these rows the model would be {min(alone):.2f} to {max(alone):.2f} times too fast for"
        " them",
        f"{sum(each.inside for each in inside)} of {len(inside)} published rows are inside 8 of 10"
        " draws of a model that never saw their family, and"
        f" {sum(each.inside for each in of_sdxl)} of {len(of_sdxl)} of SDXL;"
        f" {sum(each.inside for each in of_conv)} of {len(of_conv)} of convolutional networks:"
        f" outside are some of {', '.join(outside)}",
        f"transformers narrower than {WIDE}, in no fit, take {errors.min():.1f} to"
        f" {errors.max():.1f} times what the model says",
        "a check of what is assumed of the DDR: rows whose weights do not fit on the chip read up"
        f" to {streaming:.0%} of its bandwidth, if they read them once an inference",
        f"no rate may pass {fastest_share(every):.0%} of the peak, the most that any published"
        f" program of these cards reached; on a bound in some of the {len(fits())} fits:"
        f" {', '.join(resting)}",
    ]


def card_left_out(fit: Fit) -> float:
    """Return how far SDXL's time on a card is missed, at most, where that card was not fitted."""
    from backends.modelled.fit import rows

    return max(math.exp(abs(math.log(error))) for error in fit.held_out[rows().is_sdxl]) - 1


def reading_words(device: Device, unet: Cost, size: tuple[int, int]) -> list[str]:
    """What a UNet step takes by what SDXL's time may be spent on, and what that is worth.

    Args:
        unet: one evaluation at batch 1.
        size: width and height that are asked about.
    """
    from backends.modelled.fit import DDR, SDXL_SIZE, fits, weights
    from backends.modelled.program import SHARES, Hardware, Work, seconds

    counts, asked = weights(), "{}x{}".format(*size)
    steps = []
    for share in SHARES:
        took = [
            1e3 * float(seconds(Work.of(unet), Hardware.soc(device), each.parameters, each.ddr))
            for each in (fits()[share, ddr] for ddr in DDR)
        ]
        weight = sum(counts[share, ddr] for ddr in DDR)
        steps.append(f"{share:.0%}: {min(took):.0f} to {max(took):.0f} ms (weight {weight:.0%})")
    return [
        "what SDXL at 1024 px spends most of its time on is neither its multiply-adds nor the DDR"
        " nor the number of its operators: it is the scores of attention, or the exchange of"
        " activations among the cores, or both, and one published size of one network does not say"
        f" in which shares. A UNet step at {asked} on {device.name} by the share of the scores:"
        f" {'; '.join(steps)}. Weights say how well each predicts networks that its fit had not"
        " seen",
        f"{asked} is the size that was published"
        if size == (SDXL_SIZE, SDXL_SIZE)
        else f"{asked} is extrapolated: published are {SDXL_SIZE} px on Pro and Ultra cards. A UNet"
        f" step measured at {asked} would settle it",
    ]


def fit_line(name: str, kind: Kind) -> str:
    from backends.modelled.fit import central, errors_of, factor, fits, of_kind, rows

    middle, mine = central(), of_kind(kind)
    outside, counts = errors_of(middle, kind)
    inside = middle.errors[mine]
    off = [[factor(each, counts, share) for share in (0.5, 0.9)] for each in (inside, outside)]
    shares = sorted(getattr(fit.parameters, kind) for fit in fits().values())
    return (
        f"{name}: {getattr(middle.parameters, kind):.0%} of the peak"
        f" ({shares[0]:.0%} to {shares[-1]:.0%} over the assumptions), from {mine.sum()} of"
        f" {len(rows().names)} published rows, with {middle.ddr:.0%} of the DDR's bandwidth; off"
        f" by a factor of {off[0][0]:.2f} (median) and {off[0][1]:.2f} (90th percentile) on these"
        f" rows, of {off[1][0]:.2f} and {off[1][1]:.2f} on families held out"
    )
