"""Streamed ablations against whole models whose weights are zeroed or whose routers are cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.experts.pool import dense_experts
from moe_jax.transformer import Transformer
from pruning.scores.ablation import Ablation, ablate, layer_visits
from tests.support.loud import loud_model, unequal_text

E, F = 6, 12
CONFIG = ModelConfig(
    vocab_size=64, d_model=16, num_layers=4, max_position=32, norm_eps=1e-6, tie_embeddings=True,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, qk_norm=True),
    moe=MoEConfig(num_experts=E, experts_per_token=2, d_expert=F, renormalize=True, d_shared=8),
    d_dense=20, dense_layers=(1,),
)  # fmt: skip
ABLATIONS = [
    Ablation(3, 0), Ablation(0, 2), Ablation(2, 4, channel=7), Ablation(0, 2, reroute=True),
    Ablation(2, 5, reroute=True), Ablation(0, 0, channel=0), Ablation(2, 5),
    Ablation(3, 5, channel=11), Ablation(3, 1, reroute=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    return loud_model(CONFIG)


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray]:
    return unequal_text()


@jax.jit
def whole_loss(model: Transformer, tokens, valid) -> jax.Array:
    nll = optax.softmax_cross_entropy_with_integer_labels(
        model(tokens, valid)[:, :-1], tokens[:, 1:]
    )
    return jnp.where(valid[:, 1:], nll, 0).sum()


def without(model: Transformer, one: Ablation) -> Transformer:
    """The model by hand: rows of w_down zeroed, or the expert and its router row deleted."""
    layer = model.layers[one.layer]
    mlp, experts = layer.mlp, layer.mlp.experts
    if one.reroute:
        others = [e for e in range(E) if e != one.expert]
        cut = [
            w.reshape(E, F, -1)[np.array(others)].reshape((E - 1) * F, -1)
            for w in (experts.w_gate, experts.w_up, experts.w_down)
        ]
        mlp = dataclasses.replace(
            mlp,
            router=mlp.router[np.array(others)],
            experts=dense_experts(*cut, E - 1),
            config=dataclasses.replace(mlp.config, num_experts=E - 1),
        )
    else:
        down = np.array(experts.w_down).reshape(E, F, -1)
        down[one.expert, slice(None) if one.channel is None else one.channel] = 0
        down = jnp.asarray(down.reshape(E * F, -1))
        mlp = dataclasses.replace(mlp, experts=dataclasses.replace(experts, w_down=down))
    layers = list(model.layers)
    layers[one.layer] = dataclasses.replace(layer, mlp=mlp)
    return dataclasses.replace(model, layers=tuple(layers))


@pytest.fixture(scope="module")
def expected(model, text) -> tuple[float, list[float]]:
    losses = [float(whole_loss(without(model, a), *text)) for a in ABLATIONS]
    return float(whole_loss(model, *text)), losses


@pytest.mark.slow
def test_every_ablated_loss_is_that_of_a_model_changed_by_hand(model, text, expected):
    dense, losses = ablate(model, *text, ABLATIONS, batch=2)
    # Losses of some 100 nats in float32.
    assert dense == pytest.approx(expected[0], rel=2e-5)
    np.testing.assert_allclose(losses, expected[1], rtol=2e-5)
    assert np.abs(losses - dense).min() > 1e-2, "an ablation that changes nothing tests nothing"


def test_little_memory_takes_more_passes_and_finds_the_same(model, text, expected):
    steps = []
    state = 6 * 10 * 16 * 4  # bytes of the padded text at one layer
    dense, losses = ablate(
        model, *text, ABLATIONS, batch=2, memory=3 * state, on_step=lambda *at: steps.append(at)
    )
    np.testing.assert_allclose([dense, *losses], [expected[0], *expected[1]], rtol=2e-5)
    # Two ablations and the dense model at a time: five passes.
    assert len(steps) == 5 * 4
    assert steps[-1] == (5 * 4 + 3 * 4 + 3 * 2 + 3 * 1, 41)


def test_the_announced_visits_count_layers_from_the_ablated_one_on():
    assert layer_visits(ABLATIONS, 4) == 4 + 3 * 4 + 3 * 2 + 3 * 1
    assert layer_visits([], 4) == 4


def test_without_ablations_the_dense_loss_comes_alone(model, text, expected):
    dense, losses = ablate(model, *text, [], batch=2)
    assert dense == pytest.approx(expected[0], rel=2e-5) and losses.shape == (0,)


@pytest.mark.parametrize(
    "wrong",
    [Ablation(1, 0), Ablation(0, 6), Ablation(0, 0, channel=12), Ablation(4, 0), Ablation(0, -1),
     Ablation(0, 0, channel=-1), Ablation(0, 0, channel=3, reroute=True)],
)  # fmt: skip
def test_what_is_not_in_the_model_is_refused(model, text, wrong):
    with pytest.raises(ValueError, match=r"is not in the model, which has 6 experts of 12"):
        ablate(model, *text, [wrong])
