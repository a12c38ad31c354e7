"""Vectors per expert, pairs of experts and weight gradients, against loops and autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.attention.context import make_context
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.collect import collect_statistics, collect_weights
from pruning.scores.criteria import channel_scores
from pruning.scores.details import clipped_sums
from pruning.scores.elimination import elimination_costs
from pruning.scores.expert_criteria import EXPERT_CRITERIA
from pruning.scores.weight_gradient import weight_gradient_scores
from tests.pruning.scores.test_layer import CONFIG, batch, layer_inputs, model  # noqa: F401

E, F, D = 6, 12, 16


@pytest.fixture(scope="module")
def statistics(model, batch):  # noqa: F811
    return collect_statistics(model, *batch, gradients=True, expert_details=True, batch=3)


@pytest.fixture(scope="module")
def routed(model, batch):  # noqa: F811
    """Per expert layer: (weights, [(token input, block output, {expert: (w, g, p, h, z)})])."""
    tokens, valid = batch
    found = []
    for index, (layer, x, out) in enumerate(layer_inputs(model, tokens, valid)):
        if index in CONFIG.dense_layers:
            continue
        moe = layer.mlp
        gate, up, down = (
            np.asarray(w, np.float64).reshape(E, F, D)
            for w in (moe.experts.w_gate, moe.experts.w_up, moe.experts.w_down)
        )
        rows = []
        for b, t in zip(*np.nonzero(valid), strict=True):
            logits = np.asarray(moe.router, np.float64) @ x[b, t]
            share = np.exp(logits - logits.max())
            share /= share.sum()
            parts = {}
            for e in np.argsort(-share)[:2]:
                g, p = gate[e] @ x[b, t], up[e] @ x[b, t]
                h = g / (1 + np.exp(-g)) * p
                parts[e] = (share[e], g, p, h, h @ down[e])
            rows.append((x[b, t], out[b, t], share, parts))
        found.append(((gate, up, down), rows))
    return found


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_vectors_and_pairs_equal_loops_over_tokens(statistics, routed):
    for slot, (_, rows) in enumerate(routed):
        inputs, outputs, squares = (np.zeros((E, D)) for _ in range(3))
        gram, probability, weighted = np.zeros((E, E)), np.zeros(E), np.zeros(E)
        for x, _, share, parts in rows:
            probability += share
            for e, (w, *_, z) in parts.items():
                inputs[e] += x**2
                outputs[e] += z
                squares[e] += z**2
                weighted[e] += w * z @ z
                for other, (v, *_, y) in parts.items():
                    gram[e, other] += w * v * z @ y
        close(statistics.input_square[slot], inputs)
        close(statistics.output_sum[slot], outputs)
        close(statistics.output_coordinate_square[slot], squares)
        close(statistics.output_gram[slot], gram)
        close(statistics.probability_mass[slot], probability)
        close(statistics.weighted_output_square[slot], weighted)


def test_clipped_attribution_clips_one_percent_of_each_coordinate():
    rng = np.random.default_rng(0)
    rows, owner = rng.normal(size=(500, 3)), rng.integers(0, 3, 500)  # 2 stands for padding
    rows[7], owner[7] = 1e3, 0  # one token that is everything
    expected = []
    for e in range(2):
        mine = rows[owner == e]
        total = 0.0
        for column in mine.T:
            ranked = np.sort(np.abs(column))
            place = 0.99 * (len(ranked) - 1)
            low = int(place)
            most = ranked[low] + (place - low) * (ranked[low + 1] - ranked[low])
            total += sum(min(max(value, -most), most) for value in column)
        expected.append(total)
    np.testing.assert_allclose(clipped_sums(rows, owner, 2), expected)
    assert clipped_sums(rows, owner, 2)[0] < 1e3 < rows[owner == 0].sum()


def test_clipping_changes_the_attribution_by_what_it_cuts_off(statistics):
    # with a handful of tokens per expert the clip lies just below the largest of each coordinate
    assert statistics.clipped_phi.shape == statistics.phi.shape
    assert not np.allclose(statistics.clipped_phi, statistics.phi)
    correlation = np.corrcoef(statistics.clipped_phi.ravel(), statistics.phi.ravel())[0, 1]
    assert correlation > 0.95


def test_similarity_is_the_alignment_of_all_experts_on_the_same_tokens(statistics, routed, batch):  # noqa: F811
    first = int(batch[1][:3].sum())  # valid tokens of the first batch
    for slot, ((gate, up, down), rows) in enumerate(routed):
        x = np.stack([row[0] for row in rows[:first]])
        kernels = []
        for e in range(E):
            g = x @ gate[e].T
            z = (g / (1 + np.exp(-g)) * (x @ up[e].T)) @ down[e]
            z -= z.mean(axis=0)
            kernels.append(z @ z.T)
        inner = np.array([[np.sum(a * b) for b in kernels] for a in kernels])
        expected = inner / np.sqrt(np.outer(inner.diagonal(), inner.diagonal()))
        np.testing.assert_allclose(statistics.similarity[slot], expected, atol=1e-4)


def test_wanda_weighs_magnitudes_with_the_norm_of_their_input(statistics, routed):
    score = CHANNEL_CRITERIA["wanda"](statistics)
    for slot, ((gate, up, down), rows) in enumerate(routed):
        for e in range(E):
            mine = [(x, parts[e][3]) for x, _, _, parts in rows if e in parts]
            x = np.sqrt(sum((x**2 for x, _ in mine), np.zeros(D)))
            h = np.sqrt(sum((h**2 for _, h in mine), np.zeros(F)))
            expected = (
                h * np.abs(down[e]).sum(axis=1) + np.abs(up[e]) @ x + np.abs(gate[e]) @ x
            ) / 3
            close(score[slot, e], expected)


def whole_loss(model, tokens, valid, counted):  # noqa: F811
    """Summed next-token loss by one plain forward."""
    context = make_context(CONFIG.attention, CONFIG.max_position, valid)
    x = model.embedding(tokens, jnp.float32)
    for layer in model.layers:
        x = layer(x, context)
    nll = optax.softmax_cross_entropy_with_integer_labels(model.head(x[:, :-1]), tokens[:, 1:])
    return jnp.sum(jnp.where(valid[:, 1:] & valid[:, :-1] & counted[:, 1:], nll, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [False, True], ids=["all", "without prompts"])
def test_weight_times_gradient_equals_autograd_of_the_whole_model(model, batch, prompts):  # noqa: F811
    tokens, valid = map(jnp.asarray, batch)
    counted = np.random.default_rng(2).random(valid.shape) < (0.5 if prompts else 2.0)
    gradient = jax.jit(jax.grad(whole_loss, allow_int=True))(model, tokens, valid, counted)
    told: list[tuple[int, int]] = []
    found = weight_gradient_scores(model, *batch, counted if prompts else None, batch=2,
                                   on_step=lambda *step: told.append(step))  # fmt: skip
    assert told == [(done, 6) for done in range(1, 7)]  # three layers, up and down
    for slot, index in enumerate(CONFIG.moe_layers):
        experts, d_experts = model.layers[index].mlp.experts, gradient.layers[index].mlp.experts
        expected = sum(
            np.abs(np.asarray(getattr(experts, name)) * np.asarray(getattr(d_experts, name))).sum(1)
            for name in ("w_gate", "w_up", "w_down")
        ).reshape(E, F)
        np.testing.assert_allclose(found[slot], expected, rtol=2e-3, atol=2e-4 * expected.max())


def test_prompts_are_read_and_leave_no_gradient(statistics, model, batch):  # noqa: F811
    tokens, valid = batch
    counted = np.random.default_rng(3).random(valid.shape) < 0.5
    how = {"gradients": True, "batch": 3}
    some, others = (
        collect_statistics(model, tokens, valid, counted=c, **how) for c in (counted, ~counted)
    )
    for name in ("energy", "hidden_square", "total_tokens"):  # of all tokens, whatever counts
        np.testing.assert_allclose(getattr(some, name), getattr(statistics, name), rtol=1e-6)
    # The loss and what of it a channel carries are sums over predictions.
    for name in ("loss_sum", "taylor"):
        whole = getattr(statistics, name)
        close = {"rtol": 1e-4, "atol": 1e-4 * np.abs(whole).max()}
        np.testing.assert_allclose(getattr(some, name) + getattr(others, name), whole, **close)
    assert 0.2 < some.loss_sum / statistics.loss_sum < 0.8


def test_every_criterion_can_be_taken_from_one_sweep(statistics, model, batch):  # noqa: F811
    whole = statistics.replace(
        weight_gradient=weight_gradient_scores(model, *batch, batch=3),
        elimination=elimination_costs(model, *batch, statistics, batch=3),
    )
    for criterion in (name for name in CHANNEL_CRITERIA if name != "noise"):  # of no text
        # end-to-end attributions have passes of their own
        swept = [name for name in EXPERT_CRITERIA if not name.startswith("nll_")]
        for attribution in swept if criterion == "act" else ("ala",):
            scores = channel_scores(whole, criterion=criterion, attribution=attribution)
            assert np.isfinite(scores.channel).all() and (scores.channel >= 0).all()
            assert scores.expert.shape == (2, E)


def test_weights_alone_score_and_refuse_what_needs_text(model, statistics):  # noqa: F811
    alone = collect_weights(model)
    for name in ("down_norm", "gate_l1"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(statistics, name))
    scores = channel_scores(alone, criterion="weight", attribution="aimer")
    assert (scores.channel > 0).all() and (scores.expert > 0).all()
    with pytest.raises(ValueError, match="on text, or use noise, random, weight with"):
        channel_scores(alone, criterion="act", attribution="aimer")


def test_norm_ratio_of_weights_equals_its_definition(statistics, routed):
    for slot, ((gate, up, down), _) in enumerate(routed):
        for e in range(E):
            weights = np.concatenate([gate[e].ravel(), up[e].ravel(), down[e].ravel()])
            ratio = np.sqrt((weights**2).mean()) / np.abs(weights).mean()
            found = EXPERT_CRITERIA["aimer"](statistics)[slot, e]
            np.testing.assert_allclose(found * np.sqrt(weights.size), ratio, rtol=1e-5)
