"""The typed reading of config.json: each field that any family reads, with its kind and range.

A field of another type or out of range is refused here, by name, before anything is made of it:
`"no"` is no boolean, 4096.5 no size, and a million layers no model. What config.json leaves out is
what transformers has for the family (`Family.defaults`), which differs from family to family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_jax.errors import InputError

# Far above every published model, and small enough that a table of all names is made in a second.
MOST_LAYERS, MOST_EXPERTS, MOST_WIDTH, MOST_ROWS = 2048, 1 << 14, 1 << 20, 1 << 28
MOST_EXPERTS_IN_ALL = 1 << 17
MOST_POSITIONS = 1 << 40
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Field:
    """What a value of config.json must be.

    Attributes:
      words: the expectation, as an error says it.
      fits: whether a value meets it.
      null: whether null means something, beside leaving the field out.
    """

    words: str
    fits: Callable[[Any], bool]
    null: bool = False


def whole(least: int, most: int, *, null: bool = False) -> Field:
    """A whole number in [least, most]."""
    return Field(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
        null,
    )


def number(above: float, most: float, *, null: bool = False) -> Field:
    """A finite number in (above, most]."""
    return Field(
        f"a number above {above:g} and at most {most:g}",
        lambda value: type(value) in (int, float) and above < value <= most,
        null,
    )


def many(one: Field, most: int = MOST_LAYERS) -> Field:
    """A list of values, or null."""
    return Field(
        f"a list of at most {most} entries, each {one.words}",
        lambda value: isinstance(value, list) and len(value) <= most and all(map(one.fits, value)),
        null=True,
    )


SWITCH = Field("true or false", lambda value: isinstance(value, bool))
WORD = Field("text", lambda value: isinstance(value, str) and len(value) <= 1000)
MAPPING = Field("an object", lambda value: isinstance(value, dict), null=True)
WIDTH, COUNT = whole(1, MOST_WIDTH), whole(1, MOST_EXPERTS)
OPTIONAL_COUNT = whole(0, MOST_EXPERTS, null=True)
FACTOR = number(0.0, 1e9)

ROPE_FIELDS: dict[str, Field] = {
    "rope_type": WORD,
    "type": WORD,
    "rope_theta": number(0.0, 1e15),
    "partial_rotary_factor": number(0.0, 1.0, null=True),
    "factor": number(0.0, 1e6, null=True),
    "original_max_position_embeddings": whole(1, MOST_POSITIONS, null=True),
    "attention_factor": number(0.0, 1e6, null=True),
    "beta_fast": number(0.0, 1e9, null=True),
    "beta_slow": number(0.0, 1e9, null=True),
    "truncate": SWITCH,
    "mscale": number(-1.0, 1e6, null=True),
    "mscale_all_dim": number(-1.0, 1e6, null=True),
    "low_freq_factor": number(0.0, 1e6, null=True),
    "high_freq_factor": number(0.0, 1e6, null=True),
    "short_factor": many(FACTOR, MOST_WIDTH),
    "long_factor": many(FACTOR, MOST_WIDTH),
}

FIELDS: dict[str, Field] = {
    "vocab_size": whole(1, MOST_ROWS),
    "hidden_size": WIDTH,
    "num_hidden_layers": whole(1, MOST_LAYERS),
    "intermediate_size": whole(0, MOST_WIDTH, null=True),
    "max_position_embeddings": whole(1, MOST_POSITIONS),
    "rms_norm_eps": number(0.0, 1.0),
    "hidden_act": WORD,
    "tie_word_embeddings": SWITCH,
    # attention
    "num_attention_heads": whole(1, MOST_WIDTH),
    "num_key_value_heads": whole(1, MOST_WIDTH, null=True),
    "head_dim": whole(1, MOST_WIDTH, null=True),
    "attention_bias": SWITCH,
    "qkv_bias": SWITCH,
    "use_qk_norm": SWITCH,
    "clip_qkv": number(0.0, 1e9, null=True),
    "q_lora_rank": whole(1, MOST_WIDTH, null=True),
    "kv_lora_rank": WIDTH,
    "qk_nope_head_dim": WIDTH,
    "qk_rope_head_dim": WIDTH,
    "v_head_dim": WIDTH,
    "rope_interleave": SWITCH,
    "rope_theta": ROPE_FIELDS["rope_theta"],
    "partial_rotary_factor": ROPE_FIELDS["partial_rotary_factor"],
    "original_max_position_embeddings": ROPE_FIELDS["original_max_position_embeddings"],
    "rope_scaling": MAPPING,
    "rope_parameters": MAPPING,
    "sliding_window": whole(0, MOST_POSITIONS, null=True),
    "use_sliding_window": SWITCH,
    "max_window_layers": whole(0, 1 << 30),
    "layer_types": many(WORD),
    "linear_num_key_heads": WIDTH,
    "linear_num_value_heads": WIDTH,
    "linear_key_head_dim": WIDTH,
    "linear_value_head_dim": WIDTH,
    "linear_conv_kernel_dim": whole(1, 1024),
    "full_attention_interval": whole(1, 1 << 30),
    # experts
    "num_experts": OPTIONAL_COUNT,
    "num_local_experts": OPTIONAL_COUNT,
    "n_routed_experts": OPTIONAL_COUNT,
    "num_experts_per_tok": COUNT,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "n_shared_experts": COUNT,
    "norm_topk_prob": SWITCH,
    "routed_scaling_factor": number(0.0, 1e6),
    "n_group": whole(1, MOST_EXPERTS, null=True),
    "topk_group": whole(1, MOST_EXPERTS, null=True),
    "topk_method": Field(WORD.words, WORD.fits, null=True),
    "scoring_func": Field(WORD.words, WORD.fits, null=True),
    "moe_layer_freq": whole(1, MOST_LAYERS, null=True),
    "first_k_dense_replace": whole(0, 1 << 30, null=True),
    "mlp_only_layers": many(whole(0, 1 << 30)),
    "decoder_sparse_step": whole(0, 1 << 30),
    "mlp_bias": SWITCH,
    "swiglu_alpha": number(0.0, 1e6),
    "swiglu_limit": number(0.0, 1e9),
    # beside the model
    "num_nextn_predict_layers": whole(0, 64, null=True),
    "quantization_config": MAPPING,
}


def read_fields(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with every field that we read checked, and what it leaves out filled in.

    Args:
      hf: config.json.
      defaults: of the family, for the fields that it leaves out.

    Returns:
      A new dict.

    Raises:
      InputError: naming each value of another type or out of range, and what is expected.
    """
    # null where a value is needed says no more than leaving the field out.
    needed = {name for name, field in FIELDS.items() if not field.null and name not in defaults}
    hf = {name: value for name, value in hf.items() if value is not None or name not in needed}
    faults = _faults(hf, FIELDS, "")
    for name in ("rope_scaling", "rope_parameters"):
        value = hf.get(name)
        if isinstance(value, dict):
            faults += _faults(value, ROPE_FIELDS, f"{name}.")
    if not faults:
        layers, types = hf.get("num_hidden_layers", 1), hf.get("layer_types")
        if types is not None and len(types) != layers:
            faults.append(f"layer_types has {len(types)} entries, the model has {layers} layers")
        experts = max(hf.get(name) or 0 for name in EXPERT_COUNTS)
        if layers * experts > MOST_EXPERTS_IN_ALL:
            faults.append(
                f"{layers} layers of {experts} experts are more than {MOST_EXPERTS_IN_ALL} in all"
            )
    if faults:
        raise InputError("; ".join(faults[:10]) + "; get config.json of the published model again")
    return {**defaults, **hf}


def _faults(values: Mapping[str, Any], fields: Mapping[str, Field], prefix: str) -> list[str]:
    return [
        f"{prefix}{name}={_shown(values[name])} must be {field.words}"
        for name, field in fields.items()
        if name in values
        and not (field.fits(values[name]) if values[name] is not None else field.null)
    ]


def _shown(value: Any) -> str:
    # A value can be a list of a million entries, or as deep as the reader lets it be.
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
