"""Generation with a cache equals the whole model called again and again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import LatentAttentionConfig, LinearAttentionConfig
from moe_jax.generation import generate
from moe_jax.transformer import init
from tests.pruning.scores.test_layer import CONFIG

LATENT = LatentAttentionConfig(
    num_heads=2, query_rank=None, kv_rank=6, plain_dim=4, rope_dim=4, value_dim=6
)


LINEAR = LinearAttentionConfig(num_key_heads=1, num_value_heads=2, key_dim=4, value_dim=6)
GATED = dataclasses.replace(CONFIG.attention, output_gate=True)
CONFIGS = {
    "grouped": CONFIG,
    "latent": CONFIG.replace(attention=LATENT),
    "linear first": CONFIG.replace(
        attention=GATED, linear_attention=LINEAR, linear_layers=(0,), centred_norms=True
    ),
    "linear alone": CONFIG.replace(linear_attention=LINEAR, linear_layers=(0, 1, 2)),
}


def random_model(config):
    model = init(config, jax.random.key(3))
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, model)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_equals_repeated_full_forwards_for_prompts_of_unequal_length(name):
    model = random_model(CONFIGS[name])
    prompts = [[3, 9, 27, 17], [5]]
    new = generate(model, prompts, max_new_tokens=5)
    forward = jax.jit(lambda model, tokens, valid: model(tokens, valid))
    for prompt, written in zip(prompts, new, strict=True):
        text = list(prompt)
        for token in written:
            row = np.zeros((1, 12), np.int32)
            row[0, : len(text)] = text
            valid = (np.arange(12) < len(text))[None]
            logits = forward(model, jnp.asarray(row), jnp.asarray(valid))
            assert int(jnp.argmax(logits[0, len(text) - 1])) == token
            text.append(token)


def test_sampling_is_repeatable_and_depends_on_the_seed(model):
    run = lambda seed: generate(model, [[1, 2]], max_new_tokens=8, temperature=1.0, seed=seed)  # noqa: E731
    assert run(0) == run(0)
    assert run(0) != run(1)


def test_a_text_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="exceed the context of 32"):
        generate(model, [[1] * 30], max_new_tokens=5)


def test_generation_ends_at_a_stop_token(model):
    free = generate(model, [[1, 2]], max_new_tokens=6)[0]
    stopped = generate(model, [[1, 2]], max_new_tokens=6, stop=[free[2]])[0]
    assert stopped == free[: free.index(free[2]) + 1]


def test_generation_ends_where_it_is_told_to_and_no_other_sequence_does(model):
    free = generate(model, [[1, 2], [9]], max_new_tokens=6)
    assert free[0][:2] != free[1][:2]
    found = generate(model, [[1, 2], [9]], max_new_tokens=6, ended=lambda new: new == free[0][:2])
    assert found == [free[0][:2], free[1]]


def test_longer_padding_changes_nothing_and_takes_no_room_of_the_context(model):
    prompts = [[3, 9, 27, 17], [5] * 26]
    expected = generate(model, prompts, max_new_tokens=6)
    assert generate(model, prompts, max_new_tokens=6, length=40) == expected
