"""Mixture-of-Experts models whose experts have different widths, for `transformers`.

This file travels inside every ragged and layered checkpoint that moe-jax writes and is loaded by
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` under transformers 4.57 and
5.x. It changes one thing of the stock model: the experts of a layer are separate SwiGLU networks
whose widths the config lists.

- Ragged: `config.expert_intermediate_sizes[layer][expert]`. An expert of width 0 adds nothing, or
  the vector `constant` if `config.emptied_experts` says so, or in gpt-oss the bias of its output;
  if that says `cut`, the router has no row for it, and those that are left keep their numbers.
- Layered: `config.moe_intermediate_size[layer]` is the width of all experts of a layer, 0 where a
  layer has none, and `config.unpruned_intermediate_size` what it was before pruning, of which the
  width of shared experts is a multiple. vLLM fuses the experts of such layers.

Routers, shared experts and all else are the stock ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as families call them
FAMILIES = {  # model type: stem of the class names, names of an expert's gate, up and down
    "qwen2_moe": ("Qwen2Moe", PROJECTIONS),
    "qwen3_moe": ("Qwen3Moe", PROJECTIONS),
    "qwen3_next": ("Qwen3Next", PROJECTIONS),
    "mixtral": ("Mixtral", ("w1", "w3", "w2")),
    "olmoe": ("Olmoe", PROJECTIONS),
    "deepseek_v2": ("DeepseekV2", PROJECTIONS),
    "deepseek_v3": ("DeepseekV3", PROJECTIONS),
    "glm4_moe": ("Glm4Moe", PROJECTIONS),
    "glm4_moe_lite": ("Glm4MoeLite", PROJECTIONS),
    "dots1": ("Dots1", PROJECTIONS),
    "gpt_oss": ("GptOss", PROJECTIONS),
}


class RaggedExpert(nn.Module):
    """One SwiGLU expert of its own width, or a constant."""

    def __init__(self, config: Any, width: int, names: tuple[str, str, str], constant: bool):
        super().__init__()
        self.width, self.names, hidden_size = width, names, config.hidden_size
        self.constant = nn.Parameter(torch.zeros(hidden_size)) if constant and not width else None
        if width:
            gate, up, down = names
            self.add_module(gate, nn.Linear(hidden_size, width, bias=False))
            self.add_module(up, nn.Linear(hidden_size, width, bias=False))
            self.add_module(down, nn.Linear(width, hidden_size, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.constant is not None:
            return self.constant.expand_as(x)
        if not self.width:
            return torch.zeros_like(x)
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(F.silu(gate(x)) * up(x))


class GptOssExpert(nn.Module):
    """One expert of gpt-oss: biases, a bounded activation; of width 0 the bias of its output, which
    is then its constant, too."""

    def __init__(self, config: Any, width: int, names: tuple[str, str, str], constant: bool):
        super().__init__()
        self.width = width
        # transformers 4.57 knows the published values only, the config may say others
        self.alpha = getattr(config, "swiglu_alpha", 1.702)
        self.limit = getattr(config, "swiglu_limit", 7.0)
        if width:
            self.gate_proj = nn.Linear(config.hidden_size, width)
            self.up_proj = nn.Linear(config.hidden_size, width)
        down: Any = nn.Linear(width, config.hidden_size) if width else nn.Module()
        if not width:
            down.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.down_proj = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.width:
            return self.down_proj.bias.expand_as(x)
        gate = self.gate_proj(x).clamp(max=self.limit)
        up = self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj((up + 1) * gate * torch.sigmoid(gate * self.alpha))


def _loop(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """`forward` as the blocks of transformers 5 call it; those of 4.57 index the experts."""
    out = torch.zeros_like(hidden_states)
    for number in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == number)
        weight = top_k_weights[token, slot, None]
        part = experts[number](hidden_states[token]) * weight
        out.index_add_(0, token, part.to(out.dtype))
    return out


class LayeredExperts(nn.ModuleList):
    """The experts of a layer, all of one width: a list, which vLLM replaces by a fused layer."""

    forward = _loop


class RaggedExperts(nn.Module):
    """The experts of a layer, children "0", "1", ... so that tensors keep their public names.

    Not an `nn.ModuleList`: vLLM would replace that by a fused layer of one width.
    """

    expert_class: type[nn.Module] = RaggedExpert

    def __init__(
        self,
        config: Any,
        widths: list[int],
        names: tuple[str, str, str],
        constants: bool = False,
        cut: bool = False,
    ):
        super().__init__()
        # The expert of each row of the router.
        self.alive = [number for number, width in enumerate(widths) if width or not cut]
        self.num_experts = len(self.alive)
        for number in self.alive:
            expert = self.expert_class(config, widths[number], names, constants)
            self.add_module(str(number), expert)

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, number: int) -> RaggedExpert:
        return getattr(self, str(self.alive[int(number)]))

    forward = _loop


class RaggedGptOssExperts(RaggedExperts):
    """The same for gpt-oss, whose blocks call them under both versions: 4.57 gives weights for all
    experts, zero for those that are not chosen."""

    expert_class = GptOssExpert

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_indices: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if routing_weights.shape != router_indices.shape:
            routing_weights = routing_weights.gather(1, router_indices)
        return super().forward(rows, router_indices, routing_weights).view_as(hidden_states)


def _is_layered(config: Any) -> bool:
    return isinstance(getattr(config, "moe_intermediate_size", None), list)


@contextmanager
def _stock_width(config: Any) -> Iterator[None]:
    """Show a stock constructor one width for all layers, that of the unpruned model."""
    if not _is_layered(config):
        yield
        return
    widths = config.moe_intermediate_size
    config.moe_intermediate_size = config.unpruned_intermediate_size
    try:
        yield
    finally:
        config.moe_intermediate_size = widths


def _experts(config: Any, layer: int, block: Any, names: tuple[str, str, str]) -> nn.Module:
    if _is_layered(config):
        width, count = config.moe_intermediate_size[layer], len(block.gate.weight)
        return LayeredExperts(RaggedExpert(config, width, names, False) for _ in range(count))
    emptied = getattr(config, "emptied_experts", "zero")
    kind = RaggedGptOssExperts if config.model_type == "ragged_gpt_oss" else RaggedExperts
    widths = config.expert_intermediate_sizes[layer]
    return kind(config, widths, names, emptied == "constant", emptied == "cut")


def _cut_block(config: Any, layer: int, block: Any) -> Any:
    """The block of a layer, made anew where its router has rows for some experts alone."""
    if getattr(config, "emptied_experts", "zero") != "cut":
        return block
    fewer = copy(config)
    count = sum(map(bool, config.expert_intermediate_sizes[layer]))
    for key in COUNTS:
        if hasattr(config, key):
            setattr(fewer, key, count)
    return type(block)(fewer)


def _model_class(stock: Any, config_class: type, names: tuple[str, str, str]) -> type:
    """A subclass of a stock model whose sparse layers have experts of the config's widths."""

    def __init__(self, config):
        with _stock_width(config):
            stock.__init__(self, config)
        for number, layer in enumerate(getattr(self, "model", self).layers):
            name = "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"
            block = getattr(layer, name)
            if hasattr(block, "experts"):
                block = _cut_block(config, number, block)
                block.experts = _experts(config, number, block, names)
                setattr(layer, name, block)

    members = {
        "__module__": __name__,
        "__init__": __init__,
        "config_class": config_class,
        "_can_compile_fullgraph": False,
    }
    return type(f"Ragged{stock.__name__}", (stock,), members)


def _config_class(stock: Any, name: str, family: str) -> type:
    """A subclass of a stock config, which may be one that checks types and knows one width only."""
    members: dict[str, Any] = {"__module__": __name__, "model_type": f"ragged_{family}"}
    if "moe_intermediate_size" not in getattr(stock, "__dataclass_fields__", ()):
        return type(name, (stock,), members)
    from huggingface_hub.dataclasses import strict

    members["__annotations__"] = {"moe_intermediate_size": int | list[int]}
    return strict(type(name, (stock,), members))


def _classes(family: str, stem: str, names: tuple[str, str, str]) -> dict[str, type]:
    """Config, bare model and causal language model of a family; none if transformers lacks it."""
    package = f"transformers.models.{family}"
    try:
        configs = import_module(f"{package}.configuration_{family}")
        models = import_module(f"{package}.modeling_{family}")
    except ImportError:
        return {}
    config = _config_class(getattr(configs, f"{stem}Config"), f"Ragged{stem}Config", family)
    made = [
        _model_class(getattr(models, stem + kind), config, names)
        for kind in ("Model", "ForCausalLM")
    ]
    return {made_class.__name__: made_class for made_class in (config, *made)}


for _family, (_stem, _names) in FAMILIES.items():
    globals().update(_classes(_family, _stem, _names))

try:  # transformers 5 calls every block `mlp`; in files, Mixtral's keeps its own name
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
except ImportError:
    pass
else:
    register_checkpoint_conversion_mapping(
        "ragged_mixtral", [WeightRenaming(".block_sparse_moe.", ".mlp.")], overwrite=True
    )
