"""The experts as one function, and its gradients, against a dense einsum over all experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Activation
from moe_jax.experts import swiglu
from moe_jax.experts.dispatch import gather_rows, make_dispatch
from moe_jax.experts.expert_rows import expert_rows, no_score, routed_experts_by_rows
from moe_jax.experts.grouped_matmul import on_cpu
from moe_jax.experts.swiglu import routed_experts
from pruning.scores.expert_sums import (
    observe_by_rows,
    observe_experts,
    output_sums,
    output_sums_by_rows,
)
from tests.support.pools import pooled_experts

N, D, E, F, K = 19, 8, 4, 12, 2
WIDTHS = {"dense": (12, 12, 12, 12), "ragged, one emptied": (12, 0, 5, 3)}
BOUNDED = Activation(slope=1.7, shift=1.0, limit=1.2)
PROBLEMS = [(name, biased) for name in WIDTHS for biased in (False, True)]


def magnitudes(hidden, d_hidden, gate, d_gate):
    return hidden * d_hidden, jnp.abs(gate * d_gate)


@pytest.fixture(
    scope="module", params=PROBLEMS, ids=[n + (", biased" if b else "") for n, b in PROBLEMS]
)
def problem(request):
    name, biased = request.param
    counts = WIDTHS[name]
    rng = np.random.default_rng(0)
    gate, up, down = (
        [rng.normal(size=(n, D)).astype(np.float32) for n in counts] for _ in range(3)
    )
    block = F if min(counts) == F else 3
    rows = sum(counts) + (0 if block == F else block)
    rows = max(rows, sum(counts) + block)
    extra, biases = {}, None
    if biased:
        own = [[rng.normal(size=n).astype(np.float32) for n in counts] for _ in range(2)]
        added = jnp.asarray(rng.normal(size=(E, D)), jnp.float32)
        extra = {"gate_bias": own[0], "up_bias": own[1], "down_bias": added, "activation": BOUNDED}
        biases = [*(np.stack([np.pad(b, (0, F - len(b))) for b in kind]) for kind in own), added]
    experts = pooled_experts(gate, up, down, width=F, rows=rows, block=block, **extra)
    x = rng.normal(size=(N, D)).astype(np.float32)
    chosen = np.stack([rng.choice(E, K, replace=False) for _ in range(N)]).astype(np.int32)
    weight = rng.uniform(0.1, 1, (N, K)).astype(np.float32)
    valid = np.arange(N) != 7
    owner = jnp.where(jnp.asarray(valid)[:, None], chosen, E).reshape(-1)
    return {
        "experts": experts,
        "counts": counts,
        "dense": [
            *(np.concatenate([pad(w) for w in kind]) for kind in (gate, up, down)),
            *(biases or []),
        ],
        "x": jnp.asarray(x),
        "weight": jnp.asarray(weight),
        "chosen": chosen,
        "valid": valid,
        "dispatch": make_dispatch(owner, E, 16, K),
    }


def pad(weight):
    return np.pad(weight, ((0, F - len(weight)), (0, 0)))[None]


def activated(gate, up, bounded: bool):
    """The activation as it is written down in torch's gpt-oss, and SwiGLU."""
    if not bounded:
        return jax.nn.silu(gate) * up
    gate, up = (
        jnp.where(gate > 1.2, 1.2, gate),
        jnp.where(jnp.abs(up) > 1.2, jnp.sign(up) * 1.2, up),
    )
    return (up + 1) * (gate / (1 + jnp.exp(-1.7 * gate)))


def dense_output(x, weight, gates, dense, chosen, valid):
    """Every expert on every token, then the routed ones picked: [N, D]."""
    gate, up, down, *biases = (jnp.asarray(w) for w in dense)  # [E, F, D], [E, F], [E, D]
    g, u = jnp.einsum("nd,efd->nef", x, gate), jnp.einsum("nd,efd->nef", x, up)
    if biases:
        g, u = g + biases[0][None], u + biases[1][None]
    out = jnp.einsum("nef,efd->ned", activated(g, u, bool(biases)) * gates[None], down)
    out += biases[2][None] if biases else 0
    share = jax.nn.one_hot(chosen, E) * weight[:, :, None] * valid.astype(np.float32)[:, None, None]
    return jnp.einsum("nke,ned->nd", share, out)


@pytest.mark.slow
@pytest.mark.parametrize("form", [routed_experts, routed_experts_by_rows])
def test_output_and_every_gradient_equal_a_dense_einsum(problem, form):
    p, d = problem, problem["dispatch"]
    pool, weights = p["experts"].pool, p["experts"].weights
    pull = jnp.asarray(np.random.default_rng(1).normal(size=(N, D)), jnp.float32)

    def ours(x, weight, weights, probe):
        row_weight = gather_rows(weight.reshape(-1), d, 1)
        return jnp.vdot(pull, form(magnitudes, x, row_weight, weights, probe, d, pool))

    def theirs(x, weight, dense, gates):
        return jnp.vdot(pull, dense_output(x, weight, gates, dense, p["chosen"], p["valid"]))

    probe, gates = jnp.zeros((2, E, F)), jnp.ones((E, F))
    arguments = (p["x"], p["weight"])
    value, found = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3)))(*arguments, weights, probe)
    dense = [jnp.asarray(w) for w in p["dense"]]
    expected, wanted = jax.value_and_grad(theirs, (0, 1, 2, 3))(*arguments, dense, gates)
    close = {"rtol": 2e-4, "atol": 2e-5}  # float32 sums of a dozen products of order one
    np.testing.assert_allclose(value, expected, **close)
    np.testing.assert_allclose(found[0], wanted[0], **close)
    np.testing.assert_allclose(found[1], wanted[1], **close)
    stops = np.cumsum(p["counts"])
    names = ("gate", "up", "down", "gate_bias", "up_bias")
    if len(dense) == 6:
        np.testing.assert_allclose(found[2].down_bias, wanted[2][5], **close)
    for name, dense_gradient in zip(names, wanted[2][:5], strict=False):
        pooled = np.asarray(getattr(found[2], name))
        for e, (stop, count) in enumerate(zip(stops, p["counts"], strict=True)):
            np.testing.assert_allclose(
                pooled[stop - count : stop].reshape(dense_gradient[e, :count].shape),
                dense_gradient[e, :count],
                **close,
            )
    # the first score is the true gradient of a multiplier on the channel
    np.testing.assert_allclose(found[3][0], wanted[3], **close)
    gate_score = gate_magnitudes(p, pull)
    np.testing.assert_allclose(found[3][1], gate_score, **close)


@pytest.mark.parametrize("problem", [PROBLEMS[-1]], indirect=True)
@pytest.mark.parametrize("loops", [True, False])
def test_what_experts_pull_back_is_added_to_what_others_did(problem, loops, monkeypatch):
    if loops != on_cpu():
        monkeypatch.setattr(swiglu, "on_cpu", lambda: loops)
    p, d = problem, problem["dispatch"]
    rng = np.random.default_rng(1)
    pull, onto = (jnp.asarray(rng.normal(size=(N, D)), jnp.float32) for _ in range(2))

    def ours(x, weight):
        row_weight = gather_rows(weight.reshape(-1), d, 1)
        args = (p["experts"].weights, jnp.zeros((2, E, F)), d, p["experts"].pool)
        return swiglu.added_gradients(magnitudes, onto, pull, x, row_weight, *args)

    def theirs(x, weight, gates):
        dense = [jnp.asarray(w) for w in p["dense"]]
        return jnp.vdot(pull, dense_output(x, weight, gates, dense, p["chosen"], p["valid"]))

    arguments = (p["x"], p["weight"])
    d_x, d_row, scores = jax.jit(ours)(*arguments)
    wanted = jax.grad(theirs, (0, 1, 2))(*arguments, jnp.ones((E, F)))
    close = {"rtol": 2e-4, "atol": 2e-5}
    np.testing.assert_allclose(d_x - onto, wanted[0], **close)
    d_weight = jnp.zeros(N * K).at[d.row_copy].set(d_row, mode="drop").reshape(N, K)
    np.testing.assert_allclose(d_weight, wanted[1], **close)
    np.testing.assert_allclose(scores[0], wanted[2], **close)


def gate_magnitudes(p, pull):
    """Sum over each expert's tokens of |g dL/dg|, one token and expert at a time by autograd."""
    gate, up, down, *biases = (jnp.asarray(w) for w in p["dense"])
    gate_bias, up_bias, _ = biases or (jnp.zeros((E, F)), jnp.zeros((E, F)), None)

    @jax.jit
    def score(n, slot):
        e = jnp.asarray(p["chosen"])[n, slot]
        g, u = gate[e] @ p["x"][n] + gate_bias[e], up[e] @ p["x"][n] + up_bias[e]
        hidden = lambda g: activated(g, u, bool(biases))  # noqa: E731
        loss = lambda g: pull[n] @ (p["weight"][n, slot] * (hidden(g) @ down[e]))  # noqa: E731
        return jnp.abs(g * jax.grad(loss)(g))

    sums = np.zeros((E, F))
    for n in np.flatnonzero(p["valid"]):
        for slot, e in enumerate(p["chosen"][n]):
            sums[e] += score(n, slot)
    return sums


@pytest.mark.slow
@pytest.mark.skipif(not on_cpu(), reason="only the loops of a CPU take kept projections")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_known_projections_give_the_gradient_of_computed_ones(problem, dtype):
    p, d, pool = problem, problem["dispatch"], problem["experts"].pool
    x, weights = jax.tree.map(lambda leaf: leaf.astype(dtype), (p["x"], p["experts"].weights))
    row_weight = gather_rows(p["weight"].reshape(-1), d, 1)
    pull = jnp.asarray(np.random.default_rng(1).normal(size=(N, D)), dtype)

    @jax.jit
    def gradient(known):
        args = (x, row_weight, weights, jnp.zeros((2, E, F)))
        run = lambda *args: jnp.vdot(pull, routed_experts(magnitudes, *args, d, pool, known))  # noqa: E731
        return jax.tree.leaves(jax.grad(run, (0, 1, 2, 3))(*args))

    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    rows = expert_rows(x.astype(jnp.float32), wide, d, pool)
    computed = gradient(None)
    # Sums of two compilations round apart; in bfloat16 the whole arrays are rounded between steps.
    error = 2e-6 if dtype == jnp.float32 else 0.02
    for found, wanted in zip(gradient((rows.gate, rows.up)), computed, strict=True):
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert np.abs(found - wanted).max() <= error * np.abs(wanted).max()
    # and they are used: others change the scores
    assert not np.allclose(gradient((2 * rows.gate, rows.up))[-1], computed[-1], rtol=0.1)


def test_bfloat16_stays_close_to_float32(problem):
    p, d, pool = problem, problem["dispatch"], problem["experts"].pool
    row_weight = gather_rows(p["weight"].reshape(-1), d, 1)
    probe = jnp.zeros((0, E, F))
    run = jax.jit(lambda x, w: routed_experts(no_score, x, row_weight, w, probe, d, pool))
    exact = run(p["x"], p["experts"].weights)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p["experts"].weights)
    found = run(p["x"].astype(jnp.bfloat16), narrow)
    assert found.dtype == jnp.bfloat16
    # 8 bits of mantissa in weights, tokens and hidden rows
    assert np.abs(found.astype(jnp.float32) - exact).max() < 0.03 * np.abs(exact).max()


def test_sums_taken_in_the_loop_equal_those_of_whole_arrays(problem):
    p, d = problem, problem["dispatch"]
    row_weight = gather_rows(p["weight"].reshape(-1), d, 1)
    if min(p["counts"]) < F:
        with pytest.raises(AssertionError, match="experts of one width"):
            observe_experts(p["experts"], p["x"], row_weight, d)
        return
    q = jnp.asarray(np.random.default_rng(2).random(N), jnp.float32)
    results = []
    for observe, weigh in (
        (observe_experts, output_sums),
        (observe_by_rows, output_sums_by_rows),
    ):
        y, seen = jax.jit(observe)(p["experts"], p["x"], row_weight, d)
        sums = jax.jit(weigh)(p["experts"], seen.hidden, row_weight, d, q, y)
        real = np.asarray(d.row_copy) < N * K
        results.append((y, seen.squares, np.asarray(seen.out_square)[real], sums))
    for loop, whole in zip(*results, strict=True):
        np.testing.assert_allclose(loop, whole, rtol=1e-4, atol=1e-5)
