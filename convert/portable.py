"""config.json as both versions of transformers read it."""

from convert.families import find_family
from convert.families.hf_config import num_experts, rope_parameters
from convert.side_files import text_classes


def portable_config(hf_config: dict, *, with_mtp: bool = False) -> dict:
    """A source config.json in the spellings of transformers 4.57 and of 5.x at once.

    Either version silently falls back to default values where its own spelling is absent.
    `quantization_config` is dropped, since weights are dequantised when read, and of `auto_map` the
    code of models, which does not travel: an exporter that quantises or brings code adds its own
    afterwards.

    Args:
      hf_config: config.json as a dict; not changed.
      with_mtp: whether layers that predict further tokens are written; else the config has none.

    Returns:
      A new dict.

    Raises:
      InputError: if the model type is unknown.
    """
    family = find_family(hf_config.get("model_type"))
    gone = ("quantization_config", "auto_map")
    config = {key: value for key, value in hf_config.items() if key not in gone}
    if code := text_classes(hf_config):
        config["auto_map"] = code
    rope = rope_parameters(config, family.rope)
    scaled = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_parameters"] = rope
    config["rope_scaling"] = None if scaled == {"rope_type": "default"} else scaled
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    config |= dict.fromkeys(family.count_keys, num_experts(config))
    if family.mtp is not None and not with_mtp:
        config[family.mtp.count_key] = 0
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = dtype
    return config
