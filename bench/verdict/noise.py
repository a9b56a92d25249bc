"""How often the rules of `addbench compare` and `addbench ab` are wrong: a simulation.

A seeded simulation of measurement noise, through the very functions that judge (rules.py):
false alarms of a whole job of 24 cells, and the power to see a cell that became slower.

The model, in logarithms of latency:

    machine   one draw for a job. Both sides of a comparison on one machine share it, in `ab` and
              in two runs one after the other; it cancels. It does not for a baseline from another
              job: that is what the plain rule in the table suffers from.
    drift     a random walk with one step a turn, a turn being one pass of one side over the plan.
              `ab` alternates within a turn, worker by worker, so its pairs lie closer than modelled
              here. Two runs one after the other get all of it.
    process   one draw for each worker process (caches, memory layout, clock).
    burst     a worker process is hit with a probability, by an exponential excess (a neighbour).
    cell      one draw for each cell and round.

A job has 24 cells, three (the steps) in each worker. The levels are assumptions:
`--levels RUN...` holds them against repeated runs of an unchanged program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from core.table import Column, markdown_lines

if TYPE_CHECKING:
    import numpy as np

    from bench.verdict.rules import Array, Flags, Judgement

CELLS, CELLS_PER_WORKER = 24, 3
AB_ROUNDS = 10
FALSE_ALARM_GOAL = 0.005
"""The most false alarms of a whole job, for the upper 95% bound."""
POWER_GOALS = {0.10: 0.60, 0.15: 0.90}
"""The least power of `ab` under typical noise, by slowdown of one cell."""
BATCH = 500
"""Jobs simulated at once: some 50 MB."""


@dataclass(frozen=True)
class Levels:
    """Standard deviations in log latency; a burst's probability per worker and mean excess."""

    name: str
    machine: float
    drift: float
    process: float
    burst_rate: float
    burst_mean: float
    cell: float


TYPICAL = Levels("typical", 0.08, 0.01, 0.02, 0.08, 0.15, 0.015)
HARSH = Levels("harsh", 0.08, 0.03, 0.04, 0.20, 0.30, 0.015)


def simulate(
    levels: Levels, jobs: int, turns: int, rng: np.random.Generator, cells: int = CELLS
) -> Array:
    """Log latencies of an unchanged program, [jobs, turns, cells], turns in order of time."""
    import numpy as np

    workers = -(-cells // CELLS_PER_WORKER)
    shape = (jobs, turns, workers)
    slow = rng.normal(0, levels.machine, (jobs, 1, 1))
    slow = slow + rng.normal(0, levels.drift, (jobs, turns, 1)).cumsum(axis=1)
    burst = (rng.random(shape) < levels.burst_rate) * rng.exponential(levels.burst_mean, shape)
    process = slow + burst + rng.normal(0, levels.process, shape)
    each = np.repeat(process, CELLS_PER_WORKER, axis=2)[:, :, :cells]
    return np.asarray(each + rng.normal(0, levels.cell, each.shape), dtype=np.float64)


def abba(turns: Array) -> Array:
    """[jobs, 2 x rounds, cells] -> log-ratios [jobs, cells, rounds], the order base head head base.

    An unchanged program: which turn is `base` is a matter of naming only.
    """
    import numpy as np

    rounds = np.arange(turns.shape[1] // 2)
    base = 2 * rounds + rounds % 2
    head = 2 * rounds + 1 - rounds % 2
    return np.moveaxis(turns[:, head] - turns[:, base], 1, 2)


# ---- the rules: (levels, jobs, cells, slowdown, rng) -> (alarms, inconclusive), [jobs, cells]

Outcome = tuple["Flags", "Flags"]
Rule = Callable[[Levels, int, int, float, "np.random.Generator"], Outcome]


def unclear(judged: Judgement) -> Flags:
    return ~(judged.slower | judged.faster | judged.same)


def ab(rounds: int, confirm: bool = True) -> Rule:
    """`addbench ab`: what is flagged is measured once more, and alarms if flagged again."""

    def outcome(
        levels: Levels, jobs: int, cells: int, slowdown: float, rng: np.random.Generator
    ) -> Outcome:
        import numpy as np

        from bench.verdict.rules import pairs

        def judge(count: int) -> Judgement:
            turns = simulate(levels, count, 2 * rounds, rng, cells)
            return pairs(abba(turns) + np.log1p(slowdown))

        judged = judge(jobs)
        alarms, open_ = judged.slower, unclear(judged)
        again = alarms.any(axis=1)
        if confirm and again.any():
            second = judge(int(again.sum()))
            open_[again] |= alarms[again] & unclear(second)
            alarms[again] &= second.slower
        return alarms, open_

    return outcome


def compare(rounds: int, one_machine: bool = True, estimate_alone: bool = False) -> Rule:
    """`addbench compare`: `rounds` of the base, then as many of the head.

    `estimate_alone` drops the interval and the spread from the rule: what they are there for.
    """

    def outcome(
        levels: Levels, jobs: int, cells: int, slowdown: float, rng: np.random.Generator
    ) -> Outcome:
        import numpy as np

        from bench.verdict.rules import RUN_SLOWDOWN, runs

        if one_machine:
            turns = simulate(levels, jobs, 2 * rounds, rng, cells)
            base, head = turns[:, :rounds], turns[:, rounds:]
        else:
            base = simulate(levels, jobs, rounds, rng, cells)
            head = simulate(levels, jobs, rounds, rng, cells)
        judged = runs(np.moveaxis(base, 1, 2), np.moveaxis(head, 1, 2) + np.log1p(slowdown))
        if estimate_alone:
            return judged.estimate > np.log1p(RUN_SLOWDOWN), np.zeros_like(judged.slower)
        return judged.slower, unclear(judged)

    return outcome


def last_run(limit: float, one_machine: bool) -> Rule:
    """The plain rule: one round now against one round of the last run."""

    def outcome(
        levels: Levels, jobs: int, cells: int, slowdown: float, rng: np.random.Generator
    ) -> Outcome:
        import numpy as np

        if one_machine:
            turns = simulate(levels, jobs, 2, rng, cells)
            change = turns[:, 1] - turns[:, 0]
        else:
            base = simulate(levels, jobs, 1, rng, cells)
            change = (simulate(levels, jobs, 1, rng, cells) - base)[:, 0]
        alarms = change + np.log1p(slowdown) > np.log1p(limit)
        return alarms, np.zeros_like(alarms)

    return outcome


@dataclass(frozen=True)
class RuleTrial:
    """A rule in the table; `goal` where its false alarms are held to FALSE_ALARM_GOAL."""

    name: str
    rule: Rule
    goal: bool = False
    power_goal: bool = False


def rule_trials(rounds: int = AB_ROUNDS) -> list[RuleTrial]:
    return [
        RuleTrial(f"ab, {rounds} rounds ABBA, confirmed", ab(rounds), goal=True, power_goal=True),
        RuleTrial(f"ab, {rounds} rounds ABBA, first pass", ab(rounds, confirm=False)),
        RuleTrial("compare, 5 + 5 rounds", compare(5), goal=True),
        RuleTrial("compare, 10 + 10 rounds", compare(10), goal=True),
        RuleTrial("compare, 20 + 20 rounds", compare(20), goal=True),
        RuleTrial("compare, its estimate alone, 5 + 5", compare(5, estimate_alone=True)),
        RuleTrial("compare, 10 + 10 rounds, another machine", compare(10, one_machine=False)),
        RuleTrial("last run +10%, same machine", last_run(0.10, one_machine=True)),
        RuleTrial("last run +10%, another job", last_run(0.10, one_machine=False)),
    ]


# ---- rates


def batches(jobs: int) -> Iterator[int]:
    for start in range(0, jobs, BATCH):
        yield min(BATCH, jobs - start)


@dataclass(frozen=True)
class Rate:
    """A share of simulated jobs with its one-sided upper 95% bound (Clopper-Pearson)."""

    count: int
    jobs: int

    @property
    def share(self) -> float:
        return self.count / self.jobs

    @property
    def upper(self) -> float:
        from scipy.stats import binomtest

        test = binomtest(self.count, self.jobs, alternative="less")
        return float(test.proportion_ci(0.95).high)

    def columns(self) -> dict[str, Any]:
        return {"count": self.count, "jobs": self.jobs, "share": self.share, "upper": self.upper}


def false_alarms(rule: Rule, levels: Levels, jobs: int, seed: int) -> tuple[Rate, Rate]:
    """Jobs of CELLS unchanged cells that end in an alarm; jobs that end inconclusive instead."""
    import numpy as np

    rng = np.random.default_rng(seed)
    alarmed = undecided = 0
    for size in batches(jobs):
        alarms, open_ = rule(levels, size, CELLS, 0.0, rng)
        alarmed += int(alarms.any(axis=1).sum())
        undecided += int((open_.any(axis=1) & ~alarms.any(axis=1)).sum())
    return Rate(alarmed, jobs), Rate(undecided, jobs)


def power(rule: Rule, levels: Levels, slowdown: float, jobs: int, seed: int) -> Rate:
    """Jobs in which the one cell that became slower raises the alarm."""
    import numpy as np

    rng = np.random.default_rng(seed)
    seen = sum(int(rule(levels, size, 1, slowdown, rng)[0].sum()) for size in batches(jobs))
    return Rate(seen, jobs)


SLOWDOWNS = (0.10, 0.15, 0.20, 0.30)


def table(jobs: int, power_jobs: int, rounds: int, seed: int) -> Iterator[dict[str, Any]]:
    """A line for each rule and level, as it is done; `goals` lists (goal, met)."""
    for levels in (TYPICAL, HARSH):
        for trial in rule_trials(rounds):
            alarm, undecided = false_alarms(trial.rule, levels, jobs, seed)
            seen = {
                slowdown: power(trial.rule, levels, slowdown, power_jobs, seed + 1).share
                for slowdown in SLOWDOWNS
            }
            goals = []
            if trial.goal:
                goals.append((f"false alarms at most {FALSE_ALARM_GOAL:.1%}",
                              alarm.upper <= FALSE_ALARM_GOAL))  # fmt: skip
            if trial.power_goal and levels is TYPICAL:
                goals += [
                    (f"power at {slowdown:+.0%} at least {least:.0%}", seen[slowdown] >= least)
                    for slowdown, least in POWER_GOALS.items()
                ]
            yield {
                "rule": trial.name,
                "levels": levels.name,
                "false_alarm": alarm.columns(),
                "inconclusive": undecided.columns(),
                "power": {f"{slowdown:+.0%}": share for slowdown, share in seen.items()},
                "goals": [{"goal": goal, "met": met} for goal, met in goals],
            }


def head_text(jobs: int, seed: int) -> str:
    """What is simulated, and the head of the table of `line_text`."""
    heads = " ".join(f"{slowdown:+.0%}".rjust(6) for slowdown in SLOWDOWNS)
    levels = [
        ", ".join(f"{key} {value}" for key, value in asdict(each).items())
        for each in (TYPICAL, HARSH)
    ]
    columns = f"{'levels':<8} {'rule':<50} {'alarms':>8} {'<= 95%':>8} {'unclear':>7}   {heads}"
    what = f"{jobs} jobs of {CELLS} cells, seed {seed}; power: of one slower cell"
    return "\n".join([*levels, f"{what}\n", f"{columns}   goals"])


def line_text(line: dict[str, Any]) -> str:
    alarm = line["false_alarm"]
    powers = " ".join(f"{share:5.1%}".rjust(6) for share in line["power"].values())
    missed = [goal["goal"] for goal in line["goals"] if not goal["met"]]
    state = f"MISSED: {'; '.join(missed)}" if missed else "met" if line["goals"] else "-"
    return (
        f"{line['levels']:<8} {line['rule']:<50} {alarm['share']:8.3%} {alarm['upper']:8.3%}"
        f" {line['inconclusive']['share']:7.1%}   {powers}   {state}"
    )


def markdown(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The table for a document."""

    def power_at(name: str) -> Column:
        return Column(f"power at {name}", lambda line: f"{line['power'][name]:.0%}")

    columns = [
        Column("levels", lambda line: line["levels"]),
        Column("rule", lambda line: line["rule"]),
        Column("false alarms a job", lambda line: f"{line['false_alarm']['share']:.3%}"),
        Column("upper 95% bound", lambda line: f"{line['false_alarm']['upper']:.3%}"),
        Column("inconclusive jobs", lambda line: f"{line['inconclusive']['share']:.1%}"),
        *(power_at(f"{slowdown:+.0%}") for slowdown in SLOWDOWNS),
    ]
    return markdown_lines(columns, lines)
