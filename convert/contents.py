"""What the folder of a pruned model holds, known from shapes before any work."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from convert.description import Description
from convert.export_format import MIXED, ExportFormat, Widths
from convert.few_bits import quantization_config
from convert.fewer_experts import check_cut, left_experts, with_fewer_experts
from convert.formats import compressed_tensors, float8, mxfp4, padded, ragged
from convert.formats.wrapped import wrapped_config
from convert.interleaved import check_shape, fuse_specs
from convert.layout import BFLOAT16, FLOAT32, Spec, nbytes, weight_bytes
from convert.mtp_export import check_mtp_width, mtp_specs, mtp_width
from convert.portable import portable_config
from convert.quantized.config import Scheme
from convert.rules import TensorRule, layer_number, ruled_tensors
from convert.stored import Stored
from convert.written import Written, as_written
from moe_jax.errors import InputError


@dataclass(frozen=True, eq=False)
class Contents:
    """What the folder of a pruned model holds; each answer is found once.

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

    @property
    def _is_fused(self) -> bool:
        """Whether the folder holds the experts of a layer together."""
        return bool(self._source.family.together) and self.form.is_padded
