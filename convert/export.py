"""A pruned model in one of the formats that other programs load: known first, then written."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convert.description import Description
from convert.disk_layer import outer_tensors
from convert.export_format import MIXED, ExportFormat, Widths
from convert.few_bits import quantization_config
from convert.fewer_experts import check_cut, cut_layer, left_experts, with_fewer_experts
from convert.formats import compressed_tensors, float8, mxfp4, padded, ragged
from convert.formats.wrapped import wrapped_config
from convert.interleaved import check_shape, fuse_experts, fuse_specs
from convert.layout import BFLOAT16, FLOAT32, Spec, nbytes, weight_bytes
from convert.mtp_export import MtpSource, check_mtp_width, mtp_arrays, mtp_specs, mtp_width
from convert.portable import portable_config
from convert.quantized.config import Scheme
from convert.reader import SafetensorsFolder
from convert.rules import TensorRule, expert_number, layer_number, ruled_tensors
from convert.stored import Stored, stored_layer
from convert.writer import Content, write_folder
from convert.written import Written, as_written
from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from moe_jax.groups import each_group, own_experts
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer


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
        config = ragged.emptied_model(source.config, self._emptied)
        if form.is_padded:
            config = padded.padded_model(config, source.family, form.padded_width(self.widths))
        experts_only = form.is_float4
        scale = FLOAT32 if self.native is None else self.base.scale

        def stored(name: str, shape: tuple[int, ...], rule: TensorRule | None) -> Stored:
            if rule is None:
                return Stored(shape, BFLOAT16, packed=False, of_expert=False)
            own = form.of_layer(layer_number(name) or 0)
            packed = own.is_packed and rule.is_linear and (rule.is_of_expert or not experts_only)
            packed = packed and (self.native is None or self.base.is_native(name))
            dtype = FLOAT32 if rule.precise else BFLOAT16
            return Stored(shape, dtype, packed, rule.is_of_expert, scale, own.bits)

        found = ruled_tensors(source.family, config, form.stored_widths(self._left))
        return {name: stored(name, shape, rule) for name, shape, rule in found}

    @property
    def native(self) -> Scheme | None:
        """How the base stores the weights whose codes are taken over; None if none are."""
        form, native = self.form, self.base.native
        if native is None or form.requantize:
            return None
        integers = form.is_int4 and native.group_size == form.group_size
        return native if integers or (form.is_float8 and native.floating) else None

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Name -> (dtype, shape) of every tensor in the folder, in file order."""
        specs: dict[str, Spec] = {}
        for name, stored in self.tensors.items():
            specs |= stored.specs(name, self.form)
        if self._is_fused:
            specs = fuse_specs(specs, self._source.config.moe.num_experts)
        specs = {self.stored_name(name): spec for name, spec in (specs | self.mtp_specs).items()}
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
        return self._counted.weights(self._left, self._emptied) + self.mtp_parameters

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
        """Input widths of the linear layers that are stored in few bits, each once, ascending."""
        return sorted({stored.shape[1] for stored in self.tensors.values() if stored.packed})

    @property
    def code_files(self) -> dict[str, Path]:
        """The modelling file that travels in a folder of several widths: name -> path of ours."""
        file = ragged.MODELLING_FILE
        return {} if self.form.is_padded else {file.name: file}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json: the base's, edited, in both spellings of transformers."""
        source, form = self._source, self.form
        config = portable_config(source.hf_config, with_mtp=form.mtp != "drop")
        config["dtype"] = config["torch_dtype"] = "bfloat16"
        pruned = self.mtp_width if form.mtp == "prune" else None
        if form.is_ragged:
            counts = [list(row) for row in self.widths]
            config = ragged.ragged_config(config, source.family, counts, self._emptied, pruned)
        elif form.is_layered:
            layers = form.layer_widths(self.widths)
            config = ragged.layered_config(config, source.family, layers, pruned)
        else:
            width = form.padded_width(self.widths)
            config = padded.padded_config(config, source.config, source.family, width)
        if form.is_packed:
            config["quantization_config"] = quantization_config(
                self.base, form, self.tensors, self.mtp_specs, native=self.native is not None
            )
        return config if self.base.outer is None else wrapped_config(config, self.base.outer)

    def check(self) -> None:
        """Refuse what no folder can hold.

        Raises:
          InputError: the family lacks the format, something has no place in it, the router cannot
            be cut so, a group of 4 bits would be incomplete, or layers that predict further tokens
            are missing or do not fit.
        """
        form, config = self.form, self.base.config
        if form.name not in self.base.family.formats:
            raise InputError(
                f"export={form.name!r} does not exist for {self.base.family.model_type}, because "
                f"no program would read it; choose from {', '.join(self.base.family.formats)}"
            )
        if form.name == MIXED and len(form.layer_bits) != len(self.base):
            raise InputError(
                f"export={MIXED!r} stores each layer in the bits that a plan says, and this one "
                f"says those of {len(form.layer_bits)} layers of {len(self.base)}; add --bits auto "
                "--target-bytes SIZE to compress, or write a plan of compare --bits auto with "
                "`moe-compress apply`"
            )
        if form.constants and not form.holds_constants(config.moe.expert_bias):
            raise InputError(
                f"export={form.name!r} has no place for constants of emptied experts, which stock "
                "programs know nothing of; export ragged-bf16 or ragged-int4, or plan with "
                "--emptied zero"
            )
        self.check_mtp()
        if form.cut_router:
            check_cut(self.base, self.widths, form)
        if self._is_fused:
            check_shape(self.base.family.together, form.padded_width(self.widths), config.d_model)
        kept = {count for counts in self.widths for count in counts}
        if form.is_float4:
            mxfp4.check_widths(sorted(kept), config.d_model)
        elif form.is_float8:
            float8.check_widths(kept)
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
        extra_files: Mapping[str, Content] | None = None,
        overwrite: bool = False,
        on_layer: Callable[[int], None] | None = None,
        on_written: Callable[[], None] | None = None,
        spread: Spread = ALONE,
    ) -> Path:
        """Write a model, one layer in memory at a time; the folder is complete or absent.

        Of several processes each writes as many layers in a row, and process 0 all else.

        Args:
          source: the pruned model in the order of `base`'s layers, as wide as `widths` say; in a
            4-bit format weights that are `QTensor` keep their codes and scales, in 8-bit floats
            those that are `Float8Tensor`, others are rounded to nearest; MXFP4 always rounds, which
            leaves rounded weights as they are.
          target: folder to make.
          mtp: where the layers that predict further tokens come from, unless they are dropped.
          extra_files: such as a model card, see `write_folder`.
          overwrite: replace an existing folder.
          on_layer: called with the index of each finished layer.
          on_written: called in every process once its tensors are written, before `extra_files`.
          spread: the processes.

        Returns:
          The folder.

        Raises:
          InputError: as of `check`, or `source` is another model.
          FileExistsError: if the target exists.
          OSError: if the disk is too small.
        """
        self.check()
        return write_folder(
            target,
            self.specs,
            self.arrays(source, mtp, on_layer, on_written, spread),
            self.config,
            self.base.folder,
            extra_files={**(extra_files or {}), **self.code_files},
            overwrite=overwrite,
            spread=spread,
        )

    def arrays(
        self,
        model: LayerSource,
        mtp: MtpSource | None = None,
        on_layer: Callable[[int], None] | None = None,
        on_written: Callable[[], None] | None = None,
        spread: Spread = ALONE,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor that this process has of the folder, (name, array as on disk); arguments as
        of `write`."""
        if spread.leads:
            yield from self.outer_arrays(model)
        for index in spread.in_a_row(len(model)):
            for layer in each_group(model, index) if self.by_group else [model.layer(index)]:
                yield from self.layer_arrays(layer, index)
                del layer  # before the next group is read
            if on_layer:
                on_layer(index)
        if self.mtp_specs and spread.leads:
            if mtp is None:
                raise InputError(f"mtp={self.form.mtp!r} needs the layers' weights; pass `mtp`")
            yield from self.mtp_arrays(mtp)
        if on_written:
            on_written()

    def outer_arrays(self, model: LayerSource) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of no layer, a wrapper's other parts included, (name, array as on disk)."""
        for name, value in outer_tensors(model):
            yield self.stored_name(name), value.astype(BFLOAT16, copy=False)
        if self.base.beside:
            folder = SafetensorsFolder(self.base.folder)
            yield from ((name, folder.read(name)) for name in self.base.beside)

    def layer_arrays(self, layer: DecoderLayer, index: int) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of layer `index` of the pruned model, or `by_group` of a group of it, (name,
        array as on disk); what all groups have is the first one's.

        Raises:
          InputError: the layer is another than the one planned.
        """
        source, tensors = self._source, self._by_layer[f"model.layers.{index}"]
        if self.form.cut_router:
            layer = cut_layer(layer, self.form.renumbers)
        own = own_experts(layer) if isinstance(layer.mlp, MoE) else slice(0, 0)
        here = {name: stored for name, stored in tensors.items() if _is_of(name, own)}
        written = layer if own.start else source.layer(layer)
        parts = stored_layer(source.family, written, index, here, self.form.of_layer(index))
        if self._is_fused:
            parts = fuse_experts(parts, source.config.moe.num_experts, source.family.together)
        return ((self.stored_name(name), array) for name, array in parts)

    def mtp_arrays(self, mtp: MtpSource) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of `mtp_specs`, (name, array as on disk)."""
        found = mtp_arrays(self.base, self.mtp_specs, self.mtp_width, mtp)
        return ((self.stored_name(name), array) for name, array in found)

    def stored_name(self, name: str) -> str:
        """A tensor's name in the folder, by that in the family's rules."""
        return self._source.stored(name)

    @cached_property
    def _source(self) -> Written:
        return as_written(self._counted)

    @property
    def _emptied(self) -> ragged.Emptied:
        """What becomes of experts without channels where they are numbered at all."""
        if self.form.cut_router and self.form.is_ragged:
            return "cut"
        return "constant" if self.form.constants else "zero"

    @cached_property
    def _left(self) -> Widths:
        """Channels of the experts that the folder numbers, per layer."""
        return left_experts(self.widths) if self.form.renumbers else self.widths

    @cached_property
    def _counted(self) -> Description:
        """The dense model with as many experts, and experts per token, as the folder says."""
        if not self.form.cut_router:
            return self.base
        # Before a plan is known to fit, layers may differ.
        most = max(map(len, self._left)) if self.form.renumbers else None
        return with_fewer_experts(self.base, most, self.form.top_k)

    @cached_property
    def _by_layer(self) -> dict[str, dict[str, Stored]]:
        found: dict[str, dict[str, Stored]] = {}
        for name, stored in self.tensors.items():
            found.setdefault(".".join(name.split(".")[:3]), {})[name] = stored
        return found

    @property
    def by_group(self) -> bool:
        """Whether a layer can be written in groups of its experts; not if one tensor holds all, or
        numbers depend on those before."""
        return not (self._is_fused or self.form.renumbers)

    @property
    def _is_fused(self) -> bool:
        """Whether the folder holds the experts of a layer together."""
        return bool(self._source.family.together) and self.form.is_padded


def _is_of(name: str, own: slice) -> bool:
    """Whether a tensor of a layer is one of these experts, or of what its first group has."""
    expert = expert_number(name)
    return not own.start if expert is None else own.start <= expert < own.stop
