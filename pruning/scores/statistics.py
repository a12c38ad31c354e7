"""What one sweep over the calibration text collects: sums that serve every criterion and budget."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flax import struct
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moe_jax.errors import InputError
from moe_jax.files import replace_file, replace_text

ALWAYS = "always"
# Axes of every sum over tokens, by what has to be asked for to get it.
SUMS: dict[str, dict[str, str]] = {
    ALWAYS: {
        **dict.fromkeys(("hidden_square", "up_square", "gate_square"), "LEF"),
        **dict.fromkeys(("weighted_square", "energy", "shapley"), "LEF"),
        **dict.fromkeys(("phi", "kappa", "tokens", "gate_mass", "probability_mass"), "LE"),
        **dict.fromkeys(("output_norm", "weighted_output_norm"), "LE"),
        **dict.fromkeys(("output_square", "weighted_output_square"), "LE"),
        **dict.fromkeys(("layer_energy", "router_entropy"), "L"),
        "total_tokens": "",
    },
    "gradients": {
        **dict.fromkeys(("taylor", "abs_taylor", "fisher", "gate_saliency"), "LEF"),
        "gradient_square": "LEF",
        "loss_sum": "",
    },
    "expert-details": {
        **dict.fromkeys(("input_square", "output_sum", "output_coordinate_square"), "LED"),
        "output_gram": "LEG",
        "clipped_phi": "LE",
    },
    "nll-ig": {"nll_ig": "LE"},
    "nll-ablate": {"nll_ablate": "LE"},
    "nll-grad2": {"nll_grad2": "LE"},
}
# Facts about the weights, equal for every text: not sums.
WEIGHTS: dict[str, str] = dict.fromkeys(
    ("down_norm", "up_norm", "gate_norm", "down_l1", "up_l1", "gate_l1"), "LEF"
)
# What is no sum over tokens: it needs the whole text, or none.
FINISHED: dict[str, dict[str, str]] = {
    "expert-details": {"similarity": "LEG", "wanda_up": "LEF", "wanda_gate": "LEF"},
    "weight-gradients": {"weight_gradient": "LEF"},
    "weights-only": {"noise": "LEF"},
}
FORMAT = 2


@struct.dataclass
class ChannelStatistics:
    """Sums over the valid calibration tokens, float64; divide by `total_tokens` for means.

    Per channel [L, E, F], over the tokens routed to the expert, with h the hidden activation, p and
    g the up and gate projections, w the routing weight, q = 1 / (|block output|^2 + 1e-6), v the
    channel's column of W_down and y the routed output: `hidden_square` h^2, `up_square` p^2,
    `gate_square` g^2, `weighted_square` w^2 h^2, `energy` q w^2 h^2 |v|^2, `shapley` q w h <v, y>.
    `down_norm`, `up_norm`, `gate_norm` are L2 norms of the channel's weights, `down_l1`,
    `up_l1`, `gate_l1` the sums of their magnitudes.

    Per expert [L, E], with z its output and u = w z: `phi` q <u, y>, `kappa` q |u|^2, `tokens` 1,
    `gate_mass` w, `output_norm` |z|, `weighted_output_norm` w |z|, `output_square` |z|^2,
    `weighted_output_square` w |z|^2; over all tokens `probability_mass`, the router's softmax.
    Per layer [L]: `layer_energy` q |y|^2, `router_entropy` in nats. Scalar: `total_tokens`.

    None unless gradients of the summed next-token loss were asked for, with s = h dloss/dh:
    `taylor` s, `abs_taylor` |s|, `fisher` s^2, `gate_saliency` |g dloss/dg|, `gradient_square`
    (dloss/dh)^2, and the scalar `loss_sum` in nats.

    None unless details of the experts were asked for: per expert and coordinate [L, E, D]
    `input_square` x^2, `output_sum` z, `output_coordinate_square` z^2; per pair of experts
    [L, E, E] `output_gram` <u_i, u_j> and `similarity`, the linear CKA of their outputs on a common
    sample of tokens (not a sum: that of the first text); per expert `clipped_phi`, which is phi
    with the largest 1 % of the coordinates of each batch clipped, as the paper's release does.

    `wanda_up`, `wanda_gate` [L, E, F] are the sums over a channel's weights of |W| times the norm
    of their input coordinate; they need the whole text, so only finished statistics have them.

    None unless weight gradients were asked for: `weight_gradient` [L, E, F], the sum over a
    channel's weights in the three matrices of |W dloss/dW| with the gradient of the whole text.

    None unless asked for by name: `nll_ig`, `nll_ablate`, `nll_grad2` [L, E], estimates of the
    increase of the summed next-token loss (nats) without the expert, see pruning.scores.end_to_end.

    None unless no text was read: `noise` [L, E, F], the mean of h <v, z> over noise instead of
    tokens, see pruning.scores.noise.

    Source: design method 2(a), 2(b); phi and S are Propositions 1 and 2.
    """

    hidden_square: np.ndarray
    up_square: np.ndarray
    gate_square: np.ndarray
    weighted_square: np.ndarray
    energy: np.ndarray
    shapley: np.ndarray
    down_norm: np.ndarray
    up_norm: np.ndarray
    gate_norm: np.ndarray
    down_l1: np.ndarray
    up_l1: np.ndarray
    gate_l1: np.ndarray
    phi: np.ndarray
    kappa: np.ndarray
    tokens: np.ndarray
    gate_mass: np.ndarray
    probability_mass: np.ndarray
    output_norm: np.ndarray
    weighted_output_norm: np.ndarray
    output_square: np.ndarray
    weighted_output_square: np.ndarray
    layer_energy: np.ndarray
    router_entropy: np.ndarray
    total_tokens: np.ndarray
    taylor: np.ndarray | None = None
    abs_taylor: np.ndarray | None = None
    fisher: np.ndarray | None = None
    gate_saliency: np.ndarray | None = None
    gradient_square: np.ndarray | None = None
    loss_sum: np.ndarray | None = None
    input_square: np.ndarray | None = None
    output_sum: np.ndarray | None = None
    output_coordinate_square: np.ndarray | None = None
    output_gram: np.ndarray | None = None
    clipped_phi: np.ndarray | None = None
    similarity: np.ndarray | None = None
    wanda_up: np.ndarray | None = None
    wanda_gate: np.ndarray | None = None
    weight_gradient: np.ndarray | None = None
    nll_ig: np.ndarray | None = None
    nll_ablate: np.ndarray | None = None
    nll_grad2: np.ndarray | None = None
    noise: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers with experts, experts per layer, channels per expert)."""
        layers, experts, channels = self.hidden_square.shape
        return layers, experts, channels

    @property
    def groups(self) -> frozenset[str]:
        """What was asked for beyond the forward sums, names of `SUMS` and `FINISHED`."""
        present = {
            "gradients": self.taylor,
            "expert-details": self.output_sum,
            "weight-gradients": self.weight_gradient,
            "nll-ig": self.nll_ig,
            "nll-ablate": self.nll_ablate,
            "nll-grad2": self.nll_grad2,
            "weights-only": self.noise,
        }
        return frozenset(name for name, value in present.items() if value is not None)

    @property
    def has_gradients(self) -> bool:
        """Whether gradients were asked for."""
        return "gradients" in self.groups

    def merge(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Statistics of both calibration texts together; what is no sum of both is dropped.

        Raises:
          InputError: if the two were not collected from one model in one mode.
        """
        if self.shape != other.shape or self.groups != other.groups:
            raise InputError(
                f"statistics of shape {self.shape} with {sorted(self.groups)} cannot be merged "
                f"with {other.shape} with {sorted(other.groups)}; collect both from one model in "
                "one mode"
            )
        if not all(np.array_equal(getattr(self, n), getattr(other, n)) for n in WEIGHTS):
            raise InputError("the two statistics have different weight norms: other model weights")
        names = [name for group in (ALWAYS, *self.groups) for name in SUMS.get(group, ())]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        dropped: dict = dict.fromkeys(("wanda_up", "wanda_gate", "weight_gradient"))
        return dataclasses.replace(self, **sums, **dropped)


def field_shapes(
    layers: int,
    experts: int,
    channels: int,
    d_model: int = 0,
    groups: Iterable[str] = (),
    *,
    finished: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Shape of every float64 array of a model's statistics.

    Args:
      layers, experts, channels: L, E, F.
      d_model: D, needed for "expert-details".
      groups: what is asked for beyond the forward sums, names of `SUMS` and `FINISHED`.
      finished: include what is computed after the sweep.

    Returns:
      Name -> shape.
    """
    sizes = {"L": layers, "E": experts, "F": channels, "D": d_model, "G": experts}
    axes = dict(WEIGHTS)
    for group in (ALWAYS, *groups):
        axes |= SUMS.get(group, {}) | (FINISHED.get(group, {}) if finished else {})
    return {name: tuple(sizes[axis] for axis in letters) for name, letters in axes.items()}


def save_statistics(path: str | Path, statistics: ChannelStatistics, provenance: dict) -> None:
    """Write `path` (safetensors) and `path` with suffix .json (model hash, texts, tokens).

    Args:
      path: file name ending in .safetensors; each file appears atomically, the notes last.
      statistics: the sums.
      provenance: JSON-compatible facts about model and texts.
    """
    path = Path(path)
    arrays = {
        field.name: np.asarray(value, order="C")
        for field in dataclasses.fields(statistics)
        if (value := getattr(statistics, field.name)) is not None
    }
    header = {"format": FORMAT, **provenance}
    # Arrays without notes count as absent: a run killed in between leaves no wrong pair behind.
    path.with_suffix(".json").unlink(missing_ok=True)
    replace_file(path, lambda partial: save_file(arrays, partial))
    replace_text(path.with_suffix(".json"), json.dumps(header, indent=2) + "\n")


def load_statistics(path: str | Path) -> tuple[ChannelStatistics, dict]:
    """Read what `save_statistics` wrote.

    Returns:
      (statistics, provenance).

    Raises:
      InputError: if a file is missing, of another format, or lacks an array.
    """
    path = Path(path)
    notes = path.with_suffix(".json")
    for file in (path, notes):
        if not file.is_file():
            raise InputError(f"{file} does not exist; write it with `moe-compress score`")
    try:
        provenance = json.loads(notes.read_text(encoding="utf-8"))
        arrays = load_file(path)
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it and score again") from None
    if provenance.get("format") != FORMAT:
        raise InputError(
            f"{notes}: format={provenance.get('format')!r}, expected {FORMAT}; score again with "
            "this version"
        )
    known = {field.name for field in dataclasses.fields(ChannelStatistics)}
    missing, unexpected = set(SUMS[ALWAYS]) | set(WEIGHTS), set(arrays) - known
    missing -= set(arrays)
    if missing or unexpected:
        raise InputError(
            f"{path}: missing {sorted(missing)}, unexpected {sorted(unexpected)}; score again "
            "with this version"
        )
    return ChannelStatistics(**arrays), provenance
