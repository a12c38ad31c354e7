"""Running layer by layer equals running the whole model, with few compilations."""

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.stream import (
    WORTH_A_SHAPE,
    forward_hidden,
    in_batches,
    layer_forward,
    mapped,
    pad_rows,
    sweep,
)
from moe_jax.transformer import Transformer, init

CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=4,
    max_position=32,
    norm_eps=1e-6,
    tie_embeddings=False,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, qk_norm=True),
    moe=MoEConfig(num_experts=4, experts_per_token=2, d_expert=6, renormalize=True),
    d_dense=20,
    dense_layers=(1,),
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    grow = lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf  # noqa: E731
    return jax.tree.map(grow, init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray]:
    """Five rows, two of them short: with three to a batch one row of padding is needed."""
    tokens = np.random.default_rng(0).integers(0, 32, (5, 9)).astype(np.int32)
    return tokens, np.arange(9)[None] < np.array([[9], [4], [9], [1], [9]])


@dataclasses.dataclass
class Reading:
    """A source that remembers which layers were read."""

    model: Transformer
    read: list[int] = dataclasses.field(default_factory=list)

    @property
    def config(self):
        return self.model.config

    @property
    def embedding(self):
        return self.model.embedding

    @property
    def head(self):
        return self.model.head

    def __len__(self) -> int:
        return len(self.model)

    def layer(self, index: int):
        self.read.append(index)
        return self.model.layer(index)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 3, 8])
def test_streamed_states_equal_those_of_the_whole_model(model, text, batch):
    tokens, valid = text
    expected = jax.jit(lambda model, *text: model.hidden(*text)[0])(model, tokens, valid)
    got = forward_hidden(model, tokens, valid, batch=batch)
    assert got.shape == expected.shape and got.dtype == np.float32
    np.testing.assert_allclose(got[valid], np.asarray(expected)[valid], rtol=1e-4, atol=1e-4)


def test_layers_of_one_shape_share_one_compilation(model):
    tokens = np.zeros((6, 7), np.int32)  # a shape that no other test uses
    before = layer_forward._cache_size()
    forward_hidden(model, tokens, np.ones(tokens.shape, bool), batch=2)
    assert layer_forward._cache_size() - before == 2  # dense and with experts


def test_a_window_makes_a_layer_of_its_own(model):
    """Sliding layers differ in a static field: three kinds of layer, three compilations."""
    config = CONFIG.replace(sliding_window=3, sliding_layers=(2,))
    slid = init(config, jax.random.key(0))
    tokens = np.zeros((2, 8), np.int32)
    before = layer_forward._cache_size()
    forward_hidden(slid, tokens, np.ones(tokens.shape, bool), batch=2)
    assert layer_forward._cache_size() - before == 3


def test_every_layer_is_read_once_however_many_batches(model, text):
    source, finished = Reading(model), []
    forward_hidden(source, *text, batch=2, on_layer=finished.append)
    assert source.read == finished == [0, 1, 2, 3]


def test_activations_have_the_dtype_asked_for(model, text):
    short = forward_hidden(model, *text, batch=3, dtype=jnp.bfloat16)
    assert short.dtype == jnp.bfloat16
    valid = text[1]
    full = forward_hidden(model, *text, batch=3)
    # bfloat16 keeps eight bits, and a token may change its expert: compare the bulk only.
    error = np.abs(short.astype(np.float32) - full)[valid]
    assert np.median(error) < 0.05 * np.median(np.abs(full[valid]))


def test_rows_are_padded_to_whole_batches_with_zeros():
    values = np.ones((5, 2), np.int32)
    padded = pad_rows(values, 4)
    assert padded.shape == (8, 2) and padded.dtype == np.int32
    np.testing.assert_array_equal(padded[:5], values)
    np.testing.assert_array_equal(padded[5:], 0)
    assert pad_rows(values, 5).shape == (5, 2)


def test_a_sweep_down_reads_the_layers_asked_for_in_their_order_and_hands_on_what_each_returns(
    model,
):
    source, finished = Reading(model), []
    step = lambda index, layer, x: [*x, (index, layer is model.layer(index))]  # noqa: E731
    found = sweep(source, [], step, layers=reversed(range(1, 4)), on_layer=finished.append)
    assert found == [(3, True), (2, True), (1, True)]
    assert source.read == finished == [3, 2, 1]


def test_a_sweep_lets_go_of_a_layer_before_it_reads_the_next(model):
    """A layer of a large model is gigabytes: two at once would be twice the memory."""
    alive: list[weakref.ref] = []

    class Fresh(Reading):
        def layer(self, index: int):
            assert not any(ref() for ref in alive)
            layer = dataclasses.replace(super().layer(index))
            alive.append(weakref.ref(layer))
            return layer

    sweep(Fresh(model), None, lambda index, layer, x: None)
    assert len(alive) == 4


def test_batches_say_where_their_tokens_stand_and_join_without_the_padding(model, text):
    tokens, valid = text
    batches = in_batches(model, tokens, valid, 3)
    assert batches.tokens.shape == (6, 9) and not batches.valid[5:].any()
    assert batches.rows == (slice(0, 3), slice(3, 6))
    for place, rows in zip(batches.places, batches.rows, strict=True):
        np.testing.assert_array_equal(place.valid, batches.valid[rows])
    x = batches.embedded(model, jnp.float32)
    seen = []
    again = batches.each(x, lambda part, place, rows: seen.append(rows) or part + 1)
    assert again is x and seen == list(batches.rows)
    joined = batches.joined(x, np.empty((5, 9, 16), np.float32))
    np.testing.assert_array_equal(joined, model.embedding.weight[tokens] + 1)
    assert x == []  # so that the text was never held twice


@pytest.mark.parametrize(
    ("count", "length", "shape"),
    [(3, 2 * WORTH_A_SHAPE, [3]), (11, 2 * WORTH_A_SHAPE, [6, 6]), (16, 2 * WORTH_A_SHAPE, [8, 8]),
     (7, WORTH_A_SHAPE, [8]), (7, WORTH_A_SHAPE + 1, [7])],
)  # fmt: skip
def test_batches_are_no_larger_than_a_text_needs_where_padding_costs_more_than_a_shape(
    model, count, length, shape
):
    tokens = np.zeros((count, length), np.int32)
    batches = in_batches(model, tokens, np.ones(tokens.shape, bool), 8)
    assert [rows.stop - rows.start for rows in batches.rows] == shape
    assert len(batches.tokens) == sum(shape)


def test_a_mapped_source_changes_layers_as_they_are_read_and_nothing_else(model):
    base, changed = Reading(model), []

    def change(index: int, layer):
        changed.append(index)
        return dataclasses.replace(layer, norm_eps=float(index))

    source = mapped(base, change)
    assert len(source) == 4 and source.config is model.config and changed == base.read == []
    assert source.embedding is model.embedding
    assert source.layer(2).norm_eps == 2.0 and base.read == changed == [2]
    assert source.layer(2).mlp is model.layer(2).mlp
