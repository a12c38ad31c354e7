"""The sums of one layer over the parts of a text, empty and with a batch more; facts beside."""

from collections.abc import Mapping

import numpy as np

from moe_jax.experts.moe import MoE
from moe_jax.transformer import DecoderLayer
from pruning.scores.layer import GRADIENT_SCORES
from pruning.scores.statistics import NORMS, field_shapes
from pruning.scores.sweep_log import Sums
from pruning.scores.weight_facts import weight_facts

DOWNWARDS = (*GRADIENT_SCORES, "loss_sum", "total_tokens")  # added on the way down, or known


def layer_facts(layer: DecoderLayer) -> Sums:
    """What the weights of a layer's experts say by themselves, see `weight_facts`.

    Raises:
      InputError: the experts are pruned.
    """
    assert isinstance(layer.mlp, MoE)
    return weight_facts(layer, layer.mlp.config.d_expert)


def no_sums(layer: DecoderLayer, d_model: int, parts: int, groups: tuple[str, ...]) -> Sums:
    """Zeros [parts, ...] for all that is added up on the way up.

    Args:
      layer: with experts.
      d_model: D.
      parts: of the text.
      groups: what is collected beyond the forward sums.
    """
    assert isinstance(layer.mlp, MoE)
    moe = layer.mlp.config
    shapes = field_shapes(1, moe.num_experts, moe.d_expert, d_model, groups, finished=False)
    return {
        name: np.zeros((parts, *shape[1:]))
        for name, shape in shapes.items()
        if name not in NORMS and name not in DOWNWARDS
    }


def no_gradient_sums(layer: DecoderLayer, parts: int) -> Sums:
    """The same for the way down, [parts, E, F]."""
    assert isinstance(layer.mlp, MoE)
    moe = layer.mlp.config
    return {name: np.zeros((parts, moe.num_experts, moe.d_expert)) for name in GRADIENT_SCORES}


def add_batch(
    sums: Sums,
    part: int,
    batch: Mapping[str, np.ndarray],
    norm: np.ndarray,
    own: slice | None = None,
) -> None:
    """Add the sums of a batch.

    Args:
      sums: [parts, ...] of the layer.
      part: whose batch it is.
      batch: what `layer_statistics` found, float32.
      norm: [E, F] of the channels' vectors.
      own: experts whose sums they are, [g, ...], and norms; None for all that a layer has.
    """
    values = {name: np.asarray(value, np.float64) for name, value in batch.items()}
    if "unit_energy" in values:
        values["energy"] = values.pop("unit_energy") * np.square(norm)
    for name, value in values.items():
        sums[name][part if own is None else (part, own)] += value
