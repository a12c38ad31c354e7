"""What config.json of an export says of weights in few bits."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from convert.description import Description
from convert.export_format import ExportFormat
from convert.formats import compressed_tensors, float8, mxfp4
from convert.layout import Spec
from convert.mtp import mtp_prefixes
from convert.rules import EMBEDDING
from convert.stored import Stored

# Modules outside of a wrapper's text model, as files, programs and a text model alone name that.
OTHER_PARTS = r"re:(?!(.*\.)?language_model\.|(model\.)?layers\.)"


def quantization_config(
    base: Description,
    form: ExportFormat,
    tensors: Mapping[str, Stored],
    mtp: Mapping[str, Spec],
    *,
    native: bool,
) -> dict[str, Any]:
    """The `quantization_config` of an export in few bits.

    Args:
      base: the dense model.
      form: the format.
      tensors, mtp: what the folder holds, see `convert.export.Export`.
      native: whether the codes of the base are taken over.

    Returns:
      The JSON value.
    """
    if form.is_float4:
        return mxfp4.quantization_config()
    plain = _matrices({name: s.shape for name, s in tensors.items() if not s.packed})
    if base.config.tie_embeddings:
        plain.append("lm_head")
    if form.is_float8:
        drafting = _matrices({name: shape for name, (_, shape) in mtp.items()})
        said = base.quantization
        if native and said is not None and said.method == float8.METHOD:
            return float8.quantization_config(drafting, base.hf_config["quantization_config"])
        return float8.quantization_config([*plain, *drafting], None)
    wrapped = base.family.wrapper is not None
    plain = _anywhere(plain) if wrapped else plain
    if form.mtp != "drop":
        # Not by exact names: vLLM asks for some of these modules under the name of several.
        prefixes = (re.escape(prefix) for prefix in mtp_prefixes(base.family, base.hf_config))
        plain += [f"re:{'.*' * wrapped}{name.removeprefix('model' * wrapped)}" for name in prefixes]
    return compressed_tensors.quantization_config(plain, form.group_size, _targets(form))


def _targets(form: ExportFormat) -> dict[int, str]:
    """Which linear layers have how many bits; those of layers in 16 are named as dense ones."""
    if not form.layer_bits:
        return {form.bits: "Linear"}
    layers: dict[int, list[str]] = {}
    for index, bits in enumerate(form.layer_bits):
        layers.setdefault(bits, []).append(str(index))
    own = {bits: rf"re:(.*\.)?layers\.({'|'.join(layers[bits])})\." for bits in sorted(layers)}
    return {bits: pattern for bits, pattern in own.items() if bits < 16}


def _anywhere(plain: Iterable[str]) -> list[str]:
    """Modules of a wrapper that stay 16-bit: those of its text model and all of its other parts.

    As patterns: its class in transformers has other names in front than its files, and may have
    parts of which the files hold nothing.
    """
    inner = (name.removeprefix("model.") for name in plain)
    return ["lm_head", *(rf"re:(.*\.)?{re.escape(name)}$" for name in inner), OTHER_PARTS]


def _matrices(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The linear layers among some tensors, as programs name their modules."""
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and name != EMBEDDING
    ]
