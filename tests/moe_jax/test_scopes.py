"""A profile of the model names its stages: every stage stands in the lowered program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention.context import make_context
from moe_jax.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from moe_jax.experts.run import gated_experts
from moe_jax.stream import layer_forward
from moe_jax.transformer import abstract

GROUPED = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
LATENT = LatentAttentionConfig(
    num_heads=2, query_rank=None, kv_rank=6, plain_dim=4, rope_dim=4, value_dim=6
)
CONFIG = ModelConfig(
    vocab_size=32, d_model=16, num_layers=3, max_position=32, norm_eps=1e-6, tie_embeddings=False,
    attention=GROUPED, d_dense=20, dense_layers=(1,), linear_layers=(2,),
    linear_attention=LinearAttentionConfig(
        num_key_heads=1, num_value_heads=2, key_dim=4, value_dim=4
    ),
    moe=MoEConfig(num_experts=4, experts_per_token=2, d_expert=8, renormalize=True, d_shared=8),
)  # fmt: skip
SOFTMAX = {"qkv", "rope", "softmax_attention", "out"}
EXPERTS = {"router", "dispatch", "experts/gate_up", "experts/down", "experts/combine"}
LAYER = {"attention_norm", "attention", "mlp_norm", "residual"}


def names(lowered) -> str:
    return lowered.as_text(debug_info=True)


def missing(text: str, stages: set[str]) -> set[str]:
    """Stages that name no operation; loops put names of their own between two of ours."""
    lines = [line for line in text.splitlines() if "loc(" in line]
    return {
        stage for stage in stages
        if not any(all(f"{part}/" in line for part in stage.split("/")) for line in lines)
    }  # fmt: skip


@pytest.mark.parametrize("attention", [GROUPED, LATENT], ids=["grouped", "latent"])
def test_every_stage_of_a_layer_is_named(attention):
    model = abstract(CONFIG.replace(attention=attention))
    context = jax.eval_shape(
        lambda valid: make_context(attention, 32, valid), jax.ShapeDtypeStruct((2, 8), bool)
    )
    x = jax.ShapeDtypeStruct((2, 8, 16), jnp.float32)
    softmax = {f"attention/{part}" for part in SOFTMAX}
    linear = {f"attention/{part}" for part in ("qkv", "convolution", "rates", "delta_rule", "out")}
    routed = {f"moe/{part}" for part in EXPERTS} | {"moe/shared_expert/gate_up"}
    dense = {"dense_mlp/gate_up", "dense_mlp/down"}
    for index, own in enumerate((softmax | routed, softmax | dense, linear | routed)):
        text = names(layer_forward.lower(model.layer(index), x, context))
        assert missing(text, LAYER | own) == set()
    assert missing(text, dense) == dense  # so a name is not found by chance


def test_the_experts_as_grouped_products_are_named_too():
    layer = abstract(CONFIG).layer(0)
    keep_all = gated_experts(lambda hidden, dispatch: hidden)
    lowered = jax.jit(lambda moe, x, valid: moe(x, valid, keep_all)[0]).lower(
        layer.mlp, jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((8,), bool)
    )
    assert missing(names(lowered), EXPERTS | {"experts/gather"}) == set()


def test_embedding_and_head_are_named():
    model = abstract(CONFIG)
    tokens = jax.ShapeDtypeStruct((2, 8), np.int32)
    lowered = jax.jit(lambda model, tokens: model(tokens)).lower(model, tokens)
    assert missing(names(lowered), {"embedding", "head"}) == set()
