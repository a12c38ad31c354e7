"""Architecture of a Mixture-of-Experts transformer as frozen, hashable dataclasses."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


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
    """Grouped-query attention: `num_heads` query heads share `num_kv_heads` key/value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig = RopeConfig()
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary pairs")
        pairs = int(self.head_dim * self.rope.fraction) // 2
        for name in ("short_factor", "long_factor") if self.rope.kind == "longrope" else ():
            given = len(getattr(self.rope, name))
            _require(
                given == pairs,
                f"{name} has {given} numbers but must have one per rotary pair, {pairs}",
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts and what stands beside them.

    `renormalize` divides the selected routing weights by their sum. `d_shared` is the width of
    the shared expert (0: none), `shared_gate` whether a sigmoid gate multiplies it.
    """

    num_experts: int
    experts_per_token: int
    d_expert: int
    renormalize: bool
    d_shared: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        _require(
            1 <= self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} must lie in "
            f"[1, num_experts={self.num_experts}]",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer whose layers are dense or Mixture-of-Experts.

    `dense_layers` lists the layers with an ordinary feed-forward network of width `d_dense`;
    `sliding_layers` those whose attention sees only the last `sliding_window` positions.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    attention: AttentionConfig
    moe: MoEConfig
    d_dense: int = 0
    dense_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "max_position"):
            value = getattr(self, name)
            _require(value > 0, f"{name}={value} must be positive")
        _require(
            set(self.dense_layers) <= set(range(self.num_layers)),
            f"dense_layers={self.dense_layers} must be layer indices below {self.num_layers}",
        )
        _require(
            not self.dense_layers or self.d_dense > 0,
            f"d_dense={self.d_dense} must be positive because layers {self.dense_layers} are dense",
        )
        _require(
            not self.sliding_layers or bool(self.sliding_window),
            f"sliding_window={self.sliding_window} must be set because layers "
            f"{self.sliding_layers} use it",
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts, ascending."""
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    def window(self, layer: int) -> int | None:
        """Attention window of a layer in positions, None for full attention."""
        return self.sliding_window if layer in self.sliding_layers else None

    def replace(self, **changes) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
