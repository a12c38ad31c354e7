"""End-to-end attributions against finite differences and whole models changed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.transformer import Transformer
from pruning.scores.curvature import nll_grad2
from pruning.scores.end_to_end import ig_chunk, ig_visits, nll_ablate, nll_ig
from tests.support.loud import loud_model, unequal_text

E, F = 4, 8
CONFIG = ModelConfig(
    vocab_size=64, d_model=16, num_layers=3, max_position=32, norm_eps=1e-6, tie_embeddings=True,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, qk_norm=True),
    moe=MoEConfig(num_experts=E, experts_per_token=2, d_expert=F, renormalize=True, d_shared=8),
    d_dense=20, dense_layers=(1,),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    return loud_model(CONFIG)


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray]:
    return unequal_text()


@jax.jit
def token_losses(model: Transformer, tokens, valid, gates) -> jax.Array:
    """Losses [B, T - 1] of the model with each expert's w_down rows times its gate [L, E]."""
    layers, slot = list(model.layers), 0
    for index in CONFIG.moe_layers:
        layer = layers[index]
        experts = layer.mlp.experts
        down = experts.w_down * jnp.repeat(gates[slot], F)[:, None]
        mlp = dataclasses.replace(layer.mlp, experts=dataclasses.replace(experts, w_down=down))
        layers[index] = dataclasses.replace(layer, mlp=mlp)
        slot += 1
    logits = dataclasses.replace(model, layers=tuple(layers))(tokens, valid)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


def scaled_loss(model: Transformer, text, gates: np.ndarray) -> float:
    """Loss of the model whose w_down rows are multiplied by the gates [L, E] of their experts."""
    nll = token_losses(model, *text, gates.astype(np.float32))
    return float(np.where(text[1][:, 1:], np.asarray(nll, np.float64), 0).sum())


def bumped(gates: np.ndarray, slot: int, expert: int, by: float) -> np.ndarray:
    gates = gates.copy()
    gates[slot, expert] += by
    return gates


@pytest.mark.parametrize("chunk", [64, 2])
def test_an_integrated_gradient_is_the_mean_of_finite_differences_on_the_path(model, text, chunk):
    found = nll_ig(model, *text, steps=2, batch=2, chunk=chunk)
    h, wanted = 2e-2, np.zeros((2, E))
    for level in (0.25, 0.75):
        for slot, expert in np.ndindex(2, E):
            gates = np.ones((2, E))
            gates[slot] = level
            up, down = (scaled_loss(model, text, bumped(gates, slot, expert, s)) for s in (h, -h))
            wanted[slot, expert] -= (up - down) / (2 * h) / 2
    # Central differences of a float32 loss of about 100 nats: 1e-5 / 4e-2, and curvature.
    np.testing.assert_allclose(found, wanted, atol=5e-3 * np.abs(wanted).max())
    assert np.abs(wanted).min() > 0


def test_an_integrated_gradient_sums_to_the_joint_ablation_of_its_layer(model, text):
    dense = scaled_loss(model, text, np.ones((2, E)))
    wanted = []
    for slot in range(2):
        gates = np.ones((2, E))
        gates[slot] = 0
        wanted.append(scaled_loss(model, text, gates) - dense)
    fine = nll_ig(model, *text, steps=32, batch=5).sum(axis=1)
    np.testing.assert_allclose(fine, wanted, rtol=5e-3, atol=1e-2)


def test_the_second_order_estimate_equals_finite_differences(model, text):
    told: list[tuple[int, int]] = []
    found = nll_grad2(model, *text, batch=2, on_step=lambda *step: told.append(step))
    total = 2 * E * -(-len(text[0]) // 2)  # a product for each expert and batch
    assert told == [(done, total) for done in range(1, total + 1)]
    ones, h = np.ones((2, E)), 0.05
    middle = scaled_loss(model, text, ones)
    for slot, expert in np.ndindex(2, E):
        up, down = (scaled_loss(model, text, bumped(ones, slot, expert, s)) for s in (h, -h))
        wanted = -(up - down) / (2 * h) + 0.5 * (up - 2 * middle + down) / h**2
        # The second difference of a float32 loss loses some 1e-5 / h^2.
        assert found[slot, expert] == pytest.approx(wanted, rel=2e-2, abs=4e-3)


def test_the_second_order_estimate_of_a_model_on_disk_is_refused(text):
    class Elsewhere:
        config = CONFIG

    with pytest.raises(ValueError, match=r"needs it in memory, but got a Elsewhere.*nll_ig"):
        nll_grad2(Elsewhere(), *text)  # type: ignore[arg-type]


def test_the_ablation_of_every_expert_is_the_loss_of_the_model_without_it(model, text):
    found = nll_ablate(model, *text, batch=2)
    dense = scaled_loss(model, text, np.ones((2, E)))
    for slot, expert in np.ndindex(2, E):
        loss = scaled_loss(model, text, bumped(np.ones((2, E)), slot, expert, -1.0))
        assert found[slot, expert] == pytest.approx(loss - dense, rel=1e-3, abs=2e-3)
    assert not np.allclose(found, nll_ablate(model, *text, reroute=True), atol=1e-2)


def test_progress_ends_at_the_announced_visits(model, text):
    steps = []
    nll_ig(model, *text, steps=3, batch=2, chunk=4, on_step=lambda *at: steps.append(at))
    # Two chunks; three levels go forwards and backwards through 3 layers, then through 1.
    assert ig_visits(model, 3) == 3 + 2 * 3 * (3 + 1)
    assert steps[-1] == (2 * 27, 2 * 27)


def test_as_many_windows_go_through_the_layers_at_once_as_their_steps_leave_room_for():
    assert [ig_chunk(steps) for steps in (1, 3, 64, 100)] == [64, 21, 1, 1]


def test_one_step_is_the_gradient_half_way(model, text):
    found = nll_ig(model, *text, steps=1, batch=2, chunk=64)
    h, half = 2e-2, np.ones((2, E))
    half[1] = 0.5
    for expert in range(E):
        up, down = (scaled_loss(model, text, bumped(half, 1, expert, s)) for s in (h, -h))
        wanted = (down - up) / (2 * h)
        assert found[1, expert] == pytest.approx(wanted, abs=5e-3 * np.abs(found).max())


def test_no_step_is_refused(model, text):
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        nll_ig(model, *text, steps=0)
