"""Tables that translate Hugging Face tensors to our model and back."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from convert.export_format import FORMATS, ExportFormat, Widths
from convert.fields import read_fields
from moe_jax.config import LatentAttentionConfig, ModelConfig
from moe_jax.quant import is_linear
from moe_jax.transformer import DecoderLayer

# How one tensor lies in ours: as it is, as an expert's part of a channel pool, whose rows are the
# tensor's rows (gate, up: [F, D] or a bias [F]) or its columns (down: [D, F]), or as the row of an
# expert, whatever its width or only if that is 0 (the bias of down: [D]).
Placing = Literal["identity", "expert_rows", "expert_columns", "expert_vector", "emptied_vector"]

RAGGED = "ragged_"  # prefix of the model types of our custom export
_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+")
_EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)\d+")


@dataclass(frozen=True)
class TensorRule:
    """One invertible line of a family's table.

    Attributes:
      hf: name on disk, with `{layer}` and, for experts, `{expert}`.
      ours: attribute path below the decoder layer.
      shape: axes on disk, letters of `axis_sizes`.
      needs: the part of the architecture that has this tensor, see `parts`.
      layout: how it lies in our array.
      precise: whether it stays float32 whatever the dtype of the rest.
    """

    hf: str
    ours: str
    shape: str
    needs: str = ""
    layout: Placing = "identity"
    precise: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether 4-bit formats pack the tensor: the linear layers of `moe_jax.quant.is_linear`."""
        return is_linear(self.ours)

    @property
    def is_of_expert(self) -> bool:
        """Whether each routed expert has one."""
        return self.layout != "identity"

    def has_expert(self, count: int) -> bool:
        """Whether an expert of `count` channels has this tensor."""
        return {"expert_vector": True, "emptied_vector": not count}.get(self.layout, count > 0)


@dataclass(frozen=True)
class Twin:
    """Another family in which a model computes the same, and which more programs load.

    Attributes:
      model_type: of the other family.
      config: config.json -> that of the other family.
      layer: decoder layer -> one that the other family's rules write.
    """

    model_type: str
    config: Callable[[dict], dict]
    layer: Callable[[DecoderLayer], DecoderLayer]


@dataclass(frozen=True)
class Mtp:
    """Where a family keeps the layers that predict further tokens, see `convert.mtp`.

    Attributes:
      count_key: key of config.json for their number.
      default: their number if config.json does not say.
      prefix: of the names of their tensors, if they are not numbered on from the last layer.
      tensors: what they have beside the tensors of an ordinary layer: name behind the prefix, or
        behind that of each layer -> axes as in `TensorRule.shape`, K being twice the model's width.
    """

    count_key: str
    tensors: Mapping[str, str]
    default: int = 0
    prefix: str | None = None


@dataclass(frozen=True)
class Family:
    """What reading and writing a model type takes.

    Attributes:
      model_type: of config.json.
      stem: of the names of its classes in transformers.
      read_config: config.json, its fields checked and what it leaves out filled in
        (`convert.fields`), -> ModelConfig; raises InputError.
      rules: tensors of a decoder layer.
      width_key: key of config.json for the experts' width.
      count_keys: keys for the number of experts, all written since each version reads its own.
      shared_count_key: key for the number of shared experts, if it times the experts' width is
        the width of the shared expert.
      rope: values of `rope_parameters` that config.json may leave out.
      defaults: values of config.json that it may leave out, those of transformers.
      mtp: its layers that predict further tokens, if it may have any.
      ragged: whether experts or layers have widths of their own (our custom exports).
      twin: the family it is exported as, if not as itself; such a one is never ragged.
      interleaved: whether a folder holds the experts of a layer together, gate and up channels
        alternating; `rules` then name what `convert.interleaved` makes of that.
      formats: what it can be exported as, of `FORMATS`: only what some program reads.
    """

    model_type: str
    stem: str
    read_config: Callable[[dict], ModelConfig]
    rules: tuple[TensorRule, ...]
    width_key: str = "moe_intermediate_size"
    count_keys: tuple[str, ...] = ("num_experts",)
    shared_count_key: str | None = None
    rope: Mapping[str, float] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    mtp: Mtp | None = None
    ragged: bool = False
    twin: Twin | None = None
    interleaved: bool = False
    formats: tuple[str, ...] = tuple(n for n in FORMATS if not ExportFormat(n).is_float4)

    def config_from_hf(self, hf: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig.

        Raises:
          InputError: a field has another type or an unsupported value, or is missing.
        """
        fields = read_fields(hf, self.defaults)
        if self.mtp is not None:
            fields.get(self.mtp.count_key)  # read by `convert.mtp`
        return self.read_config(fields)

    @property
    def public_type(self) -> str:
        """The model type of the stock family."""
        return self.model_type.removeprefix(RAGGED)

    def rule(self, name: str) -> TensorRule | None:
        """The line of the table that a name on disk belongs to, if any."""
        pattern = _EXPERT_NUMBER.sub("{expert}", _LAYER_NUMBER.sub("{layer}", name))
        return self._by_pattern.get(pattern)

    def is_precise(self, name: str) -> bool:
        """Whether a tensor stays float32."""
        rule = self.rule(name)
        return rule is not None and rule.precise

    @cached_property
    def _by_pattern(self) -> dict[str, TensorRule]:
        return {rule.hf: rule for rule in self.rules}


EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes of the axis letters of `TensorRule.shape`, but for F, which an expert may own.

    A and B are all query and all key/value heads' coordinates, O those of all heads' values, N the
    query heads, G all queries' coordinates and gates, I the width of a dense layer, S that of the
    shared expert, 1 is one. Of latent attention: Q is the query rank, C the latent width, J that
    and the rotated part of the key, U what latents expand to. Of linear attention: W are queries,
    keys, values and gates, X the channels of the convolution and T its positions, Z all values, Y
    the value heads, M twice as many, P the width of one.
    """
    a, m = config.attention, config.moe
    sizes = {
        "1": 1,
        "V": config.vocab_size,
        "D": config.d_model,
        "A": a.num_heads * a.key_dim,
        "B": a.num_kv_heads * a.key_dim,
        "O": a.num_heads * a.value_dim,
        "N": a.num_heads,
        "G": a.num_heads * a.key_dim * 2,
        "H": a.key_dim,
        "E": m.num_experts,
        "I": config.d_dense,
        "S": m.d_shared,
    }
    if isinstance(a, LatentAttentionConfig):
        sizes |= {
            "Q": a.query_rank or 0,
            "C": a.kv_rank,
            "J": a.kv_rank + a.rope_dim,
            "U": a.num_heads * (a.plain_dim + a.value_dim),
        }
    if config.linear_attention is not None:
        c = config.linear_attention
        heads = c.num_value_heads
        sizes |= {"W": c.channels + c.values, "X": c.channels, "T": c.conv_width, "Z": c.values}
        sizes |= {"Y": heads, "M": 2 * heads, "P": c.value_dim}
    return sizes


def parts(config: ModelConfig, layer: int) -> set[str]:
    """Names of the optional parts that a layer has."""
    a, m = config.attention, config.moe
    routed = layer not in config.dense_layers
    present = {
        "": True,
        "dense": not routed,
        "moe": routed,
        "correction_bias": routed and m.correction_bias,
        "shared": routed and m.d_shared > 0,
        "shared_gate": routed and m.d_shared > 0 and m.shared_gate,
        "logit_bias": routed and m.logit_bias,
        "expert_bias": routed and m.expert_bias,
        "emptied_bias": routed and m.emptied_bias,
    }
    if config.linear(layer) is not None:
        present["linear_attention"] = True
    elif isinstance(a, LatentAttentionConfig):
        present |= {
            "direct_query": a.query_rank is None,
            "query_rank": a.query_rank is not None,
            "query_rank_bias": a.query_rank is not None and a.bias,
            "out_bias": a.bias,
        }
    else:
        present |= {"qkv_bias": a.qkv_bias, "out_bias": a.out_bias, "qk_norm": a.qk_norm}
        present |= {"sinks": a.sinks, "softmax_attention": True}
    return {name for name, here in present.items() if here}


def uniform_widths(config: ModelConfig) -> Widths:
    """Every expert at `d_expert` channels."""
    m = config.moe
    row = (m.d_expert,) * m.num_experts
    return tuple(() if i in config.dense_layers else row for i in range(config.num_layers))


def layer_rules(
    rules: Iterable[TensorRule], config: ModelConfig, layer: int
) -> Iterator[tuple[TensorRule, str]]:
    """The rules of one layer with their names on disk, `{expert}` left open."""
    here = parts(config, layer)
    for rule in rules:
        if rule.needs in here:
            yield rule, rule.hf.replace("{layer}", str(layer))


def ruled_tensors(
    family: Family, config: ModelConfig, widths: Widths | None = None
) -> Iterator[tuple[str, tuple[int, ...], TensorRule | None]]:
    """All tensors that a checkpoint must have, in file order, each with its line of the table.

    Args:
      family: its rules.
      config: the architecture.
      widths: channels per layer and expert, default all `d_expert`; 0 means no tensors.

    Yields:
      (name, shape on disk, rule; None outside the decoder layers).
    """
    sizes = axis_sizes(config)
    yield EMBEDDING, (sizes["V"], sizes["D"]), None
    for layer, counts in enumerate(widths or uniform_widths(config)):
        for rule, name in layer_rules(family.rules, config, layer):
            if not rule.is_of_expert:
                yield name, tuple(sizes[axis] for axis in rule.shape), rule
                continue
            before, _, behind = name.partition("{expert}")
            shapes = {
                count: tuple(count if axis == "F" else sizes[axis] for axis in rule.shape)
                for count in set(counts)
                if rule.has_expert(count)
            }
            for expert, count in enumerate(counts):
                if count in shapes:
                    yield f"{before}{expert}{behind}", shapes[count], rule
    yield FINAL_NORM, (sizes["D"],), None
    if not config.tie_embeddings:
        yield LM_HEAD, (sizes["V"], sizes["D"]), None


def expected_tensors(
    family: Family, config: ModelConfig, widths: Widths | None = None
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of `ruled_tensors`."""
    return {name: shape for name, shape, _ in ruled_tensors(family, config, widths)}
