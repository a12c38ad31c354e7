"""Lines of tables that several families share; letters of shapes as in `convert.axes`."""

from convert.rules import TensorRule

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

NORMS = (
    TensorRule(_LAYER + "input_layernorm.weight", "attention_norm", "D"),
    TensorRule(_LAYER + "post_attention_layernorm.weight", "mlp_norm", "D"),
)
ATTENTION = (
    TensorRule(_ATTENTION + "q_proj.weight", "attention.w_q", "AD"),
    TensorRule(_ATTENTION + "k_proj.weight", "attention.w_k", "BD"),
    TensorRule(_ATTENTION + "v_proj.weight", "attention.w_v", "BD"),
    TensorRule(_ATTENTION + "o_proj.weight", "attention.w_out", "DA"),
    TensorRule(_ATTENTION + "q_proj.bias", "attention.b_q", "A", "qkv_bias"),
    TensorRule(_ATTENTION + "k_proj.bias", "attention.b_k", "B", "qkv_bias"),
    TensorRule(_ATTENTION + "v_proj.bias", "attention.b_v", "B", "qkv_bias"),
    TensorRule(_ATTENTION + "o_proj.bias", "attention.b_out", "D", "out_bias"),
)
QK_NORM = (
    TensorRule(_ATTENTION + "q_norm.weight", "attention.q_norm", "H", "qk_norm"),
    TensorRule(_ATTENTION + "k_norm.weight", "attention.k_norm", "H", "qk_norm"),
)
JOINT_QK_NORM = (
    TensorRule(_ATTENTION + "q_norm.weight", "attention.q_norm", "A", "qk_norm"),
    TensorRule(_ATTENTION + "k_norm.weight", "attention.k_norm", "B", "qk_norm"),
)
LATENT_ATTENTION = (
    TensorRule(_ATTENTION + "q_proj.weight", "attention.w_q", "AD", "direct_query"),
    TensorRule(_ATTENTION + "q_a_proj.weight", "attention.w_q_down", "QD", "query_rank"),
    TensorRule(_ATTENTION + "q_a_proj.bias", "attention.b_q_down", "Q", "query_rank_bias"),
    TensorRule(_ATTENTION + "q_a_layernorm.weight", "attention.q_norm", "Q", "query_rank"),
    TensorRule(_ATTENTION + "q_b_proj.weight", "attention.w_q_up", "AQ", "query_rank"),
    TensorRule(_ATTENTION + "kv_a_proj_with_mqa.weight", "attention.w_kv_down", "JD"),
    TensorRule(_ATTENTION + "kv_a_proj_with_mqa.bias", "attention.b_kv_down", "J", "out_bias"),
    TensorRule(_ATTENTION + "kv_a_layernorm.weight", "attention.kv_norm", "C"),
    TensorRule(_ATTENTION + "kv_b_proj.weight", "attention.w_kv_up", "UC"),
    TensorRule(_ATTENTION + "o_proj.weight", "attention.w_out", "DO"),
    TensorRule(_ATTENTION + "o_proj.bias", "attention.b_out", "D", "out_bias"),
)


def mlp_rules(prefix: str, ours: str, width: str, needs: str) -> tuple[TensorRule, ...]:
    """A SwiGLU network of one width."""
    return (
        TensorRule(prefix + "gate_proj.weight", ours + ".w_gate", width + "D", needs),
        TensorRule(prefix + "up_proj.weight", ours + ".w_up", width + "D", needs),
        TensorRule(prefix + "down_proj.weight", ours + ".w_down", "D" + width, needs),
    )


def expert_rules(
    block: str = "mlp",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    router: str = "gate",
) -> tuple[TensorRule, ...]:
    """Router and routed experts under the names of a block, its router and its projections."""
    block = _LAYER + block + "."
    expert = block + "experts.{expert}."
    return (
        TensorRule(f"{block}{router}.weight", "mlp.router", "ED", "moe"),
        TensorRule(f"{expert}{gate}.weight", "mlp.experts.w_gate", "FD", "moe", "expert_rows"),
        TensorRule(f"{expert}{up}.weight", "mlp.experts.w_up", "FD", "moe", "expert_rows"),
        TensorRule(f"{expert}{down}.weight", "mlp.experts.w_down", "DF", "moe", "expert_columns"),
    )


def emptied_rule(block: str = "mlp") -> TensorRule:
    """What an expert without channels adds, of families whose experts have no biases."""
    name = f"{_LAYER}{block}.experts.{{expert}}.constant"
    return TensorRule(name, "mlp.experts.b_down", "D", "emptied_bias", "emptied_vector")


DENSE = mlp_rules(_MLP, "mlp", "I", "dense")
EXPERTS = (*expert_rules(), emptied_rule())
CORRECTION_BIAS = (
    TensorRule(_MLP + "gate.e_score_correction_bias", "mlp.router_bias", "E", "correction_bias",
         precise=True),
)  # fmt: skip
GATED_SHARED = (
    *mlp_rules(_MLP + "shared_expert.", "mlp.shared.mlp", "S", "shared"),
    TensorRule(_MLP + "shared_expert_gate.weight", "mlp.shared.gate", "1D", "shared_gate"),
)
SHARED = mlp_rules(_MLP + "shared_experts.", "mlp.shared.mlp", "S", "shared")
