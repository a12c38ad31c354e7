"""The training loop: it learns, it resumes bit for bit, and its losses follow by hand."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.experts.dispatch import make_dispatch
from moe_jax.experts.moe import MoETrace
from moe_jax.losses import balance_loss, language_model_loss
from moe_jax.training import (
    HeldOut,
    TrainingConfig,
    split_parameters,
    train,
)
from moe_jax.transformer import Transformer, init

CONFIG = ModelConfig(
    vocab_size=16,
    d_model=8,
    num_layers=1,
    max_position=16,
    norm_eps=1e-6,
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4),
    moe=MoEConfig(num_experts=4, experts_per_token=2, d_expert=6, renormalize=True),
)
TOKENS = np.random.default_rng(0).integers(0, 16, (3, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return init(CONFIG, jax.random.key(0))


@pytest.fixture
def optax_promotes():
    """Adam's bias correction in optax raises a float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def squares(parameters, batch):
    x, y = batch
    error = x @ parameters["matrix"] + parameters["offset"][None] - y
    loss = jnp.square(error).mean()
    return loss, {"loss": loss}


def square_batch(step: int):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(4, 3)).astype(np.float32)
    return x, x[:, :2] + 1


def start():
    return {"matrix": jnp.full((3, 2), 0.3), "offset": jnp.zeros(2)}


SQUARES = TrainingConfig(
    steps=7, learning_rate=0.1, warmup_steps=2, checkpoint_every=2, log_every=3
)


def trace_of(logits, expert, valid) -> MoETrace:
    """A trace with real routing and nothing computed."""
    tokens, copies = expert.shape
    owner = jnp.where(valid[:, None], expert, logits.shape[1]).reshape(-1)
    return MoETrace(
        logits=logits,
        weight=jnp.ones((tokens, copies)),
        expert=expert,
        valid=valid,
        dispatch=make_dispatch(owner, logits.shape[1], 8),
        row_weight=jnp.ones(1),
        kept=None,
        routed=jnp.zeros((tokens, 1)),
    )


@pytest.mark.usefixtures("optax_promotes")
def test_the_loss_of_a_tiny_language_model_falls(model):
    parameters, rebuild = split_parameters(model)
    logged = []
    config = TrainingConfig(
        steps=40, learning_rate=2e-2, warmup_steps=2, log_every=10, weight_decay=0.0
    )
    trained = train(
        parameters,
        lambda parameters, tokens: language_model_loss(rebuild(parameters), tokens),
        lambda step: TOKENS,
        config,
        on_log=lambda step, means: logged.append((step, means)),
    )
    assert [step for step, _ in logged] == [10, 20, 30, 40]
    assert logged[0][1]["nll"] > logged[-1][1]["nll"] + 0.5
    assert {"nll", "balance", "idlest", "gradient_norm", "steps_per_second"} <= set(logged[0][1])
    assert set(trained) == set(parameters)


@pytest.mark.usefixtures("optax_promotes")
def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path):
    straight = train(start(), squares, square_batch, SQUARES)

    def interrupted(step):
        if step == 5:
            while not (tmp_path / "run" / "4").is_dir():  # saving runs in the background
                time.sleep(0.01)
            raise KeyboardInterrupt
        return square_batch(step)

    with pytest.raises(KeyboardInterrupt):
        train(start(), squares, interrupted, SQUARES, checkpoints=tmp_path / "run")
    steps = []

    def resumed(step):
        steps.append(step)
        return square_batch(step)

    finished = train(start(), squares, resumed, SQUARES, checkpoints=tmp_path / "run")
    assert steps == [4, 5, 6]
    for name, value in straight.items():
        np.testing.assert_array_equal(finished[name], value)
    again = train(start(), squares, resumed, SQUARES, checkpoints=tmp_path / "run")
    assert steps == [4, 5, 6]
    np.testing.assert_array_equal(again["matrix"], straight["matrix"])


@pytest.mark.usefixtures("optax_promotes")
def test_metrics_are_means_over_the_steps_since_the_last_log():
    logged = []
    parameters = start()
    losses = [float(squares(parameters, square_batch(step))[0]) for step in range(7)]
    still = TrainingConfig(
        steps=7, learning_rate=0.0, warmup_steps=1, log_every=3, weight_decay=0.0
    )
    train(parameters, squares, square_batch, still, on_log=lambda *log: logged.append(log))
    expected = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    assert [step for step, _ in logged] == [3, 6, 7]
    np.testing.assert_allclose([means["loss"] for _, means in logged], expected, rtol=1e-6)


@pytest.mark.usefixtures("optax_promotes")
def test_weight_decay_shrinks_matrices_and_spares_vectors():
    config = TrainingConfig(steps=10, learning_rate=0.5, warmup_steps=1, weight_decay=0.1)
    optimizer = config.optimizer()
    parameters = {"matrix": jnp.full((2, 2), 4.0), "norm": jnp.full(2, 4.0)}
    nothing = jax.tree.map(jnp.zeros_like, parameters)
    _, state = optimizer.update(nothing, optimizer.init(parameters), parameters)
    updates, _ = optimizer.update(nothing, state, parameters)  # the first step's rate is zero
    np.testing.assert_allclose(updates["matrix"], -0.5 * 0.1 * 4.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"], 0)


def test_gradients_of_several_batches_are_averaged_before_a_step():
    parts = [square_batch(step) for step in range(3)]
    joined = tuple(np.concatenate(side) for side in zip(*parts, strict=True))
    stacked = tuple(np.stack(side) for side in zip(*parts, strict=True))
    config = dataclasses.replace(SQUARES, steps=3, accumulate=3)
    several = train(start(), squares, lambda step: stacked, config)
    whole = train(start(), squares, lambda step: joined, dataclasses.replace(config, accumulate=1))
    for name, value in whole.items():
        np.testing.assert_allclose(several[name], value, rtol=1e-5)
    assert np.abs(whole["matrix"] - start()["matrix"]).max() > 0.05


def test_a_part_of_the_parameters_has_a_learning_rate_of_its_own():
    two = dataclasses.replace(SQUARES, steps=2, warmup_steps=1)
    one = train(start(), squares, square_batch, two)
    config = dataclasses.replace(two, group_rates={"offset": 0.25})
    other = train(start(), squares, square_batch, config)
    np.testing.assert_allclose(other["matrix"], one["matrix"], rtol=1e-6)
    moved = [np.asarray(x["offset"] - start()["offset"]) for x in (one, other)]
    np.testing.assert_allclose(moved[1], 0.25 * moved[0], rtol=1e-5)
    assert np.abs(moved[0]).min() > 0


def test_a_rate_may_be_that_of_a_part_of_a_part():
    parameters = {"a": {"one": jnp.ones(2), "two": jnp.ones(2)}, "b": jnp.ones(2)}

    def falling(parameters, batch):
        return sum(leaf.sum() for leaf in jax.tree.leaves(parameters)), {}

    rates = {"a": {"one": 0.5}, "b": 0.25}
    config = TrainingConfig(steps=2, learning_rate=0.1, warmup_steps=1, weight_decay=0.0,
                            group_rates=rates)  # fmt: skip
    found = train(parameters, falling, lambda step: None, config)
    # Adam moves by the rate against a gradient that stays the same; the first step's rate is zero.
    moved = [1 - float(leaf[0]) for leaf in (found["a"]["one"], found["a"]["two"], found["b"])]
    np.testing.assert_allclose(moved, [0.05, 0.1, 0.025], rtol=1e-4)


def test_arrays_of_a_partial_loss_are_no_constants_of_the_program():
    def scaled(factor, parameters, batch):
        loss, metrics = squares(parameters, batch)
        return factor * loss, metrics

    one = train(start(), squares, square_batch, SQUARES)
    partial = jax.tree_util.Partial(scaled, jnp.asarray(1.0))
    np.testing.assert_array_equal(
        train(start(), partial, square_batch, SQUARES)["matrix"], one["matrix"]
    )


def held_losses(*losses):
    """A held-out loss that falls and rises as told, and the steps at which it was asked for."""
    asked = []

    def loss(step, parameters):
        asked.append((step, np.asarray(parameters["offset"])))
        return losses[len(asked) - 1]

    return loss, asked


def test_the_parameters_with_the_least_held_out_loss_are_taken():
    loss, asked = held_losses(5.0, 2.0, 1.0, 4.0, 3.0)
    found = train(start(), squares, square_batch, SQUARES, held_out=HeldOut(loss, 2))
    assert [step for step, _ in asked] == [0, 2, 4, 6, 7]
    np.testing.assert_array_equal(found["offset"], asked[2][1])


def test_training_that_only_hurts_gives_the_first_parameters_back_and_ends_early():
    loss, asked = held_losses(1.0, 2.0, 3.0)
    found = train(start(), squares, square_batch, SQUARES, held_out=HeldOut(loss, 2, 2))
    assert [step for step, _ in asked] == [0, 2, 4]
    np.testing.assert_array_equal(found["matrix"], start()["matrix"])


def test_a_run_killed_between_measurements_still_finds_the_same_best(tmp_path):
    def loss(step, parameters):
        return float(jnp.square(parameters["matrix"] - 0.35).sum())  # passes by, and goes on

    straight = train(start(), squares, square_batch, SQUARES, held_out=HeldOut(loss, 3))

    def interrupted(step):
        if step == 5:
            raise KeyboardInterrupt
        return square_batch(step)

    how = {"checkpoints": tmp_path / "run", "held_out": HeldOut(loss, 3)}
    with pytest.raises(KeyboardInterrupt):
        train(start(), squares, interrupted, SQUARES, **how)
    again = train(start(), squares, square_batch, SQUARES, **how)
    for name, value in straight.items():
        np.testing.assert_array_equal(again[name], value)


def test_balance_loss_is_one_for_even_load_and_the_expert_count_for_one_expert():
    even = trace_of(jnp.zeros((4, 4)), jnp.arange(4)[:, None], jnp.ones(4, bool))
    np.testing.assert_allclose(balance_loss(even), 1.0, rtol=1e-6)
    certain = jnp.zeros((4, 4)).at[:, 2].set(50.0)
    one = trace_of(certain, jnp.full((4, 1), 2), jnp.ones(4, bool))
    np.testing.assert_allclose(balance_loss(one), 4.0, rtol=1e-6)


def test_balance_loss_follows_by_hand_and_ignores_padding():
    # Probabilities 1/2, 1/4, 1/4 and 1/4, 1/2, 1/4: means 3/8, 3/8, 1/4. Copies go to experts
    # 0, 1 and 1, 0: shares 1/2, 1/2, 0. 3 x (3/16 + 3/16) = 9/8.
    logits = jnp.log(jnp.asarray([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 98.0]]))
    expert = jnp.asarray([[0, 1], [1, 0], [2, 0]], jnp.int32)
    trace = trace_of(logits, expert, jnp.asarray([True, True, False]))
    np.testing.assert_allclose(balance_loss(trace), 9 / 8, rtol=1e-6)


def test_the_language_model_loss_predicts_each_token_from_those_before(model):
    big = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim == 2 else leaf, model)
    logits = np.asarray(jax.jit(lambda model: model(TOKENS))(big), np.float64)
    nll = []
    for row, line in zip(TOKENS, logits, strict=True):
        for t in range(len(row) - 1):
            nll.append(np.log(np.exp(line[t]).sum()) - line[t, row[t + 1]])
    loss, metrics = jax.jit(functools.partial(language_model_loss, balance_weight=0.5))(big, TOKENS)
    np.testing.assert_allclose(metrics["nll"], np.mean(nll), rtol=1e-4)
    assert abs(np.mean(nll) - np.log(16)) > 0.1  # the model is not indifferent
    np.testing.assert_allclose(loss, metrics["nll"] + 0.5 * metrics["balance"], rtol=1e-6)
    expert = jax.jit(lambda model: model.hidden(TOKENS)[1][0].expert)(big)
    load = np.bincount(np.asarray(expert).ravel(), minlength=4)
    np.testing.assert_allclose(metrics["idlest"], load.min() / load.mean(), rtol=1e-6)


def test_splitting_and_rebuilding_gives_the_model_back(model):
    parameters, rebuild = split_parameters(model)
    assert "layers.0.mlp.experts.w_down" in parameters
    assert "layers.0.mlp.experts.count" not in parameters
    same = rebuild(parameters)
    assert jax.tree.structure(same) == jax.tree.structure(model)
    doubled = rebuild({name: 2 * leaf for name, leaf in parameters.items()})
    np.testing.assert_array_equal(doubled.embedding.weight, 2 * model.embedding.weight)
    np.testing.assert_array_equal(
        doubled.layers[0].mlp.experts.count, model.layers[0].mlp.experts.count
    )
