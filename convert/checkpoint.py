"""Hugging Face checkpoints as sources of layers."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from convert.description import Description, describe
from convert.disk_layer import layer_on_disk
from convert.fingerprint import WeightsHash, fingerprint
from convert.layer_reader import LayerReader
from convert.layout import BFLOAT16
from convert.matching import match_tensors
from convert.reader import CheckpointError, SafetensorsFolder
from convert.rules import EMBEDDING, FINAL_NORM, LM_HEAD, Family
from convert.sound import Sound
from convert.view import FLOATS, View
from moe_jax.norm import Centred
from moe_jax.transformer import DecoderLayer, Embedding, Head, Transformer


class Checkpoint(LayerReader):
    """A checked folder that hands out layers, each read when asked for; a `LayerSource`.

    Attributes:
      about: what it is, without its weights.
      tensors: its files.
      weights_hash: that of `hash_weights`; None if nobody asked yet.
    """

    def __init__(
        self,
        about: Description,
        tensors: SafetensorsFolder,
        views: dict[str, View],
        mtp: dict[str, View],
        dtype=None,
    ):
        super().__init__(about)
        self.tensors = tensors
        self._views = views
        self._mtp = mtp
        self._dtype = None if dtype is None else np.dtype(dtype)
        self._sound = Sound(about.folder)
        self.weights_hash: str | None = None

    @property
    def embedding(self) -> Embedding:
        """The token embedding, kept once read."""
        return self._outer[0]

    @property
    def head(self) -> Head:
        """Final norm and projection; shares the embedding's array if the two are tied."""
        return self._outer[1]

    @cached_property
    def _outer(self) -> tuple[Embedding, Head]:
        embedding = Embedding(weight=jax.device_put(self._read(EMBEDDING)))
        tied = self.config.tie_embeddings
        weight = embedding.weight if tied else jax.device_put(self._read(LM_HEAD))
        norm = jax.device_put(self._read(FINAL_NORM))
        norm = Centred(norm) if self.config.centred_norms else norm
        return embedding, Head(norm=norm, weight=weight, norm_eps=self.config.norm_eps)

    @property
    def fingerprint(self) -> str:
        """Hash of every weight and of what config.json says; see `convert.fingerprint`."""
        return fingerprint(self.about.outer or self.about.hf_config, self.hash_weights())

    @property
    def file_hash(self) -> str:
        """The same of how the weight files look from outside, which no reading has to tell."""
        files = json.dumps(self.tensors.stamps, sort_keys=True)
        return fingerprint(self.about.outer or self.about.hf_config, files)

    def hash_weights(self, on_bytes: Callable[[int, int], None] | None = None) -> str:
        """SHA-256 of all tensors; reads them unless `check_finite` did or `weights_hash` is set.

        Args:
          on_bytes: called with the bytes done and the bytes in all.

        Raises:
          CheckpointError: a file ended early.
        """
        if self.weights_hash is None:
            self.weights_hash = WeightsHash(self.tensors).finish(on_bytes)
        return self.weights_hash

    def read_codes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of a weight that `about.is_native`, see `View.codes`."""
        codes = self._views[name].codes
        assert codes is not None
        return codes()

    def read_mtp(self, name: str) -> np.ndarray:
        """Read one tensor of `about.mtp`, in the dtype said there.

        Raises:
          CheckpointError: it holds NaN or infinity.
        """
        return self._sound.read(name, self._mtp[name]).astype(self.about.mtp[name][0], copy=False)

    def check_finite(
        self, on_tensor: Callable[[int, int], None] | None = None, *, mtp: bool = False
    ) -> None:
        """Read every tensor once, two in memory at a time, for later reads and `weights_hash`.

        Args:
          on_tensor: called with the tensors done and the tensors in all.
          mtp: whether to read those of `about.mtp`, too.

        Raises:
          CheckpointError: naming every tensor that holds NaN or infinity.
        """
        with self.checking(on_tensor, mtp=mtp):
            pass

    @contextmanager
    def checking(
        self, on_tensor: Callable[[int, int], None] | None = None, *, mtp: bool = False
    ) -> Iterator[None]:
        """The same for what is read meanwhile; the rest is read at the end, also after an error."""
        weights = None if self.weights_hash else WeightsHash(self.tensors)
        views = self._views | (self._mtp if mtp else {})
        with weights.watching() if weights else nullcontext():
            with self._sound.checking(views, on_tensor):
                yield
        if weights:
            self.weights_hash = weights.finish()

    def _read(self, name: str) -> np.ndarray:
        array = self._sound.read(name, self._views[name])
        dtype = np.dtype(np.float32) if self.about.family.is_precise(name) else self._dtype
        return array if self._dtype is None else array.astype(dtype, copy=False)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._views[name].shape


def _stored_dtype(tensors: SafetensorsFolder, name: str) -> np.dtype:
    """The dtype of a tensor that is stored as it is; others are dequantised to bfloat16."""
    dtype = tensors.spec(name)[0] if name in tensors else BFLOAT16
    return dtype if dtype.name in FLOATS else BFLOAT16


def open_checkpoint(path: Path | str, dtype=None) -> Checkpoint:
    """Check a checkpoint's config and all headers; read no weights yet.

    Args:
      path: folder with config.json and safetensors.
      dtype: to which weights are cast when read; None keeps each tensor's own.

    Returns:
      The checkpoint.

    Raises:
      CheckpointError: one message that lists the unsupported settings or every unmapped,
        missing, duplicate or misshaped tensor.
    """
    about = describe(path)
    tensors = SafetensorsFolder(about.folder)
    found = match_tensors(
        tensors, about.hf_config, about.family, about.config, about.widths, about.quantization
    )
    if found.problems:
        raise CheckpointError(about.folder, found.problems)
    mtp = {
        name: (_stored_dtype(found.folder, name), view.shape) for name, view in found.mtp.items()
    }
    beside = {name: tensors.spec(name) for name in found.beside}
    about = dataclasses.replace(about, mtp=mtp, beside=beside)
    if about.config.tie_embeddings and not found.tied:
        about = about.untied()
    return Checkpoint(_as_stored(about, found.model), tensors, found.model, found.mtp, dtype)


def _as_stored(about: Description, views: dict[str, View]) -> Description:
    """What config.json says of codes, made true by what the files hold."""
    native = {name: view for name, view in views.items() if about.is_native(name)}
    plain = frozenset(name for name, view in native.items() if view.codes is None)
    if about.native is None or not (plain or about.native.floating):
        return about
    scales = {view.scale for view in native.values() if view.scale is not None}
    rules = map(about.family.rule, plain)
    if not about.native.floating or len(scales) > 1 or any(r and r.is_of_expert for r in rules):
        return dataclasses.replace(about, native=None)  # exports have scales of another dtype
    return dataclasses.replace(about, plain=plain, scale=scales.pop())


def load_model(path: Path | str, dtype=None) -> Transformer:
    """Read a whole checkpoint into memory.

    Args:
      path: see `open_checkpoint`.
      dtype: see `open_checkpoint`.

    Returns:
      The model.

    Raises:
      CheckpointError: if anything is wrong with the folder.
    """
    source = open_checkpoint(path, dtype)
    head = source.head
    return Transformer(
        embedding=source.embedding,
        layers=tuple(source.layer(i) for i in range(len(source))),
        final_norm=head.norm,
        lm_head=None if source.config.tie_embeddings else head.weight,
        config=source.config,
    )


def layer_tensors(
    source: Checkpoint | Family, layer: DecoderLayer, index: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a layer under their Hugging Face names, pruned or not.

    Args:
      source: where the family's rules come from.
      layer: the layer; 4-bit weights are dequantised.
      index: its position in the model.

    Yields:
      (name, array as on disk); nothing for an expert without channels. Experts of unequal width
      are never fused.
    """
    family = source.about.family if isinstance(source, Checkpoint) else source
    return layer_on_disk(family, layer, index)
