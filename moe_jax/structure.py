"""What a model is besides its numbers, as plain JSON: classes, static fields, shapes and dtypes.

Pruned models differ from what their config alone says: layer by layer in the width of their pools,
weight by weight in whether it is an array or in few bits. So the whole tree is written down, and
the tree can be rebuilt without the program that made it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.attention.delta_net import LinearAttention
from moe_jax.attention.grouped import Attention
from moe_jax.attention.latent import LatentAttention
from moe_jax.config import (
    Activation,
    AttentionConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from moe_jax.errors import InputError
from moe_jax.experts.dense import DenseMLP, SharedExpert
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.norm import Centred
from moe_jax.quant import CODED
from moe_jax.transformer import DecoderLayer, Embedding, Transformer

VERSION = 1
CLASSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(Transformer, Embedding, DecoderLayer, Attention, LatentAttention),
        *(LinearAttention, MoE, Experts, SharedExpert, DenseMLP, *CODED, Centred),
        *(ModelConfig, AttentionConfig, LatentAttentionConfig, LinearAttentionConfig),
        *(RopeConfig, MoEConfig, Activation),
    )
}


def describe(value: Any) -> Any:
    """Write a model down as JSON.

    Args:
      value: a model, or any part of one.

    Returns:
      Dicts, lists, strings, numbers, booleans and None.

    Raises:
      InputError: at a part that is of no known class.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [describe(part) for part in value]
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, CODED):
        return {"shape": list(value.shape), "dtype": jnp.dtype(value.dtype).name}
    name = type(value).__name__
    if CLASSES.get(name) is not type(value):
        raise InputError(f"a {type(value)} cannot be written down; add it to structure.CLASSES")
    fields = dataclasses.fields(value)
    return {"class": name} | {field.name: describe(getattr(value, field.name)) for field in fields}


def rebuild(description: Any) -> Any:
    """Undo `describe`, with a `jax.ShapeDtypeStruct` where an array was.

    Args:
      description: what `describe` returned, JSON round trip or not.

    Returns:
      The model without its numbers.

    Raises:
      InputError: if a class or field is unknown or missing, or a config contradicts itself.
    """
    if isinstance(description, list):
        return tuple(rebuild(part) for part in description)
    if not isinstance(description, dict):
        return description
    if "class" not in description:
        return _leaf(description)
    fields = {name: rebuild(part) for name, part in description.items() if name != "class"}
    cls = CLASSES.get(description["class"])
    if cls is None:
        raise InputError(f"unknown class {description['class']!r}; known are {', '.join(CLASSES)}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    # A field that came later has a default, which is what the model then was.
    missing = [name for name in known.keys() - fields.keys() if _is_required(known[name])]
    if missing or not fields.keys() <= known.keys():
        raise InputError(
            f"{description['class']} has the fields {', '.join(sorted(fields))} but must have "
            f"{', '.join(sorted(known))}; it was written by another version of moe_jax"
        )
    return cls(**fields)


def _is_required(field: dataclasses.Field) -> bool:
    nothing = dataclasses.MISSING
    return field.default is nothing and field.default_factory is nothing


def _leaf(description: dict) -> jax.ShapeDtypeStruct:
    try:
        shape = tuple(int(size) for size in description["shape"])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(description["dtype"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{description} describes no array: it needs shape and dtype") from error


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by their dotted paths, such as `layers.0.mlp.experts.w_down`."""
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
