"""Which model is taken, by one loop over explicit windows."""

import math

import numpy as np
import pytest

from pruning.measure.choice import take


def plain(losses: dict, dense: list, tokens: list, domains: list) -> tuple[str, list[str]]:
    """The least loss, what ties with it, and the best worst domain among those."""
    total, windows = sum(tokens), range(len(tokens))
    best = next(name for name in losses if sum(losses[name]) == min(map(sum, losses.values())))
    added = sum(losses[best][i] - dense[i] for i in windows) / total
    tied = []
    for name, loss in losses.items():
        apart = [loss[i] - losses[best][i] for i in windows]
        mean = sum(apart) / total
        spread = sum((apart[i] - mean * tokens[i]) ** 2 for i in windows)
        if name != best and len(windows) < 2:
            continue
        error = math.sqrt(spread * len(windows) / max(1, len(windows) - 1)) / total
        if name == best or mean <= min(error, 0.02 * max(0.0, added)):
            tied.append(name)
    worst = {}
    for name in tied:
        each = []
        for domain in set(domains):
            rows = [i for i in windows if domains[i] == domain and tokens[i]]
            if rows:
                lost = sum(losses[name][i] - dense[i] for i in rows)
                each.append(lost / sum(tokens[i] for i in rows))
        worst[name] = max(each)
    if len({domains[i] for i in windows if tokens[i]}) < 2:
        return best, tied
    return min(tied, key=lambda name: worst[name]), tied


@pytest.mark.parametrize(("windows", "texts"), [(1, 1), (2, 1), (2, 2), (3, 3), (7, 3)])
def test_the_model_taken_is_that_of_a_plain_loop(windows, texts):
    ties = taken = 0
    for seed in range(200):
        rng = np.random.default_rng((windows, texts, seed))
        tokens = rng.integers(0 if windows > 3 else 1, 9, windows)
        tokens[0] += 1
        some = tokens > 0  # without a prediction nothing is lost
        dense, each = some * rng.normal(size=windows), rng.normal(1.0, 0.3, windows)
        losses = {n: dense + some * (each + rng.normal(0, 0.02, windows)) for n in "abcd"}
        domains = np.arange(windows) % texts
        wanted = plain({n: v.tolist() for n, v in losses.items()}, dense.tolist(),
                       tokens.tolist(), domains.tolist())  # fmt: skip
        assert take(losses, dense, tokens, domains) == wanted, seed
        ties, taken = ties + (1 < len(wanted[1]) < 4), taken + (wanted[0] != wanted[1][0])
    assert windows < 2 or ties > 20 < taken


def test_models_that_lose_the_same_tie_and_the_first_is_taken():
    dense, tokens, domains = np.zeros(4), np.full(4, 5), np.array([0, 0, 1, 2])
    losses = {name: np.array([1.0, 2.0, 3.0, 4.0]) for name in ("second", "first")}
    assert take(losses, dense, tokens, domains) == ("second", ["second", "first"])
