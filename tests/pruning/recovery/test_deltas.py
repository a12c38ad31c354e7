"""Trained changes: formulas against loops in numpy, and what must stay as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.quant import QTensor, dequantize
from moe_jax.quantized import quantize_layer
from pruning.recovery.deltas import DeltaConfig, init_deltas, merged, rounded
from tests.pruning.recovery.students import COUNTS, dense_model, experts_of, pruned_model, stirred

TOKENS = np.random.default_rng(2).integers(0, 48, (2, 9)).astype(np.int32)
KINDS = {
    "router": DeltaConfig(train="router", router_rank=0),
    "lora": DeltaConfig(train="lora", rank=3, alpha=6.0, attention_rank=2),
    "dora": DeltaConfig(rank=3, alpha=6.0, attention_rank=2),
    "full": DeltaConfig(train="full", router_rank=0),
}


@pytest.fixture(scope="module")
def student():
    return pruned_model(dense_model())


def logits(model) -> np.ndarray:
    return np.asarray(jax.jit(lambda model: model(TOKENS))(model))


def with_merged(model, config, change=lambda deltas: deltas):
    merge = jax.jit(merged, static_argnames="config")
    layers = tuple(
        merge(layer, change(init_deltas(layer, config, jax.random.key(i))), config=config)
        for i, layer in enumerate(model.layers)
    )
    return dataclasses.replace(model, layers=layers)


def spans(index: int):
    """(expert, its rows of the pool)."""
    ends = np.cumsum(COUNTS[index])
    return [(e, slice(ends[e] - n, ends[e])) for e, n in enumerate(COUNTS[index])]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_changes_begin_as_nothing_bit_for_bit(student, kind):
    np.testing.assert_array_equal(logits(with_merged(student, KINDS[kind])), logits(student))


def test_dora_is_the_formula_expert_by_expert(student):
    config, index = KINDS["dora"], 0
    layer = student.layers[index]
    deltas = stirred(init_deltas(layer, config, jax.random.key(0)))
    found = experts_of(jax.jit(merged, static_argnames="config")(layer, deltas, config=config))
    before, ratio = experts_of(layer), config.alpha / config.rank
    for name in ("w_gate", "w_up", "w_down"):
        own = {key: np.asarray(value, np.float64) for key, value in deltas["experts"][name].items()}
        for e, rows in spans(index):
            old = np.asarray(getattr(before, name), np.float64)[rows]
            if name == "w_down":  # as Hugging Face has it: [D, channels], a row for each output
                old, b, a = old.T, own["expert"][e].T, own["channel"][rows].T
                magnitude = own["magnitude"][e]
            else:
                b, a, magnitude = own["channel"][rows], own["expert"][e], own["magnitude"][rows]
            direction = old + ratio * b @ a
            wanted = np.zeros_like(direction)
            for row in range(len(direction)):
                if length := np.sqrt((direction[row] ** 2).sum()):
                    size = np.sqrt((old[row] ** 2).sum()) + magnitude[row]
                    wanted[row] = size * direction[row] / length
            wanted = wanted.T if name == "w_down" else wanted
            np.testing.assert_allclose(getattr(found, name)[rows], wanted, atol=2e-5)
            assert not len(wanted) or np.abs(wanted - np.asarray(getattr(before, name))[rows]).max()


def test_lora_is_the_product_alone(student):
    config, layer = KINDS["lora"], student.layers[0]
    deltas = stirred(init_deltas(layer, config, jax.random.key(0)))
    found = jax.jit(merged, static_argnames="config")(layer, deltas, config=config)
    before, after, ratio = experts_of(layer), experts_of(found), config.alpha / config.rank
    for name in ("w_gate", "w_up", "w_down"):
        own = {key: np.asarray(value, np.float64) for key, value in deltas["experts"][name].items()}
        assert set(own) == {"channel", "expert"}
        for e, rows in spans(0):
            wanted = ratio * own["channel"][rows] @ own["expert"][e]
            change = np.asarray(getattr(after, name) - getattr(before, name), np.float64)[rows]
            np.testing.assert_allclose(change, wanted, atol=2e-5)
            assert not len(wanted) or np.abs(wanted).max() > 1e-3
    own = deltas["attention"]["w_q"]
    wanted = ratio * np.asarray(own["up"], np.float64) @ np.asarray(own["down"], np.float64)
    np.testing.assert_allclose(found.attention.w_q - layer.attention.w_q, wanted, atol=2e-5)


def test_a_pruned_student_gets_no_channel_back(student):
    for config in (KINDS["lora"], KINDS["dora"], KINDS["full"]):
        layer = student.layers[0]
        deltas = init_deltas(layer, config, jax.random.key(0))
        if config.train != "full":
            deltas = stirred(deltas)
        found = experts_of(merged(layer, deltas, config))
        np.testing.assert_array_equal(found.count, COUNTS[0])
        for name in ("w_gate", "w_up", "w_down"):
            assert getattr(found, name).shape == getattr(experts_of(layer), name).shape
            np.testing.assert_array_equal(getattr(found, name)[sum(COUNTS[0]) :], 0)


@pytest.mark.slow
def test_the_magnitudes_have_a_gradient_and_change_the_output(student):
    config = KINDS["dora"]
    layer = student.layers[1]
    deltas = init_deltas(layer, config, jax.random.key(0))

    def total(deltas):
        model = dataclasses.replace(
            student, layers=(student.layers[0], merged(layer, deltas, config))
        )
        return jnp.square(model(TOKENS)).mean()

    slope = jax.jit(jax.grad(total))(deltas)
    for name in ("w_gate", "w_up", "w_down"):
        assert np.abs(slope["experts"][name]["magnitude"]).max() > 0, name
        # Of two factors one is zero at first, so that only the other has a gradient.
        at_rest, moves = ("expert", "channel") if name != "w_down" else ("channel", "expert")
        np.testing.assert_array_equal(slope["experts"][name][at_rest], 0)
        assert np.abs(slope["experts"][name][moves]).max() > 0, name
    grown = jax.tree.map(jnp.copy, deltas)
    grown["experts"]["w_up"]["magnitude"] += 0.5
    assert abs(float(total(grown)) - float(total(deltas))) > 1e-6


def test_a_fixed_norm_leaves_the_value_and_drops_its_own_gradient(student):
    layer, exact = student.layers[0], KINDS["dora"]
    cheap = dataclasses.replace(exact, fixed_norm=True)
    deltas = stirred(init_deltas(layer, exact, jax.random.key(0)))

    def weight(deltas, config):
        return jnp.square(experts_of(merged(layer, deltas, config)).w_gate).sum()

    assert float(weight(deltas, exact)) == float(weight(deltas, cheap))
    # The norm undoes every change of a row's length: with its gradient nothing is left.
    free, fixed = (
        jax.grad(weight)(deltas, one)["experts"]["w_gate"]["channel"] for one in (exact, cheap)
    )
    assert np.abs(free).max() < 1e-3 * np.abs(fixed).max()


def test_the_router_has_a_rank_and_a_ratio_of_its_own(student):
    layer, config = student.layers[0], DeltaConfig(rank=8, alpha=128.0)
    change = init_deltas(layer, config, jax.random.key(0))["router"]
    assert (change["up"].shape, change["down"].shape) == ((4, 4), (4, 32))
    change = {"up": jnp.ones((4, 4)), "down": change["down"]}
    found = merged(layer, {"router": change}, config).mlp.router - layer.mlp.router
    np.testing.assert_allclose(
        found, np.tile(16.0 / 4 * np.asarray(change["down"]).sum(0), (4, 1)), rtol=1e-4, atol=1e-5
    )
    whole = init_deltas(layer, dataclasses.replace(config, router_rank=0), jax.random.key(0))
    assert whole["router"].shape == (4, 32)


def test_attention_is_adapted_only_when_asked(student):
    layer = student.layers[0]
    assert "attention" not in init_deltas(layer, KINDS["full"], jax.random.key(0))
    config = KINDS["dora"]
    deltas = stirred(init_deltas(layer, config, jax.random.key(0)))
    assert set(deltas["attention"]) == {"w_q", "w_k", "w_v", "w_out"}
    own = {key: np.asarray(value, np.float64) for key, value in deltas["attention"]["w_q"].items()}
    old = np.asarray(layer.attention.w_q, np.float64)
    direction = old + config.alpha / config.rank * own["up"] @ own["down"]
    size = np.linalg.norm(old, axis=1) + own["magnitude"]
    wanted = size[:, None] * direction / np.linalg.norm(direction, axis=1)[:, None]
    found = merged(layer, deltas, config)
    np.testing.assert_allclose(found.attention.w_q, wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_what_is_rounded_in_training_is_what_an_int4_export_stores(student, kind):
    group = 32
    config = dataclasses.replace(KINDS[kind], attention_rank=0, group_size=group)
    layer = student.layers[1]
    deltas = init_deltas(layer, config, jax.random.key(0))
    deltas = stirred(deltas, size=1e-3)
    trained = jax.jit(merged, static_argnames="config")(
        rounded(layer, deltas, group), deltas, config=config
    )
    plain = merged(layer, deltas, dataclasses.replace(config, group_size=None))
    stored = quantize_layer(plain, group)
    for name in ("w_gate", "w_up", "w_down"):
        assert not isinstance(getattr(experts_of(trained), name), QTensor)
        found, wanted = (dequantize(getattr(experts_of(x), name)) for x in (trained, stored))
        rows = slice(0, sum(COUNTS[1]))
        np.testing.assert_array_equal(found[rows], wanted[rows])
    np.testing.assert_array_equal(
        dequantize(trained.attention.w_q), dequantize(stored.attention.w_q)
    )

    def total(deltas, config):
        return jnp.sin(experts_of(merged(layer, deltas, config)).w_gate).sum()

    passed = jax.grad(total)(deltas, config)["experts"]["w_gate"]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(passed))
