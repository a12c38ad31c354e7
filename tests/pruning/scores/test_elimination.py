"""Criterion obs against least squares over every set of kept channels, and in whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.norm import rms_norm
from moe_jax.stream import forward_hidden, in_batches, layer_attend
from pruning.budget.plan import PruningPlan
from pruning.scores import grams
from pruning.scores.collect import collect_statistics
from pruning.scores.elimination import PULL, eliminate, elimination_costs
from pruning.scores.statistics import load_statistics
from pruning.stages import score as scoring
from tests.pruning.shrink.test_repair_model import CHANNELS, EXPERTS, LAYERS, PLAIN, model_of
from tests.support import command

F, D, TOKENS = 7, 3, 40


@pytest.fixture(scope="module")
def expert() -> tuple[np.ndarray, np.ndarray]:
    """Hidden rows whose channels are much alike, and a down-projection."""
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(TOKENS, F)) @ rng.normal(size=(F, F))
    return hidden, rng.normal(size=(F, D))


def least_error(hidden: np.ndarray, down: np.ndarray, kept: list[int]) -> float:
    """Of all weights of the kept channels, by rows of the pull below those of the tokens."""
    pull = np.sqrt(PULL * (hidden**2).sum(axis=0).mean()) * np.eye(F)
    rows = np.concatenate([hidden, pull])
    wanted = rows @ down
    fitted = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
    return float(((wanted - rows[:, kept] @ fitted) ** 2).sum())


def test_channels_go_in_the_order_and_at_the_cost_that_every_try_gives(expert):
    hidden, down = expert
    kept, before, costs, order = list(range(F)), 0.0, np.zeros(F), []
    while kept:
        tries = {j: least_error(hidden, down, [one for one in kept if one != j]) for j in kept}
        gone = min(tries, key=lambda j: tries[j])
        costs[gone], before = tries[gone] - before, tries[gone]
        kept.remove(gone)
        order.append(gone)
    costs[order] = np.maximum.accumulate(costs[order])
    found = eliminate(hidden.T @ hidden, down)
    np.testing.assert_allclose(found, costs, rtol=1e-8)
    assert np.argsort(found).tolist() == order
    assert order != np.argsort((hidden**2).sum(axis=0) * (down**2).sum(axis=1)).tolist()


def test_channels_that_go_together_cost_what_they_cost_one_after_the_other(expert):
    hidden, down = expert
    gram, size = hidden.T @ hidden, 3
    found = eliminate(gram, down, most=size)
    order = np.argsort(found).tolist()
    # The first of a block are those that would be cheapest alone, dearer ones before being raised.
    alone = [least_error(hidden, down, [k for k in range(F) if k != j]) for j in range(F)]
    assert order[:size] == np.argsort(alone)[:size].tolist()
    errors = [least_error(hidden, down, order[i + 1 :]) for i in range(F)]
    np.testing.assert_allclose(found[order], np.maximum.accumulate(np.diff([0.0, *errors])))


def test_channels_that_others_can_replace_are_free_and_idle_experts_have_no_score(expert):
    hidden, down = expert
    double = np.c_[hidden[:, :-1], 2 * hidden[:, 0]]
    gram = double.T @ double
    found = eliminate(gram, down)
    # The double takes half of the weight over: only the pull against that is left to pay.
    pull = PULL * np.diagonal(gram).mean() * (1 + 0.5**2) * (down[0] ** 2).sum()
    assert np.argmin(found) == 0 and found[0] <= pull
    np.testing.assert_array_equal(eliminate(np.zeros((F, F)), down), 0.0)


@pytest.fixture(scope="module")
def swept():
    """A model, windows of a text, and what the experts of its last layer make of each token, in
    plain numpy but for what goes into the layer."""
    model, rng = model_of(PLAIN), np.random.default_rng(0)
    tokens = rng.integers(0, 64, (9, 20)).astype(np.int32)
    valid = np.arange(20)[None] < np.array([20, 20, 12, 20, 5, 20, 20, 20, 20])[:, None]
    last = model.layers[LAYERS[1]]
    text = in_batches(model, tokens, valid, 9)
    below = dataclasses.replace(model, layers=model.layers[: LAYERS[1]])
    x = forward_hidden(below, tokens, valid)
    middle = np.asarray(layer_attend(last, jnp.asarray(x), text.places[0]))
    out = forward_hidden(model, tokens, valid).astype(np.float64)
    normed = np.asarray(rms_norm(jnp.asarray(middle), last.mlp_norm, last.norm_eps), np.float64)
    scores = normed @ np.asarray(last.mlp.router, np.float64).T
    chosen = np.argsort(-scores, axis=-1)[..., :2]
    share = np.zeros_like(scores)
    np.put_along_axis(share, chosen, np.exp(np.take_along_axis(scores, chosen, -1)), -1)
    share /= share.sum(axis=-1, keepdims=True) * np.sqrt((out**2).sum(axis=-1) + 1e-6)[..., None]
    experts = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), last.mlp.experts)
    hidden, down = [], experts.w_down.reshape(EXPERTS, CHANNELS, -1)
    for expert in range(EXPERTS):
        own = slice(expert * CHANNELS, (expert + 1) * CHANNELS)
        gate, up = normed @ experts.w_gate[own].T, normed @ experts.w_up[own].T
        hidden.append(share[..., [expert]] * gate / (1 + np.exp(-gate)) * up)
    return model, tokens, valid, np.array(hidden), down


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * wanted.max())


def test_the_sums_are_those_of_a_loop_over_the_tokens_of_each_expert(swept):
    model, tokens, valid, hidden, down = swept
    statistics = collect_statistics(model, tokens, valid, batch=2)
    found = elimination_costs(model, tokens, valid, statistics, batch=2)
    assert found.shape == (2, EXPERTS, CHANNELS)
    for expert in range(EXPERTS):
        rows = hidden[expert][valid]
        close(found[1, expert], eliminate(rows.T @ rows, down[expert]))


# A quarter of nine windows of 20 tokens; five of the first 8 tokens of each.
@pytest.mark.parametrize(("piece", "windows"), [(256, [0, 4]), (8, [0, 1, 3, 4, 6, 7])])
def test_scoring_sees_likeness_on_the_beginnings_of_windows_and_sizes_on_all(
    swept, piece, windows, monkeypatch
):
    monkeypatch.setattr(grams, "PIECE", piece)
    model, tokens, valid, hidden, down = swept
    found = collect_statistics(model, tokens, valid, batch=4, obs=True)
    assert found.groups == {"obs"} and found.elimination is not None
    for expert in range(EXPERTS):
        sample = hidden[expert, windows, :piece][valid[windows, :piece]]
        gram, size = sample.T @ sample, np.sqrt((hidden[expert][valid] ** 2).sum(axis=0))
        own = np.sqrt(np.diagonal(gram))
        assert (own > 0).all()  # every channel was seen
        close(found.elimination[1, expert], eliminate(gram * np.outer(size / own, size / own),
                                                      down[expert]))  # fmt: skip
    statistics = dataclasses.replace(found, elimination=None)
    alone = elimination_costs(
        model, *grams.sampled(tokens, valid, grams.SHARE), statistics, batch=4
    )
    close(alone, found.elimination)


def test_a_run_plans_by_it_in_one_order_for_all_rates(models, texts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    asked = ("score", models / "single", *command.given(texts, out), "--bits", 16)
    assert command.run(*asked, "--obs", "--planner", "fair") == 0
    statistics, _ = load_statistics(out / "statistics.safetensors")
    assert statistics.elimination is not None and (statistics.elimination >= 0).all()
    plans = []
    for rate in (0.25, 0.5):
        assert command.run("plan", out, "--criterion", "obs", "--prune-rate", rate) == 0
        plans.append(PruningPlan.load(out))
    assert (plans[1].keep <= plans[0].keep).all() and plans[0].keep.sum() > plans[1].keep.sum()
    assert command.run("plan", out, "--criterion", "obs", "--width", "uniform") == 0
    assert " uniform-obs " in capsys.readouterr().out
    plain = tmp_path / "plain"
    asked = ("score", models / "single", *command.given(texts, plain), "--planner", "fair")
    asked = (*asked, "--bits", 16)
    assert command.run(*asked) == 0
    assert command.run("plan", plain, "--criterion", "obs", "--prune-rate", 0.5) == 2
    assert "--obs" in capsys.readouterr().err
    before, _ = load_statistics(plain / "statistics.safetensors")
    assert before.elimination is None

    def unread(*given):
        raise AssertionError("the whole text is swept again")

    monkeypatch.setattr(scoring, "collect_parts", unread)
    assert command.run(*asked, "--obs") == 0
    after, _ = load_statistics(plain / "statistics.safetensors")
    close(after.elimination, statistics.elimination)
    for name, value in before.arrays().items():
        np.testing.assert_array_equal(after.arrays()[name], value, err_msg=name)


def test_where_some_of_the_text_is_enough_the_sample_is_of_that(models, texts, tmp_path, capsys):
    asked = ("score", models / "single", "--planner", "fair", "--bits", 16, "--obs")
    asked = (*asked, "--until-stable", 0.1, *command.given(texts, tmp_path / "out"))
    assert command.run(*asked) == 0
    found, _ = load_statistics(tmp_path / "out" / "statistics.safetensors")
    assert found.groups == {"obs"}
    assert "elimination" in capsys.readouterr().err
