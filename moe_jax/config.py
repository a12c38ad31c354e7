"""Architecture of a Mixture-of-Experts transformer as frozen, hashable dataclasses."""

from dataclasses import dataclass, replace
from typing import Literal

from moe_jax.errors import InputError

RopeKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
Score = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and its context extension.

    `theta` is the base; `fraction` the share of a head that rotates. The other fields belong to
    the extension `kind` and keep the meaning they have in Hugging Face's `rope_parameters`.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    fraction: float = 1.0
    factor: float = 1.0
    original_max_position: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention: `num_heads` query heads share `num_kv_heads` key/value heads.

    `qk_norm` normalises queries and keys, each head by itself or, if `joint_qk_norm`, all heads
    together. `clip_qkv` bounds the magnitude of queries, keys and values. With `sinks` every head
    has one more score, which takes its share of the softmax and adds no value. With `output_gate`
    every head's projection holds as many gates after its queries; their sigmoids multiply its
    output.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig = RopeConfig()
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    norm_eps: float = 1e-6
    joint_qk_norm: bool = False
    clip_qkv: float | None = None
    sinks: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        heads, shared = self.num_heads, self.num_kv_heads
        message = f"num_heads={heads} must be a multiple of num_kv_heads={shared}"
        _require(heads % shared == 0, message)
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary pairs")
        pairs = int(self.head_dim * self.rope.fraction) // 2
        for name in ("short_factor", "long_factor") if self.rope.kind == "longrope" else ():
            given = len(getattr(self.rope, name))
            message = f"{name} has {given} numbers but must have one per rotary pair, {pairs}"
            _require(given == pairs, message)

    @property
    def key_dim(self) -> int:
        """Width of a key head; values are as wide, and `rope.fraction` is a share of it."""
        return self.head_dim

    rope_dim = value_dim = key_dim


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention: keys and values are expanded from one narrow vector per token.

    A query or key head is `plain_dim` coordinates without position and `rope_dim` rotated ones; all
    heads share the rotated part of the key. `query_rank` is the width through which queries are
    made, None for a direct projection. `bias` belongs to the compressing and the output
    projections. With `interleaved`, rotary pairs are neighbours (2i, 2i + 1).

    Source: DeepSeek-V2, arXiv:2405.04434.
    """

    num_heads: int
    query_rank: int | None
    kv_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    rope: RopeConfig = RopeConfig()
    interleaved: bool = True
    bias: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require(self.rope_dim % 2 == 0, f"rope_dim={self.rope_dim} must be even for rotary pairs")

    @property
    def num_kv_heads(self) -> int:
        """Heads that a cache of expanded keys and values holds."""
        return self.num_heads

    @property
    def key_dim(self) -> int:
        """Width of a query or key head."""
        return self.plain_dim + self.rope_dim


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
    """Gated DeltaNet: attention whose past is one matrix per value head, whatever its length.

    `num_value_heads` value heads share `num_key_heads` query and key heads in runs of equal length;
    `conv_width` is the number of positions that a short convolution mixes before.

    Source: Gated Delta Networks, arXiv:2412.06464.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("num_key_heads", "num_value_heads", "key_dim", "value_dim", "conv_width"):
            value = getattr(self, name)
            _require(value > 0, f"{name}={value} must be positive")
        heads, shared = self.num_value_heads, self.num_key_heads
        message = f"num_value_heads={heads} must be a multiple of num_key_heads={shared}"
        _require(heads % shared == 0, message)

    @property
    def values_per_key(self) -> int:
        """Value heads that share a key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def keys(self) -> int:
        """Coordinates of all key heads."""
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Coordinates of all value heads."""
        return self.num_value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: all queries, keys and values."""
        return 2 * self.keys + self.values


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What a channel makes of its gate g and up projection u: g sigmoid(slope g) (u + shift).

    With `limit`, g is first bounded from above by it and u on both sides. The default is SwiGLU.
    """

    slope: float = 1.0
    shift: float = 0.0
    limit: float | None = None


SWIGLU = Activation()


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts and what stands beside them.

    `renormalize` divides the selected routing weights by their sum; `routed_scale` multiplies them
    last. `d_shared` is the width of the shared expert (0: none), `shared_gate` whether a sigmoid
    gate multiplies it. `score` turns router logits into scores; with `correction_bias` each expert
    adds a constant to its score for the selection alone. Experts lie in `num_groups` equal groups
    of which a token may use the best `groups_per_token`, rated by `group_score`: their best expert
    or the sum of their two best. `float32_router` computes logits in float32 whatever the
    activations' dtype. `logit_bias` adds a constant per expert to the logits; `expert_bias` gives
    every expert biases of its three matrices, `emptied_bias` one of its output to each expert that
    pruning left no channel; with `emptied_cut` the router has no row for those.
    """

    num_experts: int
    experts_per_token: int
    d_expert: int
    renormalize: bool
    d_shared: int = 0
    shared_gate: bool = False
    score: Score = "softmax"
    correction_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: GroupScore = "max"
    routed_scale: float = 1.0
    float32_router: bool = False
    logit_bias: bool = False
    expert_bias: bool = False
    emptied_bias: bool = False
    emptied_cut: bool = False
    activation: Activation = SWIGLU

    def __post_init__(self) -> None:
        _require(
            1 <= self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} must lie in "
            f"[1, num_experts={self.num_experts}]",
        )
        _require(
            self.num_groups >= 1 and self.num_experts % self.num_groups == 0,
            f"num_groups={self.num_groups} must divide num_experts={self.num_experts}",
        )
        size = self.num_experts // self.num_groups
        _require(
            1 <= self.groups_per_token <= self.num_groups
            and self.experts_per_token <= self.groups_per_token * size,
            f"groups_per_token={self.groups_per_token} of {self.num_groups} groups of {size} "
            f"experts must offer experts_per_token={self.experts_per_token} experts",
        )
        _require(
            self.group_score == "max" or self.num_groups == 1 or size > 1,
            f"num_groups={self.num_groups} leaves one expert per group; group_score='top2' needs 2",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer whose layers are dense or Mixture-of-Experts.

    `dense_layers` lists the layers with an ordinary feed-forward network of width `d_dense`;
    `sliding_layers` those whose attention sees only the last `sliding_window` positions;
    `linear_layers` those with `linear_attention` in place of `attention`. With `centred_norms` the
    norms of layers, queries and keys and the last one hold what they scale by less one.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    attention: AttentionConfig | LatentAttentionConfig
    moe: MoEConfig
    d_dense: int = 0
    dense_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    linear_attention: LinearAttentionConfig | None = None
    linear_layers: tuple[int, ...] = ()
    centred_norms: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "max_position"):
            value = getattr(self, name)
            _require(value > 0, f"{name}={value} must be positive")
        for name in ("dense_layers", "sliding_layers", "linear_layers"):
            value = getattr(self, name)
            inside = set(value) <= set(range(self.num_layers))
            _require(inside, f"{name}={value} must be layer indices below {self.num_layers}")
        _require(
            not self.dense_layers or self.d_dense > 0,
            f"d_dense={self.d_dense} must be positive because layers {self.dense_layers} are dense",
        )
        needs = ("sliding_window", "linear_attention")
        for name, layers in zip(needs, (self.sliding_layers, self.linear_layers), strict=True):
            value = getattr(self, name)
            missing = bool(layers) and not value
            _require(not missing, f"{name}={value} must be set because layers {layers} use it")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts, ascending."""
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    def window(self, layer: int) -> int | None:
        """Attention window of a layer in positions, None for full attention."""
        return self.sliding_window if layer in self.sliding_layers else None

    def linear(self, layer: int) -> LinearAttentionConfig | None:
        """Linear attention of a layer, None where it attends by softmax."""
        return self.linear_attention if layer in self.linear_layers else None

    def replace(self, **changes) -> "ModelConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)
