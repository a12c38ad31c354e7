"""Tables that translate Hugging Face tensors to our model and back."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from convert.axes import axis_sizes, parts
from convert.export_format import FORMATS, ExportFormat, Widths
from convert.fields import read_fields
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.quant import is_linear
from moe_jax.transformer import DecoderLayer

# How one tensor lies in ours: as it is, as an expert's part of a channel pool, whose rows are the
# tensor's rows (gate, up: [F, D] or a bias [F]) or its columns (down: [D, F]), or as the row of an
# expert, whatever its width or only if that is 0 (the bias of down: [D]).
Placing = Literal["identity", "expert_rows", "expert_columns", "expert_vector", "emptied_vector"]

# How a folder may hold the experts of a layer in one tensor, see `convert.interleaved`.
Together = Literal["", "alternating", "halves"]

TEXT = "text_config"  # the text model's part of a wrapper's config.json
RAGGED = "ragged_"  # prefix of the model types of our custom export
OF_THE_WHOLE = ("quantization_config", "dtype", "torch_dtype")  # keys that may stand beside it
_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+")
_EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)\d+")


@dataclass(frozen=True)
class TensorRule:
    """One invertible line of a family's table.

    Attributes:
      hf: name on disk, with `{layer}` and, for experts, `{expert}`.
      ours: attribute path below the decoder layer.
      shape: axes on disk, letters of `convert.axes.axis_sizes`.
      needs: the part of the architecture that has this tensor, see `parts`.
      layout: how it lies in our array.
      precise: whether it stays float32 whatever the dtype of the rest.
    """

    hf: str
    ours: str
    shape: str
    needs: str = ""
    layout: Placing = "identity"
    precise: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether 4-bit formats pack the tensor: the linear layers of `moe_jax.quant.is_linear`."""
        return is_linear(self.ours)

    @property
    def is_of_expert(self) -> bool:
        """Whether each routed expert has one."""
        return self.layout != "identity"

    def has_expert(self, count: int, cut: bool) -> bool:
        """Whether an expert of `count` channels has this tensor; `cut` as of `emptied_cut`."""
        beside = {"expert_vector": not cut, "emptied_vector": True}.get(self.layout, False)
        return beside if not count else self.layout != "emptied_vector"


@dataclass(frozen=True)
class Twin:
    """Another family in which a model computes the same, and which more programs load.

    Attributes:
      model_type: of the other family.
      config: config.json -> that of the other family.
      layer: decoder layer, or the first group of one, -> one that the other family's rules write.
    """

    model_type: str
    config: Callable[[dict], dict]
    layer: Callable[[DecoderLayer], DecoderLayer]


@dataclass(frozen=True)
class Mtp:
    """Where a family keeps the layers that predict further tokens, see `convert.mtp`.

    Attributes:
      count_key: key of config.json for their number.
      default: their number if config.json does not say.
      prefix: of the names of their tensors, if they are not numbered on from the last layer.
      tensors: what they have beside the tensors of an ordinary layer: name behind the prefix, or
        behind that of each layer -> axes as in `TensorRule.shape`, K being twice the model's width.
    """

    count_key: str
    tensors: Mapping[str, str]
    default: int = 0
    prefix: str | None = None


@dataclass(frozen=True)
class Wrapper:
    """Where a model of several parts, such as one that sees images, keeps its text model.

    Attributes:
      prefixes: of its names on disk -> in the family's rules.
      default_tied: what it means if its config.json does not say `tie_word_embeddings`.
    """

    prefixes: Mapping[str, str]
    default_tied: bool = False

    def inner(self, stored: str) -> str | None:
        """The name in the rules, None if the tensor is of another part."""
        for theirs, ours in self.prefixes.items():
            if stored.startswith(theirs):
                return ours + stored.removeprefix(theirs)
        return None

    def stored(self, name: str) -> str:
        """The inverse of `inner`."""
        for theirs, ours in self.prefixes.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


@dataclass(frozen=True)
class Family:
    """What reading and writing a model type takes.

    Attributes:
      model_type: of config.json.
      stem: of the names of its classes in transformers.
      read_config: config.json, its fields checked and what it leaves out filled in
        (`convert.fields`), -> ModelConfig; raises InputError.
      rules: tensors of a decoder layer.
      width_key: key of config.json for the experts' width.
      count_keys: keys for the number of experts, all written since each version reads its own.
      shared_count_key: key for the number of shared experts, if it times the experts' width is
        the width of the shared expert.
      rope: values of `rope_parameters` that config.json may leave out.
      defaults: values of config.json that it may leave out, those of transformers.
      mtp: its layers that predict further tokens, if it may have any.
      ragged: whether experts or layers have widths of their own (our custom exports).
      twin: the family it is exported as, if not as itself; such a one is never ragged.
      together: how a folder holds the experts of a layer in one tensor, if it does; `rules` then
        name what `convert.interleaved` makes of that.
      aliases: another name that tensors may have on disk -> the one in `rules`, both with
        `{layer}` and `{expert}`.
      wrapper: where it is kept, if it is the text model inside of another one.
      formats: what it can be exported as, of `FORMATS`: only what some program reads.
    """

    model_type: str
    stem: str
    read_config: Callable[[dict], ModelConfig]
    rules: tuple[TensorRule, ...]
    width_key: str = "moe_intermediate_size"
    count_keys: tuple[str, ...] = ("num_experts",)
    shared_count_key: str | None = None
    rope: Mapping[str, float] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    mtp: Mtp | None = None
    ragged: bool = False
    twin: Twin | None = None
    together: Together = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    wrapper: Wrapper | None = None
    formats: tuple[str, ...] = tuple(n for n in FORMATS if not ExportFormat(n).is_float4)

    def config_from_hf(self, hf: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig.

        Raises:
          InputError: a field has another type or an unsupported value, or is missing.
        """
        fields = read_fields(self.text_config(hf), self.defaults)
        if self.mtp is not None:
            fields.get(self.mtp.count_key)  # read by `convert.mtp`
        return self.read_config(fields)

    def text_config(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the text model: itself, or the part of a wrapper's, which says the rest.

        Raises:
          InputError: there is no such part.
        """
        if self.wrapper is None or (TEXT not in hf and "hidden_size" in hf):
            return dict(hf)
        text = hf.get(TEXT)
        if not isinstance(text, Mapping):
            raise InputError(f"config.json lacks {TEXT}, the part about the text model")
        outer = {key: hf[key] for key in OF_THE_WHOLE if hf.get(key) is not None}
        tied = hf.get("tie_word_embeddings", self.wrapper.default_tied)
        return {**text, **outer, "model_type": self.model_type, "tie_word_embeddings": tied}

    def canonical(self, name: str) -> str:
        """The name in `rules` of a tensor that may have another on disk."""
        found = self.aliases.get(_pattern(name))
        if found is None:
            return name
        numbers = (_LAYER_NUMBER.search(name), _EXPERT_NUMBER.search(name))
        layer, expert = (match[0] if match else "" for match in numbers)
        return found.replace("{layer}", layer).replace("{expert}", expert)

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads a folder of its own, by the model type."""
        return "AutoModelForImageTextToText" if self.wrapper else "AutoModelForCausalLM"

    @property
    def public_type(self) -> str:
        """The model type of the stock family."""
        return self.model_type.removeprefix(RAGGED)

    def rule(self, name: str) -> TensorRule | None:
        """The line of the table that a name on disk belongs to, if any."""
        return self._by_pattern.get(_pattern(name))

    def is_precise(self, name: str) -> bool:
        """Whether a tensor stays float32."""
        rule = self.rule(name)
        return rule is not None and rule.precise

    @cached_property
    def _by_pattern(self) -> dict[str, TensorRule]:
        return {rule.hf: rule for rule in self.rules}


def _pattern(name: str) -> str:
    """A name with `{layer}` and `{expert}` for its numbers."""
    return _EXPERT_NUMBER.sub("{expert}", _LAYER_NUMBER.sub("{layer}", name))


def expert_number(name: str) -> int | None:
    """Whose tensor of this name is, if it is one routed expert's."""
    found = _EXPERT_NUMBER.search(name)
    return None if found is None else int(found[0])


def layer_number(name: str) -> int | None:
    """Of which decoder layer a tensor of this name is, if of any."""
    found = _LAYER_NUMBER.search(name)
    return None if found is None else int(found[0])


EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def uniform_widths(config: ModelConfig) -> Widths:
    """Every expert at `d_expert` channels."""
    m = config.moe
    row = (m.d_expert,) * m.num_experts
    return tuple(() if i in config.dense_layers else row for i in range(config.num_layers))


def layer_rules(
    rules: Iterable[TensorRule], config: ModelConfig, layer: int
) -> Iterator[tuple[TensorRule, str]]:
    """The rules of one layer with their names on disk, `{expert}` left open."""
    here = parts(config, layer)
    for rule in rules:
        if rule.needs in here:
            yield rule, rule.hf.replace("{layer}", str(layer))


def ruled_tensors(
    family: Family, config: ModelConfig, widths: Widths | None = None
) -> Iterator[tuple[str, tuple[int, ...], TensorRule | None]]:
    """All tensors that a checkpoint must have, in file order, each with its line of the table.

    Args:
      family: its rules.
      config: the architecture.
      widths: channels per layer and expert, default all `d_expert`; 0 means no tensors.

    Yields:
      (name, shape on disk, rule; None outside the decoder layers).
    """
    sizes, cut = axis_sizes(config), config.moe.emptied_cut
    yield EMBEDDING, (sizes["V"], sizes["D"]), None
    for layer, counts in enumerate(widths or uniform_widths(config)):
        sizes["E"] = sum(map(bool, counts)) if cut else config.moe.num_experts
        for rule, name in layer_rules(family.rules, config, layer):
            if not rule.is_of_expert:
                yield name, tuple(sizes[axis] for axis in rule.shape), rule
                continue
            before, _, behind = name.partition("{expert}")
            shapes = {
                count: tuple(count if axis == "F" else sizes[axis] for axis in rule.shape)
                for count in set(counts)
                if rule.has_expert(count, cut)
            }
            for expert, count in enumerate(counts):
                if count in shapes:
                    yield f"{before}{expert}{behind}", shapes[count], rule
    yield FINAL_NORM, (sizes["D"],), None
    if not config.tie_embeddings:
        yield LM_HEAD, (sizes["V"], sizes["D"]), None


def expected_tensors(
    family: Family, config: ModelConfig, widths: Widths | None = None
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of `ruled_tensors`."""
    return {name: shape for name, shape, _ in ruled_tensors(family, config, widths)}
