"""The typed reading of config.json: each field that any family reads, with its kind and range.

A field of another type or out of range is refused when it is read, by name, before anything is
made of it:
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
    "mlp_layer_types": many(WORD),
    "mlp_only_layers": many(whole(0, 1 << 30)),
    "decoder_sparse_step": whole(0, 1 << 30),
    "mlp_bias": SWITCH,
    "swiglu_alpha": number(0.0, 1e6),
    "swiglu_limit": number(0.0, 1e9),
    # beside the model
    "num_nextn_predict_layers": whole(0, 64, null=True),
    "quantization_config": MAPPING,
}


class Fields(dict[str, Any]):
    """config.json with what it leaves out filled in; a field is checked when it is read.

    Other models' fields may be anything: many a config.json holds zeros for parts that it lacks.

    Raises:
      InputError: when a field is read that has another type, is out of range, or is missing.
    """

    def __init__(self, hf: Mapping[str, Any], defaults: Mapping[str, Any]):
        super().__init__({**defaults, **hf})

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise InputError(f"config.json lacks {name}")
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:  # type: ignore[override]
        """The value, or the default where there is none."""
        if name not in self:
            return default
        value = _checked(name, super().__getitem__(name), FIELDS.get(name))
        if isinstance(value, dict) and name in ("rope_scaling", "rope_parameters"):
            return {n: _checked(f"{name}.{n}", v, ROPE_FIELDS.get(n)) for n, v in value.items()}
        return value


def read_fields(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> Fields:
    """config.json as a family reads it, refused where it describes more than any model is.

    Args:
      hf: config.json.
      defaults: of the family, for the fields that it leaves out.

    Raises:
      InputError: naming what is wrong and what is expected.
    """
    fields = Fields(hf, defaults)
    layers, types = fields["num_hidden_layers"], fields.get("layer_types")
    if types is not None and len(types) != (layers or 0):
        raise InputError(f"layer_types has {len(types)} entries, the model has {layers} layers")
    experts = max(fields.get(name) or 0 for name in EXPERT_COUNTS)
    if (layers or 0) * experts > MOST_EXPERTS_IN_ALL:
        raise InputError(
            f"{layers} layers of {experts} experts are more than {MOST_EXPERTS_IN_ALL} in all"
        )
    fields.get("quantization_config")  # read by `convert.views`
    return fields


def _checked(name: str, value: Any, field: Field | None) -> Any:
    if field is None or (value is None and field.null) or (value is not None and field.fits(value)):
        return value
    if value is None and field is SWITCH:
        return False  # what every program makes of null there
    if value is None:
        raise InputError(f"config.json lacks {name}: it is null, expected {field.words}")
    cure = "get config.json of the published model again"
    raise InputError(f"{name}={_shown(value)} must be {field.words}; {cure}")


def _shown(value: Any) -> str:
    # A value can be a list of a million entries, or as deep as the reader lets it be.
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
