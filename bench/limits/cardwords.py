"""What `addbench cards` says of modelled cards in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backends.modelled.card import Interval
    from backends.modelled.fit import Fit
    from bench.limits.cards import Option
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
    from backends.modelled.fit import DDR, KINDS, WIDE, Bounds, fits, samples

    found, every, middle = fits(), samples(), DDR[len(DDR) // 2]
    lines = [
        fit_line(name, [found[kind, ddr] for ddr in (middle, DDR[0], DDR[-1])])
        for kind, name in zip(KINDS, ("matrix products", "convolutions"), strict=True)
    ]
    narrow = [s for s in every if s.hidden is not None and s.hidden < WIDE]
    bounds = Bounds(narrow, middle)
    errors = bounds.seconds / bounds.predict(found["matmul", middle].parameters)
    streaming = max(s.streamed for s in every if not s.on_chip)
    return [
        *lines,
        f"transformers narrower than {WIDE}, in no fit, take {errors.min():.1f} to"
        f" {errors.max():.1f} times what the model says",
        "a check of what is assumed of the DDR: rows whose weights do not fit on the chip read up"
        f" to {streaming:.0%} of its bandwidth, if they read them once an inference",
    ]


def other_reading(ours: Sequence[Option], unet: Cost) -> list[str]:
    """What pipelines would take if the rows of one inference at a time wait for no weights.

    Args:
        ours: of one card.
        unet: one evaluation at batch 1.
    """
    from backends.modelled.fit import DDR, fits, unhidden

    pipelines = [one for one in ours if one.split == "pipelines"]
    if not pipelines:
        return []
    device, batch = pipelines[0].device, pipelines[0].batch
    peak = device.fp16_tflops_dense * 1e12 / device.socs
    share, conv = unhidden(), fits()["conv", DDR[len(DDR) // 2]].efficiency
    of_conv = unet.by_kind["conv"]
    step_s = (unet.flops - of_conv) / (share * peak) + of_conv / (conv * peak)
    periods = []
    for one in pipelines:
        modelled_s = one.found.stages["unet_step"].mid / math.ceil(batch / device.socs)
        longer_s = one.steps * (step_s - modelled_s) * batch / device.socs
        period = 1e3 * (one.found.period.mid + longer_s)
        periods.append(f"{period:.0f} ms ({named(one.steps)} {one.decoder})")
    return [
        "what these rows cannot settle: at one inference at a time, weights and FLOPs grow together"
        " from row to row. The model reads them as waiting for weights (and ALBERT, whose layers"
        f" share theirs, as reading them in every layer). If they compute at {share:.0%} of the"
        " peak instead, at 128 tokens, and a UNet with its 256 to 1024 tokens did no better, a step"
        f" would take {1e3 * step_s:.0f} ms on {device.name}, and pipelines would have periods of"
        f" {', '.join(periods)}: no interval holds this reading"
    ]


def fit_line(name: str, found: Sequence[Fit]) -> str:
    """`found`: the central assumption first, then the ends."""
    from backends.modelled.fit import factor

    one, *ends = found
    inside, outside = (
        [factor(errors, one.weights, share) for share in (0.5, 0.9)]
        for errors in (one.errors, one.held_out)
    )
    others = " and ".join(
        f"{end.efficiency:.0%} and {factor(end.held_out, end.weights, 0.5):.2f} at {end.ddr:.0%}"
        for end in ends
    )
    return (
        f"{name}: {one.efficiency:.0%} of the peak, from {len(one.weights)} published rows, with"
        f" {one.ddr:.0%} of the DDR's bandwidth; off by a factor of {inside[0]:.2f} (median) and"
        f" {inside[1]:.2f} (90th percentile) on these rows, of {outside[0]:.2f} and"
        f" {outside[1]:.2f} on families held out (efficiency and held-out median with the DDR"
        f" elsewhere: {others})"
    )
