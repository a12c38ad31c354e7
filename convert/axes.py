"""How long the axes of a family's tensors are, and which parts a layer has."""

from moe_jax.config import LatentAttentionConfig, ModelConfig


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes of the axis letters of `TensorRule.shape`, but for F, which an expert may own.

    A and B are all query and all key/value heads' coordinates, O those of all heads' values, N the
    query heads, G all queries' coordinates and gates, I the width of a dense layer, S that of the
    shared expert, 1 is one. Of latent attention: Q is the query rank, C the latent width, J that
    and the rotated part of the key, U what latents expand to. Of linear attention: W are queries,
    keys, values and gates, X the channels of the convolution and T its positions, Z all values, Y
    the value heads, M twice as many, P the width of one.
    """
    a, m = config.attention, config.moe
    sizes = {
        "1": 1,
        "V": config.vocab_size,
        "D": config.d_model,
        "A": a.num_heads * a.key_dim,
        "B": a.num_kv_heads * a.key_dim,
        "O": a.num_heads * a.value_dim,
        "N": a.num_heads,
        "G": a.num_heads * a.key_dim * 2,
        "H": a.key_dim,
        "E": m.num_experts,
        "I": config.d_dense,
        "S": m.d_shared,
    }
    if isinstance(a, LatentAttentionConfig):
        sizes |= {
            "Q": a.query_rank or 0,
            "C": a.kv_rank,
            "J": a.kv_rank + a.rope_dim,
            "U": a.num_heads * (a.plain_dim + a.value_dim),
        }
    if config.linear_attention is not None:
        c = config.linear_attention
        heads = c.num_value_heads
        sizes |= {"W": c.channels + c.values, "X": c.channels, "T": c.conv_width, "Z": c.values}
        sizes |= {"Y": heads, "M": 2 * heads, "P": c.value_dim}
    return sizes


def parts(config: ModelConfig, layer: int) -> set[str]:
    """Names of the optional parts that a layer has."""
    a, m = config.attention, config.moe
    routed = layer not in config.dense_layers
    present = {
        "": True,
        "dense": not routed,
        "moe": routed,
        "correction_bias": routed and m.correction_bias,
        "shared": routed and m.d_shared > 0,
        "shared_gate": routed and m.d_shared > 0 and m.shared_gate,
        "logit_bias": routed and m.logit_bias,
        "expert_bias": routed and m.expert_bias,
        "emptied_bias": routed and m.emptied_bias,
    }
    if config.linear(layer) is not None:
        present["linear_attention"] = True
    elif isinstance(a, LatentAttentionConfig):
        present |= {
            "direct_query": a.query_rank is None,
            "query_rank": a.query_rank is not None,
            "query_rank_bias": a.query_rank is not None and a.bias,
            "out_bias": a.bias,
        }
    else:
        present |= {"qkv_bias": a.qkv_bias, "out_bias": a.out_bias, "qk_norm": a.qk_norm}
        present |= {"sinks": a.sinks, "softmax_attention": True}
    return {name for name, here in present.items() if here}
