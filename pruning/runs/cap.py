"""A cap on memory: what stages take is foretold, and they are told what to do without.

One function, `allowance_within`, chooses by the numbers of `pruning.runs.memory`, so what is said,
what is refused and what is done agree.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from convert.checkpoint import Checkpoint
from convert.description import Description
from moe_jax.errors import InputError
from pruning.kit.memory import (
    AMPLE,
    Allowance,
    allowing,
    free_memory,
    keep_no_large_block,
    own_memory,
)
from pruning.kit.progress import Steps
from pruning.kit.words import amount
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe
from pruning.report.cost_tables import STAGES
from pruning.runs.memory import ADAPT, Foretold

Peaks = Mapping[str, int]  # of stages, bytes
ROOMS = (None, *(1 << power for power in range(31, 25, -1)), 0)  # of what is kept, 2 GiB downwards
THRIFTIEST = Allowance(room=0, read_ahead=False, experts=1)
# Options that may take less, which a limit never changes: results would not be the same.
CURES: dict[str, dict[str, Any]] = {
    "--batch 1 (sums then differ in their last bits)": {"batch": 1},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--max-tokens 16384": {"max_tokens": 16384},
    "--evaluation-tokens 2048": {"evaluation_tokens": 2048},
    "--planner fair": {"planner": "fair", "criterion": "shapley", "attribution": "ala"},
    "--quantizer rtn": {"quantizer": "rtn"},
    "--repair none": {"repair": "none"},
    "--planner fair --repair none": {
        "planner": "fair", "criterion": "shapley", "attribution": "ala", "repair": "none",
    },
    "no --gradients": {"gradients": False},
    "no --expert-details": {"expert_details": False},
}  # fmt: skip
WORTH_SAYING = 0.9  # of what a stage takes


def allowance_within(
    cap: int, foretold: Callable[[Allowance], Peaks], experts: int = 1
) -> Allowance:
    """The most generous allowance under which every stage stays within a cap.

    What is kept shrinks first, which costs little; then no layer is read ahead; last, layers are
    taken in ever smaller groups of experts.

    Args:
      cap: bytes.
      foretold: an allowance -> the peak of every stage.
      experts: of a layer.

    Returns:
      Without a limit; if none suffices, the thriftiest, in groups only as far as they help.
    """

    def peak(found: Allowance) -> int:
        return max(foretold(found).values())

    whole = [Allowance(room=room, read_ahead=ahead) for ahead in (True, False) for room in ROOMS]
    groups = _in_groups(experts)
    fits = (found for found in (*whole, *groups) if peak(found) <= cap)
    return next(fits, None) or min((whole[-1], *groups), key=peak)


def _in_groups(experts: int) -> list[Allowance]:
    """Of layers in groups, the largest first: one half as large with the next one read ahead takes
    no more than one that is read when it is wanted."""
    sizes = []
    while experts > 1:
        sizes.append(experts := -(-experts // 2))
    found = [Allowance(room=room, experts=size) for size in sizes for room in (None, 0)]
    return [*found, THRIFTIEST] if found else []


@contextmanager
def capped(
    base: Checkpoint,
    limit: int | None,
    foretold: Callable[[Allowance], Peaks],
    steps: Steps,
    cures: Callable[[str], Sequence[str]] = lambda stage: (),
) -> Iterator[None]:
    """Run stages within a limit and within what is free.

    Args:
      base: the model that they read.
      limit: of memory, bytes; None for what is free alone, which is no reason to refuse.
      foretold: as of `allowance_within`.
      steps: told what is done without.
      cures: a stage that does not fit -> what else would let it.

    Raises:
      InputError: some stage takes more than the limit whatever it does without.
    """
    cap = own_memory() + free_memory()
    if limit is not None:
        require_within(limit, foretold, cures)
        keep_no_large_block()
        cap = min(cap, limit)
    experts = base.config.moe.num_experts
    found = dataclasses.replace(allowance_within(cap, foretold, experts), limit=limit)
    if found != AMPLE:
        stage, peak = max(foretold(found).items(), key=lambda one: one[1])
        steps.say(
            f"of memory {amount(cap)} may be taken: {_words(found)}; at most about {amount(peak)} "
            f"are, {STAGES[stage]}"
        )
    before = base.read_ahead, base.experts_at_once
    base.read_ahead, base.experts_at_once = found.reading
    try:
        with allowing(found):
            yield
    finally:
        base.read_ahead, base.experts_at_once = before


def require_within(
    limit: int, foretold: Callable[[Allowance], Peaks], cures: Callable[[str], Sequence[str]]
) -> None:
    """Raise InputError if some stage takes more than a limit whatever it does without."""
    peaks = foretold(THRIFTIEST)
    stage = max(peaks, key=lambda name: peaks[name])
    if peaks[stage] <= limit:
        return
    least = math.ceil(peaks[stage] / 1e6)
    others = "".join(f", or {cure}" for cure in cures(stage))
    raise InputError(
        f"memory_limit={amount(limit)} is too little {STAGES[stage]}, which takes about {least:,} "
        "MB with as little of a layer in memory as it can do with, and hidden states on disk; "
        f"choose --memory-limit {least}MB{others}"
    )


@contextmanager
def capped_recipe(
    base: Checkpoint,
    recipe: ResolvedRecipe,
    steps: Steps,
    stages: Sequence[str] = (),
    rates: int = 1,
) -> Iterator[None]:
    """`capped` by a recipe's own limit.

    Args:
      base: the dense model.
      recipe: a resolved one.
      steps: told what is done without.
      stages: those that a process of their own goes through; default all, one after the other.
      rates: prune rates that are planned at once.

    Raises:
      InputError: as there.
    """
    foretold, cures = _of_recipe(base.about, recipe, stages, rates)
    with capped(base, recipe.memory_limit, foretold, steps, cures):
        yield


def refuse_limit(recipe: CompressionRecipe, command: str) -> None:
    """Raise InputError if a recipe limits the memory of a command that has no such limit."""
    if recipe.memory_limit is not None:
        raise InputError(
            f"memory_limit={amount(recipe.memory_limit)} is no option of {command}, whose memory "
            "is not foretold; leave it out"
        )


def recipe_allowance(base: Description, recipe: ResolvedRecipe) -> Allowance:
    """What `compress` may spend by the recipe's own limit, whatever is free here.

    Raises:
      InputError: as of `capped`.
    """
    if recipe.memory_limit is None:
        return AMPLE
    foretold, cures = _of_recipe(base, recipe)
    require_within(recipe.memory_limit, foretold, cures)
    return allowance_within(recipe.memory_limit, foretold, base.config.moe.num_experts)


def _of_recipe(
    base: Description, recipe: ResolvedRecipe, stages: Sequence[str] = (), rates: int = 1
) -> tuple[Callable[[Allowance], Peaks], Callable[[str], list[str]]]:
    """What stages take by the allowance, and the options by which one of them takes less."""
    asked = stages or [name for name in STAGES if name not in ADAPT]

    def of(one: ResolvedRecipe) -> Foretold:
        return Foretold(base, one, alone=bool(stages), rates=rates)

    def cures(stage: str) -> list[str]:
        def peak(one: ResolvedRecipe) -> int:
            return of(one).peaks([stage], THRIFTIEST)[stage]

        usual = peak(recipe)
        less = {words: peak(dataclasses.replace(recipe, **new)) for words, new in CURES.items()}
        return [
            f"{words}, with which it takes about {amount(size)}"
            for words, size in less.items()
            if size < WORTH_SAYING * usual
        ]

    foretold = of(recipe)
    return lambda found: foretold.peaks(asked, found), cures


def _words(found: Allowance) -> str:
    """What is done without."""
    said = [] if found.read_ahead else ["nothing is read ahead"]
    if found.experts is not None:
        said.append(f"layers are taken in groups of {found.experts} experts where that can be done")
    if found.room is not None:
        kept = f"at most {amount(found.room)} of" if found.room else "no"
        said.append(f"{kept} hidden states and rows of experts are kept in memory")
    return ", ".join(said) or "nothing is done without"
