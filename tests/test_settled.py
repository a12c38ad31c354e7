"""Logits are compared wherever rounding cannot have sent a token elsewhere, and only there."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.checkpoint import open_checkpoint
from convert.reader import SafetensorsFolder
from moe_jax.config import MoEConfig
from moe_jax.router import SCORE_ROUNDING, is_settled, route
from moe_jax.stream import contexts, embed
from pruning.evaluate import logits
from pruning.settled import settled_logits
from pruning.verify import logit_check
from tests import command, tiny

E, K = 8, 3
ROUTERS = {
    "softmax": {},
    "sigmoid": {"score": "sigmoid"},
    "groups by their best": {"num_groups": 4, "groups_per_token": 2, "group_score": "max"},
    "groups by two": {"score": "sigmoid", "num_groups": 4, "groups_per_token": 2,
                      "group_score": "top2"},
}  # fmt: skip


def chosen(values, config, bias) -> np.ndarray:
    return np.sort(np.asarray(route(jnp.asarray(values), config, bias)[1]), axis=-1)


@pytest.mark.parametrize("name", ROUTERS)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), change=st.sampled_from([1e-3, 0.03, 0.3]))
def test_no_change_moves_a_settled_token_and_some_change_moves_any_other(name, seed, change):
    rng = np.random.default_rng(seed)
    config = MoEConfig(
        num_experts=E, experts_per_token=K, d_expert=4, renormalize=True, **ROUTERS[name]
    )
    biased = config.score == "sigmoid"
    bias = jnp.asarray(rng.normal(size=E).astype(np.float32)) if biased else None
    values = rng.normal(size=(40, E)).astype(np.float32)
    settled = np.asarray(is_settled(jnp.asarray(values), config, jnp.full(40, change), bias))
    before = chosen(values, config, bias)
    moved = np.zeros(40, bool)
    # Random directions, and for every set of losers the one that favours all others.
    for number in range(256):
        sign = 1.0 - 2.0 * ((number >> np.arange(E)) & 1)
        for size in (1.0, rng.random()):
            other = values + (sign * size * change).astype(np.float32)
            moved |= (chosen(other, config, bias) != before).any(axis=-1)
    assert not (moved & settled).any()
    # What differs by rounding of the scores alone stays undecided here.
    near = is_settled(jnp.asarray(values), config, jnp.full(40, change - 1e-5), bias)
    assert not (~moved & ~np.asarray(near)).any()


def test_a_tie_within_the_rounding_of_the_scores_is_no_choice_to_rely_on():
    config = MoEConfig(num_experts=3, experts_per_token=1, d_expert=4, renormalize=True)
    values = jnp.array([[0.0, SCORE_ROUNDING / 2, -1.0], [0.0, 8 * SCORE_ROUNDING, -1.0]])
    assert is_settled(values, config, jnp.zeros(2)).tolist() == [False, True]


def test_positions_behind_a_near_tie_in_their_window_are_not_settled(models):
    source = open_checkpoint(models / "single", dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, 300, (5, 12)).astype(np.int32)
    # By hand: half the gap at the edge of the selection, as a share of the token's largest logit.
    places, margin = contexts(source, np.ones(tokens.shape, bool), 5), np.full(tokens.shape, np.inf)
    x = jnp.asarray(embed(source, tokens, jnp.float32))
    for index in range(len(source)):
        layer = source.layer(index)
        x, trace = layer.trace(x, places[0])
        if trace is not None:
            ranked = np.sort(np.asarray(trace.logits, np.float64), axis=-1)
            k = source.config.moe.experts_per_token
            edge = (ranked[:, -k] - ranked[:, -k - 1]) / 2 / np.abs(ranked).max(axis=-1)
            margin = np.minimum(margin, edge.reshape(tokens.shape))
    first = np.minimum.accumulate(margin, axis=1)
    rounding = float(np.median(first)) * 1.001
    found, settled = settled_logits(source, tokens, rounding)
    np.testing.assert_array_equal(settled, first > rounding)
    assert settled.any() and not settled.all()
    np.testing.assert_allclose(found, logits(source, tokens), atol=1e-5, rtol=1e-5)
    assert settled_logits(source, tokens)[1].sum() >= settled.sum()


def compared(difference, settled):
    wanted = np.zeros((1, 4, 3), np.float32)
    found = wanted + np.asarray(difference, np.float32)[None, :, None]
    return logit_check("e", "n", found, wanted, np.asarray([settled]))


def test_only_positions_that_must_be_equal_decide():
    all_four = compared([1e-4, 0, 1e-3, 0], [True, False, False, False])
    assert all_four.ok and all_four.detail == "max difference 0.001 (limit 0.002)"
    elsewhere = compared([1e-4, 0, 0.5, 0.5], [True, True, False, False])
    assert elsewhere.ok and "0.0001 (limit 0.002) at 2 of 4 positions" in elsewhere.detail
    assert not compared([1e-4, 0.5, 0, 0], [True, True, False, False]).ok
    assert not compared([np.nan, 0, 0, 0], [False, True, True, True]).ok
    none = compared([0.5, 0, 0, 0], [False] * 4)
    assert not none.ok and "every position follows a near tie" in none.detail


def test_a_model_whose_router_is_nearly_undecided_passes(models, texts, tmp_path, capsys):
    """Rounding of the two programs sends some of its tokens to different experts."""
    model = tiny.save(tiny.tiny_model("qwen2_moe", seed=1, **command.SIZES), tmp_path / "model")
    tiny.add_tokenizer(model)
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.gate.weight"
        command.change_tensor(model, name, lambda weight: weight * np.asarray(1e-4, weight.dtype))
    out = tmp_path / "out"
    assert command.run("compress", model, *command.given(texts, out), "--bits", 16) == 0
    assert command.run("verify", out) == 0
    capsys.readouterr()
    # What is wrong is still found: a channel of one expert, scaled after the export.
    export = out / "exports" / "ragged-bf16"
    weight = next(
        n for n in SafetensorsFolder(export).names if n.endswith("experts.3.down_proj.weight")
    )
    command.change_tensor(export, weight, lambda tensor: tensor * np.asarray(2, tensor.dtype))
    assert command.run("verify", out) == 1
    assert "logits in transformers" in capsys.readouterr().err
