"""A pruned model in one of the formats that other programs load: known first, then written."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from convert.contents import Contents
from convert.disk_layer import outer_tensors
from convert.fewer_experts import cut_layer
from convert.interleaved import fuse_experts
from convert.layout import BFLOAT16
from convert.mtp_export import MtpSource, mtp_arrays
from convert.reader import SafetensorsFolder
from convert.rules import expert_number
from convert.stored import Stored, stored_layer
from convert.writer import Content, write_folder
from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from moe_jax.groups import each_group, own_experts
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer


@dataclass(frozen=True, eq=False)
class Export(Contents):
    """A folder of a pruned model: what it holds, and its arrays."""

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

    @property
    def by_group(self) -> bool:
        """Whether a layer can be written in groups of its experts; not if one tensor holds all, or
        numbers depend on those before."""
        return not (self._is_fused or self.form.renumbers)

    @cached_property
    def _by_layer(self) -> dict[str, dict[str, Stored]]:
        found: dict[str, dict[str, Stored]] = {}
        for name, stored in self.tensors.items():
            found.setdefault(".".join(name.split(".")[:3]), {})[name] = stored
        return found


def _is_of(name: str, own: slice) -> bool:
    """Whether a tensor of a layer is one of these experts, or of what its first group has."""
    expert = expert_number(name)
    return not own.start if expert is None else own.start <= expert < own.stop
