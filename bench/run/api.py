"""What a notebook calls: a sweep of a request, a choice within limits, two runs compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.rows.store import RUNS, Run, open_run
from bench.run import runner
from bench.run.patience import usual_patience_s
from bench.run.plan import plan
from bench.run.request import Request
from bench.run.search import METHOD, captions_for, final, search
from bench.verdict import compare as comparing
from bench.verdict.choosing.choice import Decision, decide
from bench.verdict.choosing.contenders import contenders_of
from bench.verdict.choosing.wants import wants_of
from bench.verdict.outcome import Outcome
from bench.verdict.rules import RUN_SLOWDOWN
from core.errors import PreconditionError
from core.values import refuse


def sweep(
    request: Request,
    *,
    runs: str | os.PathLike[str] = RUNS,
    budget_s: float | None = None,
    patience_s: float | None = None,
    timeout_s: float = 1800.0,
    ceilings: bool = True,
) -> Run:
    """Measure what a request asks for, in worker processes; the run, with its rows on disk.

    `run.rows()` are dictionaries, one for each cell and round, whose columns results/README.md
    describes; `pandas.DataFrame(run.rows())` is a table of them. A cell that failed is a row with
    a `status` other than `ok`, not an exception. Ctrl-C keeps what was measured, and prints the
    command that goes on with it.

    Args:
        request: the model, the axes and the method.
        runs: the folder that the run's folder is made in.
        budget_s: seconds after which it ends with what it has; None for no end.
        patience_s: seconds, in all, for measuring again what other programs disturbed; None for
            60, or 0 where the variable CI is set.
        timeout_s: seconds that loading, or one cell, may take.
        ceilings: measure this machine's first, for the rows' `roofline`.

    Raises:
        PreconditionError: nothing can be measured; what is missing, and how to get it.
    """
    if not isinstance(request, Request):
        refuse("request", request, "it is no Request", "pass addbench.Request('shapes-turbo')")
    run, _ = runner.sweep(
        plan(request),
        Path(runs),
        ["addbench.sweep"],
        timeout_s=timeout_s,
        budget_s=budget_s,
        patience_s=usual_patience_s() if patience_s is None else patience_s,
        ceilings=ceilings,
    )
    return run


def compare(
    base: Run | str | os.PathLike[str],
    head: Run | str | os.PathLike[str],
    *,
    max_slowdown: float = RUN_SLOWDOWN,
    runs: str | os.PathLike[str] = RUNS,
    allow_other_machine: bool = False,
) -> Outcome:
    """Say of every cell of two runs whether it became slower from `base` to `head`.

    `outcome.lines` has a line for each cell, `outcome.exit_code` is what `addbench compare` ends
    with: 0 for no regression.

    Args:
        base, head: a run, its folder, its name below `runs`, or `latest`.
        max_slowdown: the limit as a share: 0.15 for 15%.

    Raises:
        PreconditionError: there is no such run, or the two cannot be compared.
    """
    pair = [each if isinstance(each, Run) else open_run(os.fspath(each), Path(runs))
            for each in (base, head)]  # fmt: skip
    if not 0 < max_slowdown < 10:
        raise PreconditionError(
            f"max_slowdown={max_slowdown!r} is not understood",
            "it is a share of the latency, above 0",
            "pass max_slowdown=0.15 for 15%",
        )
    return comparing.compare(pair[0], pair[1], max_slowdown, allow_other_machine)


def choose(
    source: Request | Run | str | os.PathLike[str] | Sequence[Run | str | os.PathLike[str]],
    within: str = "",
    *,
    best: str = "",
    price: float | None = None,
    across: str = "",
    runs: str | os.PathLike[str] = RUNS,
    budget_s: float | None = None,
    timeout_s: float = 1800.0,
    ceilings: bool = True,
) -> Decision:
    """Say what to take within limits: of runs that are there, or of what a request names, of which
    no more is measured than the choice takes.

    `decision.taken` is the choice and None where there is none, `decision.second` the runner-up,
    `decision.standings` all of them; `addbench.recipe_of(decision).write(path)` locks it.

    Args:
        source: a request, or runs: each a run, its folder, its name below `runs`, or `latest`. Of a
            request the method is not looked at: rounds are measured until the choice is settled.
        within: limits as they are typed: `latency<=4s memory<=8GB psnr>=40dB`.
        best: the quantity of which the best is taken; "" for the first without a limit.
        price: USD an hour of the machine.
        across: the other quantity of the frontier.
        budget_s: seconds after which a search ends with what it has; None for no end.

    Raises:
        PreconditionError: a limit makes no sense, there is no such run, or nothing can be measured.
    """
    wants = wants_of(within, best, price)
    if isinstance(source, Request):
        asked = replace(source, method=METHOD, quality=captions_for(wants))
        words = ["addbench.choose"]
        run, _ = search(
            plan(asked), wants, Path(runs), words, [], timeout_s=timeout_s, budget_s=budget_s,
            ceilings=ceilings,
        )  # fmt: skip
        return final(run, wants, across)
    named: Sequence[Run | str | os.PathLike[str]]
    named = [source] if isinstance(source, Run | str | os.PathLike) else source
    opened = [each if isinstance(each, Run) else open_run(os.fspath(each), Path(runs))
              for each in named]  # fmt: skip
    return decide(contenders_of(opened, wants), wants, across)
