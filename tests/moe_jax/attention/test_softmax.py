"""Blockwise causal attention against torch's attention over the whole score matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from moe_jax.attention import softmax as softmax_attention

BATCH, LENGTH, HEADS, SHARED, WIDTH = 2, 21, 4, 2, 8


def whole(q, k, v, valid, window):  # torch [B, T, N, H], ... -> [B, T, N, H]
    """Attention by torch under an explicit mask [B, T, T]."""
    position = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    distance = position[:, :, None] - position[:, None]
    seen = (distance >= 0) & (distance < window) & valid[:, None]
    seen &= np.tril(np.ones((LENGTH, LENGTH), bool))
    k, v = (part.repeat_interleave(HEADS // SHARED, dim=2) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    mask = torch.from_numpy(seen)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


# Blocks of 16 queries have 32 rows for each key head, whose products are others in bfloat16. That
# rounds gradients of up to 4 by .008, and what they are made of before.
@pytest.mark.parametrize("window", [LENGTH, 5])
@pytest.mark.parametrize(
    ("queries", "dtype", "atol"),
    [(1, "float32", 1e-5), (3, "float32", 1e-5), (4, "float32", 1e-5), (16, "float32", 1e-5),
     (21, "float32", 1e-5), (4, "bfloat16", 0.03), (16, "bfloat16", 0.03)],
)  # fmt: skip
def test_values_and_gradients_equal_torchs_for_any_size_of_block(
    monkeypatch, queries, window, dtype, atol
):
    monkeypatch.setattr(softmax_attention, "BLOCK_SCORES", queries * HEADS * LENGTH)
    rng = np.random.default_rng(0)
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, SHARED, SHARED, HEADS)]
    rounded = (np.asarray(jnp.asarray(rng.normal(size=shape), dtype)) for shape in shapes)
    *inputs, d_out = (value.astype(np.float32) for value in rounded)
    valid = np.ones((BATCH, LENGTH), bool)
    valid[0, 17:] = valid[1, :4] = False
    position = jnp.asarray(np.maximum(np.cumsum(valid, axis=1) - 1, 0))
    d_out *= valid[:, :, None, None]  # what padding sees is nobody's business

    def ours(q, k, v):
        places = {"query_position": position, "key_position": position}
        return softmax_attention.attend(
            *(q, k, v),
            **places,
            key_valid=jnp.asarray(valid),
            scale=WIDTH**-0.5,
            window=window,
            own_keys=True,
        )

    out, pull = jax.vjp(jax.jit(ours), *(jnp.asarray(value, dtype) for value in inputs))
    tensors = [torch.tensor(value, requires_grad=True) for value in inputs]
    q, k, v = tensors
    want = whole(q, k, v, valid, window)
    rows = torch.from_numpy(valid)
    want[rows].backward(torch.from_numpy(d_out)[rows])
    found = np.asarray(out, np.float32)[valid]
    np.testing.assert_allclose(found, want[rows].detach().numpy(), atol=atol / 5)
    for gradient, tensor in zip(pull(jnp.asarray(d_out, dtype)), tensors, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(np.asarray(gradient, np.float32), tensor.grad, atol=atol)


def test_sinks_take_their_share_and_have_a_gradient():
    rng = np.random.default_rng(1)
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, SHARED, SHARED)]
    inputs = [rng.normal(size=shape).astype(np.float32) for shape in (*shapes, (HEADS,))]
    d_out = rng.normal(size=shapes[0]).astype(np.float32)
    position = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))

    def ours(q, k, v, sinks):
        return softmax_attention.attend(
            *(q, k, v), query_position=position, key_position=position,
            key_valid=jnp.ones((BATCH, LENGTH), bool), scale=WIDTH**-0.5, sinks=sinks,
        )  # fmt: skip

    out, pull = jax.vjp(jax.jit(ours), *map(jnp.asarray, inputs))
    tensors = [torch.tensor(value, requires_grad=True) for value in inputs]
    q, k, v, sinks = tensors
    k, v = (part.repeat_interleave(HEADS // SHARED, dim=2) for part in (k, v))
    score = torch.einsum("btnh,bsnh->bnts", q, k) * WIDTH**-0.5
    score = score.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    sink = sinks[None, :, None, None].expand(BATCH, HEADS, LENGTH, 1)
    weight = torch.cat([score, sink], dim=-1).softmax(dim=-1)[..., :-1]
    want = torch.einsum("bnts,bsnh->btnh", weight, v)
    want.backward(torch.from_numpy(d_out))
    np.testing.assert_allclose(out, want.detach().numpy(), atol=2e-6)
    for gradient, tensor in zip(pull(jnp.asarray(d_out)), tensors, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(gradient, tensor.grad, atol=1e-5)
