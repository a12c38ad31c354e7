"""Reading of config.json that several families share."""

from collections.abc import Iterable, Mapping

from convert.fields import EXPERT_COUNTS
from moe_jax.config import ModelConfig, MoEConfig, RopeConfig
from moe_jax.errors import InputError

# The spelling of transformers and the field of ours.
_ROPE_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
}
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def require(hf: dict, *names: str) -> None:
    """Check that config.json has these keys.

    Raises:
      InputError: naming the absent ones.
    """
    missing = [name for name in names if hf.get(name) is None]
    if missing:
        raise InputError(f"config.json lacks {', '.join(missing)}")


def rope_parameters(hf: dict, defaults: Mapping[str, float] | None = None) -> dict:
    """Rope settings in the new spelling, from either spelling of config.json.

    `defaults` are those of the family, for what config.json leaves out.
    """
    found = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = found.pop("type", None)
    found.setdefault("rope_type", kind or "default")
    for name in ("rope_theta", "partial_rotary_factor"):
        if hf.get(name) is not None:
            found.setdefault(name, hf[name])
    original = hf.get("original_max_position_embeddings")
    if original is not None and found["rope_type"] in ("yarn", "longrope", "llama3"):
        found["original_max_position_embeddings"] = original
    return {"rope_theta": 10000.0, **(defaults or {}), **found}


def rope_config(
    hf: dict, defaults: Mapping[str, float] | None = None, *, partial: bool = False
) -> RopeConfig:
    """Rope of a model whose layers share one.

    Args:
      hf: config.json.
      defaults: see `rope_parameters`.
      partial: whether the plain rope, too, may turn a part of each head only.

    Raises:
      InputError: if the kind is unknown or layers have their own.
    """
    found = rope_parameters(hf, defaults)
    kind = found["rope_type"]
    if kind not in ROPE_KINDS or any(isinstance(value, dict) for value in found.values()):
        raise InputError(f"rope_type={kind!r} must be one of {', '.join(ROPE_KINDS)}")
    fields = {ours: found[theirs] for theirs, ours in _ROPE_FIELDS.items() if theirs in found}
    for name in ("short_factor", "long_factor"):
        fields[name] = tuple(fields.get(name) or ())
    fields = {name: value for name, value in fields.items() if value is not None}
    if kind in ("yarn", "longrope") and "original_max_position" in fields:
        ratio = hf["max_position_embeddings"] / fields["original_max_position"]
        fields.setdefault("factor", ratio)
    fraction = found.get("partial_rotary_factor") or 1.0
    if kind == "default" and not partial:  # as transformers does in most families
        fraction = 1.0
    return RopeConfig(theta=float(found["rope_theta"]), kind=kind, fraction=fraction, **fields)


def num_experts(hf: dict) -> int:
    """Experts per layer, in any spelling."""
    found = {hf[name] for name in EXPERT_COUNTS if hf.get(name)}
    if not found:
        raise InputError(
            f"config.json lacks {' (or '.join(EXPERT_COUNTS[:2])}, {EXPERT_COUNTS[2]})"
        )
    if len(found) > 1:
        raise InputError(f"{', '.join(EXPERT_COUNTS)} must agree but say {sorted(found)}")
    return found.pop()


def sparse_step_dense_layers(hf: dict) -> tuple[int, ...]:
    """Layers without experts, by `mlp_only_layers` and `decoder_sparse_step`."""
    only, step = hf.get("mlp_only_layers") or (), hf["decoder_sparse_step"]
    return tuple(
        i for i in range(hf["num_hidden_layers"]) if i in only or step < 1 or (i + 1) % step
    )


def first_dense_layers(hf: dict) -> tuple[int, ...]:
    """Layers without experts, by `first_k_dense_replace`; null is none."""
    return tuple(range(min(hf["first_k_dense_replace"] or 0, hf["num_hidden_layers"])))


def model_config(
    hf: dict,
    *,
    attention,
    moe: MoEConfig,
    dense_layers: Iterable[int] = (),
    sliding_layers: Iterable[int] = (),
) -> ModelConfig:
    """The parts of ModelConfig that all families name alike.

    Args:
      hf: config.json, what it leaves out filled in (`fields.read_fields`).
      attention, moe: the parts that they do not.
      dense_layers: indices of the layers without experts.
      sliding_layers: indices of the layers with a window.

    Raises:
      InputError: if the activation is not SiLU or a size is missing or impossible.
    """
    if hf["hidden_act"] != "silu":
        raise InputError(f"hidden_act={hf['hidden_act']!r} must be 'silu'; others are unsupported")
    sliding = tuple(sliding_layers)
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        d_model=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        max_position=hf["max_position_embeddings"],
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf["tie_word_embeddings"],
        attention=attention,
        moe=moe,
        d_dense=hf.get("intermediate_size") or 0,
        dense_layers=tuple(dense_layers),
        sliding_window=hf["sliding_window"] if sliding else None,
        sliding_layers=sliding,
    )
