"""A checkpoint with the layers of DeepSeek-V3 as published, in 8-bit floats: one dense, one not."""

from pathlib import Path

import ml_dtypes
import numpy as np

from convert import find_family, write_folder
from convert.rules import ruled_tensors
from tests.support import tiny

BLOCK, FLOAT8, BFLOAT16 = 128, np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 1024,
    "hidden_size": 7168, "num_hidden_layers": 2, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8,
    "topk_group": 4, "first_k_dense_replace": 1, "max_position_embeddings": 512,
    "num_nextn_predict_layers": 0,
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
}  # fmt: skip


def checkpoint(folder: Path, experts: int, **sizes: int) -> Path:
    """Write the model: random weights of standard deviation 0.02, as published 45 MB an expert."""
    config = CONFIG | {"n_routed_experts": experts} | sizes
    family = find_family("deepseek_v3")
    found = ruled_tensors(family, family.config_from_hf(config))
    coded = {name: rule is not None and rule.is_linear for name, _, rule in found}
    shapes = {n: shape for n, shape, _ in ruled_tensors(family, family.config_from_hf(config))}
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    codes = np.clip(100 * noise, -448, 448).astype(FLOAT8)  # beyond that is no number
    plain = (0.02 * noise).astype(BFLOAT16)
    specs = {}
    for name, shape in shapes.items():
        specs[name] = FLOAT8 if coded[name] else BFLOAT16, shape
        if coded[name]:
            scales = tuple(-(-size // BLOCK) for size in shape)
            specs[name + "_scale_inv"] = np.dtype(np.float32), scales

    def value(name: str) -> np.ndarray:
        dtype, shape = specs[name]
        if dtype == np.float32:
            return np.full(shape, 0.0002, dtype)
        return np.resize(codes if dtype == FLOAT8 else plain, shape)

    values = ((name, value(name)) for name in specs)
    return tiny.add_tokenizer(write_folder(folder, specs, values, config, None))
