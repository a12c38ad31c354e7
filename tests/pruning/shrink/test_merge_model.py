"""Merging layer by layer: who is looked at behind what, and what the merged models give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.stream import forward_hidden, in_batches, layer_attend, layer_forward
from moe_jax.transformer import init
from pruning.budget.merging import MERGES
from pruning.scores.likeness import likeness
from pruning.shrink import merge_model
from pruning.shrink.merge import MergedSource, merge_of
from pruning.shrink.merge_model import merged_hidden, plan_merges
from pruning.shrink.rounding import QuantizedSource
from tests.pruning.scores.test_layer import CONFIG

RNG = np.random.default_rng(1)
TEXT = RNG.integers(0, 64, (5, 6)).astype(np.int32)
VALID = np.arange(6)[None] < np.array([6, 3, 6, 5, 6])[:, None]
USAGE = RNG.integers(1, 9, (2, 6)).astype(float)
COUNTS = np.array([3, 4])
ASKED = [(MERGES[name], COUNTS) for name in ("ream", "hc-smoe", "m-smoe")]


@pytest.fixture(scope="module")
def model():
    return jax.tree.map(lambda w: w * 10 if w.ndim == 2 else w, init(CONFIG, jax.random.key(3)))


@pytest.fixture(scope="module")
def planned(model):
    visited: list[int] = []
    found = plan_merges(model, ASKED, USAGE, TEXT, VALID, batch=2, on_layer=visited.append)
    assert visited == [0, 1, 2]
    return found


def test_layers_are_looked_at_behind_dense_ones_or_behind_merged_ones(model, planned):
    text = in_batches(model, TEXT, VALID, 2)
    for (rule, counts), merging in zip(ASKED, planned, strict=True):
        assert list(merging.layers) == [0, 2]  # layer 1 has no experts
        before = MergedSource(model, merging) if rule.behind_merged else model
        x = text.embedded(model, jnp.float32)
        for index, layer in enumerate(model.layers):
            places = zip(x, text.places, strict=True)
            middle = [np.asarray(layer_attend(layer, jnp.asarray(one), p)) for one, p in places]
            if index in merging.layers:
                slot = (0, 2).index(index)
                seen = likeness(layer, middle, text.places)
                wanted = merge_of(layer, rule, seen, USAGE[slot], counts[slot])
                for field in dataclasses.fields(wanted):
                    own, other = (getattr(one, field.name)
                                  for one in (merging.layers[index], wanted))  # fmt: skip
                    np.testing.assert_allclose(own, other, rtol=1e-5)
                assert merging.layers[index].is_leader.sum() == COUNTS[slot]
            behind = before.layer(index)
            x = [np.asarray(layer_forward(behind, jnp.asarray(one), place))
                 for one, place in zip(x, text.places, strict=True)]  # fmt: skip
    behind_dense, _ = merge_model.plan_merges(
        model, [(dataclasses.replace(MERGES["ream"], behind_merged=False), COUNTS), ASKED[0]],
        USAGE, TEXT, VALID, batch=2,
    )  # fmt: skip
    shares = [one.layers[2].share for one in (behind_dense, planned[0])]
    assert np.abs(shares[0] - shares[1]).max() > 1e-3, "else the test sees no difference"


def test_merged_models_share_a_reading_and_say_how_many_experts_their_tokens_meet(model, planned):
    met, visited = np.zeros(3), []
    found = merged_hidden(
        model, TEXT, VALID, planned, storages=["bf16", "int4", "bf16"], met=met, group_size=4,
        batch=2, on_layer=visited.append,
    )  # fmt: skip
    assert found.shape == (3, 5, 6, CONFIG.d_model) and visited == [0, 1, 2]
    for states, merging, bits in zip(found, planned, (16, 4, 16), strict=True):
        source = MergedSource(model, merging)
        source = source if bits == 16 else QuantizedSource(source, 4)
        wanted = forward_hidden(source, TEXT, VALID, batch=2)
        np.testing.assert_allclose(states[VALID], wanted[VALID], rtol=1e-4, atol=1e-4)
    # With its router cut a token meets as many as it is sent to, else each group once.
    tokens = VALID.sum()
    assert met[0] == 2 * 2 * tokens
    text, count = in_batches(model, TEXT, VALID, 2), 0
    x = text.embedded(model, jnp.float32)
    routed = jax.jit(
        lambda layer, x, place: layer.feed_forward(layer.attend(x, place)[0], place)[1]
    )
    for index, layer in enumerate(MergedSource(model, planned[2]).layer(i) for i in range(3)):
        for number, place in enumerate(text.places):
            one = jnp.asarray(x[number])
            if index in planned[2].layers:
                trace = routed(layer, one, place)
                chosen = planned[2].layers[index].leaders[np.asarray(trace.expert)]
                count += sum(len(set(row.tolist())) for row in chosen[np.asarray(trace.valid)])
            x[number] = np.asarray(layer_forward(layer, one, place))
    assert met[2] == count and 2 * tokens <= count < 4 * tokens
