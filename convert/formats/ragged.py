"""Folders of several widths, per expert or per layer, loaded with one modelling file."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, cast, get_args

from convert.export_format import Widths
from convert.rules import RAGGED, Family
from convert.side_files import text_classes
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError

MODELLING_FILE = Path(__file__).with_name("modeling_ragged_moe.py")
# Keys of config.json: widths per layer and expert; widths per layer, under the name by which vLLM
# looks for them; and the width before pruning, of which a shared expert may be a multiple.
PER_EXPERT, PER_LAYER = "expert_intermediate_sizes", "moe_intermediate_size"
UNPRUNED = "unpruned_intermediate_size"
MTP = "mtp_expert_intermediate_size"  # width of pruned experts that predict further tokens
_EMPTIED = "emptied_experts"  # what experts without channels add, or that the router lacks them
Emptied = Literal["zero", "constant", "cut"]


def emptied_experts(hf_config: dict[str, Any]) -> Emptied:
    """What becomes of experts without channels in a ragged folder: they add nothing, or a tensor
    `constant`, or the router has no rows for them.

    Raises:
      InputError: config.json says something else.
    """
    said = hf_config.get(_EMPTIED, "zero")
    known = get_args(Emptied)
    if not isinstance(said, str) or said not in known:
        raise InputError(f"{_EMPTIED}={said!r} must be one of {', '.join(map(repr, known))}")
    return cast(Emptied, said)


def emptied_model(config: ModelConfig, emptied: Emptied) -> ModelConfig:
    """The architecture where experts without channels add constants, if no bias of theirs does, or
    have no rows of the router and no such bias."""
    added = emptied == "constant" and not config.moe.expert_bias
    moe = dataclasses.replace(config.moe, emptied_bias=added, emptied_cut=emptied == "cut")
    return config.replace(moe=moe)


def ragged_config(
    hf_config: dict[str, Any],
    family: Family,
    counts: list[list[int]],
    emptied: Emptied,
    mtp_width: int | None,
) -> dict[str, Any]:
    """config.json of a ragged folder.

    Args:
      hf_config: the source's config.json, of the stock family; not changed.
      family: of the source.
      counts: channels per layer and expert, [] for dense layers.
      emptied: what becomes of experts without channels.
      mtp_width: that of the experts that predict further tokens, if they were pruned.

    Returns:
      A new dict.
    """
    config = _with_code(hf_config, family, mtp_width) | {PER_EXPERT: counts}
    return config | ({} if emptied == "zero" else {_EMPTIED: emptied})


def layered_config(
    hf_config: dict[str, Any], family: Family, widths: list[int], mtp_width: int | None
) -> dict[str, Any]:
    """config.json of a layered folder.

    Args:
      hf_config: the source's config.json, of the stock family; not changed.
      family: of the source.
      widths: channels of every expert of a layer, 0 for dense layers.
      mtp_width: that of the experts that predict further tokens, if they were pruned.

    Returns:
      A new dict.
    """
    unpruned = hf_config[family.width_key]
    return _with_code(hf_config, family, mtp_width) | {UNPRUNED: unpruned, PER_LAYER: widths}


def _with_code(hf_config: dict[str, Any], family: Family, mtp_width: int | None) -> dict[str, Any]:
    """The model type is one of our own: under the stock one, transformers would ignore the
    modelling file and vLLM would copy narrow experts into uninitialised memory."""
    stem, module = f"Ragged{family.stem}", MODELLING_FILE.stem
    return {
        **hf_config,
        "model_type": RAGGED + family.public_type,
        "architectures": [f"{stem}ForCausalLM"],
        "auto_map": {
            **text_classes(hf_config),
            "AutoConfig": f"{module}.{stem}Config",
            "AutoModel": f"{module}.{stem}Model",
            "AutoModelForCausalLM": f"{module}.{stem}ForCausalLM",
        },
        **({} if mtp_width is None else {MTP: mtp_width}),
    }


def stock_config(hf_config: dict[str, Any], family: Family) -> dict[str, Any]:
    """config.json of the stock family with the widths that experts had before pruning.

    Args:
      hf_config: config.json of a ragged or layered folder (any other stays as it is), not changed.
      family: of the folder.

    Returns:
      A new dict.
    """
    if not hf_config["model_type"].startswith(RAGGED):
        return dict(hf_config)
    ours = ("auto_map", PER_EXPERT, UNPRUNED, MTP, _EMPTIED)
    config = {key: value for key, value in hf_config.items() if key not in ours}
    if UNPRUNED in hf_config:
        del config[PER_LAYER]
        config[family.width_key] = hf_config[UNPRUNED]
    return config


def widths_from_hf(hf_config: dict[str, Any], config: ModelConfig) -> Widths:
    """Channels per layer and expert of a ragged or layered folder, () for dense layers.

    Args:
      hf_config: config.json.
      config: the architecture before pruning.

    Raises:
      InputError: if the widths do not fit the architecture.
    """
    experts = [
        0 if layer in config.dense_layers else config.moe.num_experts
        for layer in range(config.num_layers)
    ]
    if UNPRUNED in hf_config:
        return _layered_widths(hf_config.get(PER_LAYER), experts)
    return _ragged_widths(hf_config.get(PER_EXPERT), experts)


def _layered_widths(widths: Any, experts: list[int]) -> Widths:
    if not isinstance(widths, list) or len(widths) != len(experts):
        raise InputError(
            f"{PER_LAYER} must be a list of one width per layer beside {UNPRUNED}; the "
            f"architecture has {len(experts)} layers"
        )
    for layer, (width, count) in enumerate(zip(widths, experts, strict=True)):
        if type(width) is not int or width < 0 or (width > 0) != (count > 0):
            raise InputError(
                f"{PER_LAYER}[{layer}]={width!r} must be "
                + ("at least 1" if count else "0, since the layer has no experts")
            )
    return tuple((width,) * count for width, count in zip(widths, experts, strict=True))


def _ragged_widths(sizes: Any, experts: list[int]) -> Widths:
    lists = isinstance(sizes, list) and all(isinstance(row, list) for row in sizes)
    if not lists or [len(row) for row in sizes] != experts:
        raise InputError(
            f"{PER_EXPERT} must have one list per layer with one width per expert, empty for dense "
            f"layers; the architecture has {experts}"
        )
    bad = [n for row in sizes for n in row if type(n) is not int or n < 0]
    if bad:
        raise InputError(f"{PER_EXPERT} holds {bad[:5]}; widths must be natural")
    return tuple(tuple(row) for row in sizes)
