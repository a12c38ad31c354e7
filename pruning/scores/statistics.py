"""What one sweep over the calibration text collects: sums that serve every criterion and budget."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import struct
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moe_jax.errors import InputError, choose
from moe_jax.files import replace_file, replace_text
from moe_jax.json_files import read_json
from pruning.scores.own import PREFIX, STATISTICS

ALWAYS = "always"
FORMAT = 2


def _array(kind: str, axes: str, group: str = ALWAYS) -> Any:
    # An array by what merging does with it, its axes, and what has to be asked for to get it.
    facts = {"kind": kind, "axes": axes, "group": group}
    if group == ALWAYS:
        return dataclasses.field(metadata=facts)
    return dataclasses.field(default=None, metadata=facts)


# A sum over tokens; a fact about the weights, equal for every text; what is made once the whole
# text is in, so that two texts have none together; what the first text has, which stands for all.
_sum, _norm, _finished, _first = (
    functools.partial(_array, kind) for kind in ("sum", "norm", "finished", "first")
)


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
    `input_square` x^2, `weighted_input_square` w^2 x^2, `output_sum` z,
    `output_coordinate_square` z^2; per pair of experts
    [L, E, E] `output_gram` <u_i, u_j> and `similarity`, the linear CKA of their outputs on a common
    sample of tokens (not a sum: that of the first text); per expert `clipped_phi`, which is phi
    with the largest 1 % of the coordinates of each batch clipped, as the paper's release does.

    `wanda_up`, `wanda_gate` [L, E, F] are the sums over a channel's weights of |W| times the norm
    of their input coordinate, `routed_wanda_up`, `routed_wanda_gate` the same with every token's
    input times its routing weight; they need the whole text, so only finished statistics have them.

    None unless weight gradients were asked for: `weight_gradient` [L, E, F], the sum over a
    channel's weights in the three matrices of |W dloss/dW| with the gradient of the whole text.

    None unless obs was asked for: `elimination` [L, E, F], see pruning.scores.elimination.

    None unless asked for by name: `nll_ig`, `nll_ablate`, `nll_grad2` [L, E], estimates of the
    increase of the summed next-token loss (nats) without the expert, see pruning.scores.end_to_end.

    None unless no text was read: `noise` [L, E, F], the mean of h <v, z> over noise instead of
    tokens, see pruning.scores.noise.

    `extra` holds by name what `pruning.scores.own.STATISTICS` had registered; like everything else
    it can be read as `statistics[name]`.

    Source: design method 2(a), 2(b); phi and S are Propositions 1 and 2.
    """

    hidden_square: np.ndarray = _sum("LEF")
    up_square: np.ndarray = _sum("LEF")
    gate_square: np.ndarray = _sum("LEF")
    weighted_square: np.ndarray = _sum("LEF")
    energy: np.ndarray = _sum("LEF")
    shapley: np.ndarray = _sum("LEF")
    down_norm: np.ndarray = _norm("LEF")
    up_norm: np.ndarray = _norm("LEF")
    gate_norm: np.ndarray = _norm("LEF")
    down_l1: np.ndarray = _norm("LEF")
    up_l1: np.ndarray = _norm("LEF")
    gate_l1: np.ndarray = _norm("LEF")
    phi: np.ndarray = _sum("LE")
    kappa: np.ndarray = _sum("LE")
    tokens: np.ndarray = _sum("LE")
    gate_mass: np.ndarray = _sum("LE")
    probability_mass: np.ndarray = _sum("LE")
    output_norm: np.ndarray = _sum("LE")
    weighted_output_norm: np.ndarray = _sum("LE")
    output_square: np.ndarray = _sum("LE")
    weighted_output_square: np.ndarray = _sum("LE")
    layer_energy: np.ndarray = _sum("L")
    router_entropy: np.ndarray = _sum("L")
    total_tokens: np.ndarray = _sum("")
    taylor: np.ndarray | None = _sum("LEF", "gradients")
    abs_taylor: np.ndarray | None = _sum("LEF", "gradients")
    fisher: np.ndarray | None = _sum("LEF", "gradients")
    gate_saliency: np.ndarray | None = _sum("LEF", "gradients")
    gradient_square: np.ndarray | None = _sum("LEF", "gradients")
    loss_sum: np.ndarray | None = _sum("", "gradients")
    input_square: np.ndarray | None = _sum("LED", "expert-details")
    weighted_input_square: np.ndarray | None = _sum("LED", "expert-details")
    output_sum: np.ndarray | None = _sum("LED", "expert-details")
    output_coordinate_square: np.ndarray | None = _sum("LED", "expert-details")
    output_gram: np.ndarray | None = _sum("LEG", "expert-details")
    clipped_phi: np.ndarray | None = _sum("LE", "expert-details")
    similarity: np.ndarray | None = _first("LEG", "expert-details")
    wanda_up: np.ndarray | None = _finished("LEF", "expert-details")
    wanda_gate: np.ndarray | None = _finished("LEF", "expert-details")
    routed_wanda_up: np.ndarray | None = _finished("LEF", "expert-details")
    routed_wanda_gate: np.ndarray | None = _finished("LEF", "expert-details")
    weight_gradient: np.ndarray | None = _finished("LEF", "weight-gradients")
    elimination: np.ndarray | None = _finished("LEF", "obs")
    nll_ig: np.ndarray | None = _sum("LE", "nll-ig")
    nll_ablate: np.ndarray | None = _sum("LE", "nll-ablate")
    nll_grad2: np.ndarray | None = _sum("LE", "nll-grad2")
    noise: np.ndarray | None = _first("LEF", "weights-only")
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers with experts, experts per layer, channels per expert)."""
        layers, experts, channels = self.hidden_square.shape
        return layers, experts, channels

    @property
    def groups(self) -> frozenset[str]:
        """What was asked for beyond the forward sums, names of `GROUPS`.

        A group of which an earlier version collected fewer sums does not count.
        """
        lacking = {name for name in DECLARED if getattr(self, name) is None}
        there = {DECLARED[name]["group"] for name in DECLARED.keys() - lacking}
        in_part = {DECLARED[name]["group"] for name in lacking if DECLARED[name]["kind"] == "sum"}
        return frozenset(there - in_part - {ALWAYS})

    def covers(self, groups: Iterable[str]) -> bool:
        """Whether all of these groups, and all that is registered now, were collected."""
        return self.groups >= set(groups) and self.extra.keys() >= STATISTICS.keys()

    def __getitem__(self, name: str) -> np.ndarray:
        """An array by its name, one of `STATISTICS` included.

        Raises:
          InputError: it was not collected; names what collects it.
        """
        if name not in DECLARED and name not in self.extra:
            choose({**DECLARED, **STATISTICS, **self.extra}, name, "statistic")
            raise InputError(
                f"{name!r} was not collected in these statistics; score the model again while "
                "pruning.STATISTICS has it"
            )
        value = getattr(self, name) if name in DECLARED else self.extra[name]
        if value is None:
            flag = DECLARED[name]["group"] + " 4" * (name == "nll_ig")  # steps; enough for ranks
            raise InputError(
                f"{name!r} was not collected in these statistics; score the model again with "
                f"--{flag} or choose a criterion that needs none, e.g. 'weight'"
            )
        return value

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ChannelStatistics":
        """Statistics from arrays named as in a file: those of one's own have a prefix."""
        own = {n.removeprefix(PREFIX): a for n, a in arrays.items() if n.startswith(PREFIX)}
        return cls(**{n: a for n, a in arrays.items() if not n.startswith(PREFIX)}, extra=own)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was collected, named as in a file."""
        found = {name: getattr(self, name) for name in DECLARED}
        found |= {PREFIX + name: value for name, value in self.extra.items()}
        return {name: value for name, value in found.items() if value is not None}

    def merge(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Statistics of both calibration texts together; what is no sum of both is dropped.

        Raises:
          InputError: if the two were not collected from one model in one mode.
        """
        ours, theirs = (s.groups | s.extra.keys() for s in (self, other))
        if self.shape != other.shape or ours != theirs:
            raise InputError(
                f"statistics of shape {self.shape} with {sorted(ours)} cannot be merged "
                f"with {other.shape} with {sorted(theirs)}; collect both from one model in "
                "one mode"
            )
        if not all(np.array_equal(getattr(self, n), getattr(other, n)) for n in NORMS):
            raise InputError("the two statistics have different weight norms: other model weights")
        names = [name for group in (ALWAYS, *self.groups) for name in SUMS.get(group, ())]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        dropped = {n: None for n, facts in DECLARED.items() if facts["kind"] == "finished"}
        extra = {name: value + other.extra[name] for name, value in self.extra.items()}
        return dataclasses.replace(self, **sums, **dropped, extra=extra)


# Facts about every array, from its declaration above.
DECLARED: dict[str, Mapping[str, str]] = {
    field.name: field.metadata for field in dataclasses.fields(ChannelStatistics) if field.metadata
}
GROUPS = tuple(dict.fromkeys(f["group"] for f in DECLARED.values() if f["group"] != ALWAYS))


def _axes(*kinds: str) -> dict[str, dict[str, str]]:
    # Group -> name -> axes of the arrays of some kinds.
    found: dict[str, dict[str, str]] = {}
    for name, facts in DECLARED.items():
        if facts["kind"] in kinds:
            found.setdefault(facts["group"], {})[name] = facts["axes"]
    return found


SUMS, FINISHED = _axes("sum"), _axes("finished", "first")
NORMS = _axes("norm")[ALWAYS]


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
      groups: what is asked for beyond the forward sums, names of `GROUPS`.
      finished: include what is computed after the sweep.

    Returns:
      Name -> shape; those of `STATISTICS` with a prefix.
    """
    sizes = {"L": layers, "E": experts, "F": channels, "D": d_model, "G": experts}
    if taken := sorted(STATISTICS.keys() & DECLARED.keys()):
        raise InputError(f"pruning.STATISTICS names {taken}, which are ours; choose other names")
    axes = NORMS | {PREFIX + name: statistic.axes for name, statistic in STATISTICS.items()}
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
    arrays = {n: np.asarray(value, order="C") for n, value in statistics.arrays().items()}
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
        provenance = read_json(notes)
        arrays = load_file(path)
    except (ValueError, SafetensorError) as error:
        told = str(error)[:1000]
        raise InputError(f"{path} is damaged ({told}); remove it and score again") from None
    if provenance.get("format") != FORMAT:
        raise InputError(
            f"{notes}: format={str(provenance.get('format'))[:80]}, expected {FORMAT}; score again "
            "with this version"
        )
    missing = (set(SUMS[ALWAYS]) | set(NORMS)) - set(arrays)
    unexpected = {name for name in arrays if name not in DECLARED and not name.startswith(PREFIX)}
    if missing or unexpected:
        raise InputError(
            f"{path}: missing {sorted(missing)}, unexpected {sorted(unexpected)}; score again "
            "with this version"
        )
    return ChannelStatistics.from_arrays(arrays), provenance
