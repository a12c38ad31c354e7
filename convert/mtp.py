"""Multi-token prediction: layers after the model that draft tokens, which only servers run.

They are no part of the model here. An export leaves them out, keeps them as they are, or prunes
their experts alike: serving programs give them the expert width of the model.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.export_format import ExportFormat
from convert.formats.padded import padded_model
from convert.layout import BFLOAT16, FLOAT32, Spec
from convert.rules import Family, Rule, Widths, axis_sizes, layer_rules
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint
    from convert.description import Description

MULTIPLE = 32  # of which the widths of pruned experts in ragged folders are multiples
NOISE = 2048  # rows, of which each expert meets an eighth
_LAYER = re.compile(r"(.+\.)?layers\.\d+\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_PARTS = ("w_gate", "w_up", "w_down")


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
    layers = range(config.num_layers, config.num_layers + mtp_layers(family, hf))
    for number, layer in enumerate(layers):
        stem = f"model.layers.{layer}."
        for rule, name in layer_rules(family.rules, config, layer):
            spec = (FLOAT32 if rule.precise else BFLOAT16, tuple(sizes[a] for a in rule.shape))
            if family.mtp.prefix is not None:
                name = name.replace(stem, f"{family.mtp.prefix}layers.{number}.")
            routed = range(config.moe.num_experts if rule.layout != "identity" else 1)
            found |= {name.replace("{expert}", str(expert)): spec for expert in routed}
        for name, axes in family.mtp.tensors.items():
            shape = tuple(sizes[axis] for axis in axes)
            found[(family.mtp.prefix or stem) + name] = (BFLOAT16, shape)
    return found


def check_mtp(base: "Description", mtp: str) -> None:
    """Raise ValueError unless the checkpoint has the layers that are to be kept or pruned."""
    if mtp == "drop":
        return
    wanted = mtp_tensors(base.family, base.hf_config, base.config)
    if not (wanted and base.mtp):
        raise InputError(
            f"mtp={mtp!r} needs layers that predict further tokens, and {base.folder} has none; "
            "choose mtp='drop'"
        )
    wrong = [
        f"{name} is missing"
        if name not in base.mtp
        else f"{name} has shape {list(base.mtp[name][1])}; config.json asks for {list(shape)}"
        for name, (_, shape) in wanted.items()
        if _rule(base.family, name) and base.mtp.get(name, (None, None))[1] != shape
    ]
    if wrong:
        raise InputError(f"mtp={mtp!r} needs whole layers: {'; '.join(wrong[:5])}")


def check_mtp_width(base: "Description", widths: Widths, form: ExportFormat) -> None:
    """Raise ValueError if layers that are kept would not have the one width of a padded folder."""
    check_mtp(base, form.mtp)
    own = base.config.moe.d_expert
    if form.mtp == "keep" and form.is_padded and form.padded_width(widths) != own:
        raise InputError(
            f"mtp='keep' leaves experts {own} channels wide in the layers that predict further "
            f"tokens, and {form.name} has one width, {form.padded_width(widths)}, for all, so "
            "programs would load them wrongly; choose mtp='prune' or 'drop', or a ragged format"
        )


def mtp_width(base: "Description", widths: Widths, form: ExportFormat) -> int:
    """Channels of each expert in these layers of an export.

    Pruned, it is the one width of a padded folder. Every expert of a ragged one has the average
    width of the model's, up to a multiple of 32.
    """
    own = base.config.moe.d_expert
    if form.mtp != "prune":
        return own
    if form.is_padded:
        return form.padded_width(widths)
    counts = [count for row in widths for count in row]
    return min(own, -(-sum(counts) // (len(counts) * MULTIPLE)) * MULTIPLE)


def mtp_specs(base: "Description", widths: Widths, form: ExportFormat) -> dict[str, Spec]:
    """Dtypes and shapes of the tensors of these layers in an export: 16-bit in every format.

    Args:
      base: the dense model.
      widths: channels kept per layer and expert, () for dense layers.
      form: the format.

    Returns:
      Name -> (dtype, shape).
    """
    if form.mtp == "drop":
        return {}
    width, family = mtp_width(base, widths, form), base.family
    shared = base.config.moe.d_shared
    if form.is_padded:
        shared = padded_model(base.config, family, width).moe.d_shared
    sizes, found = {"F": width, "S": shared}, {}
    for name, (dtype, shape) in base.mtp.items():
        rule = _rule(family, name)
        axes = rule.shape if rule else " " * len(shape)
        found[name] = dtype, tuple(sizes.get(a, n) for a, n in zip(axes, shape, strict=True))
    return found


def mtp_arrays(
    base: "Checkpoint", widths: Widths, form: ExportFormat
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `mtp_specs`, the matrices of one expert in memory at a time.

    A pruned expert keeps, in order, the channels of largest `channel_worth`; ties go to the lower
    index.

    Yields:
      (name, array as on disk); a shared expert is filled up with zeros where the width asks so.
    """
    specs, width = mtp_specs(base, widths, form), mtp_width(base, widths, form)
    narrower = width < base.config.moe.d_expert
    layers: dict[str, dict[str, str]] = {}  # layer -> path of ours, of each expert -> name
    for name, (dtype, shape) in specs.items():
        found, rule = _LAYER.match(name), _rule(base.family, name)
        if found and rule and narrower:
            expert = _EXPERT.search(name)
            key = rule.ours + (expert[0] if expert else "")
            layers.setdefault(found[0], {})[key] = name
            if expert:
                continue
        array = base.read_mtp(name)
        if array.shape != shape:
            full = np.zeros(shape, dtype)
            full[tuple(slice(size) for size in array.shape)] = array
            array = full
        yield name, array
    for names in layers.values():
        yield from _narrower_experts(base, names, width)


def _narrower_experts(
    base: "Checkpoint", names: Mapping[str, str], width: int
) -> Iterator[tuple[str, np.ndarray]]:
    centred = "mlp_norm.offset" in names
    gain = _float64(base.read_mtp(names["mlp_norm.offset" if centred else "mlp_norm"])) + centred
    noise = np.random.default_rng(0).standard_normal((NOISE, len(gain)))
    rows = noise / np.sqrt(np.mean(noise**2, axis=1, keepdims=True)) * gain
    logits = rows @ _float64(base.read_mtp(names["mlp.router"])).T
    for expert in range(base.config.moe.num_experts):
        own = [names[f"mlp.experts.{part}.experts.{expert}."] for part in _PARTS]
        gate, up, down = (base.read_mtp(name) for name in own)
        sent = np.argsort(-logits[:, expert], kind="stable")[: NOISE // 8]
        worth = channel_worth(rows[sent], *map(_float64, (gate, up, down)))
        kept = np.sort(np.argsort(-worth, kind="stable")[:width])
        yield from zip(own, (gate[kept], up[kept], down[:, kept]), strict=True)


def channel_worth(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """What each channel of a SwiGLU expert adds in the direction of the expert's output.

    Where no text is at hand the inputs are noise as an expert meets it: scaled as by the layer's
    norm, and of 2,048 rows the eighth that its router likes best for this expert. In ordinary
    layers that beat chance, which products of weight norms did not. In float64, lest the order of
    a sum decide.

    Args:
      x: inputs [T, D].
      gate: [F, D].
      up: [F, D].
      down: [D, F].

    Returns:
      [F], the mean over inputs of (channel's output) . (expert's output).
    """
    gated = x @ gate.T
    hidden = gated * (0.5 + 0.5 * np.tanh(gated / 2)) * (x @ up.T)  # [T, F]; silu, no overflow
    return np.mean(hidden * ((hidden @ down.T) @ down), axis=0)


def _float64(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _rule(family: Family, name: str) -> Rule | None:
    """The line of the table for a tensor that an ordinary layer has, too."""
    prefix = family.mtp.prefix if family.mtp else None
    return family.rule(name if prefix is None else f"model.{name.removeprefix(prefix)}")
