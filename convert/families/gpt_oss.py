"""gpt-oss: biased experts with a bounded activation, attention sinks, windows in every other layer.

Its router takes the softmax of the chosen logits alone. That is the softmax of all logits divided
by its sum over the chosen, which is how it is computed here.
"""

from convert.families import hf_config
from convert.families.tables import ATTENTION, NORMS, expert_rules
from convert.rules import Family, TensorRule
from moe_jax.config import Activation, AttentionConfig, ModelConfig, MoEConfig
from moe_jax.errors import InputError

ROPE = {"rope_theta": 150000.0}
_EXPERT = "model.layers.{layer}.mlp.experts.{expert}."

SINKS = (TensorRule("model.layers.{layer}.self_attn.sinks", "attention.sinks", "N", "sinks"),)
BIASES = (
    TensorRule("model.layers.{layer}.mlp.router.bias", "mlp.logit_bias", "E", "logit_bias"),
    TensorRule(_EXPERT + "gate_proj.bias", "mlp.experts.b_gate", "F", "expert_bias", "expert_rows"),
    TensorRule(_EXPERT + "up_proj.bias", "mlp.experts.b_up", "F", "expert_bias", "expert_rows"),
    TensorRule(
        _EXPERT + "down_proj.bias", "mlp.experts.b_down", "D", "expert_bias", "expert_vector"
    ),
)

# What config.json may leave out, as in transformers.
DEFAULTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "attention_bias": True,
    "head_dim": 64,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}


def config_from_hf(hf: dict) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: if a key is missing or has an unsupported value.
    """
    hf_config.require(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "intermediate_size", "num_experts_per_tok",
    )  # fmt: skip
    if "rope_scaling" not in hf and "rope_parameters" not in hf:
        # Versions of transformers fill this in with different values.
        raise InputError("config.json lacks rope_parameters (or rope_scaling)")
    eps, bias = hf["rms_norm_eps"], hf["attention_bias"]
    attention = AttentionConfig(
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope=hf_config.rope_config(hf, ROPE),
        qkv_bias=bias,
        out_bias=bias,
        norm_eps=eps,
        sinks=True,
    )
    moe = MoEConfig(
        num_experts=hf_config.num_experts(hf),
        experts_per_token=hf["num_experts_per_tok"],
        d_expert=hf["intermediate_size"],
        renormalize=True,
        logit_bias=True,
        expert_bias=True,
        activation=Activation(slope=hf["swiglu_alpha"], shift=1.0, limit=hf["swiglu_limit"]),
    )
    return hf_config.model_config(
        hf, attention=attention, moe=moe, sliding_layers=_sliding_layers(hf)
    )


def _sliding_layers(hf: dict) -> list[int]:
    layers, types = range(hf["num_hidden_layers"]), hf.get("layer_types")
    if types is None:
        return [i for i in layers if i % 2 == 0]
    return [i for i in layers if types[i] == "sliding_attention"]


FAMILY = Family(
    model_type="gpt_oss",
    stem="GptOss",
    read_config=config_from_hf,
    defaults=DEFAULTS,
    rules=NORMS + ATTENTION + SINKS + expert_rules(router="router") + BIASES,
    width_key="intermediate_size",
    count_keys=("num_local_experts",),
    rope=ROPE,
    together="alternating",
    formats=("ragged-bf16", "padded-bf16", "padded-mxfp4"),
)
