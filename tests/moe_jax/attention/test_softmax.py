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


@pytest.mark.parametrize("window", [LENGTH, 5])
@pytest.mark.parametrize("queries", [1, 3, 4, 21], ids="{} queries a block".format)
def test_values_and_gradients_equal_torchs_for_any_size_of_block(monkeypatch, queries, window):
    monkeypatch.setattr(softmax_attention, "BLOCK_SCORES", queries * HEADS * LENGTH)
    rng = np.random.default_rng(0)
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, SHARED, SHARED, HEADS)]
    *inputs, d_out = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
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

    out, pull = jax.vjp(jax.jit(ours), *map(jnp.asarray, inputs))
    tensors = [torch.tensor(value, requires_grad=True) for value in inputs]
    q, k, v = tensors
    want = whole(q, k, v, valid, window)
    rows = torch.from_numpy(valid)
    want[rows].backward(torch.from_numpy(d_out)[rows])
    np.testing.assert_allclose(out[valid], want[rows].detach().numpy(), atol=2e-6)
    for gradient, tensor in zip(pull(jnp.asarray(d_out)), tensors, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-5)
