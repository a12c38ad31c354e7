"""Logits are compared wherever rounding cannot have sent a token elsewhere, and only there."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.checkpoint import open_checkpoint
from convert.reader import SafetensorsFolder
from moe_jax.config import MoEConfig
from moe_jax.experts.router import SCORE_ROUNDING, is_settled, route
from moe_jax.stream import in_batches, mapped
from pruning.measure.settled import settled_logits
from pruning.stages.checks import logit_check
from tests.support import command, tiny
from tests.support.logits import logits
from tests.support.threads import together

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
    # Random directions, and for every set of losers the one that favours all others.
    signs = 1.0 - 2.0 * ((np.arange(256)[:, None] >> np.arange(E)) & 1)
    sizes = np.stack([np.ones(256), rng.random(256)], axis=1)
    steps = (signs[:, None] * sizes[..., None] * change).astype(np.float32)  # [256, 2, E]
    others = (values + steps[:, :, None]).reshape(-1, E)
    after = chosen(others, config, bias).reshape(256, 2, 40, K)
    moved = (after != before).any(axis=(0, 1, 3))
    assert not (moved & settled).any()
    # What differs by rounding of the scores alone stays undecided here.
    near = is_settled(jnp.asarray(values), config, jnp.full(40, change - 1e-5), bias)
    assert not (~moved & ~np.asarray(near)).any()


def test_a_tie_within_the_rounding_of_the_scores_is_no_choice_to_rely_on():
    config = MoEConfig(num_experts=3, experts_per_token=1, d_expert=4, renormalize=True)
    values = jnp.array([[0.0, SCORE_ROUNDING / 2, -1.0], [0.0, 8 * SCORE_ROUNDING, -1.0]])
    assert is_settled(values, config, jnp.zeros(2)).tolist() == [False, True]
    # A bias that leaves little of a score leaves the rounding that the score had.
    config = dataclasses.replace(config, score="sigmoid")
    values = jnp.array([[8.0, 8.0 + 2e-4, -1.0], [8.0, 9.0, -1.0]])
    bias = -jax.nn.sigmoid(values[0])
    bias = jnp.broadcast_to(bias[:1], 3)
    assert is_settled(values, config, jnp.zeros(2), bias).tolist() == [False, True]


def test_experts_that_are_not_there_come_into_no_tie():
    config = MoEConfig(num_experts=4, experts_per_token=2, d_expert=4, renormalize=True)
    values = jnp.array([[1.0, 0.5, -jnp.inf, -jnp.inf], [1.0, 0.5, 0.5, -jnp.inf]])
    assert is_settled(values, config, jnp.full(2, 0.1)).tolist() == [True, False]


def test_a_model_of_which_an_expert_is_gone_is_settled_where_the_others_are(models):
    source = open_checkpoint(models / "single", dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 6)).astype(np.int32)

    def without_first(index, layer):
        alive = jnp.arange(layer.mlp.config.num_experts) > 0
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, alive=alive))

    gone = mapped(source, without_first)
    for rounding, all_settled in ((1e-9, True), (1e9, False)):
        ((_, settled),) = settled_logits(gone, (tokens,), 6, rounding)
        assert settled.all() == all_settled == settled.any()


@pytest.mark.slow
def test_positions_behind_a_near_tie_in_their_window_are_not_settled(models):
    source = open_checkpoint(models / "single", dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, 300, (5, 12)).astype(np.int32)
    # By hand: half the gap at the edge of the selection, as a share of the token's largest logit.
    text = in_batches(source, tokens, np.ones(tokens.shape, bool), 5)
    x, margin = jnp.asarray(text.embedded(source, jnp.float32)[0]), np.full(tokens.shape, np.inf)
    for index in range(len(source)):
        layer = source.layer(index)
        x, trace = layer.trace(x, text.places[0])
        if trace is not None:
            ranked = np.sort(np.asarray(trace.logits, np.float64), axis=-1)
            k = source.config.moe.experts_per_token
            edge = (ranked[:, -k] - ranked[:, -k - 1]) / 2 / np.abs(ranked).max(axis=-1)
            margin = np.minimum(margin, edge.reshape(tokens.shape))
    first = np.minimum.accumulate(margin, axis=1)
    rounding = float(np.median(first)) * 1.001
    (found, settled), (ends, late) = settled_logits(source, (tokens, tokens[:2]), 12, rounding)
    np.testing.assert_array_equal(settled, first > rounding)
    assert settled.any() and not settled.all()
    np.testing.assert_allclose(found, logits(source, tokens), atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(late, settled[:2])
    np.testing.assert_array_equal(ends, found[:2])
    ((ends, late),) = settled_logits(source, (tokens,), 5, rounding)
    np.testing.assert_array_equal(late, settled[:, -5:])
    np.testing.assert_allclose(ends, found[:, -5:], atol=1e-5, rtol=1e-5)
    ((_, most),) = settled_logits(source, (tokens,), 12)
    assert most.sum() >= settled.sum()


@pytest.mark.parametrize("at_once", [None, 3])
def test_processes_take_turns_with_layers_and_have_the_bits_of_one(models, monkeypatch, at_once):
    tokens = np.random.default_rng(0).integers(0, 300, (3, 6)).astype(np.int32)
    asked = (tokens, tokens[:2, :4]), 5, 0.02, (1, 3)
    source = open_checkpoint(models / "single", dtype=jnp.float32)
    expected = settled_logits(source, *asked)
    read: list[tuple[int, int]] = []

    def work(spread):
        own = open_checkpoint(models / "single", dtype=jnp.float32)
        own.experts_at_once, own.read_ahead = at_once, False

        def said(index, layer):
            read.append((index, spread.process))
            return layer

        return settled_logits(mapped(own, said, by_group=True), *asked, spread=spread)

    for found in together(monkeypatch, 3, work):
        for (logits_, settled), (wanted, near) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(settled, near)
            np.testing.assert_allclose(logits_, wanted, rtol=0, atol=1e-6 if at_once else 0)
    # Each layer, or each group of its experts, in one process.
    groups = 1 if at_once is None else -(-source.config.moe.num_experts // at_once)
    layers = [index for index in range(len(source)) for _ in range(groups)]
    assert sorted(read) == [(index, index % 3) for index in layers]


def compared(difference, settled):
    wanted = np.zeros((1, len(settled), 3), np.float32)
    found = wanted + np.asarray(difference, np.float32)[None, :, None]
    return logit_check("e", "n", found, wanted, settled[None])


def test_only_positions_that_must_be_equal_decide():
    early = np.arange(40) < 10
    fine = compared(np.full(40, 1e-3), ~early)
    assert fine.ok and fine.detail == "max difference 0.001 (limit 0.002)"
    elsewhere = compared(np.where(early, 1e-4, 0.5), early)
    assert elsewhere.ok and "0.0001 (limit 0.002) at 10 of 40 positions" in elsewhere.detail
    among = np.where(np.arange(40) == 5, 0.5, 0.0)
    assert not compared(among, early).ok
    assert compared(among, ~early).ok
    assert not compared(np.where(early, np.nan, 0.0), ~early).ok


def test_too_few_positions_to_judge_by_let_differences_begin_at_a_hundredth():
    few, one = np.arange(200) < 7, np.arange(200) == 100
    assert compared(0.5 * one, few).ok and not compared(0.5 * one, ~few).ok
    wrong = compared(np.where(few, 0.0, 0.5), few)
    assert not wrong.ok and "193 of 200 positions differ by more" in wrong.detail


@pytest.mark.parametrize(
    ("settled", "differing", "ok"),
    [(7, 2, True), (7, 50, True), (7, 51, False), (8, 150, True), (9, 150, True)],
)
def test_eight_positions_are_enough_to_judge_by_and_with_fewer_most_must_be_the_same(
    settled, differing, ok
):
    place = np.arange(200)
    found = compared(np.where(place >= 200 - differing, 0.5, 1e-4), place < settled)
    assert found.ok == ok
    judged = f" at {settled} of 200 positions; others follow a near tie"
    others = f"; {differing} of 200 positions differ by more"
    largest = "0.0001" if settled >= 8 else "0.5"
    assert found.detail == (
        f"max difference {largest} (limit 0.002){judged if settled >= 8 else others}"
    )


@pytest.mark.parametrize(("windows", "ok"), [(1, True), (2, True), (3, False)])
@pytest.mark.parametrize("length", [1, 28])
def test_a_tie_that_fell_the_other_way_is_followed_by_the_rest_of_its_window_alone(
    windows, length, ok
):
    wanted, settled = np.zeros((8, 32, 3), np.float32), np.zeros((8, 32), bool)
    settled[:, 0] = True
    found = wanted.copy()
    found[:windows, 4 : 4 + length] = 0.5  # of 256 positions two may begin to differ
    assert logit_check("e", "n", found, wanted, settled).ok == ok


@pytest.mark.parametrize(("size", "limit"), [(0.2, 2e-3), (1.0, 2e-3), (-8.0, 16e-3)])
def test_the_limit_is_a_share_of_the_largest_logit_or_of_one(size, limit):
    wanted = np.zeros((2, 10, 3), np.float32)
    wanted[1, 4, 2] = size
    everywhere = np.ones((2, 10), bool)
    for share, ok in ((0.99, True), (1.01, False)):
        for sign in (1, -1):
            found = wanted.copy()
            found[0, 3, 1] += sign * share * limit
            assert logit_check("e", "n", found, wanted, everywhere).ok == ok
    for value in (np.inf, np.nan):
        found = wanted.copy()
        found[0, 3, 1] = value
        for settled in (everywhere, ~everywhere, (np.arange(10) > 3) & everywhere):
            assert not logit_check("e", "n", found, wanted, settled).ok


def test_first_positions_alone_do_not_decide():
    """They see no other, so that an error of positions or masks would not show."""
    shape = (20, 4)
    settled = np.zeros(shape, bool)
    settled[:, 0] = True
    wanted = np.zeros((*shape, 3), np.float32)
    found = np.where(settled[..., None], wanted, 0.5).astype(np.float32)
    assert not logit_check("e", "n", found, wanted, settled).ok


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


@pytest.mark.slow
def test_a_padded_four_bit_folder_is_compared_with_the_experts_that_transformers_makes_of_it(
    models, texts, tmp_path
):
    out = tmp_path / "out"
    given_ = command.given(texts, out)
    assert command.run("compress", models / "single", *given_, "--export", "padded-int4") == 0
    checks = json.loads((out / "report.json").read_text())["verification"]
    (detail,) = (c["detail"] for c in checks if c["check"] == "logits in transformers")
    # Experts rounded otherwise, or not at all, are a hundred times as far away.
    assert float(re.findall(r"max difference (\S+)", detail)[0]) < 1e-4
