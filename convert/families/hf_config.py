"""Reading of config.json that several families share."""

from moe_jax.config import ModelConfig, MoEConfig, RopeConfig

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
      ValueError: naming the absent ones.
    """
    missing = [name for name in names if hf.get(name) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")


def rope_parameters(hf: dict) -> dict:
    """Rope settings in the new spelling, from either spelling of config.json."""
    found = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = found.pop("type", None)
    found.setdefault("rope_type", kind or "default")
    found.setdefault("rope_theta", hf.get("rope_theta") or 10000.0)
    if hf.get("partial_rotary_factor") is not None:
        found.setdefault("partial_rotary_factor", hf["partial_rotary_factor"])
    original = hf.get("original_max_position_embeddings")
    if original is not None and found["rope_type"] in ("yarn", "longrope", "llama3"):
        found["original_max_position_embeddings"] = original
    return found


def rope_config(hf: dict) -> RopeConfig:
    """Rope of a model whose layers share one.

    Raises:
      ValueError: if the kind is unknown or layers have their own.
    """
    found = rope_parameters(hf)
    kind = found["rope_type"]
    if kind not in ROPE_KINDS or any(isinstance(value, dict) for value in found.values()):
        raise ValueError(f"rope_type={kind!r} must be one of {', '.join(ROPE_KINDS)}")
    fields = {ours: found[theirs] for theirs, ours in _ROPE_FIELDS.items() if theirs in found}
    for name in ("short_factor", "long_factor"):
        fields[name] = tuple(fields.get(name) or ())
    fields = {name: value for name, value in fields.items() if value is not None}
    if kind in ("yarn", "longrope") and "original_max_position" in fields:
        ratio = hf.get("max_position_embeddings", 32768) / fields["original_max_position"]
        fields.setdefault("factor", ratio)
    # transformers ignores partial rotation in the plain rope of these families
    fraction = 1.0 if kind == "default" else found.get("partial_rotary_factor") or 1.0
    return RopeConfig(theta=float(found["rope_theta"]), kind=kind, fraction=fraction, **fields)


def num_experts(hf: dict) -> int:
    """Experts per layer, in either spelling."""
    count = hf.get("num_experts") or hf.get("num_local_experts")
    if not count:
        raise ValueError("config.json lacks num_experts (or num_local_experts)")
    return count


def dense_layers(hf: dict) -> tuple[int, ...]:
    """Layers without experts, by `mlp_only_layers` and `decoder_sparse_step`."""
    only, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
    return tuple(
        i for i in range(hf["num_hidden_layers"]) if i in only or step < 1 or (i + 1) % step
    )


def model_config(hf: dict, *, attention, moe: MoEConfig, sliding_layers=()) -> ModelConfig:
    """The parts of ModelConfig that Qwen's families name alike.

    Raises:
      ValueError: if the activation is not SiLU or a size is missing or impossible.
    """
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={hf['hidden_act']!r} must be 'silu'; others are unsupported")
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        d_model=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        max_position=hf.get("max_position_embeddings", 32768),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        attention=attention,
        moe=moe,
        d_dense=hf.get("intermediate_size") or 0,
        dense_layers=dense_layers(hf),
        sliding_window=hf.get("sliding_window", 4096) if sliding_layers else None,
        sliding_layers=tuple(sliding_layers),
    )
