"""Statistics against brute-force loops in numpy, autograd and whole-model gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.experts.dispatch import sum_by_expert
from moe_jax.experts.grouped_matmul import on_cpu
from moe_jax.experts.run import gated_experts
from moe_jax.transformer import Transformer, init
from pruning.scores import states
from pruning.scores.collect import collect_statistics
from pruning.scores.layer import GRADIENT_SCORES

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=16,
    num_layers=3,
    max_position=32,
    norm_eps=1e-6,
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, qk_norm=True),
    moe=MoEConfig(num_experts=6, experts_per_token=2, d_expert=12, renormalize=False, d_shared=8),
    d_dense=20,
    dense_layers=(1,),
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    # Weights of order one: with the usual 0.02 every layer is close to the identity and a wrong
    # sum would hide below the tolerance.
    model = init(CONFIG, jax.random.key(0))
    grow = lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf  # noqa: E731
    return jax.tree.map(grow, model)


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (6, 10)).astype(np.int32)
    valid = np.arange(10)[None] < rng.integers(3, 11, (6, 1))
    return tokens, valid


@pytest.fixture(scope="module")
def statistics(model, batch):
    return collect_statistics(model, *batch, gradients=True, batch=3)


def layer_inputs(model: Transformer, tokens, valid):
    """Normalised input of each expert layer and the layer's output, token by token."""
    from moe_jax.attention.context import make_context
    from moe_jax.norm import rms_norm

    context = make_context(CONFIG.attention, CONFIG.max_position, jnp.asarray(valid))
    x = model.embedding(jnp.asarray(tokens), jnp.float32)

    @jax.jit
    def run(layer, x):
        attended, _ = layer.attention(
            rms_norm(x, layer.attention_norm, layer.norm_eps), context, None
        )
        return rms_norm(x + attended, layer.mlp_norm, layer.norm_eps), layer(x, context)

    for layer in model.layers:
        middle, x = run(layer, x)
        yield layer, np.asarray(middle, np.float64), np.asarray(x, np.float64)


def test_forward_sums_equal_a_loop_over_tokens_and_experts(model, batch, statistics):
    tokens, valid = batch
    layers = [item for item in layer_inputs(model, tokens, valid)]
    slot = 0
    for index, (layer, x, out) in enumerate(layers):
        if index in CONFIG.dense_layers:
            continue
        moe = layer.mlp
        gate, up, down = (
            np.asarray(w, np.float64).reshape(6, 12, 16)
            for w in (moe.experts.w_gate, moe.experts.w_up, moe.experts.w_down)
        )
        expected = {
            name: np.zeros((6, 12))
            for name in ("hidden_square", "up_square", "gate_square", "weighted_square", "energy",
                         "shapley")
        }  # fmt: skip
        expected |= {
            name: np.zeros(6)
            for name in ("phi", "kappa", "tokens", "gate_mass", "output_norm",
                         "weighted_output_norm", "output_square")
        }  # fmt: skip
        energy = entropy = 0.0
        for b, t in zip(*np.nonzero(valid), strict=True):
            token = x[b, t]
            logits = np.asarray(moe.router, np.float64) @ token
            probability = np.exp(logits - logits.max())
            probability /= probability.sum()
            chosen = np.argsort(-probability)[:2]
            q = 1 / (out[b, t] @ out[b, t] + 1e-6)
            parts = {}
            for e in chosen:
                g, p = gate[e] @ token, up[e] @ token
                h = g / (1 + np.exp(-g)) * p
                parts[e] = (g, p, h, h @ down[e], probability[e])
            y = sum(w * z for *_, z, w in parts.values())
            energy += q * y @ y
            entropy -= probability @ np.log(probability)
            for e, (g, p, h, z, w) in parts.items():
                expected["hidden_square"][e] += h**2
                expected["up_square"][e] += p**2
                expected["gate_square"][e] += g**2
                expected["weighted_square"][e] += (w * h) ** 2
                expected["energy"][e] += q * (w * h) ** 2 * (down[e] ** 2).sum(axis=1)
                expected["shapley"][e] += q * w * h * (down[e] @ y)
                expected["phi"][e] += q * w * z @ y
                expected["kappa"][e] += q * w**2 * z @ z
                expected["tokens"][e] += 1
                expected["gate_mass"][e] += w
                expected["output_norm"][e] += np.sqrt(z @ z)
                expected["weighted_output_norm"][e] += w * np.sqrt(z @ z)
                expected["output_square"][e] += z @ z
        for name, value in expected.items():
            # float32 forward against float64 loops
            np.testing.assert_allclose(
                getattr(statistics, name)[slot], value, rtol=2e-4, atol=1e-5 * np.abs(value).max()
            )
        np.testing.assert_allclose(statistics.layer_energy[slot], energy, rtol=1e-4)
        np.testing.assert_allclose(statistics.router_entropy[slot], entropy, rtol=1e-4)
        slot += 1
    assert statistics.total_tokens == valid.sum()


def test_channel_shapley_values_sum_to_the_expert_and_the_expert_to_the_layer(statistics):
    np.testing.assert_allclose(statistics.shapley.sum(axis=2), statistics.phi, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics.phi.sum(axis=1), statistics.layer_energy, rtol=1e-5)


def whole_loss(model, tokens, valid, gates):
    """Summed next-token loss with a multiplier on every channel, by one plain forward."""
    from moe_jax.attention.context import make_context

    context = make_context(CONFIG.attention, CONFIG.max_position, valid)
    x = model.embedding(tokens, jnp.float32)
    slot = 0
    for index, layer in enumerate(model.layers):
        if index in CONFIG.dense_layers:
            x = layer(x, context)
            continue
        multiplier = gates[slot]

        def gate(h, dispatch, multiplier=multiplier):
            return h * jnp.repeat(multiplier[dispatch.tile_expert], dispatch.tile, axis=0)

        x = layer(x, context, gated_experts(gate))
        slot += 1
    nll = optax.softmax_cross_entropy_with_integer_labels(model.head(x[:, :-1]), tokens[:, 1:])
    return jnp.sum(jnp.where(valid[:, 1:] & valid[:, :-1], nll, 0.0))


def test_streamed_taylor_scores_equal_the_whole_model_gradient(model, batch, statistics):
    tokens, valid = map(jnp.asarray, batch)
    gates = jnp.ones((2, 6, 12))
    whole = jax.jit(jax.value_and_grad(functools.partial(whole_loss, model, tokens, valid)))
    loss, gradient = whole(gates)
    np.testing.assert_allclose(statistics.taylor, gradient, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(statistics.loss_sum, loss, rtol=1e-5)


def test_taylor_scores_equal_finite_differences(model, batch, statistics):
    tokens, valid = map(jnp.asarray, batch)
    loss = jax.jit(functools.partial(whole_loss, model, tokens, valid))
    strongest = np.argsort(-np.abs(statistics.taylor), axis=None)[:4]
    for flat in strongest:
        place = np.unravel_index(flat, (2, 6, 12))
        step = jnp.zeros((2, 6, 12)).at[place].set(1e-2)
        slope = float(loss(1 + step) - loss(1 - step)) / 2e-2
        # float32 losses of about 200 nats limit the difference quotient
        np.testing.assert_allclose(statistics.taylor[place], slope, rtol=2e-2)


def test_expert_gradient_is_the_sum_of_its_channels(model, batch, statistics):
    tokens, valid = map(jnp.asarray, batch)

    def loss(expert_gates):  # [2, 6]: a multiplier on the whole expert
        return whole_loss(model, tokens, valid, expert_gates[:, :, None] * jnp.ones((1, 1, 12)))

    gradient = jax.jit(jax.grad(loss))(jnp.ones((2, 6)))
    np.testing.assert_allclose(statistics.taylor.sum(axis=2), gradient, rtol=1e-3, atol=1e-4)


def test_closed_form_equals_autograd_of_the_paper_loss(model, batch, statistics):
    """Gradient of the local reconstruction loss with every expert output scaled by 0.9."""
    from moe_jax.attention.context import make_context

    tokens, valid = map(jnp.asarray, batch)
    context = make_context(CONFIG.attention, CONFIG.max_position, valid)
    layer = model.layers[0]
    x = model.embedding(tokens, jnp.float32)
    target = jax.jit(layer)(x, context)
    q = jnp.where(valid, 1 / (jnp.sum(target**2, axis=-1) + 1e-6), 0.0)

    def loss(multiplier):  # [E]
        def gate(h, dispatch):
            return h * jnp.repeat(multiplier[dispatch.tile_expert], dispatch.tile)[:, None]

        error = layer(x, context, gated_experts(gate)) - target
        return jnp.sum(q * jnp.sum(error**2, axis=-1))

    at = jnp.full(6, 0.9)
    slope = jax.jit(jax.value_and_grad(loss))
    value, gradient = slope(at)
    # -<dL/dz, z> with z the scaled output is minus the multiplier times its gradient.
    np.testing.assert_allclose(-at * gradient, 0.18 * statistics.phi[0], rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(value, 0.01 * statistics.layer_energy[0], rtol=2e-3)
    np.testing.assert_allclose(slope(jnp.ones(6))[1], np.zeros(6), atol=1e-6)


def test_abs_and_squared_scores_sum_over_single_tokens(model, batch, statistics):
    """One sequence of two tokens has one predicted token: |s| and s^2 follow by hand."""
    tokens, valid = batch[0][:1, :2], np.ones((1, 2), bool)
    one = collect_statistics(model, tokens, valid, gradients=True, batch=1)
    routed_once = one.tokens == 1
    s = one.taylor[routed_once]
    np.testing.assert_allclose(one.abs_taylor[routed_once], np.abs(s), rtol=1e-5)
    np.testing.assert_allclose(one.fisher[routed_once], s**2, rtol=1e-5)
    assert (statistics.abs_taylor >= np.abs(statistics.taylor) - 1e-6).all()


@pytest.mark.slow
def test_order_batch_size_and_padding_change_nothing(model, batch, statistics):
    tokens, valid = batch
    order = np.array([4, 1, 5, 0, 3, 2])
    wider = np.pad(tokens[order], ((0, 0), (0, 3)), constant_values=7)
    mask = np.pad(valid[order], ((0, 0), (0, 3)))
    other = collect_statistics(model, wider, mask, gradients=True, batch=2)
    for name in ("hidden_square", "energy", "shapley", "phi", "tokens", "taylor", "fisher"):
        expected = getattr(statistics, name)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(getattr(other, name), expected, rtol=1e-3, atol=1e-5 * scale)
    assert other.total_tokens == statistics.total_tokens


@pytest.mark.slow
@pytest.mark.skipif(not on_cpu(), reason="only the loops of a CPU take kept projections")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_projections_kept_within_their_budget_change_no_score(model, batch, monkeypatch, dtype):
    one = states.projection_bytes(CONFIG.moe, 2 * 10)
    kept, keep = [], states.Projections.keep

    def spy(self, layer, rows, arrays):
        kept.append((layer, rows.start, sum(part.nbytes for part in arrays.projections)))
        keep(self, layer, rows, arrays)

    monkeypatch.setattr(states.Projections, "keep", spy)
    found = {}
    for room in (0, 1, 4, 6):  # of three batches in each of the layers 0 and 2
        kept.clear()
        monkeypatch.setattr(states, "MEMORY_PROJECTIONS", room * one + one // 2)
        found[room] = collect_statistics(model, *batch, gradients=True, batch=2, dtype=dtype)
        whole = [(layer, start, one) for layer in (0, 2) for start in (0, 2, 4)]
        assert kept == (whole[:room] if room > 1 else [])  # less than a quarter is not worth it
    exact = collect_statistics(model, *batch, gradients=True, batch=2)
    for name in GRADIENT_SCORES:
        wanted = getattr(exact, name)
        off = [np.linalg.norm(getattr(found[room], name) - wanted) for room in found]
        if dtype == jnp.float32:  # sums of two compilations round apart
            assert max(off) < 1e-5 * np.linalg.norm(wanted)
        else:  # every step rounds, in each compilation at other places: none is better than others
            assert max(off) < 1.5 * min(off)


def test_statistics_of_two_texts_merge_to_those_of_both(model, batch, statistics):
    tokens, valid = batch
    halves = [
        collect_statistics(model, tokens[i : i + 3], valid[i : i + 3], gradients=True, batch=3)
        for i in (0, 3)
    ]
    merged = halves[0].merge(halves[1])
    np.testing.assert_allclose(merged.energy, statistics.energy, rtol=1e-6)
    np.testing.assert_allclose(merged.down_norm, statistics.down_norm)


def test_every_layer_is_visited_once_per_sweep(model, batch):
    visits = []
    collect_statistics(
        model, *batch, batch=2, on_step=lambda done, total: visits.append((done, total))
    )
    assert visits == [(i, 3) for i in range(1, 4)]


def test_tile_sums_ignore_padding_rows():
    from moe_jax.experts.dispatch import gather_rows, make_dispatch

    expert = jnp.asarray([1, 0, 3, 1, 1, 3, 0], jnp.int32)  # 3 means nowhere
    dispatch = make_dispatch(expert, 3, 2)
    values = jnp.arange(1.0, 8.0)[:, None]
    sums = sum_by_expert(gather_rows(values, dispatch, 1), dispatch)
    np.testing.assert_array_equal(sums[:, 0], [2 + 7, 1 + 4 + 5, 0])
    np.testing.assert_array_equal(dispatch.tokens, [2, 3, 0])


@pytest.mark.slow
def test_the_way_back_ends_at_the_lowest_layer_with_experts():
    config = dataclasses.replace(CONFIG, dense_layers=(0,))
    found, visits, read = init(config, jax.random.key(0)), [], []

    class Counted:
        """The model, which says how often a layer was read."""

        def __getattr__(self, name):
            return getattr(found, name)

        def __len__(self):
            return len(found)

        def layer(self, index):
            read.append(index)
            return found.layer(index)

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 8)).astype(np.int32)
    statistics = collect_statistics(
        Counted(), tokens, np.ones((2, 8), bool), gradients=True, batch=2,
        on_step=lambda done, total: visits.append((done, total)),
    )  # fmt: skip
    assert read == [0, 1, 2, 2, 1] and visits[-1] == (5, 5)
    assert (statistics.abs_taylor.sum(axis=(1, 2)) > 0).all()
