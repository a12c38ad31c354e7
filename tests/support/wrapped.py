"""Tiny models that see images, by transformers' own classes, around text models of our families."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import tiny

IMAGE, TOKENS, HIDDEN = 90, 96, 160  # token that stands for a part of an image; sizes of the text
_TEXT = {
    "vocab_size": TOKENS, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "moe_intermediate_size": 96, "num_experts_per_tok": 2,
}  # fmt: skip
_EYES = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 4}
_SQUARE = {"depth": 2, "num_heads": 2, "out_hidden_size": HIDDEN, "spatial_merge_size": 2,
           "temporal_patch_size": 2}  # fmt: skip
_LATENT = {**tiny.LATENT, "n_shared_experts": 1, "q_lora_rank": 32, "kv_lora_rank": 32}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92,
           "vision_end_token_id": 93}  # fmt: skip

# Model type -> config.json; the first layer has no experts.
CONFIGS: dict[str, dict] = {
    "qwen3_vl_moe": {
        **_TOKENS,
        "text_config": {
            **_TEXT, "head_dim": 16, "num_experts": 8, "mlp_only_layers": [0],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        "vision_config": {**_EYES, **_SQUARE, "num_position_embeddings": 16,
                          "deepstack_visual_indexes": [0]},
    },
    "glm4v_moe": {
        **_TOKENS,
        "text_config": {
            **_TEXT, "n_routed_experts": 8, "first_k_dense_replace": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                "mrope_section": [4, 3, 3], "partial_rotary_factor": 0.5},
        },
        "vision_config": {**_EYES, **_SQUARE, "image_size": 16},
    },
    "kimi_k25": {
        **_TOKENS,
        "projection_hidden_size": 32,
        "tie_word_embeddings": False,
        "text_config": {**_TEXT, **_LATENT, "model_type": "deepseek_v3",
                        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
        "vision_config": {**_EYES, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2},
    },
}  # fmt: skip


def save_model(model_type: str, folder: Path) -> torch.nn.Module:
    """Save a random model in bfloat16 as users find it; returns it as read again, in float32."""
    config = transformers.AutoConfig.for_model(model_type, **CONFIGS[model_type])
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.7, 1.3)
            else:
                parameter.normal_(std=0.1 if parameter.ndim > 1 else 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.1)
    tiny.save(tiny.half(model), folder)
    path = folder / "model.safetensors"
    tensors = dict(_published(name, value) for name, value in load_file(path).items())
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"patch_size": 4}))
    return load(folder)[0]


def _published(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """What transformers 5 reads, but does not write: it renames too much of Kimi-K2.5, and leaves
    the experts of Qwen3-VL as it has them in memory."""
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        value = value.transpose(1, 2).contiguous()
    return name.replace("language_model.model.blocks.", "language_model.model.layers."), value


def load(folder: Path):
    """(the model in float32 by its own class, what loading says of its tensors)."""
    loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    model, info = loaded
    return model.eval(), info


def image_inputs(model_type: str) -> dict[str, torch.Tensor]:
    """An image of 4 x 4 patches, which are 4 tokens, within a text."""
    shape = (16, 3, 4, 4) if model_type == "kimi_k25" else (16, 3 * 2 * 4 * 4)
    tokens = [5, 17, 92, *[IMAGE] * 4, 93, 44, 8, 71, 23]
    ids = torch.tensor([tokens])
    found = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(3)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    if model_type != "kimi_k25":
        found["mm_token_type_ids"] = (ids == IMAGE).int()
    return found


def image_logits(model, model_type: str):
    """Logits [1, T, V] of a text with an image in it."""
    with torch.no_grad():
        return model(**image_inputs(model_type)).logits.numpy()
