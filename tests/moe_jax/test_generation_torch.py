"""Generation, bfloat16 and padding against transformers on tiny models of every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from convert import load_model
from moe_jax.generation import generate
from tests.support import tiny

PROMPTS = [[3, 9, 27, 81, 17, 50, 4], [5], [60, 61, 62, 63]]
NEW = 8

forward = jax.jit(lambda model, tokens, valid: model(tokens, valid))


@pytest.fixture(scope="module", params=["qwen2_moe", "qwen3_moe", "qwen3_next", "gpt_oss"])
def folder(request, tmp_path_factory):
    """A saved model whose weights are representable in bfloat16."""
    model = tiny.tiny_model(request.param).bfloat16()
    return tiny.save(model, tmp_path_factory.mktemp("model") / request.param)


def torch_model(folder, dtype):
    # Read from the folder, because .bfloat16() would round the rotary frequencies too.
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def reference(folder):
    return torch_model(folder, torch.float32)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, dtype=jnp.float32)


def their_generation(reference, *, stop: int | None = None) -> list[list[int]]:
    """Greedy continuations by transformers, left padded, cut after the stop token."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    out = reference.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        eos_token_id=stop,
    )[:, longest:].tolist()  # fmt: skip
    return [row[: row.index(stop) + 1] if stop in row else row for row in out]


@pytest.mark.slow
def test_greedy_generation_equals_transformers_for_prompts_of_unequal_length(model, reference):
    theirs = their_generation(reference)
    assert generate(model, PROMPTS, max_new_tokens=NEW) == theirs
    assert len({tuple(row) for row in theirs}) == 3  # else padding could have won


def test_generation_stops_where_transformers_stops(model, reference):
    free = their_generation(reference)
    stop = free[1][2]
    theirs = their_generation(reference, stop=stop)
    assert generate(model, PROMPTS, max_new_tokens=NEW, stop=[stop]) == theirs
    assert len(theirs[1]) <= 3 < NEW


@pytest.mark.slow
def test_top_k_sampling_draws_all_of_the_k_likeliest_tokens_and_no_other(model, reference):
    prompt = PROMPTS[0]
    tokens = np.array([prompt], np.int32)
    logits = tiny.torch_logits(reference, tokens, np.ones(tokens.shape, bool))[0, -1]
    allowed = set(np.argsort(logits)[-3:].tolist())
    copies = [prompt] * 256
    drawn = generate(model, copies, max_new_tokens=1, temperature=4.0, top_k=3, seed=1)
    assert {row[0] for row in drawn} == allowed
    free = generate(model, copies, max_new_tokens=1, temperature=4.0, seed=1)
    assert {row[0] for row in free} > allowed


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(folder, reference):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 96, (16, 12)).astype(np.int32)
    valid = np.ones(tokens.shape, bool)
    exact = tiny.torch_logits(reference, tokens, valid)
    theirs = tiny.torch_logits(torch_model(folder, torch.bfloat16), tokens, valid)
    ours = np.asarray(forward(load_model(folder, dtype=jnp.bfloat16), tokens, valid))
    error = lambda a, b: float(np.median(np.abs(a - b)))  # noqa: E731
    # The median, because a near-tie in a router sends a token elsewhere in either program.
    assert error(ours, exact) < 1.2 * error(theirs, exact)
    assert error(ours, theirs) < 0.02 * np.abs(exact).mean()


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [1, 5, 20])
def test_padding_changes_no_logit(model, reference, side, padding):
    text = np.random.default_rng(4).integers(1, 96, (2, 12)).astype(np.int32)
    wanted = tiny.torch_logits(reference, text, np.ones(text.shape, bool))
    pads = (padding, 0) if side == "left" else (0, padding)
    tokens = np.pad(text, ((0, 0), pads), constant_values=7)
    valid = np.pad(np.ones(text.shape, bool), ((0, 0), pads))
    found = np.asarray(forward(model, tokens, valid))[valid].reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, atol=5e-5, rtol=1e-5)  # float32 sums, reordered
