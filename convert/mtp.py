"""Multi-token prediction: layers after the model that draft tokens, which only servers run.

They are no part of the model here. Which tensors they are, by names and shapes; what an export
holds of them is in `convert.mtp_export`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from convert.axes import axis_sizes
from convert.layout import BFLOAT16, FLOAT32, Spec
from convert.rules import Family, TensorRule, layer_rules
from moe_jax.config import ModelConfig


def mtp_layers(family: Family, hf: Mapping[str, Any]) -> int:
    """How many such layers config.json says there are."""
    if family.mtp is None:
        return 0
    count = hf.get(family.mtp.count_key)
    return family.mtp.default if count is None else count


def mtp_prefixes(family: Family, hf: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of their tensors begin with."""
    if family.mtp is None:
        return ()
    if family.mtp.prefix is not None:
        return (family.mtp.prefix,)
    first = hf["num_hidden_layers"]
    return tuple(f"model.layers.{first + i}." for i in range(mtp_layers(family, hf)))


def mtp_rule(family: Family, name: str) -> TensorRule | None:
    """The line of the table for a tensor that an ordinary layer has, too."""
    prefix = family.mtp.prefix if family.mtp else None
    return family.rule(name if prefix is None else f"model.{name.removeprefix(prefix)}")


def mtp_stem(family: Family, config: ModelConfig, number: int) -> str:
    """What the names of the ordinary part of such a layer begin with."""
    prefix = family.mtp.prefix if family.mtp else None
    if prefix is None:
        return f"model.layers.{config.num_layers + number}."
    return f"{prefix}layers.{number}."


def mtp_layer_names(
    family: Family, config: ModelConfig, number: int
) -> Iterator[tuple[TensorRule, str]]:
    """The rules of the ordinary part of such a layer with names on disk, `{expert}` left open."""
    index = config.num_layers + number
    ordinary, own = f"model.layers.{index}.", mtp_stem(family, config, number)
    for rule, name in layer_rules(family.rules, config, index):
        yield rule, own + name.removeprefix(ordinary)


def mtp_tensors(family: Family, hf: Mapping[str, Any], config: ModelConfig) -> dict[str, Spec]:
    """Dtypes and shapes of all tensors of these layers that config.json asks for.

    Args:
      family: its rules.
      hf: config.json.
      config: the same as our architecture.

    Returns:
      Name on disk -> (bfloat16, or float32 where the family says so, shape).
    """
    found: dict[str, Spec] = {}
    if family.mtp is None:
        return found
    sizes = axis_sizes(config) | {"K": 2 * config.d_model, "F": config.moe.d_expert}
    for number in range(mtp_layers(family, hf)):
        for rule, name in mtp_layer_names(family, config, number):
            spec = (FLOAT32 if rule.precise else BFLOAT16, tuple(sizes[a] for a in rule.shape))
            routed = range(config.moe.num_experts if rule.is_of_expert else 1)
            found |= {name.replace("{expert}", str(expert)): spec for expert in routed}
        for name, axes in family.mtp.tensors.items():
            shape = tuple(sizes[axis] for axis in axes)
            prefix = family.mtp.prefix or mtp_stem(family, config, number)
            found[prefix + name] = (BFLOAT16, shape)
    return found
