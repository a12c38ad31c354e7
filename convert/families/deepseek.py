"""DeepSeekMoE (V1, 16B): ungated shared experts beside ordinary attention.

transformers has no such class, but a Qwen2-MoE can compute the same: its shared expert is
multiplied by a sigmoid, which is one half at a zero gate, so w_down doubles; its query, key and
value biases are zero. Doubling is exact in every float and 4-bit format.
"""

import dataclasses

import jax.numpy as jnp

from convert.families import hf_config
from convert.families.deepseek_v2 import require_value
from convert.families.tables import ATTENTION, DENSE, EXPERTS, NORMS, SHARED
from convert.rules import Family, Twin
from moe_jax.attention.grouped import Attention
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.experts.moe import MoE
from moe_jax.quant import CODED, Weight
from moe_jax.transformer import DecoderLayer

# What a Qwen2-MoE states otherwise, or not at all.
_OWN_KEYS = (
    "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq",
    "scoring_func", "attention_bias", "aux_loss_alpha", "seq_aux", "pretraining_tp",
)  # fmt: skip

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "norm_topk_prob": False,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "moe_intermediate_size", "num_experts_per_tok", "n_shared_experts",
    )  # fmt: skip
    require_value(hf, "scoring_func", "softmax")
    require_value(hf, "attention_bias", False)
    heads = hf["num_attention_heads"]
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf["hidden_size"] // heads,
        rope=hf_config.rope_config(hf),
    )
    moe = MoEConfig(
        num_experts=hf_config.num_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["moe_intermediate_size"],
        renormalize=hf["norm_topk_prob"],
        d_shared=hf["moe_intermediate_size"] * hf["n_shared_experts"],
    )
    return hf_config.model_config(hf, attention=attention, moe=moe, dense_layers=_dense_layers(hf))


def _dense_layers(hf: dict) -> list[int]:
    first, every = hf["first_k_dense_replace"] or 0, hf["moe_layer_freq"] or 1
    return [i for i in range(hf["num_hidden_layers"]) if i < first or i % every]


def _qwen2_moe_config(hf: dict) -> dict:
    kept = {key: value for key, value in hf.items() if key not in _OWN_KEYS}
    return kept | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": hf_config.num_experts(hf),
        "shared_expert_intermediate_size": hf["moe_intermediate_size"] * hf["n_shared_experts"],
        "mlp_only_layers": _dense_layers(DEFAULTS | hf),
        "decoder_sparse_step": 1,
        "qkv_bias": True,
        "use_sliding_window": False,
    }


def _qwen2_moe_layer(layer: DecoderLayer) -> DecoderLayer:
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(attention, Attention)
    projections = {"b_q": attention.w_q, "b_k": attention.w_k, "b_v": attention.w_v}
    zeros = {name: jnp.zeros(w.shape[0], w.dtype) for name, w in projections.items()}
    if isinstance(mlp, MoE):
        assert mlp.shared is not None
        doubled = dataclasses.replace(mlp.shared.mlp, w_down=_double(mlp.shared.mlp.w_down))
        gate = jnp.zeros((1, mlp.router.shape[1]), mlp.router.dtype)
        mlp = dataclasses.replace(
            mlp, shared=dataclasses.replace(mlp.shared, mlp=doubled, gate=gate)
        )
    return dataclasses.replace(layer, attention=dataclasses.replace(attention, **zeros), mlp=mlp)


def _double(weight: Weight) -> Weight:
    if isinstance(weight, CODED):
        return dataclasses.replace(weight, scale=weight.scale * 2)
    return weight * 2


FAMILY = Family(
    model_type="deepseek",
    stem="Deepseek",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + ATTENTION + DENSE + EXPERTS + SHARED,
    count_keys=("n_routed_experts",),
    shared_count_key="n_shared_experts",
    twin=Twin("qwen2_moe", _qwen2_moe_config, _qwen2_moe_layer),
)
