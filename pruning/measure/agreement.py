"""How well do cheap scores rank what experts and channels are really worth?"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_jax.errors import InputError
from pruning.scores.ablation import Ablation
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.expert_criteria import EXPERT_CRITERIA
from pruning.scores.statistics import ChannelStatistics

LEAST = 3  # experts of a layer that a rank correlation inside it needs
Losses = Mapping[Ablation, float]


def sample_ablations(
    layers: Sequence[int], shape: tuple[int, int], experts: int, channels: int, seed: int = 0
) -> list[Ablation]:
    """A random sample, spread evenly over the layers.

    Args:
      layers: indices of the decoder layers with experts.
      shape: (experts per layer, channels per expert).
      experts: to sample in the whole model, each masked and rerouted; all if there are fewer.
      channels: to sample in the whole model.
      seed: of the choice.

    Returns:
      Ablations in the order of the layers.
    """
    rng = np.random.default_rng(seed)
    found = []
    for layer, count in zip(layers, _shares(experts, len(layers), rng), strict=True):
        for expert in rng.permutation(shape[0])[:count]:
            found += [Ablation(layer, int(expert), reroute=reroute) for reroute in (False, True)]
    for layer, count in zip(layers, _shares(channels, len(layers), rng), strict=True):
        size = shape[0] * shape[1]
        for flat in rng.choice(size, min(count, size), replace=False):
            expert, channel = divmod(int(flat), shape[1])
            found.append(Ablation(layer, expert, channel))
    return sorted(found, key=lambda one: one.key)


def _shares(total: int, layers: int, rng: np.random.Generator) -> np.ndarray:  # [L]
    """Equal shares; the remainder goes to random layers."""
    return total // layers + (rng.permutation(layers) < total % layers)


def spearman(one: np.ndarray, two: np.ndarray) -> float | None:  # [n], [n]
    """Rank correlation, ties at their mean rank; None where one side is constant."""
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (one, two)]
    if len(ranks[0]) < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])


def pearson(one: np.ndarray, two: np.ndarray) -> float | None:  # [n], [n]
    """Correlation of the values themselves; None where one side is constant."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(two) == 0:
        return None
    return float(np.corrcoef(one, two)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def agreement(
    proxy: np.ndarray, increase: np.ndarray, layer: np.ndarray
) -> dict[str, float | None]:  # [n], [n], [n]
    """Spearman correlation over the whole model, and its mean over the layers."""
    inside = [
        spearman(proxy[layer == index], increase[layer == index])
        for index in np.unique(layer)
        if (layer == index).sum() >= LEAST
    ]
    known = [value for value in inside if value is not None]
    return {
        "global": spearman(proxy, increase),
        "within_layer": float(np.mean(known)) if known else None,
    }


def proxies(
    statistics: ChannelStatistics, registry: Mapping[str, Callable]
) -> dict[str, np.ndarray]:
    """Values of every criterion whose statistics were collected, by name."""
    found = {}
    for name, criterion in registry.items():
        try:
            found[name] = np.asarray(criterion(statistics), np.float64)
        except InputError:  # its sums were not collected
            continue
    return found


def audit_report(statistics: ChannelStatistics, layers: Sequence[int], increases: Losses) -> dict:
    """Compare every proxy with what was measured.

    Args:
      statistics: what the proxies are made of.
      layers: indices of the decoder layers with experts.
      increases: loss increase of every ablation, nats per predicted token.

    Returns:
      JSON-compatible: "experts" and "channels", each with the number measured, `proxies` (name ->
      Spearman correlations) and `rows` (one for each part, with all proxies), and what was not
      collected; experts also have the share of harmful ones, those without which the loss is lower.
    """
    slots = {layer: slot for slot, layer in enumerate(layers)}
    whole = [one for one in increases if one.channel is None and not one.reroute]
    experts = [_row(one, increases) for one in sorted(whole, key=lambda one: one.key)]
    channels = [
        {"layer": one.layer, "expert": one.expert, "channel": one.channel, "masked": loss}
        for one, loss in sorted(increases.items(), key=lambda item: item[0].key)
        if one.channel is not None
    ]
    return {
        "experts": _compare(experts, EXPERT_CRITERIA, statistics, slots, ("masked", "rerouted")),
        "channels": _compare(channels, CHANNEL_CRITERIA, statistics, slots, ("masked",)),
    }


def _row(one: Ablation, increases: Losses) -> dict:
    rerouted = increases[Ablation(one.layer, one.expert, reroute=True)]
    masked = increases[one]
    return {"layer": one.layer, "expert": one.expert, "masked": masked, "rerouted": rerouted}


def _compare(rows: list[dict], registry, statistics, slots, kinds: tuple[str, ...]) -> dict:
    found: dict = {"count": len(rows), "proxies": {}, "rows": rows}
    scores = proxies(statistics, registry)
    found["not_collected"] = [name for name in registry if name not in scores]
    layer = np.array([row["layer"] for row in rows])
    measured = {kind: np.array([row[kind] for row in rows]) for kind in kinds}
    for name, score in scores.items():
        axes = ("expert", "channel")[: score.ndim - 1]
        values = np.array([score[slots[row["layer"]], *(row[a] for a in axes)] for row in rows])
        for row, value in zip(rows, values, strict=True):
            row[name] = float(value)
        found["proxies"][name] = {kind: agreement(values, measured[kind], layer) for kind in kinds}
    for kind in kinds:
        found[f"harmful_{kind}"] = float(np.mean(measured[kind] < 0)) if rows else None
    if len(kinds) == 2:
        found["masked_and_rerouted"] = agreement(measured[kinds[0]], measured[kinds[1]], layer)
    return found


def to_csv(report: dict) -> str:
    """All rows of a report as one table; a column is empty where it does not apply."""
    rows = [{"kind": kind[:-1], **row} for kind in ("experts", "channels", "layers")
            if kind in report for row in report[kind]["rows"]]  # fmt: skip
    names = list(dict.fromkeys(name for row in rows for name in row))
    first = [name for name in ("kind", "layer", "expert", "channel") if name in names]
    text = io.StringIO()
    writer = csv.DictWriter(text, first + [n for n in names if n not in first], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
