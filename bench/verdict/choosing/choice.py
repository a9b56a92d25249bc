"""The decision: which contender to take within limits, how sure that is, what the others cost.

Intervals decide. A limit is met where the whole interval lies inside, missed where all of it lies
outside, and open in between. Of those that meet every limit, the ones that are not surely worse
than another tie, and the simplest of them is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.verdict.choosing.contenders import Contender, Span, advantage
from bench.verdict.choosing.wants import QUANTITIES, Limit, Quantity, Wants
from core.errors import EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_OK

Met = Literal["meets", "open", "misses", "unknown"]
State = Literal["taken", "tied", "behind", "open", "unknown", "misses", "failed"]
SETTLED = 0.05
"""A choice is settled once nothing that it was held against can be better by as much. Half of the
difference that is to be told: looking after every round would be wrong too often with all of it."""
MOST_ROUNDS = 20
"""Rounds of a search at most: what is not told apart by then is close enough."""
SETTLED_POINTS = 1.0
"""The same for figures that are compared in points or dB."""
ACROSS = ("captions", "memory", "psnr")
"""What a frontier may show beside the best, first to last."""


@dataclass(frozen=True)
class Standing:
    """A contender, what became of it and why.

    Attributes:
        advantage: its advantage over the one that is taken, where both have figures.
        frontier: whether no other contender is surely better in both quantities of the frontier.
    """

    contender: Contender
    state: State
    why: str
    advantage: Span | None = None
    frontier: bool = False


@dataclass(frozen=True)
class Decision:
    """What to take within limits, and everything that it was held against.

    Attributes:
        objective: the quantity of which the best is taken.
        across: the other quantity of the frontier; None where no contender has one.
        taken, second: the choice and the runner-up; None where there is none.
        nearest: where nothing meets the limits, the contender that is least far off.
        loss: the most by which another one may be better than the choice, as `advantage` has it.
    """

    wants: Wants
    objective: Quantity
    across: Quantity | None
    standings: tuple[Standing, ...]
    taken: Standing | None = None
    second: Standing | None = None
    nearest: Contender | None = None
    loss: float = 0.0

    @property
    def settled(self) -> bool:
        """Whether nothing can be better than the choice by SETTLED."""
        most = math.log1p(SETTLED) if self.objective.unit not in ("%", "dB") else SETTLED_POINTS
        return self.taken is not None and self.loss < most

    @property
    def exit_code(self) -> int:
        """0 with a choice, 4 where nothing meets the limits, 5 where nothing can be said."""
        if self.taken is not None:
            return EXIT_OK
        return EXIT_FAILED if self.nearest is not None else EXIT_INCONCLUSIVE

    def having(self, *states: State) -> list[Standing]:
        """The standings that are in one of some states."""
        return [each for each in self.standings if each.state in states]


def decide(contenders: Sequence[Contender], wants: Wants, across: str = "") -> Decision:
    """Choose among contenders; the order in which they are given changes nothing.

    Args:
        across: the other quantity of the frontier; "" for the first of ACROSS that is known.
    """
    ranked = sorted(contenders, key=lambda contender: contender.key)
    usable = [contender for contender in ranked if not contender.fault]
    objective = wants.objective({name for contender in usable for name in contender.spans})
    other = other_axis(usable, objective, across)
    met = {id(each): verdicts(each, wants, objective) for each in usable}
    fit = [each for each in usable if set(met[id(each)].values()) <= {"meets"}]
    fit.sort(key=lambda each: (cost(each, objective), each.key))
    # Intervals of pairs may in theory go round in a circle: then the best by its estimate.
    tied = [each for each in fit if not any(surely(rival, each, objective) for rival in fit)]
    tied = tied or fit[:1]
    taken = min(tied, key=lambda each: each.key) if tied else None
    second = next((each for each in [*tied, *fit] if each is not taken), None)
    rivals = [each for each in usable if taken is not None and each is not taken
              and objective.name in each.spans
              and not {"misses", "unknown"} & set(met[id(each)].values())]  # fmt: skip
    standings = []
    for each in ranked:
        state, why = state_of(each, taken, tied, met.get(id(each), {}), objective)
        known = (
            taken is not None
            and taken is not each
            and not each.fault
            and objective.name in each.spans
        )
        standings.append(
            Standing(
                each, state, why,
                advantage(each, taken, objective.name) if known and taken is not None else None,
                each in usable and on_frontier(each, usable, objective, other),
            )
        )  # fmt: skip
    by_contender = {id(each.contender): each for each in standings}
    return Decision(
        wants,
        objective,
        other,
        tuple(sorted(standings, key=lambda each: place(each, objective))),
        by_contender[id(taken)] if taken is not None else None,
        by_contender[id(second)] if second is not None else None,
        nearest(usable, met, wants) if taken is None else None,
        max((advantage(each, taken, objective.name).high for each in rivals if taken), default=0.0),
    )


def still_open(choice: Decision) -> list[Contender]:
    """The contenders that another round may make the choice: those that tie, and those that may
    come to meet the limits and are not surely worse than what is taken."""
    return [
        each.contender
        for each in choice.standings
        if each.state in ("taken", "tied")
        or (each.state == "open" and (each.advantage is None or each.advantage.high >= 0))
    ]


def cost(contender: Contender, objective: Quantity) -> float:
    """The estimate of a contender, smaller is better."""
    mid = contender.spans[objective.name].mid
    return mid if objective.less else -mid


def surely(one: Contender, other: Contender, objective: Quantity) -> bool:
    """Whether `one` is surely better than `other`."""
    return one is not other and advantage(one, other, objective.name).low > 0


def verdicts(contender: Contender, wants: Wants, objective: Quantity) -> dict[str, Met]:
    """What a contender makes of each limit, and whether it has what the best is taken of."""
    found: dict[str, Met] = {str(limit): met(contender, limit) for limit in wants.limits}
    if objective.name not in contender.spans:
        found[objective.name] = "unknown"
    return found


def met(contender: Contender, limit: Limit) -> Met:
    """Whether a contender meets a limit, by the whole of its interval."""
    span, less = contender.spans.get(limit.name), limit.quantity.less
    if span is None:
        return "unknown"
    side = 1.0 if less else -1.0
    if side * span.worst(less) <= side * limit.value:
        return "meets"
    return "open" if side * span.best(less) <= side * limit.value else "misses"


def state_of(
    contender: Contender,
    taken: Contender | None,
    tied: Sequence[Contender],
    met_by: dict[str, Met],
    objective: Quantity,
) -> tuple[State, str]:
    """What became of a contender, and why."""
    if contender.fault:
        return "failed", contender.fault
    by_state: dict[str, list[str]] = {}
    for limit, state in met_by.items():
        by_state.setdefault(state, []).append(limit)
    if "misses" in by_state:
        return "misses", "; ".join(limit_text(contender, limit) for limit in by_state["misses"])
    if "unknown" in by_state:
        return (
            "unknown",
            f"no figure for {', '.join(name_of(each) for each in by_state['unknown'])}",
        )
    if "open" in by_state:
        texts = [limit_text(contender, limit) for limit in by_state["open"]]
        return "open", f"its interval holds the limit: {'; '.join(texts)}"
    if contender is taken:
        return "taken", ""
    if taken is None or objective.name not in contender.spans:
        return "unknown", f"no figure for {objective.name}"
    if any(contender is each for each in tied):
        return (
            "tied",
            f"not to be told from the choice, which is simpler: {why_simpler(taken, contender)}",
        )
    return "behind", change_text(advantage(contender, taken, objective.name), objective)


def name_of(limit: str) -> str:
    """The quantity of a limit's text."""
    return next((name for name in QUANTITIES if limit.startswith(name)), limit)


def limit_text(contender: Contender, limit: str) -> str:
    """A limit beside what a contender has."""
    quantity = QUANTITIES[name_of(limit)]
    return f"{limit}: {span_text(contender.spans[quantity.name], quantity)}"


def span_text(span: Span, quantity: Quantity) -> str:
    """`4.19 s (4.02 to 4.37)`."""
    mid, scale = quantity.text(span.mid), quantity.shown_in(span.mid)[1]
    if span.low == span.high:
        return mid
    low, high = quantity.number(span.low / scale), quantity.number(span.high / scale)
    return f"{mid} ({low} to {high})"


def change_text(change: Span, quantity: Quantity) -> str:
    """An advantage with its interval: `12% slower (8% to 16%)`."""
    mid = quantity.change_text(change.mid)
    ends = sorted((change.low, change.high), key=abs)
    if change.low < 0 < change.high:
        ends = [change.low, change.high]
        return f"{mid} ({quantity.change_text(ends[0])} to {quantity.change_text(ends[1])})"
    first, last = (quantity.change_text(end).removesuffix(
        quantity.better if end >= 0 else quantity.worse).strip() for end in ends)  # fmt: skip
    return f"{mid} ({first} to {last})"


def why_simpler(one: Contender, other: Contender) -> str:
    """The first rule of simplicity by which `one` comes before `other`."""
    from bench.verdict.choosing.contenders import SIMPLER

    pairs = zip(SIMPLER, one.simplicity, other.simplicity, strict=True)
    return next((rule for rule, mine, theirs in pairs if mine != theirs), "its name comes first")


def place(standing: Standing, objective: Quantity) -> tuple[object, ...]:
    """The order of a table: what is taken, what ties, the rest from the best on; faults last."""
    states = ("taken", "tied", "behind", "open", "unknown", "misses", "failed")
    contender = standing.contender
    known = not contender.fault and objective.name in contender.spans
    return (
        states.index(standing.state),
        cost(contender, objective) if known else math.inf,
        contender.key,
    )


# ---- the frontier, and what is nearest


def other_axis(usable: Sequence[Contender], objective: Quantity, across: str) -> Quantity | None:
    """The quantity that the frontier shows beside the best."""
    names = [across] if across else [name for name in ACROSS if name != objective.name]
    return next(
        (QUANTITIES[name] for name in names if any(name in each.spans for each in usable)), None
    )


def on_frontier(
    contender: Contender, usable: Sequence[Contender], objective: Quantity, across: Quantity | None
) -> bool:
    """Whether no other is surely as good in both quantities, and surely better in one."""
    axes = [axis for axis in (objective, across) if axis is not None]
    if any(axis.name not in contender.spans for axis in axes):
        return False
    for rival in usable:
        if rival is contender or any(axis.name not in rival.spans for axis in axes):
            continue
        lows = [advantage(rival, contender, axis.name).low for axis in axes]
        if min(lows) >= 0 and max(lows) > 0:
            return False
    return True


def nearest(
    usable: Sequence[Contender], met_by: dict[int, dict[str, Met]], wants: Wants
) -> Contender | None:
    """Where nothing meets the limits, the contender that is least far off; None where one of them
    may meet them all, for then nothing can be said."""
    missing = [each for each in usable if "misses" in met_by[id(each)].values()]
    if not missing or len(missing) < len(usable):
        return None
    return min(missing, key=lambda each: (excess(each, wants), each.key))


def excess(contender: Contender, wants: Wants) -> float:
    """How far beyond its limits a contender is: the worst of them, as the logarithm of a factor."""
    worst = 0.0
    for limit in wants.limits:
        span = contender.spans.get(limit.name)
        ratio = math.inf if span is None or span.mid <= 0 else span.mid / limit.value
        beyond = math.log(ratio) if limit.quantity.less else -math.log(ratio)
        worst = max(worst, abs(beyond) if ratio == math.inf else beyond)
    return worst


def as_json(choice: Decision) -> dict[str, Any]:
    """A choice for programs, every figure unrounded."""
    entries = {id(each): entry(each, choice.objective) for each in choice.standings}
    return {
        "within": choice.wants.text,
        "best": choice.objective.name,
        "price_usd_per_hour": choice.wants.price,
        "across": choice.across.name if choice.across else None,
        "exit_code": choice.exit_code,
        "settled": choice.settled,
        "loss": factor(max(0.0, choice.loss), choice.objective) if choice.taken else None,
        "taken": entries[id(choice.taken)] if choice.taken else None,
        "second": entries[id(choice.second)] if choice.second else None,
        "nearest": next((entries[id(each)] for each in choice.standings
                         if each.contender is choice.nearest), None),
        "contenders": list(entries.values()),
    }  # fmt: skip


def entry(standing: Standing, objective: Quantity) -> dict[str, Any]:
    """A contender for programs."""
    contender, change = standing.contender, standing.advantage
    return {
        **contender.cell.columns(),
        "machine": contender.machine,
        "place": contender.place,
        "run": contender.run,
        "provenance": contender.provenance,
        "rounds": contender.rounds,
        "state": standing.state,
        "why": standing.why,
        "frontier": standing.frontier,
        "figures": {name: vars(span) for name, span in contender.spans.items()},
        "advantage": None if change is None else {
            name: factor(value, objective) for name, value in vars(change).items()
        },
    }  # fmt: skip


def factor(advantage_: float, objective: Quantity) -> float:
    """An advantage as a share above 0 (0.1: better by a factor of 1.1), or points and dB."""
    return advantage_ if objective.unit in ("%", "dB") else math.expm1(advantage_)
