"""What an export holds of the layers that predict further tokens.

It leaves them out, keeps them as they are, or prunes their experts alike: serving programs give
them the expert width of the model. Which channels stay is decided elsewhere and handed in.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from convert.assemble import PoolShape, build_layer, read_arrays
from convert.description import Description
from convert.export_format import ExportFormat, Widths
from convert.formats.padded import padded_model
from convert.layout import Spec
from convert.mtp import mtp_layer_names, mtp_rule, mtp_stem, mtp_tensors
from moe_jax.errors import InputError
from moe_jax.transformer import DecoderLayer

MULTIPLE = 32  # of which the widths of pruned experts in ragged folders are multiples
PARTS = ("w_gate", "w_up", "w_down")

# (layer, width) -> int [E, width]: the channels that each expert of the layer keeps, ascending.
Choose = Callable[[DecoderLayer, int], np.ndarray]


@dataclass(frozen=True)
class MtpSource:
    """Where the tensors of these layers come from, and which of their channels stay.

    Attributes:
      read: name -> array in the dtype that `Description.mtp` says.
      choose: asked only if experts are pruned.
    """

    read: Callable[[str], np.ndarray]
    choose: Choose


def check_mtp(about: Description, mtp: str) -> None:
    """Refuse to keep or prune layers that the checkpoint lacks.

    Raises:
      InputError: naming the first tensors that are missing or misshaped.
    """
    if mtp == "drop":
        return
    wanted = mtp_tensors(about.family, about.hf_config, about.config)
    if not (wanted and about.mtp):
        raise InputError(
            f"mtp={mtp!r} needs layers that predict further tokens, and {about.folder} has none; "
            "choose mtp='drop'"
        )
    wrong = [
        f"{name} is missing"
        if name not in about.mtp
        else f"{name} has shape {list(about.mtp[name][1])}; config.json asks for {list(shape)}"
        for name, (_, shape) in wanted.items()
        if mtp_rule(about.family, name) and about.mtp.get(name, (None, None))[1] != shape
    ]
    if wrong:
        raise InputError(f"mtp={mtp!r} needs whole layers: {'; '.join(wrong[:5])}")


def check_mtp_width(about: Description, widths: Widths, form: ExportFormat) -> None:
    """Refuse to keep layers whose experts would not have the one width of a padded folder.

    Raises:
      InputError: they would not, or as of `check_mtp`.
    """
    check_mtp(about, form.mtp)
    own = about.config.moe.d_expert
    if form.mtp == "keep" and form.is_padded and form.padded_width(widths) != own:
        raise InputError(
            f"mtp='keep' leaves experts {own} channels wide in the layers that predict further "
            f"tokens, and {form.name} has one width, {form.padded_width(widths)}, for all, so "
            "programs would load them wrongly; choose mtp='prune' or 'drop', or a ragged format"
        )


def mtp_width(about: Description, widths: Widths, form: ExportFormat) -> int:
    """Channels of each expert in these layers of an export.

    Pruned, it is the one width of a padded folder. Every expert of a ragged one has the average
    width of the model's, up to a multiple of 32.
    """
    own = about.config.moe.d_expert
    if form.mtp != "prune":
        return own
    if form.is_padded:
        return form.padded_width(widths)
    counts = [count for row in widths for count in row]
    return min(own, -(-sum(counts) // (len(counts) * MULTIPLE)) * MULTIPLE)


def mtp_specs(about: Description, width: int, form: ExportFormat) -> dict[str, Spec]:
    """Dtypes and shapes of the tensors of these layers in an export: 16-bit in every format.

    Args:
      about: the dense model.
      width: channels of each of their experts.
      form: the format.

    Returns:
      Name -> (dtype, shape).
    """
    if form.mtp == "drop":
        return {}
    family, shared = about.family, about.config.moe.d_shared
    if form.is_padded:
        shared = padded_model(about.config, family, width).moe.d_shared
    sizes, found = {"F": width, "S": shared}, {}
    for name, (dtype, shape) in about.mtp.items():
        rule = mtp_rule(family, name)
        axes = rule.shape if rule else " " * len(shape)
        found[name] = dtype, tuple(sizes.get(a, n) for a, n in zip(axes, shape, strict=True))
    return found


def mtp_arrays(
    about: Description, specs: dict[str, Spec], width: int, source: MtpSource
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `mtp_specs`; of a layer that is pruned all matrices are in memory at once.

    Args:
      about: the dense model.
      specs: of these tensors in the export.
      width: channels of each expert.
      source: where they come from.

    Yields:
      (name, array as on disk); a shared expert is filled up with zeros where the width asks so.
    """
    narrower = bool(specs) and width < about.config.moe.d_expert
    for name, (dtype, shape) in specs.items():
        rule = mtp_rule(about.family, name)
        if narrower and rule is not None and rule.is_of_expert:
            continue
        array = source.read(name)
        if array.shape != shape:
            full = np.zeros(shape, dtype)
            full[tuple(slice(size) for size in array.shape)] = array
            array = full
        yield name, array
    if narrower:
        for number in _layers_among(about, specs):
            yield from _narrower_experts(about, number, width, source)


def _layers_among(about: Description, names: Iterable[str]) -> Iterator[int]:
    """Numbers of the layers that have tensors of these names, from 0."""
    return itertools.takewhile(
        lambda number: any(
            name.startswith(mtp_stem(about.family, about.config, number)) for name in names
        ),
        itertools.count(),
    )


def _narrower_experts(
    about: Description, number: int, width: int, source: MtpSource
) -> Iterator[tuple[str, np.ndarray]]:
    kept = source.choose(_ordinary_part(about, number, source), width)
    names = {rule.ours: name for rule, name in mtp_layer_names(about.family, about.config, number)}
    for expert in range(about.config.moe.num_experts):
        for part in PARTS:
            name = names[f"mlp.experts.{part}"].replace("{expert}", str(expert))
            array = source.read(name)
            yield name, array[:, kept[expert]] if part == "w_down" else array[kept[expert]]


def _ordinary_part(about: Description, number: int, source: MtpSource) -> DecoderLayer:
    """The decoder layer inside such a layer."""
    config, moe = about.config, about.config.moe
    index = config.num_layers + number
    ordinary, own = f"model.layers.{index}.", mtp_stem(about.family, config, number)
    counts = (moe.d_expert,) * moe.num_experts
    pool = PoolShape(rows=sum(counts), width=moe.d_expert, block=moe.d_expert)
    arrays = read_arrays(
        about.family.rules,
        config,
        index,
        counts,
        pool.rows,
        lambda name: source.read(own + name.removeprefix(ordinary)),
    )
    return build_layer(arrays, config, index, counts, pool)
