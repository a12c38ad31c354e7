"""Models whose routers know fewer experts: what remains of a description and of a layer."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from convert.description import Description
from convert.export_format import ExportFormat, Widths
from convert.fields import EXPERT_COUNTS
from moe_jax.config import MoEConfig
from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from moe_jax.transformer import DecoderLayer

# Keys of config.json for the experts per token; gpt-oss has had both.
TOP_K_KEYS = ("num_experts_per_tok", "experts_per_token")


def left_experts(widths: Widths) -> Widths:
    """Channels of the experts that have some, per layer."""
    return tuple(tuple(filter(None, counts)) for counts in widths)


def check_cut(base: Description, widths: Widths, form: ExportFormat) -> None:
    """Refuse a cut that a format or the family's router cannot express.

    Args:
      base: the dense model.
      widths: channels kept per layer and expert, () for dense layers.
      form: the format.

    Raises:
      InputError: layers keep different numbers of experts in a format of one number, fewer than a
        token goes to, or other numbers in each group; or layers that predict further tokens would
        keep all of theirs.
    """
    moe = base.config.moe
    left = {index: sum(map(bool, counts)) for index, counts in enumerate(widths) if counts}
    asked, cure = form.top_k or moe.experts_per_token, "give a smaller --top-k"
    if form.top_k is None:
        cure = f"--top-k {max(1, min(left.values()))} sends tokens to fewer"
    if few := {index: count for index, count in left.items() if count < asked}:
        raise InputError(
            f"cut_router leaves {_listed(few)}, fewer than the {asked} that a token goes to; {cure}"
        )
    if asked > moe.experts_per_token:
        raise InputError(
            f"top_k={asked} must lie in [1, {moe.experts_per_token}], what the model was trained "
            "with at most"
        )
    if form.mtp != "drop":
        raise InputError(
            f"mtp={form.mtp!r} keeps layers that predict further tokens, whose routers know all "
            f"{moe.num_experts} experts, and programs give them as many as the others; choose "
            "mtp='drop' or leave --cut-router away"
        )
    if form.renumbers and len(set(left.values())) > 1:
        raise InputError(
            f"cut_router leaves {_listed(left)}, and {form.name} has one number of experts for all "
            "layers; export a ragged format, or plan with --width experts --per-layer, at a prune "
            "rate of as many experts in every layer"
        )
    _check_groups(moe, widths, asked)


def _check_groups(moe: MoEConfig, widths: Widths, top_k: int) -> None:
    """Refuse groups of experts of which some lose more than others."""
    if moe.num_groups == 1:
        return
    for index, counts in enumerate(widths):
        if not counts:
            continue
        left = (np.array(counts).reshape(moe.num_groups, -1) > 0).sum(axis=1)
        least = max(2 if moe.group_score == "top2" else 1, -(-top_k // moe.groups_per_token))
        if left.min() != left.max() or left[0] < least:
            raise InputError(
                f"cut_router leaves {left.tolist()} experts in the {moe.num_groups} groups of "
                f"layer {index}, and the router of this family takes all groups for as large, and "
                f"each for at least {least}; leave --cut-router away"
            )


def _listed(left: dict[int, int]) -> str:
    """So many experts in these layers, in words."""
    layers: dict[int, list[int]] = {}
    for index, count in left.items():
        layers.setdefault(count, []).append(index)
    words = [
        f"{count} experts in layer{'s' * (len(own) > 1)} {_first(own)}"
        for count, own in sorted(layers.items())
    ]
    return ", ".join(words)


def _first(layers: Sequence[int]) -> str:
    more = ["..."] if len(layers) > 5 else []
    return ", ".join([*map(str, layers[:5]), *more])


def with_fewer_experts(base: Description, experts: int | None, top_k: int | None) -> Description:
    """The description of the model that a cut leaves.

    Args:
      base: the dense model.
      experts: in every layer, None for as many as there are.
      top_k: experts per token, None for as many as there are.

    Returns:
      `base` but for these numbers, in all spellings that its config.json has, and the widths.
    """
    hf, moe, widths = dict(base.hf_config), base.config.moe, base.widths
    if experts is not None:
        keys = {*base.family.count_keys, *EXPERT_COUNTS} & hf.keys()
        hf |= dict.fromkeys(keys, experts)
        moe = dataclasses.replace(moe, num_experts=experts)
        widths = tuple((moe.d_expert,) * experts if counts else () for counts in widths)
    if top_k is not None:
        hf |= dict.fromkeys(hf.keys() & set(TOP_K_KEYS), top_k)
        moe = dataclasses.replace(moe, experts_per_token=top_k)
    config = base.config.replace(moe=moe)
    return dataclasses.replace(base, hf_config=hf, config=config, widths=widths)


def cut_layer(layer: DecoderLayer, renumbers: bool) -> DecoderLayer:
    """A layer as a folder holds it: the rows of the router that `alive` leaves.

    Args:
      layer: with experts and `alive`, without channels where that is False; or a dense one.
      renumbers: whether the others are gone from the list of experts, too; then it is whole.

    Returns:
      The layer, for its tensors alone: it is not run.

    Raises:
      InputError: the router of the layer is not cut.
    """
    moe = layer.mlp
    if not isinstance(moe, MoE):
        return layer
    if moe.alive is None:
        raise InputError("the router of a layer knows all experts; export it without cut_router")
    alive = np.flatnonzero(np.asarray(moe.alive))
    names = ("router", "router_bias", "logit_bias")
    rows = {name: getattr(moe, name) for name in names}
    rows = {name: value[alive] for name, value in rows.items() if value is not None}
    experts, config = moe.experts, dataclasses.replace(moe.config, emptied_cut=True)
    if renumbers:
        bias = None if experts.b_down is None else jnp.asarray(experts.b_down)[alive]
        experts = dataclasses.replace(experts, count=experts.count[alive], b_down=bias)
        config = dataclasses.replace(config, num_experts=len(alive))
    moe = dataclasses.replace(moe, **rows, experts=experts, config=config, alive=None)
    return dataclasses.replace(layer, mlp=moe)
