"""Width policies: free per expert, capped, one per layer, one for the model, whole experts, mixed.

A policy turns one `Problem` into widths. The planner decides; alignment moves its widths to legal
ones; the policy says what may differ from what.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from moe_jax.errors import InputError
from pruning.budget.alignment import redistribute, uniform_counts
from pruning.budget.importance import IMPORTANCE
from pruning.budget.optimum import SOLVERS, aligned_optimum, block_values, coverage_by_blocks
from pruning.budget.problem import Allocation, Problem
from pruning.budget.whole_experts import keep_experts
from pruning.kit.errors import BudgetError


def free(problem: Problem) -> Allocation:
    """Every expert has its own width."""
    legal = problem.most - problem.most % problem.block
    most = np.where(legal < problem.least, 0, legal)
    if most.sum() < problem.budget and (most < problem.most).any():
        raise _too_narrow(problem, most)
    wanted = problem.planner(dataclasses.replace(problem, most=most))
    if problem.least == 1:
        return Allocation(wanted, wanted)
    return Allocation(ALIGNMENTS[problem.align](problem, wanted, most), wanted)


def capped(problem: Problem) -> Allocation:
    """No expert is wider than `cap`, rounded down to a block."""
    width = problem.scores.channel.shape[2]
    assert problem.cap is not None
    if not problem.least <= problem.cap <= width:
        raise InputError(
            f"cap={problem.cap} must lie in [{problem.least}, {width}], the minimum and the expert "
            "width; choose e.g. half the width"
        )
    most = np.minimum(problem.most, problem.cap - problem.cap % problem.block)
    if most.sum() < problem.budget:
        raise _too_narrow(problem, most)
    return free(dataclasses.replace(problem, most=most))


def one_per_layer(problem: Problem) -> Allocation:
    """All experts of a layer have one width; layers differ.

    A layer is planned like one expert whose n-th channel is the n-th best of every expert.
    """
    scores, experts = problem.scores, problem.scores.expert.shape[1]
    ranked = -np.sort(-scores.channel, axis=2)
    merged = scores.replace(  # type: ignore[attr-defined]
        channel=ranked.sum(axis=1, keepdims=True),
        expert=scores.expert.sum(axis=1, keepdims=True),
    )
    most = problem.most.min(axis=1, keepdims=True)
    budget = min(problem.budget // experts, int(most.sum()))
    if budget < len(most) * problem.least:
        raise BudgetError(
            f"the budget of {problem.budget} channels leaves less than {problem.least} for each of "
            f"{experts} experts in {len(most)} layers; lower the prune rate, the minimum or the "
            "block"
        )
    small = dataclasses.replace(
        problem, scores=merged, budget=budget, most=most, floor=np.full(most.shape, problem.least)
    )
    widths = free(small)
    shape = scores.expert.shape
    return Allocation(
        np.broadcast_to(widths.counts, shape).copy(), np.broadcast_to(widths.unaligned, shape)
    )


def one_for_all(problem: Problem) -> Allocation:
    """All experts of the model have one width."""
    shape = problem.scores.channel.shape
    budget = min(problem.budget, int(problem.most.min()) * problem.most.size)
    counts = uniform_counts(shape, budget, problem.block, problem.least)
    return Allocation(counts, counts)


def whole_experts(problem: Problem) -> Allocation:
    """Experts stay whole or go, those of largest attribution first.

    As many stay as come nearest to the budget, which can be half an expert more than it.
    """
    width = problem.scores.channel.shape[2]
    kept = round(problem.budget / width)
    chosen = problem.experts
    if chosen is None:
        allowed = np.where(problem.most == width, problem.scores.expert, -np.inf)
        kept = min(kept, int((problem.most == width).sum()))
        chosen = keep_experts(allowed, kept, reserved=problem.reserved, per_layer=problem.per_layer)
    if chosen.sum() != kept:
        rate = 1.0 - chosen.sum() / chosen.size
        raise BudgetError(
            f"the budget of {problem.budget} channels pays for {kept} whole experts, but "
            f"{chosen.sum()} were chosen; the prune rate of that choice is {rate:.6f}"
        )
    counts = np.where(chosen, width, 0)
    return Allocation(counts, counts)


def combined(problem: Problem) -> Allocation:
    """Some experts go entirely, channels of the others make up the rest of the budget."""
    chosen = problem.experts
    if chosen is None:
        experts = problem.floor.size
        kept = experts - round(problem.expert_rate * experts)
        value = np.where(problem.most > 0, problem.scores.expert, -np.inf)
        chosen = keep_experts(value, kept, reserved=problem.reserved, per_layer=problem.per_layer)
    most = np.where(chosen, problem.most, 0)
    if most.sum() < problem.budget:
        raise _too_narrow(problem, most)
    return free(dataclasses.replace(problem, most=most, floor=np.where(chosen, problem.floor, 0)))


WIDTHS: dict[str, Callable[[Problem], Allocation]] = {
    "free": free,
    "capped": capped,
    "layer": one_per_layer,
    "uniform": one_for_all,
    "experts": whole_experts,
    "combined": combined,
}


def by_rule(problem: Problem, wanted: np.ndarray, most: np.ndarray) -> np.ndarray:  # [L, E]
    """The paper's redistribution, freed blocks to those that lost most channels."""
    return _redistribute(problem, wanted, most, None)


def by_lost_score(problem: Problem, wanted: np.ndarray, most: np.ndarray) -> np.ndarray:  # [L, E]
    """The paper's redistribution, freed blocks to those that lost most score."""
    return _redistribute(problem, wanted, most, -np.sort(-problem.scores.channel, axis=2))


def _redistribute(
    problem: Problem, wanted: np.ndarray, most: np.ndarray, best_first: np.ndarray | None
) -> np.ndarray:
    return redistribute(
        wanted,
        d_expert=problem.scores.channel.shape[2],
        block=problem.block,
        minimum=problem.least,
        attribution=problem.scores.expert,
        reserved=problem.reserved,
        best_first=best_first,
        capacity=most,
        per_layer=problem.per_layer,
    )


def _by_optimum(solver: str) -> Callable[[Problem, np.ndarray, np.ndarray], np.ndarray]:
    # The planner's widths only set the layers' budgets, and those only with `per_layer`.
    def align(problem: Problem, wanted: np.ndarray, most: np.ndarray) -> np.ndarray:
        degree, name = problem.objective
        options = problem.options
        weights = IMPORTANCE[options.weights or name](problem.scores, options)
        coverage = coverage_by_blocks(problem.scores.channel, problem.block)
        values = block_values(coverage, weights, degree=degree, rho_max=options.rho_max)
        return problem.block * aligned_optimum(
            values,
            problem.budget // problem.block,
            least=problem.least // problem.block,
            reserved=problem.reserved,
            most=most // problem.block,
            solver=SOLVERS[solver],
            layer_shares=wanted.sum(axis=1) if problem.per_layer else None,
        )

    return align


ALIGNMENTS: dict[str, Callable[[Problem, np.ndarray, np.ndarray], np.ndarray]] = {
    "paper": by_rule,
    "paper_scores": by_lost_score,
    "dp": _by_optimum("dp"),
    "hull": _by_optimum("hull"),
}


def with_layer_budgets(
    problem: Problem, fixed: Mapping[int, int], policy: Callable[[Problem], Allocation]
) -> Allocation:
    """Apply a policy, some layers having a budget of their own.

    Args:
      problem: its budget is that of the whole model.
      fixed: channels of a layer, by its position among the L.
      policy: an entry of `WIDTHS`.

    Returns:
      Widths of all layers; those without a budget of their own share what is left.

    Raises:
      InputError: what is left does not suit the other layers.
    """
    if not fixed:
        return policy(problem)
    counts = np.zeros(problem.most.shape, np.int64)
    wanted = counts.copy()
    for layer, budget in fixed.items():
        at = np.array([layer])
        one = policy(problem.of_layers(at, budget))
        counts[at], wanted[at] = one.counts, one.unaligned
    others = np.setdiff1d(np.arange(len(counts)), list(fixed))
    asked = sum(fixed.values())
    # Rounding accounts for one channel per layer and one block.
    if not others.size and abs(problem.budget - asked) >= len(fixed) + problem.block:
        rate = 1.0 - asked / problem.scores.channel.size
        raise BudgetError(
            f"the rates of all layers keep {asked} channels, the budget is {problem.budget}; give "
            f"the prune rate {rate:.6f}, or leave a layer free"
        )
    if others.size:
        left = problem.budget - int(counts.sum())
        room = int(problem.most[others].sum())
        needed = int(problem.floor[others].sum())
        if not needed <= left <= room:
            raise BudgetError(
                f"the layers of a fixed rate leave {left} channels of the budget for the others, "
                f"which keep {needed} to {room}; change the prune rate or the layers' rates"
            )
        rest = policy(problem.of_layers(others, left))
        counts[others], wanted[others] = rest.counts, rest.unaligned
    return Allocation(counts, wanted)


def _too_narrow(problem: Problem, most: np.ndarray) -> InputError:
    channels = problem.scores.channel.size
    return InputError(
        f"the budget of {problem.budget} channels exceeds the {int(most.sum())} that the experts "
        f"may keep; the nearest feasible prune rate is {1.0 - most.sum() / channels:.6f}"
    )
