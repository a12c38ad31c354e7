"""Qwen3-Next: Gated DeltaNet in most layers, gated attention in the others, centred norms.

The matrices of Gated DeltaNet are no linear layers to 4-bit formats: the recipes made for vLLM
leave them in 16 bits.
"""

from convert.families import hf_config
from convert.families.tables import DENSE, EXPERTS, GATED_SHARED
from convert.rules import Family, Mtp, TensorRule
from moe_jax.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig
from moe_jax.errors import InputError

ROPE = {"partial_rotary_factor": 0.25}
LINEAR, FULL = "linear_attention", "full_attention"
MTP = Mtp(
    "num_nextn_predict_layers",
    {
        "fc.weight": "DK",
        "norm.weight": "D",
        "pre_fc_norm_embedding.weight": "D",
        "pre_fc_norm_hidden.weight": "D",
    },
    default=1,  # published configs do not say
    prefix="mtp.",
)

_LAYER = "model.layers.{layer}."
_SELF = _LAYER + "self_attn."
_LINEAR = _LAYER + "linear_attn."

CENTRED_NORMS = (
    TensorRule(_LAYER + "input_layernorm.weight", "attention_norm.offset", "D"),
    TensorRule(_LAYER + "post_attention_layernorm.weight", "mlp_norm.offset", "D"),
)
GATED_ATTENTION = (
    TensorRule(_SELF + "q_proj.weight", "attention.w_q", "GD", "softmax_attention"),
    TensorRule(_SELF + "k_proj.weight", "attention.w_k", "BD", "softmax_attention"),
    TensorRule(_SELF + "v_proj.weight", "attention.w_v", "BD", "softmax_attention"),
    TensorRule(_SELF + "o_proj.weight", "attention.w_out", "DA", "softmax_attention"),
    TensorRule(_SELF + "q_proj.bias", "attention.b_q", "G", "qkv_bias"),
    TensorRule(_SELF + "k_proj.bias", "attention.b_k", "B", "qkv_bias"),
    TensorRule(_SELF + "v_proj.bias", "attention.b_v", "B", "qkv_bias"),
    TensorRule(_SELF + "o_proj.bias", "attention.b_out", "D", "out_bias"),
    TensorRule(_SELF + "q_norm.weight", "attention.q_norm.offset", "H", "qk_norm"),
    TensorRule(_SELF + "k_norm.weight", "attention.k_norm.offset", "H", "qk_norm"),
)
GATED_DELTA_NET = (
    TensorRule(_LINEAR + "in_proj_qkvz.weight", "attention.in_qkvz", "WD", "linear_attention"),
    TensorRule(_LINEAR + "in_proj_ba.weight", "attention.in_ba", "MD", "linear_attention"),
    TensorRule(_LINEAR + "conv1d.weight", "attention.convolution", "X1T", "linear_attention"),
    TensorRule(_LINEAR + "A_log", "attention.log_rate", "Y", "linear_attention"),
    TensorRule(_LINEAR + "dt_bias", "attention.time_bias", "Y", "linear_attention"),
    TensorRule(_LINEAR + "norm.weight", "attention.out_norm", "P", "linear_attention"),
    TensorRule(_LINEAR + "out_proj.weight", "attention.out", "DZ", "linear_attention"),
)

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "attention_bias": False,
    "head_dim": 256,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "moe_intermediate_size", "shared_expert_intermediate_size",
        "num_experts_per_tok",
    )  # fmt: skip
    bias, eps = hf["attention_bias"], hf["rms_norm_eps"]
    attention = AttentionConfig(
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"] or DEFAULTS["head_dim"],
        rope=hf_config.rope_config(hf, ROPE, partial=True),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        norm_eps=eps,
        output_gate=True,
    )
    moe = MoEConfig(
        num_experts=hf_config.num_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["moe_intermediate_size"],
        renormalize=hf["norm_topk_prob"],
        d_shared=hf["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    found = hf_config.model_config(
        hf,
        attention=attention,
        moe=moe,
        dense_layers=hf_config.sparse_step_dense_layers(hf),
    )
    linear_layers = _linear_layers(hf)
    return found.replace(
        linear_attention=_linear_attention(hf, eps) if linear_layers else None,
        linear_layers=linear_layers,
        centred_norms=True,
    )


def _linear_attention(hf: dict, eps: float) -> LinearAttentionConfig:
    return LinearAttentionConfig(
        num_key_heads=hf["linear_num_key_heads"],
        num_value_heads=hf["linear_num_value_heads"],
        key_dim=hf["linear_key_head_dim"],
        value_dim=hf["linear_value_head_dim"],
        conv_width=hf["linear_conv_kernel_dim"],
        norm_eps=eps,
    )


def _linear_layers(hf: dict) -> tuple[int, ...]:
    count, types = hf["num_hidden_layers"], hf.get("layer_types")
    if types is None:
        interval = hf["full_attention_interval"]
        if interval < 1:
            raise InputError(f"full_attention_interval={interval} must be at least 1")
        return tuple(i for i in range(count) if (i + 1) % interval)
    if len(types) != count or not set(types) <= {LINEAR, FULL}:
        raise InputError(
            f"layer_types={types} must name {LINEAR!r} or {FULL!r} for each of the {count} layers"
        )
    return tuple(i for i in range(count) if types[i] == LINEAR)


FAMILY = Family(
    model_type="qwen3_next",
    stem="Qwen3Next",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=(CENTRED_NORMS + GATED_ATTENTION + GATED_DELTA_NET + DENSE + EXPERTS + GATED_SHARED),
    rope=ROPE,
    mtp=MTP,
)
