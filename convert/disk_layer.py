"""The tensors of a model in memory under their names on disk."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from convert.interleaved import fuse_experts
from convert.rules import EMBEDDING, FINAL_NORM, LM_HEAD, Family, TensorRule
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.float8 import BLOCK, Float8Tensor
from moe_jax.norm import Centred
from moe_jax.quant import QTensor, Weight, dequantize, unpack
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer


def layer_to_hf(
    rules: Iterable[TensorRule], layer: DecoderLayer, index: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a decoder layer or group under their names on disk; the inverse of reading.

    4-bit weights are dequantised. An expert without channels yields nothing. What all groups of a
    layer have is yielded of the first.
    """
    for rule in rules:
        value = _lookup(layer, rule.ours)
        if value is not None:
            assert isinstance(value, Weight)
            array = np.asarray(dequantize(value))
            yield from _named_parts(rule, layer, index, array, channels_per_row=1)


def layer_on_disk(
    family: Family, layer: DecoderLayer, index: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The same, with experts of equal width fused if the family's folders have them so."""
    found = layer_to_hf(family.rules, layer, index)
    if not (family.together and isinstance(layer.mlp, MoE)):
        return found
    counts = np.asarray(layer.mlp.experts.count)
    equal = counts[0] and (counts == counts[0]).all()
    return fuse_experts(found, len(counts), family.together) if equal else found


@dataclass(frozen=True)
class Codes:
    """A weight [out, in] in few bits: codes int8 with scale float [out, in / g], or
    float8_e4m3fn with scale float [ceil(out / 128), ceil(in / 128)]."""

    codes: np.ndarray
    scale: np.ndarray


def layer_codes(
    rules: Iterable[TensorRule], layer: DecoderLayer, index: int
) -> Iterator[tuple[str, Codes]]:
    """The coded weights of a decoder layer under their names on disk, exactly as they are."""
    for rule in rules:
        value = _lookup(layer, rule.ours)
        if isinstance(value, QTensor):
            group = value.group_size if value.axis == 0 else 1
            codes = unpack(value)
        elif isinstance(value, Float8Tensor):
            group, codes = BLOCK, value.codes
        else:
            continue
        codes, scale = np.asarray(codes), np.asarray(value.scale)
        for (name, part), (_, own) in zip(
            _named_parts(rule, layer, index, codes, channels_per_row=1),
            _named_parts(rule, layer, index, scale, channels_per_row=group),
            strict=True,
        ):
            yield name, Codes(part, own)


def _named_parts(
    rule: TensorRule, layer: DecoderLayer, index: int, array: np.ndarray, channels_per_row: int
) -> Iterator[tuple[str, np.ndarray]]:
    """An array of the layer cut into what lies on disk; experts' rows follow each other."""
    name = rule.hf.replace("{layer}", str(index))
    first = layer.mlp.own.start if isinstance(layer.mlp, MoE) else 0
    if rule.layout == "identity":
        if not first:
            yield name, array
        return
    experts = _lookup(layer, rule.ours.rpartition(".")[0])
    assert isinstance(experts, Experts)
    if rule.layout in ("expert_vector", "emptied_vector"):
        counts = np.asarray(experts.count)
        cut = isinstance(layer.mlp, MoE) and layer.mlp.config.emptied_cut
        for expert, (part, count) in enumerate(zip(array, counts, strict=True), first):
            if rule.has_expert(int(count), cut):
                yield name.replace("{expert}", str(expert)), part
        return
    ends = np.concatenate([[0], np.cumsum(np.asarray(experts.count))]) // channels_per_row
    for expert, (start, stop) in enumerate(itertools.pairwise(ends.astype(int)), first):
        rows = array[start:stop]
        if len(rows):
            part = rows if rule.layout == "expert_rows" else np.ascontiguousarray(rows.T)
            yield name.replace("{expert}", str(expert)), part


def _lookup(node, path: str):
    """Follow an attribute path; None where a part is absent."""
    for key in path.split("."):
        node = getattr(node, key, None)
    return node


def outer_tensors(source: LayerSource) -> Iterator[tuple[str, np.ndarray]]:
    """Embedding, final norm and, unless it is tied, the output projection, with HF names."""
    yield EMBEDDING, np.asarray(source.embedding.weight)
    norm = source.head.norm
    yield FINAL_NORM, np.asarray(norm.offset if isinstance(norm, Centred) else norm)
    if not source.config.tie_embeddings:
        yield LM_HEAD, np.asarray(dequantize(source.head.weight))
