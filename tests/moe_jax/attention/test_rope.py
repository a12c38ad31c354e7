"""Every rope kind against transformers, on texts longer than the original context."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import find_family, load_model, open_checkpoint
from convert.families.hf_config import rope_config
from moe_jax.attention.context import make_context
from moe_jax.generation import generate
from moe_jax.stream import layer_forward
from pruning.measure.settled import settled_logits
from tests.support import tiny
from tests.support.variants import VARIANTS

LENGTH = 40
STRETCH = {
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.5, 1.7, 2.0, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
ORIGINAL = {"original_max_position_embeddings": 16}
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 777.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic within the context": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn of the whole context": {"rope_type": "yarn", "factor": 4.0},
    "yarn, soft bounds": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5,
                          "truncate": False, **ORIGINAL},
    "yarn, given attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25,
                                     **ORIGINAL},
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.5, "mscale_all_dim": 0.5,
                     **ORIGINAL},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, **ORIGINAL},
    "longrope, long": {"rope_type": "longrope", **STRETCH, **ORIGINAL},
    "longrope, long, given factor": {"rope_type": "longrope", "factor": 9.0, **STRETCH, **ORIGINAL},
    "longrope, short": {"rope_type": "longrope", "factor": 2.0, **STRETCH,
                        "original_max_position_embeddings": 48},
    "longrope, exactly the original": {"rope_type": "longrope", "factor": 2.0, **STRETCH,
                                       "original_max_position_embeddings": LENGTH},
    "longrope, given attention factor": {"rope_type": "longrope", "attention_factor": 0.8,
                                         **STRETCH, **ORIGINAL},
}  # fmt: skip


def one_layer(family: str, **config):
    """Enough layers for a position to matter, few enough to compile quickly."""
    return tiny.tiny_model(family, num_hidden_layers=1, head_dim=16, **config)


forward = jax.jit(lambda model, tokens: model(tokens))


def some_tokens(length: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 96, (1, length)).astype(np.int32)


def their_logits(model, tokens) -> np.ndarray:
    return tiny.torch_logits(model, tokens, np.ones(tokens.shape, bool))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(family, kind, tmp_path):
    rope = {"rope_theta": 1e3} | KINDS[kind]
    model = one_layer(family, rope_parameters=dict(rope))
    tokens = some_tokens(LENGTH)
    theirs = their_logits(model, tokens)
    ours = forward(load_model(tiny.save(model, tmp_path / "model")), tokens)
    # float32 sums of some hundred terms in another order
    np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=1e-5)
    plain = their_logits(one_layer(family, rope_parameters={"rope_type": "default"}), tokens)
    assert np.abs(theirs - plain).max() > 1e-2  # else the test would not see the rope


STRETCHED = [
    (family, variant)
    for family, variants in VARIANTS.items()
    for variant, config in variants.items()
    if "yarn" in variant and "short" not in variant
]


def strided_logits(folder, tokens, stride: int) -> np.ndarray:
    ((logits, _),) = settled_logits(
        open_checkpoint(folder), [tokens], tokens.shape[1], strides=[stride]
    )
    return logits


def their_strided_logits(model, tokens, stride: int) -> np.ndarray:
    ids = torch.tensor(tokens, dtype=torch.long)
    places = (stride * torch.arange(ids.shape[1])).expand(ids.shape)
    with torch.no_grad():
        out = model(input_ids=ids, position_ids=places, attention_mask=torch.ones_like(ids))
    return out.logits.float().numpy()


@pytest.mark.parametrize(("family", "variant"), STRETCHED)
def test_tokens_far_apart_turn_as_those_of_a_long_text_and_see_each_other(
    family, variant, tmp_path
):
    model, tokens = tiny.tiny_model(family, **VARIANTS[family][variant]), some_tokens(12)
    folder, near = tiny.save(model, tmp_path / "model"), their_logits(model, tokens)
    theirs = their_strided_logits(model, tokens, 5)
    found = strided_logits(folder, tokens, 5)
    np.testing.assert_allclose(found, theirs, atol=5e-5, rtol=1e-5)
    assert np.abs(theirs - near)[:, 1:].max() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "short" not in kind])
def test_every_kind_of_rope_turns_tokens_far_apart_as_transformers_does(kind, tmp_path):
    model = one_layer("qwen3_moe", rope_parameters={"rope_theta": 1e3} | KINDS[kind])
    tokens, folder = some_tokens(8), tiny.save(model, tmp_path / "model")
    theirs = their_strided_logits(model, tokens, 7)  # the last at 49 of positions
    np.testing.assert_allclose(strided_logits(folder, tokens, 7), theirs, atol=5e-5, rtol=1e-5)
    assert np.abs(theirs - their_logits(model, tokens))[:, 1:].max() > 1e-3


def test_partial_rotation_of_the_default_kind_is_ignored_as_transformers_ignores_it(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5}
    model, tokens = one_layer("qwen3_moe", rope_parameters=rope), some_tokens(LENGTH)
    ours = forward(load_model(tiny.save(model, tmp_path / "model")), tokens)
    np.testing.assert_allclose(ours, their_logits(model, tokens), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_each_call_is_rotated_for_its_own_length(kind, tmp_path):
    """One torch model keeps the rope of its longest text until a short one; ours has no memory."""
    rope = {"dynamic": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e3},
            "longrope": KINDS["longrope, long"] | {"rope_theta": 1e3}}[kind]  # fmt: skip
    model = one_layer("qwen3_moe", rope_parameters=rope, max_position_embeddings=20)
    ours, found = load_model(tiny.save(model, tmp_path / "model")), {}
    for length in (12, 16, 20, 37, 12):  # 16 and 20 are the last lengths before the stretch
        tokens = some_tokens(37)[:, :length]
        found[length] = their_logits(model, tokens)
        np.testing.assert_allclose(forward(ours, tokens), found[length], atol=5e-5, rtol=1e-5)
    assert np.abs(found[37][:, :12] - found[12]).max() > 1e-2


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_context_made_for_a_longer_text_is_the_prefix_of_that_text(kind, tmp_path):
    rope = {"dynamic": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e3},
            "longrope": KINDS["longrope, long"] | {"rope_theta": 1e3}}[kind]  # fmt: skip
    model = one_layer("qwen3_moe", rope_parameters=rope, max_position_embeddings=20)
    ours, tokens = load_model(tiny.save(model, tmp_path / "model")), some_tokens(37)
    c = ours.config
    context = make_context(c.attention, c.max_position, jnp.ones((1, 12), bool), length=37)
    x = layer_forward(ours.layers[0], ours.embedding(tokens[:, :12], jnp.float32), context)
    theirs = their_logits(model, tokens)[:, :12]  # causal: what follows changes only the rope
    np.testing.assert_allclose(ours.head(x), theirs, atol=5e-5, rtol=1e-5)


def test_generation_under_longrope_uses_one_rope_for_the_whole_text(tmp_path):
    """transformers changes factors in mid-text, against keys already cached; we do not."""
    rope = KINDS["longrope, long"] | {"rope_theta": 1e3}
    model = one_layer("qwen3_moe", rope_parameters=rope)
    prompt = some_tokens(14)[0].tolist()
    new = generate(load_model(tiny.save(model, tmp_path / "model")), [prompt], max_new_tokens=6)[0]
    text = list(prompt)
    for token in new:
        padded = np.array([text + [0] * (20 - len(text))], np.int32)
        assert their_logits(model, padded)[0, len(text) - 1].argmax() == token
        text.append(token)


def test_the_original_context_may_stand_outside_the_rope_settings():
    sizes = {"max_position_embeddings": 64, "rope_theta": 1e3}
    inner = {"rope_type": "longrope", **STRETCH, **ORIGINAL}
    outer = {"rope_type": "longrope", **STRETCH}
    found = rope_config({**sizes, "rope_scaling": outer, **ORIGINAL})
    assert found == rope_config({**sizes, "rope_parameters": inner})
    assert found.factor == 4.0 and found.original_max_position == 16


def test_stretch_factors_of_the_wrong_number_are_refused_by_name():
    hf = one_layer("qwen3_moe").config.to_dict() | {"rope_parameters": KINDS["longrope, long"]}
    config = find_family("qwen3_moe").config_from_hf(hf)
    rope = dataclasses.replace(config.attention.rope, long_factor=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"long_factor has 2 numbers .* 8"):
        dataclasses.replace(config.attention, rope=rope)


def test_torch_has_no_partial_rotation_to_compare_the_scaled_kinds_with():
    """The day this fails, partial rotation of scaled ropes needs an oracle here."""
    rope = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5, "rope_theta": 1e3}
    model = one_layer("qwen3_moe", rope_parameters=rope)
    with pytest.raises(RuntimeError), torch.no_grad():
        their_logits(model, some_tokens(4))
