"""What one sweep over the calibration text collects: sums that serve every criterion and budget."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import struct
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pruning.files import replace_file, replace_text

PER_CHANNEL = (
    "hidden_square", "up_square", "gate_square", "weighted_square", "energy", "shapley",
    "taylor", "abs_taylor", "fisher",
)  # fmt: skip
WEIGHT_NORMS = ("down_norm", "up_norm", "gate_norm")
PER_EXPERT = (
    "phi", "kappa", "tokens", "gate_mass", "output_norm", "weighted_output_norm", "output_square",
)  # fmt: skip
PER_LAYER = ("layer_energy", "router_entropy")
SCALARS = ("total_tokens", "loss_sum")
SUMS = PER_CHANNEL + PER_EXPERT + PER_LAYER + SCALARS
FORMAT = 1


@struct.dataclass
class ChannelStatistics:
    """Sums over the valid calibration tokens, float64; divide by `total_tokens` for means.

    Per channel [L, E, F], over the tokens routed to the expert, with h the intermediate, p and g
    the up and gate projections, w the routing weight, q = 1 / (|block output|^2 + 1e-6), v the
    channel's column of W_down and y the routed output: `hidden_square` h^2, `up_square` p^2,
    `gate_square` g^2, `weighted_square` w^2 h^2, `energy` q w^2 h^2 |v|^2, `shapley` q w h <v, y>;
    with s = h dloss/dh (summed next-token loss, nats): `taylor` s, `abs_taylor` |s|, `fisher` s^2.
    `down_norm`, `up_norm`, `gate_norm` are the L2 norms of the channel's weights, not sums.

    Per expert [L, E], with z its output and u = w z: `phi` q <u, y>, `kappa` q |u|^2, `tokens` 1,
    `gate_mass` w, `output_norm` |z|, `weighted_output_norm` w |z|, `output_square` |z|^2.
    Per layer [L]: `layer_energy` q |y|^2, `router_entropy` in nats. Scalars: `total_tokens`,
    `loss_sum` in nats over the predicted tokens (0 without gradients).

    Source: design method 2(a), 2(b); phi and S are Propositions 1 and 2.
    """

    hidden_square: np.ndarray
    up_square: np.ndarray
    gate_square: np.ndarray
    weighted_square: np.ndarray
    energy: np.ndarray
    shapley: np.ndarray
    taylor: np.ndarray
    abs_taylor: np.ndarray
    fisher: np.ndarray
    down_norm: np.ndarray
    up_norm: np.ndarray
    gate_norm: np.ndarray
    phi: np.ndarray
    kappa: np.ndarray
    tokens: np.ndarray
    gate_mass: np.ndarray
    output_norm: np.ndarray
    weighted_output_norm: np.ndarray
    output_square: np.ndarray
    layer_energy: np.ndarray
    router_entropy: np.ndarray
    total_tokens: np.ndarray
    loss_sum: np.ndarray
    has_gradients: bool = struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers with experts, experts per layer, channels per expert)."""
        layers, experts, channels = self.hidden_square.shape
        return layers, experts, channels

    def merge(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Statistics of both calibration texts together.

        Raises:
          ValueError: if the two were not collected from one model in one mode.
        """
        if self.shape != other.shape or self.has_gradients != other.has_gradients:
            raise ValueError(
                f"statistics of shape {self.shape} (gradients: {self.has_gradients}) cannot be "
                f"merged with {other.shape} (gradients: {other.has_gradients}); collect both from "
                "one model in one mode"
            )
        if not all(np.array_equal(getattr(self, n), getattr(other, n)) for n in WEIGHT_NORMS):
            raise ValueError("the two statistics have different weight norms: other model weights")
        return dataclasses.replace(self, **{n: getattr(self, n) + getattr(other, n) for n in SUMS})


def field_shapes(layers: int, experts: int, channels: int) -> dict[str, tuple[int, ...]]:
    """Shape of every float64 array of the statistics of a model."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        PER_CHANNEL + WEIGHT_NORMS, (layers, experts, channels)
    )
    shapes |= dict.fromkeys(PER_EXPERT, (layers, experts))
    return shapes | dict.fromkeys(PER_LAYER, (layers,)) | dict.fromkeys(SCALARS, ())


def zeros(layers: int, experts: int, channels: int, *, has_gradients: bool) -> dict[str, Any]:
    """Empty sums as a mutable dict of arrays, to be filled and made `ChannelStatistics`."""
    shapes = field_shapes(layers, experts, channels)
    sums: dict[str, Any] = {name: np.zeros(shape) for name, shape in shapes.items()}
    return sums | {"has_gradients": has_gradients}


def save_statistics(path: str | Path, statistics: ChannelStatistics, provenance: dict) -> None:
    """Write `path` (safetensors) and `path` with suffix .json (model hash, texts, tokens).

    Args:
      path: file name ending in .safetensors; each file appears atomically, the notes last.
      statistics: the sums.
      provenance: JSON-compatible facts about model and texts.
    """
    path = Path(path)
    arrays = {
        field.name: np.asarray(getattr(statistics, field.name), order="C")
        for field in dataclasses.fields(statistics)
        if field.name != "has_gradients"
    }
    header = {"format": FORMAT, "has_gradients": statistics.has_gradients, **provenance}
    # Arrays without notes count as absent: a run killed in between leaves no wrong pair behind.
    path.with_suffix(".json").unlink(missing_ok=True)
    replace_file(path, lambda partial: save_file(arrays, partial))
    replace_text(path.with_suffix(".json"), json.dumps(header, indent=2) + "\n")


def load_statistics(path: str | Path) -> tuple[ChannelStatistics, dict]:
    """Read what `save_statistics` wrote.

    Returns:
      (statistics, provenance).

    Raises:
      ValueError: if a file is missing, of another format, or lacks an array.
    """
    path = Path(path)
    notes = path.with_suffix(".json")
    for file in (path, notes):
        if not file.is_file():
            raise ValueError(f"{file} does not exist; write it with `moe-compress score`")
    try:
        provenance = json.loads(notes.read_text(encoding="utf-8"))
        arrays = load_file(path)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and score again") from None
    if provenance.get("format") != FORMAT:
        raise ValueError(
            f"{notes}: format={provenance.get('format')!r}, expected {FORMAT}; score again with "
            "this version"
        )
    expected = {f.name for f in dataclasses.fields(ChannelStatistics)} - {"has_gradients"}
    if set(arrays) != expected:
        raise ValueError(
            f"{path}: missing {sorted(expected - set(arrays))}, unexpected "
            f"{sorted(set(arrays) - expected)}; score again with this version"
        )
    statistics = ChannelStatistics(**arrays, has_gradients=provenance["has_gradients"])
    return statistics, provenance
