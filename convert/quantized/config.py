"""What a `quantization_config` says: the format, and how each module's weights are stored."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.export_format import FLOAT8_BLOCK, GROUP_SIZES
from convert.rules import Family
from moe_jax.errors import InputError

FLOAT8, NORMAL4 = "fp8", "bitsandbytes"
INTEGERS = ("gptq", "awq")
COMPRESSED = "compressed-tensors"
MXFP4 = "mxfp4"
PACKED = "pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
READ = (
    "AWQ (gemm), GPTQ, compressed-tensors of 4 and 8 bits, bitsandbytes NF4, FP8 in blocks and, in "
    "gpt-oss, MXFP4"
)
STRATEGIES = ("tensor", "channel", "group", "block")
MOST_PATTERNS, LONGEST_PATTERN = 1 << 16, 1000


@dataclass(frozen=True)
class Scheme:
    """How compressed-tensors stores the weights of some modules.

    Attributes:
      packed: whether codes are packed into 32-bit words.
      bits: 4 or 8.
      floating: whether codes are 8-bit floats.
      symmetric: whether there are no zero points.
      strategy: one of `STRATEGIES`: what shares a scale.
      block: rows and columns that do, None for all.
    """

    packed: bool
    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    block: tuple[int | None, int | None]

    @property
    def group_size(self) -> int | None:
        """Weights of a row per scale; None unless the strategy is "group"."""
        return self.block[1] if self.strategy == "group" else None

    def is_native(self, scale: np.dtype) -> bool:
        """Whether an export can hold the codes, with scales of this dtype."""
        if self.floating:
            return self.symmetric and self.block == (FLOAT8_BLOCK, FLOAT8_BLOCK)
        integers = self.packed and self.bits == 4 and self.symmetric
        return integers and self.group_size in GROUP_SIZES and scale.name == "bfloat16"


@dataclass(frozen=True)
class Quantization:
    """A readable `quantization_config`.

    Attributes:
      method: its `quant_method`.
      options: the JSON value.
      groups: of compressed-tensors, targets and scheme in order.
      ignore: of compressed-tensors, modules that are stored as they are.
      outer: module of a text model -> its name in the model around it, which is matched, too.
    """

    method: str
    options: Mapping[str, Any]
    groups: tuple[tuple[tuple[str, ...], Scheme], ...] = ()
    ignore: tuple[str, ...] = ()
    outer: Callable[[str], str] = lambda name: name

    @functools.cached_property
    def scheme(self) -> Callable[[str], Scheme | None]:
        """How a linear layer's weights are stored, by its name; None if as they are.

        Names and patterns of `targets` win over the class name "Linear", `ignore` over both.
        """
        ignored = _matcher(self.ignore)
        named = [(_matcher(targets), scheme) for targets, scheme in self.groups]
        others = next((scheme for targets, scheme in self.groups if "Linear" in targets), None)

        @functools.cache
        def find(module: str) -> Scheme | None:
            names = (module, self.outer(module))
            if any(map(ignored, names)):
                return None
            return next((one for matches, one in named if any(map(matches, names))), others)

        return find


def _matcher(targets: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a module is named, or fits a pattern "re:...", from its start as compressed-tensors
    has it."""
    names = frozenset(targets)
    patterns = [re.compile(one.removeprefix("re:")) for one in targets if one.startswith("re:")]
    return lambda module: module in names or any(one.match(module) for one in patterns)


def read_quantization(hf: Mapping[str, Any], family: Family) -> Quantization | None:
    """The `quantization_config` of a config.json; None without one.

    Args:
      hf: config.json, of the text model.
      family: of the model; MXFP4 is read where experts alternate, see `convert.interleaved`.

    Raises:
      UnreadFormat: it is another one; the sentence names it.
      InputError: a value of it is of another type or out of range.
    """
    options = hf.get("quantization_config")
    if options is None:
        return None
    if not isinstance(options, dict):
        raise InputError(f"quantization_config={str(options)[:80]} must be an object")
    method = options.get("quant_method")
    if method == FLOAT8:
        block = _float8_block(options)
        found = Scheme(packed=False, bits=8, floating=True, symmetric=True, strategy="block",
                       block=block)  # fmt: skip
        listed = options.get("modules_to_not_convert")
        listed = listed if isinstance(listed, list) else []
        ignore = tuple(name for name in listed if isinstance(name, str))
        groups = ((("Linear",), found),)
        return Quantization(method, options | {"weight_block_size": block}, groups, ignore)
    if method == MXFP4 and family.together == "alternating":
        return Quantization(method, options)
    if method in INTEGERS:
        _check_integers(options)
        return Quantization(method, options)
    if method == NORMAL4:
        if options.get("load_in_4bit") is not True or options.get("bnb_4bit_quant_type") != "nf4":
            kind = f"bnb_4bit_quant_type={str(options.get('bnb_4bit_quant_type'))[:80]}"
            raise _unread(f"bitsandbytes, not in 4 bits of type nf4 ({kind})")
        return Quantization(method, options)
    if method == COMPRESSED:
        return _compressed(options, family)
    raise _unread(f"{str(method)[:80]}/{str(options.get('format'))[:80]}")


class UnreadFormat(InputError):
    """Weights are stored in a format that nothing here reads."""


def _unread(what: str) -> UnreadFormat:
    return UnreadFormat(f"quantization_config is {what}, which is not read ({READ} are)")


def _float8_block(options: Mapping[str, Any]) -> tuple[int, int]:
    match options.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case size:
            raise InputError(
                f"quantization_config is fp8 with weight_block_size={str(size)[:80]}, which must "
                "be two positive integers, rows and columns"
            )


def _check_integers(options: Mapping[str, Any]) -> None:
    """Refuse layouts of GPTQ and AWQ that pack otherwise."""
    method, bits = options["quant_method"], options.get("bits", options.get("w_bit", 4))
    allowed = (4,) if method == "awq" else (4, 8)
    if type(bits) is not int or bits not in allowed:
        raise _unread(f"{method} in {str(bits)[:80]} bits")
    size = options.get("group_size", options.get("q_group_size", 128))
    if type(size) is not int or size == 0 or size < -1:
        raise InputError(
            f"quantization_config is {method} with group_size={str(size)[:80]}, which must be a "
            "positive whole number, or -1 for whole rows"
        )
    layout = options.get("version", "gemm") if method == "awq" else gptq_layout(options)
    known = ("gemm",) if method == "awq" else ("gptq", "gptq_v2")
    if not isinstance(layout, str) or layout.lower() not in known:
        raise _unread(f"{method} in the layout {str(layout)[:80]}")
    if method == "awq" and options.get("zero_point", True) is not True:
        raise _unread("awq without zero points")
    dynamic = options.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(str(key).startswith("-:") for key in dynamic):
        raise _unread(f"{method} with other options for some modules (dynamic)")


def gptq_layout(options: Mapping[str, Any]) -> Any:
    """Which layout a GPTQ config names: "gptq" (zero points stored less one), "gptq_v2", others."""
    return options.get("checkpoint_format") or options.get("format") or "gptq"


def _compressed(options: Mapping[str, Any], family: Family) -> Quantization:
    for name in ("sparsity_config", "transform_config"):
        said = options.get(name) or {}
        if not isinstance(said, dict) or said.get("format", "dense") != "dense" or (
            name == "transform_config" and said.get("config_groups")
        ):  # fmt: skip
            raise _unread(f"compressed-tensors with a {name}")
    groups = options.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise InputError(f"quantization_config config_groups={str(groups)[:80]} must be an object")
    found = []
    for key, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise _unread(f"compressed-tensors whose {key[:80]} quantises no weights")
        targets = _patterns(group.get("targets", ["Linear"]), f"targets of {key[:80]}")
        form = group.get("format") or options.get("format")
        found.append((targets, _scheme(group["weights"], form)))
    ignore = _patterns(options.get("ignore") or [], "ignore")
    outer = family.wrapper.stored if family.wrapper else lambda name: name
    return Quantization(COMPRESSED, options, tuple(found), ignore, outer)


def _patterns(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > MOST_PATTERNS:
        raise InputError(f"quantization_config {where} must be a list of names or patterns")
    for value in values:
        if not isinstance(value, str) or len(value) > LONGEST_PATTERN:
            raise InputError(
                f"quantization_config {where} holds {str(value)[:80]}, which is no name"
            )
        try:
            re.compile(value.removeprefix("re:") if value.startswith("re:") else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"quantization_config {where} holds {value[:80]!r}, which is no pattern: {error}"
            ) from None
    return tuple(values)


def _scheme(weights: Mapping[str, Any], form: Any) -> Scheme:
    """How a group stores its weights."""
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    size, structure = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy")
    if strategy is None:  # as compressed-tensors fills it in
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    said = f"{str(form)[:80]} of {str(bits)[:80]} bits, {str(kind)[:80]}, per {str(strategy)[:80]}"
    integers = kind == "int" and bits in ((4, 8) if form == PACKED else (8,))
    floats = kind == "float" and bits == 8 and form in PLAIN
    known = isinstance(form, str) and form in (PACKED, *PLAIN) and strategy in STRATEGIES
    if not known or type(bits) is not int or not (integers or floats):
        raise _unread(f"compressed-tensors {said}")
    block: tuple[int | None, int | None] = (1, None)
    if strategy == "tensor":
        block = None, None
    elif strategy == "group":
        if type(size) is not int or size < 1:
            raise InputError(
                f"quantization_config has group_size={str(size)[:80]}, which must be a positive "
                "whole number"
            )
        block = 1, size
    elif strategy == "block":
        match structure:
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                block = rows, columns
            case _:
                raise InputError(
                    f"quantization_config has block_structure={str(structure)[:80]}, which must be "
                    "two positive integers, rows and columns"
                )
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _unread(f"compressed-tensors with actorder={str(weights['actorder'])[:80]}")
    symmetric = weights.get("symmetric", True) is True
    return Scheme(form == PACKED, bits, kind == "float", symmetric, strategy, block)
