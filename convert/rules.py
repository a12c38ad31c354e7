"""Tables that translate Hugging Face tensors to our model and back."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.moe import Experts
from moe_jax.quant import QTensor, Weight, dequantize, unpack_nibbles
from moe_jax.transformer import DecoderLayer

# How one tensor lies in ours: as it is, or as an expert's part of a channel pool, whose rows are
# the tensor's rows (gate, up: [F, D]) or its columns (down: [D, F]).
Layout = Literal["identity", "expert_rows", "expert_columns"]

Widths = tuple[tuple[int, ...], ...]  # [layer][expert], () for a dense layer


@dataclass(frozen=True)
class Rule:
    """One invertible line of a family's table.

    Attributes:
      hf: name on disk, with `{layer}` and, for experts, `{expert}`.
      ours: attribute path below the decoder layer.
      shape: axes on disk, letters of `axis_sizes`.
      needs: the part of the architecture that has this tensor, see `parts`.
      layout: how it lies in our array.
    """

    hf: str
    ours: str
    shape: str
    needs: str = ""
    layout: Layout = "identity"


@dataclass(frozen=True)
class Family:
    """What reading and writing a model type takes.

    Attributes:
      model_type: of config.json.
      config_from_hf: config.json -> ModelConfig; raises ValueError.
      rules: tensors of a decoder layer.
      ragged: whether every expert has its own width (our custom export).
    """

    model_type: str
    config_from_hf: Callable[[dict], ModelConfig]
    rules: tuple[Rule, ...]
    ragged: bool = False


EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

# Axes: A and B are all query and all key/value heads' coordinates, I the width of a dense layer,
# S that of the shared expert, 1 is one.
NORMS = (
    Rule(_LAYER + "input_layernorm.weight", "attention_norm", "D"),
    Rule(_LAYER + "post_attention_layernorm.weight", "mlp_norm", "D"),
)
ATTENTION = (
    Rule(_ATTENTION + "q_proj.weight", "attention.w_q", "AD"),
    Rule(_ATTENTION + "k_proj.weight", "attention.w_k", "BD"),
    Rule(_ATTENTION + "v_proj.weight", "attention.w_v", "BD"),
    Rule(_ATTENTION + "o_proj.weight", "attention.w_out", "DA"),
    Rule(_ATTENTION + "q_proj.bias", "attention.b_q", "A", "qkv_bias"),
    Rule(_ATTENTION + "k_proj.bias", "attention.b_k", "B", "qkv_bias"),
    Rule(_ATTENTION + "v_proj.bias", "attention.b_v", "B", "qkv_bias"),
    Rule(_ATTENTION + "o_proj.bias", "attention.b_out", "D", "out_bias"),
    Rule(_ATTENTION + "q_norm.weight", "attention.q_norm", "H", "qk_norm"),
    Rule(_ATTENTION + "k_norm.weight", "attention.k_norm", "H", "qk_norm"),
)
DENSE = (
    Rule(_MLP + "gate_proj.weight", "mlp.w_gate", "ID", "dense"),
    Rule(_MLP + "up_proj.weight", "mlp.w_up", "ID", "dense"),
    Rule(_MLP + "down_proj.weight", "mlp.w_down", "DI", "dense"),
)
_EXPERT = _MLP + "experts.{expert}."
EXPERTS = (
    Rule(_MLP + "gate.weight", "mlp.router", "ED", "moe"),
    Rule(_EXPERT + "gate_proj.weight", "mlp.experts.w_gate", "FD", "moe", "expert_rows"),
    Rule(_EXPERT + "up_proj.weight", "mlp.experts.w_up", "FD", "moe", "expert_rows"),
    Rule(_EXPERT + "down_proj.weight", "mlp.experts.w_down", "DF", "moe", "expert_columns"),
)
_SHARED = _MLP + "shared_expert."
SHARED = (
    Rule(_SHARED + "gate_proj.weight", "mlp.shared.mlp.w_gate", "SD", "shared"),
    Rule(_SHARED + "up_proj.weight", "mlp.shared.mlp.w_up", "SD", "shared"),
    Rule(_SHARED + "down_proj.weight", "mlp.shared.mlp.w_down", "DS", "shared"),
    Rule(_MLP + "shared_expert_gate.weight", "mlp.shared.gate", "1D", "shared_gate"),
)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes of the axis letters of `Rule.shape`, but for F, which an expert may own."""
    a, m = config.attention, config.moe
    return {
        "1": 1,
        "V": config.vocab_size,
        "D": config.d_model,
        "A": a.num_heads * a.head_dim,
        "B": a.num_kv_heads * a.head_dim,
        "H": a.head_dim,
        "E": m.num_experts,
        "I": config.d_dense,
        "S": m.d_shared,
    }


def parts(config: ModelConfig, layer: int) -> set[str]:
    """Names of the optional parts that a layer has."""
    a, m = config.attention, config.moe
    routed = layer not in config.dense_layers
    present = {
        "": True,
        "qkv_bias": a.qkv_bias,
        "out_bias": a.out_bias,
        "qk_norm": a.qk_norm,
        "dense": not routed,
        "moe": routed,
        "shared": routed and m.d_shared > 0,
        "shared_gate": routed and m.d_shared > 0 and m.shared_gate,
    }
    return {name for name, here in present.items() if here}


def uniform_widths(config: ModelConfig) -> Widths:
    """Every expert at `d_expert` channels."""
    m = config.moe
    row = (m.d_expert,) * m.num_experts
    return tuple(() if i in config.dense_layers else row for i in range(config.num_layers))


def layer_rules(
    rules: Iterable[Rule], config: ModelConfig, layer: int
) -> Iterator[tuple[Rule, str]]:
    """The rules of one layer with their names on disk, `{expert}` left open."""
    here = parts(config, layer)
    for rule in rules:
        if rule.needs in here:
            yield rule, rule.hf.replace("{layer}", str(layer))


def expected_tensors(
    family: Family, config: ModelConfig, widths: Widths | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a checkpoint must have, in file order.

    Args:
      family: its rules.
      config: the architecture.
      widths: channels per layer and expert, default all `d_expert`; 0 means no tensors.

    Returns:
      Name -> shape on disk.
    """
    sizes = axis_sizes(config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (sizes["V"], sizes["D"])}
    for layer, counts in enumerate(widths or uniform_widths(config)):
        for rule, name in layer_rules(family.rules, config, layer):
            if rule.layout == "identity":
                shapes[name] = tuple(sizes[axis] for axis in rule.shape)
                continue
            for expert, count in enumerate(counts):
                if count:
                    own = sizes | {"F": count}
                    full = name.replace("{expert}", str(expert))
                    shapes[full] = tuple(own[axis] for axis in rule.shape)
    shapes[FINAL_NORM] = (sizes["D"],)
    if not config.tie_embeddings:
        shapes[LM_HEAD] = (sizes["V"], sizes["D"])
    return shapes


def layer_to_hf(
    rules: Iterable[Rule], layer: DecoderLayer, index: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a decoder layer under their names on disk; the inverse of reading.

    4-bit weights are dequantised. An expert without channels yields nothing.
    """
    for rule in rules:
        value = _lookup(layer, rule.ours)
        if value is not None:
            assert isinstance(value, Weight)
            array = np.asarray(dequantize(value))
            yield from _named_parts(rule, layer, index, array, channels_per_row=1)


@dataclass(frozen=True)
class Codes:
    """A weight [out, in] in 4 bits: codes int8 [out, in] in -8..7, scale float [out, in / g]."""

    codes: np.ndarray
    scale: np.ndarray


def layer_codes(
    rules: Iterable[Rule], layer: DecoderLayer, index: int
) -> Iterator[tuple[str, Codes]]:
    """The 4-bit weights of a decoder layer under their names on disk, exactly as they are."""
    for rule in rules:
        value = _lookup(layer, rule.ours)
        if not isinstance(value, QTensor):
            continue
        group = value.group_size if value.axis == 0 else 1
        codes, scale = np.asarray(unpack_nibbles(value.packed)), np.asarray(value.scale)
        for (name, part), (_, own) in zip(
            _named_parts(rule, layer, index, codes, channels_per_row=1),
            _named_parts(rule, layer, index, scale, channels_per_row=group),
            strict=True,
        ):
            yield name, Codes(part, own)


def _named_parts(
    rule: Rule, layer: DecoderLayer, index: int, array: np.ndarray, channels_per_row: int
) -> Iterator[tuple[str, np.ndarray]]:
    """An array of the layer cut into what lies on disk; experts' rows follow each other."""
    name = rule.hf.replace("{layer}", str(index))
    if rule.layout == "identity":
        yield name, array
        return
    experts = _lookup(layer, rule.ours.rpartition(".")[0])
    assert isinstance(experts, Experts)
    ends = np.concatenate([[0], np.cumsum(np.asarray(experts.count))]) // channels_per_row
    for expert, (start, stop) in enumerate(itertools.pairwise(ends.astype(int))):
        rows = array[start:stop]
        if len(rows):
            part = rows if rule.layout == "expert_rows" else np.ascontiguousarray(rows.T)
            yield name.replace("{expert}", str(expert)), part


def _lookup(node, path: str):
    """Follow an attribute path; None where a part is absent."""
    for key in path.split("."):
        node = getattr(node, key, None)
    return node
