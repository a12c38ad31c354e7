"""Mixture-of-Experts models whose experts have different widths, for `transformers`.

This file travels inside every ragged checkpoint that moe-jax writes and is loaded by
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` under transformers 4.57 and
5.x. It changes one thing of the stock model: the experts of a layer are separate SwiGLU networks
whose widths `config.expert_intermediate_sizes[layer][expert]` lists. An expert of width 0 has no
tensors and adds nothing; the router is the stock one.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeForCausalLM, Qwen2MoeModel
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeModel


class RaggedExpert(nn.Module):
    """One SwiGLU expert of its own width."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.width = width
        if width:
            self.gate_proj = nn.Linear(hidden_size, width, bias=False)
            self.up_proj = nn.Linear(hidden_size, width, bias=False)
            self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.width:
            return torch.zeros_like(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RaggedExperts(nn.Module):
    """The experts of a layer, children "0", "1", ... so that tensors keep their public names.

    Not an `nn.ModuleList`: vLLM would replace that by a fused layer of one width. The blocks of
    transformers 5 call `forward`, those of 4.57 index the experts.
    """

    def __init__(self, hidden_size: int, widths: list[int]):
        super().__init__()
        self.num_experts = len(widths)
        for number, width in enumerate(widths):
            self.add_module(str(number), RaggedExpert(hidden_size, width))

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, number: int) -> RaggedExpert:
        return getattr(self, str(int(number)))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == number)
            weight = top_k_weights[token, slot, None]
            part = self[number](hidden_states[token]) * weight
            out.index_add_(0, token, part.to(out.dtype))
        return out


def _make_ragged(layers, config) -> None:
    """Replace the stock experts of every sparse layer."""
    for layer, widths in zip(layers, config.expert_intermediate_sizes, strict=True):
        if widths:
            layer.mlp.experts = RaggedExperts(config.hidden_size, widths)


class RaggedQwen2MoeConfig(Qwen2MoeConfig):
    model_type = "ragged_qwen2_moe"


class RaggedQwen2MoeModel(Qwen2MoeModel):
    config_class = RaggedQwen2MoeConfig
    _can_compile_fullgraph = False

    def __init__(self, config):
        super().__init__(config)
        _make_ragged(self.layers, config)


class RaggedQwen2MoeForCausalLM(Qwen2MoeForCausalLM):
    config_class = RaggedQwen2MoeConfig
    _can_compile_fullgraph = False

    def __init__(self, config):
        super().__init__(config)
        _make_ragged(self.model.layers, config)


class RaggedQwen3MoeConfig(Qwen3MoeConfig):
    model_type = "ragged_qwen3_moe"


class RaggedQwen3MoeModel(Qwen3MoeModel):
    config_class = RaggedQwen3MoeConfig
    _can_compile_fullgraph = False

    def __init__(self, config):
        super().__init__(config)
        _make_ragged(self.layers, config)


class RaggedQwen3MoeForCausalLM(Qwen3MoeForCausalLM):
    config_class = RaggedQwen3MoeConfig
    _can_compile_fullgraph = False

    def __init__(self, config):
        super().__init__(config)
        _make_ragged(self.model.layers, config)
