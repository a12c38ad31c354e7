"""Tiny random Hugging Face models in folders, and their logits: the oracle of the converters."""

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "attn_implementation": "eager",
}


LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
OWN_SIZES = {
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "qwen3_moe": {"head_dim": 16},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16},
    "olmoe": {"intermediate_size": 16, "pad_token_id": 0},
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 0},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    "glm4_moe": {"n_routed_experts": 8, "first_k_dense_replace": 0, "head_dim": 16},
    "glm4_moe_lite": {**LATENT, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["sparse"] * 2},
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "head_dim": 16,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "intermediate_size": 16,
        "head_dim": 16,
        "sliding_window": 4,
        "swiglu_limit": 1.5,  # of the published 7, so that tiny activations reach it
    },
    "qwen3_next": {
        "shared_expert_intermediate_size": 24,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def tiny_model(model_type: str, *, seed: int = 0, **config) -> transformers.PreTrainedModel:
    """A float32 model whose every weight, bias and norm is random, so that none can hide."""
    sizes = {**SIZES, **OWN_SIZES[model_type], **config}
    if sizes.keys() & {"num_local_experts", "n_routed_experts"}:
        del sizes["num_experts"]
    settings = transformers.AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(settings).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                centred = not parameter.any()  # then one is added when it is used
                parameter.uniform_(0.7, 1.3).sub_(1.0 if centred else 0.0)
            else:  # small values would be divided by their size, rounding errors included
                parameter.normal_(std=1.0 if "conv1d" in name else 0.25)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.1)
    return model


def half(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model in bfloat16, but for correction biases, which checkpoints hold in float32."""
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("correction_bias")}
    model = model.bfloat16()
    for name, bias in biases.items():
        model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias
    return model


def save(model: transformers.PreTrainedModel, folder: Path, **arguments) -> Path:
    """Save as users find it, public tensor names included."""
    model.save_pretrained(folder, **arguments)
    return folder


def tiny_qwen2_moe(folder: Path, **config) -> Path:
    """A saved tiny Qwen2-MoE; `config` overrides keys of its config."""
    return save(tiny_model("qwen2_moe", **config), folder)


def tiny_qwen3_moe(folder: Path, **config) -> Path:
    """A saved tiny Qwen3-MoE; `config` overrides keys of its config."""
    return save(tiny_model("qwen3_moe", **config), folder)


def add_tokenizer(folder: Path) -> Path:
    """Give a model a tokenizer.json of bytes; its vocabulary must have 256 rows or more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tokens_and_mask(batch: int = 2, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens int32 [B, T] and a right-padded mask bool [B, T]."""
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (batch, length))
    valid = np.arange(length) < np.array([length, length - 5])[:batch, None]
    return tokens.astype(np.int32), valid


def load_export(folder: Path, *, trust: bool, **arguments):
    """(a float32 model by transformers, what loading says of its tensors)."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust, output_loading_info=True,
        attn_implementation="eager", **arguments,
    )  # fmt: skip
    return model.eval(), info


def torch_logits(model, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] by transformers."""
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(valid, dtype=torch.long),
        )
    return out.logits.float().numpy()
