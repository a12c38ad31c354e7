"""A pruned model in one of the formats that other programs load: known first, then written."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import outer_tensors
from convert.description import Description
from convert.export_format import FORMATS, ExportFormat, Widths
from convert.families import find_family
from convert.formats import compressed_tensors, mxfp4, padded, ragged
from convert.formats.wrapped import wrapped_config, wrapped_modules
from convert.interleaved import fuse_experts, fuse_specs
from convert.layout import BFLOAT16, FLOAT32, Spec, nbytes, weight_bytes
from convert.mtp import mtp_prefixes
from convert.mtp_export import MtpSource, check_mtp_width, mtp_arrays, mtp_specs, mtp_width
from convert.portable import portable_config
from convert.reader import SafetensorsFolder
from convert.rules import EMBEDDING, Family, TensorRule, ruled_tensors
from convert.stored import Stored, stored_layer
from convert.writer import write_folder
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer


@dataclass(frozen=True)
class _Source:
    """The dense model as the family it is exported as describes it."""

    family: Family
    hf_config: dict[str, Any]
    config: ModelConfig
    layer: Callable[[DecoderLayer], DecoderLayer]


@dataclass(frozen=True, eq=False)
class Export:
    """What the folder of a pruned model holds, from shapes alone; each answer is found once.

    Attributes:
      base: the dense model.
      widths: channels kept per layer and expert, () for dense layers.
      form: the format.
    """

    base: Description
    widths: Widths
    form: ExportFormat

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """The tensors of the model by public name, in file order; those that draft are apart."""
        source, form = self._source, self.form
        config = ragged.emptied_model(source.config, form.constants)
        if form.is_padded:
            config = padded.padded_model(config, source.family, form.padded_width(self.widths))
        packs, experts_only = form.is_packed, form.is_float4

        def stored(shape: tuple[int, ...], rule: TensorRule | None) -> Stored:
            if rule is None:
                return Stored(shape, BFLOAT16, packed=False, of_expert=False)
            packed = packs and rule.is_linear and (rule.is_of_expert or not experts_only)
            return Stored(shape, FLOAT32 if rule.precise else BFLOAT16, packed, rule.is_of_expert)

        found = ruled_tensors(source.family, config, form.stored_widths(self.widths))
        return {name: stored(shape, rule) for name, shape, rule in found}

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Name -> (dtype, shape) of every tensor in the folder, in file order."""
        specs: dict[str, Spec] = {}
        for name, stored in self.tensors.items():
            specs |= stored.specs(name, self.form)
        if self._is_fused:
            specs = fuse_specs(specs, self.base.config.moe.num_experts)
        specs = {self._stored(name): spec for name, spec in (specs | self.mtp_specs).items()}
        return specs | dict(self.base.beside)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the weight files and their index, headers included."""
        return weight_bytes(self.specs)

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(map(nbytes, self.specs.values()))

    @cached_property
    def parameters(self) -> int:
        """Weights of the pruned model and of its layers that draft, padding not counted."""
        own = self.base.weights(self.widths, constants=self.form.constants)
        return own + self.mtp_parameters

    @cached_property
    def mtp_parameters(self) -> int:
        """Weights of the layers that predict further tokens, as they are stored."""
        return sum(math.prod(shape) for _, shape in self.mtp_specs.values())

    @cached_property
    def mtp_specs(self) -> dict[str, Spec]:
        """Name -> (dtype, shape) of the tensors that predict further tokens, if any are held."""
        return mtp_specs(self.base, self.mtp_width, self.form)

    @cached_property
    def mtp_width(self) -> int:
        """Channels of each expert in the layers that predict further tokens."""
        return mtp_width(self.base, self.widths, self.form)

    @cached_property
    def packed_inputs(self) -> list[int]:
        """Input widths of the linear layers that are stored in 4 bits, each once, ascending."""
        return sorted({stored.shape[1] for stored in self.tensors.values() if stored.packed})

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json: the base's, edited, in both spellings of transformers."""
        source, form = self._source, self.form
        config = portable_config(source.hf_config, with_mtp=form.mtp != "drop")
        config["dtype"] = config["torch_dtype"] = "bfloat16"
        pruned = self.mtp_width if form.mtp == "prune" else None
        if form.is_ragged:
            counts = [list(row) for row in self.widths]
            config = ragged.ragged_config(config, source.family, counts, form.constants, pruned)
        elif form.is_layered:
            layers = form.layer_widths(self.widths)
            config = ragged.layered_config(config, source.family, layers, pruned)
        else:
            width = form.padded_width(self.widths)
            config = padded.padded_config(config, source.config, source.family, width)
        if form.is_float4:
            config["quantization_config"] = mxfp4.quantization_config()
        elif form.is_packed:
            config["quantization_config"] = compressed_tensors.quantization_config(
                self._unpacked_modules(), form.group_size
            )
        return config if self.base.outer is None else wrapped_config(config, self.base.outer)

    def check(self) -> None:
        """Refuse what no folder can hold.

        Raises:
          InputError: the family lacks the format, something has no place in it, a group of 4 bits
            would be incomplete, or layers that predict further tokens are missing or do not fit.
        """
        form, config = self.form, self.base.config
        if form.name not in self.base.family.formats:
            raise InputError(
                f"export={form.name!r} does not exist for {self.base.family.model_type}, because "
                f"no program would read it; choose from {', '.join(self.base.family.formats)}"
            )
        if form.constants and not form.holds_constants(config.moe.expert_bias):
            raise InputError(
                f"export={form.name!r} has no place for constants of emptied experts, which stock "
                "programs know nothing of; export ragged-bf16 or ragged-int4, or plan with "
                "--emptied zero"
            )
        self.check_mtp()
        kept = {count for counts in self.widths for count in counts}
        if form.is_float4:
            mxfp4.check_widths(sorted(kept), config.d_model)
        elif form.is_packed:
            compressed_tensors.check_group_size(form.group_size, [*self.packed_inputs, *kept])

    def check_mtp(self) -> None:
        """Raise InputError unless layers that predict further tokens are there and fit."""
        check_mtp_width(self.base, self.widths, self.form)

    def write(
        self,
        source: LayerSource,
        target: Path | str,
        *,
        mtp: MtpSource | None = None,
        extra_files: Mapping[str, str | Path] | None = None,
        overwrite: bool = False,
        on_layer: Callable[[int], None] | None = None,
    ) -> Path:
        """Write a model, one layer in memory at a time; the folder is complete or absent.

        Args:
          source: the pruned model in the order of `base`'s layers, as wide as `widths` say; in a
            4-bit format weights that are `QTensor` keep their codes and scales, others are rounded
            to nearest; MXFP4 always rounds, which leaves rounded weights as they are.
          target: folder to make.
          mtp: where the layers that predict further tokens come from, unless they are dropped.
          extra_files: file name -> content, or path of a file to copy, such as a model card.
          overwrite: replace an existing folder.
          on_layer: called with the index of each finished layer.

        Returns:
          The folder.

        Raises:
          InputError: as of `check`, or `source` is another model.
          FileExistsError: if the target exists.
          OSError: if the disk is too small.
        """
        self.check()
        code = [] if self.form.is_padded else [ragged.MODELLING_FILE]
        if self.base.outer is not None:  # its auto_map stays, and names these
            code += self.base.folder.glob("*.py")
        return write_folder(
            target,
            self.specs,
            self._arrays(source, mtp, on_layer),
            self.config,
            self.base.folder,
            extra_files={**(extra_files or {}), **{path.name: path for path in code}},
            overwrite=overwrite,
        )

    def mtp_arrays(self, mtp: MtpSource) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of `mtp_specs`, (name, array as on disk)."""
        found = mtp_arrays(self.base, self.mtp_specs, self.mtp_width, mtp)
        return ((self._stored(name), array) for name, array in found)

    @cached_property
    def _source(self) -> _Source:
        base, twin = self.base, self.base.family.twin
        if twin is None:
            hf_config = ragged.stock_config(base.hf_config, base.family)
            return _Source(base.family, hf_config, base.config, lambda layer: layer)
        family, hf_config = find_family(twin.model_type), twin.config(base.hf_config)
        return _Source(family, hf_config, family.config_from_hf(hf_config), twin.layer)

    def _stored(self, name: str) -> str:
        """A tensor's name on disk."""
        wrapper = self._source.family.wrapper
        return name if wrapper is None else wrapper.stored(name)

    @property
    def _is_fused(self) -> bool:
        """Whether the folder holds the experts of a layer together."""
        return bool(self._source.family.together) and self.form.is_padded

    def _unpacked_modules(self) -> list[str]:
        """The linear layers that stay 16-bit, as a quantisation config names them."""
        modules = [
            name.removesuffix(".weight")
            for name, stored in self.tensors.items()
            if name.endswith(".weight") and len(stored.shape) == 2 and not stored.packed
            and name != EMBEDDING
        ]  # fmt: skip
        if self._source.config.tie_embeddings:
            modules.append("lm_head")
        if self.form.mtp != "drop":
            # Not by exact names: vLLM asks for some of these modules under the name of several.
            prefixes = mtp_prefixes(self.base.family, self.base.hf_config)
            modules += [f"re:{re.escape(prefix)}" for prefix in prefixes]
        return modules if self.base.outer is None else wrapped_modules(modules, self.base.beside)

    def _arrays(
        self, model: LayerSource, mtp: MtpSource | None, on_layer: Callable[[int], None] | None
    ) -> Iterator[tuple[str, np.ndarray]]:
        for name, value in self._own_arrays(model, on_layer):
            yield self._stored(name), value
        if self.mtp_specs:
            if mtp is None:
                raise InputError(f"mtp={self.form.mtp!r} needs the layers' weights; pass `mtp`")
            yield from self.mtp_arrays(mtp)
        if self.base.beside:
            folder = SafetensorsFolder(self.base.folder)
            yield from ((name, folder.read(name)) for name in self.base.beside)

    def _own_arrays(
        self, model: LayerSource, on_layer: Callable[[int], None] | None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of the model by their names in the family's rules."""
        yield from ((name, value.astype(BFLOAT16)) for name, value in outer_tensors(model))
        by_layer: dict[str, dict[str, Stored]] = {}
        for name, stored in self.tensors.items():
            by_layer.setdefault(".".join(name.split(".")[:3]), {})[name] = stored
        for index in range(len(model)):
            layer = self._source.layer(model.layer(index))
            tensors = by_layer[f"model.layers.{index}"]
            parts = stored_layer(self._source.family, layer, index, tensors, self.form)
            if self._is_fused:
                together = self._source.family.together
                parts = fuse_experts(parts, self.base.config.moe.num_experts, together)
            yield from parts
            if on_layer:
                on_layer(index)


def packed_inputs(base: Description) -> list[int]:
    """Input widths of the linear layers that the family's first 4-bit format packs."""
    forms = (ExportFormat(name) for name in FORMATS if name in base.family.formats)
    form = next((form for form in forms if form.is_packed), None)
    return [] if form is None else Export(base, base.widths, form).packed_inputs
