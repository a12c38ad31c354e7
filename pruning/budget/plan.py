"""The pruning plan as a value and as two small files."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from moe_jax.errors import InputError
from moe_jax.files import replace_file, replace_text
from moe_jax.json_files import read_json
from pruning.budget.merged_layer import ARRAYS, MergedLayer
from pruning.budget.said import Said
from pruning.kit.fitting import fits, misfits

FORMAT_VERSION = 1
LAYER_BITS = (4, 8, 16)
BITS = "layer_bits"  # a tensor of plan.safetensors, if the plan decides them
CUT = "cut_router"  # another, if it is cut: experts per token, 0 for as many as in the model


@dataclasses.dataclass(frozen=True, eq=False)
class PruningPlan:
    """Channels to keep in every expert of every MoE layer.

    `layer_indices` are the positions of the L MoE layers in the model; `provenance` says which
    statistics, criterion, planner and budget led here. `constants` hold, layer by layer, what the
    experts without channels add instead, in ascending order of experts; without them it is zero,
    or the output's bias where there is one. `layer_bits` are 4, 8 or 16 for each layer of the
    model, those without experts too, where the plan decides how many its weights are stored in.
    `merged` says how the experts of each of the L layers are merged before anything is removed, ()
    that none are. With `cut_router` the experts without channels are gone for the router, too, and
    their tokens go to others; `top_k` is to how many a token goes then, None for as many as in the
    model.
    """

    keep: np.ndarray  # [L, E, F], bool
    layer_indices: tuple[int, ...]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constants: tuple[np.ndarray, ...] | None = None  # float32 [emptied, D] each
    layer_bits: tuple[int, ...] = ()
    merged: tuple[MergedLayer, ...] = ()
    cut_router: bool = False
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.keep.ndim != 3 or self.keep.dtype != np.bool_ or 0 in self.keep.shape:
            raise InputError(
                f"keep is {self.keep.dtype}{list(self.keep.shape)}, expected bool [L, E, F] with "
                "at least one layer, expert and channel"
            )
        indices = list(self.layer_indices)
        if len(indices) != len(self.keep) or indices != sorted(set(indices)) or indices[0] < 0:
            raise InputError(
                f"layer_indices={self.layer_indices} must be {len(self.keep)} different model "
                "layers in ascending order"
            )
        if self.constants is not None:
            self._check_constants(self.constants)
        if self.cut_router:
            self._check_cut()
        if self.merged and len(self.merged) != len(self.keep):
            raise InputError(f"merged={len(self.merged)} layers must be all {len(self.keep)}")
        for layer in self.merged:
            layer.check(self.keep.shape[1:])
        wrong = {*self.layer_bits} - {*LAYER_BITS}
        if self.layer_bits and (wrong or len(self.layer_bits) <= indices[-1]):
            raise InputError(
                f"layer_bits={self.layer_bits} must be one of {LAYER_BITS} for each layer of the "
                "model"
            )

    def _check_cut(self) -> None:
        if self.constants is not None:
            raise InputError(
                "emptied='mean' puts constants in the place of emptied experts, whose rows of the "
                "router cut_router removes; choose one of the two"
            )
        if self.counts.all():
            raise InputError(
                "cut_router removes the router's rows of emptied experts, and the plan empties "
                "none; plan with --width experts, or leave --cut-router away"
            )

    def _check_constants(self, constants: tuple[np.ndarray, ...]) -> None:
        emptied = (self.counts == 0).sum(axis=1).tolist()
        found = [vectors.shape for vectors in constants]
        widths = {shape[-1] for shape in found}
        if len(widths) != 1 or found != [(number, *widths) for number in emptied]:
            raise InputError(
                f"constants have shapes {found}, expected one row of one width for each of the "
                f"{emptied} experts without channels"
            )

    @property
    def counts(self) -> np.ndarray:  # [L, E], int64
        """Channels kept per expert."""
        return self.keep.sum(axis=2)

    def added(self, slot: int) -> np.ndarray | None:  # float32 [E, D]
        """What each expert of the layer `layer_indices[slot]` adds whatever its channels do.

        Zero for experts that stay; None if the plan has no constants.
        """
        if self.constants is None:
            return None
        vectors = self.constants[slot]
        added = np.zeros((self.keep.shape[1], vectors.shape[1]), np.float32)
        added[self.counts[slot] == 0] = vectors
        return added

    def with_cut_router(self, top_k: int | None = None) -> "PruningPlan":
        """The same plan, experts without channels being gone for the router, too.

        Args:
          top_k: experts per token, None for as many as in the model.

        Raises:
          InputError: the plan empties no expert, or puts constants in their place.
        """
        said = {**self.provenance, "cut_router": True, "top_k": top_k}
        return dataclasses.replace(self, provenance=said, cut_router=True, top_k=top_k)

    def expert_coverage(self, channel: np.ndarray) -> np.ndarray:  # [L, E, F] -> [L, E]
        """Share of each expert's channel score that the plan keeps, in [0, 1]."""
        return _share(channel, self.keep, axis=(2,))

    def layer_coverage(self, channel: np.ndarray) -> np.ndarray:  # [L, E, F] -> [L]
        """Share of each layer's channel score, all experts pooled, that the plan keeps."""
        return _share(channel, self.keep, axis=(1, 2))

    @property
    def content_hash(self) -> str:
        """SHA-256 of plan.safetensors: of all that the plan does to a model, not of why."""
        return hashlib.sha256(save(self._named())).hexdigest()

    def _named(self) -> dict[str, np.ndarray]:
        parts = {"keep": self.keep, **({"constant": self.constants} if self.constants else {})}
        for name in ARRAYS if self.merged else ():
            parts[name] = [layer.arrays[name] for layer in self.merged]
        bits = {BITS: np.array(self.layer_bits, np.int32)} if self.layer_bits else {}
        cut = {CUT: np.array(self.top_k or 0, np.int32)} if self.cut_router else {}
        return (
            bits
            | cut
            | {
                f"{name}.{index}": np.ascontiguousarray(value)
                for name, values in parts.items()
                for index, value in zip(self.layer_indices, values, strict=True)
            }
        )

    def is_same(self, other: "PruningPlan") -> bool:
        """Whether both keep the same, put the same in place of the rest, and say the same of it."""
        return (self.content_hash, self.provenance) == (other.content_hash, other.provenance)

    def require_model(self, model_hash: str) -> None:
        """Refuse to prune a model that the plan was not made for.

        Args:
          model_hash: identity of the model at hand.

        Raises:
          InputError: the plan's provenance names another one.
        """
        planned = self.provenance.get("model_hash")
        if planned is not None and planned != model_hash:
            raise InputError(
                f"the plan was made for model {planned}, this model is {model_hash}; "
                "score this model and plan again"
            )

    def moved_to(self, model_hash: str) -> "PruningPlan":
        """The same plan for another model of the same shape, which its provenance then says.

        Args:
          model_hash: identity of the model; without one of its own, a plan stays as it is.
        """
        planned = self.provenance.get("model_hash")
        if planned is None or planned == model_hash:
            return self
        said = {"planned_for": planned, **self.provenance, "model_hash": model_hash}
        return dataclasses.replace(self, provenance=said)

    def save(self, path: str | os.PathLike) -> None:
        """Write `plan.json` and `plan.safetensors`, each atomically.

        Args:
          path: a folder, made if missing; or a file name whose stem both files get.
        """
        description, tensors = _files(path)
        description.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "format_version": FORMAT_VERSION,
            "layer_indices": list(self.layer_indices),
            "d_expert": self.keep.shape[2],
            "counts": self.counts.tolist(),
            "provenance": dict(self.provenance),
        }
        text = json.dumps(content, indent=1, default=_plain) + "\n"
        replace_file(tensors, lambda partial: save_file(self._named(), partial))
        replace_text(description, text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PruningPlan":
        """Read what `save` wrote.

        Args:
          path: the folder, or either file.

        Returns:
          The plan.

        Raises:
          FileNotFoundError: one of the two files is missing.
          InputError: a file is damaged, or the two do not belong together.
        """
        description, tensors = _files(path)
        for file in (description, tensors):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; make it with `moe-compress plan`")
        try:
            content = read_json(description)
            version, indices = content["format_version"], content["layer_indices"]
            counts, provenance = np.asarray(content["counts"]), content["provenance"]
            if not fits(indices, list[int]) or not fits(provenance, dict[str, Any]):
                raise InputError("layer_indices or provenance hold something else")
            if wrong := misfits(Said, provenance):
                raise InputError(f"{', '.join(wrong)} in its provenance hold something else")
            named = load_file(tensors)
            bits = tuple(named.pop(BITS, np.zeros(0, int)).ravel().tolist())
            merged = _merged(named, indices, CUT in named)
            cut, top_k = CUT in named, int(named.pop(CUT, 0)) or None
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            told = str(error)[:1000]
            raise InputError(
                f"{description.parent} holds no readable plan ({told}); plan again"
            ) from error
        if version != FORMAT_VERSION:
            raise InputError(
                f"{description} has format {str(version)[:80]}, expected {FORMAT_VERSION}"
            )
        expected = {f"keep.{index}" for index in indices}
        more = {f"constant.{index}" for index in indices}
        if set(named) not in (expected, expected | more) or (
            len({named[name].shape for name in expected}) != 1
        ):
            raise InputError(
                f"{tensors} holds {sorted(named)}, expected {sorted(expected)} of one shape"
            )
        keep = np.stack([named[f"keep.{index}"] for index in indices])
        constants = tuple(named[f"constant.{i}"] for i in indices) if more <= set(named) else None
        plan = cls(keep, tuple(indices), provenance, constants, bits, merged, cut, top_k)
        if not np.array_equal(plan.counts, counts):
            raise InputError(f"{description} and {tensors} are of different plans; plan again")
        return plan


def _merged(named: dict[str, np.ndarray], indices: list[int], cut: bool) -> tuple[MergedLayer, ...]:
    """The merged layers of a plan's arrays, which are taken out of them."""
    names = [f"{name}.{index}" for name in ARRAYS for index in indices]
    if not set(names) <= named.keys():
        return ()
    found = [{name: named.pop(f"{name}.{index}") for name in ARRAYS} for index in indices]
    return tuple(MergedLayer(**arrays, cut=cut) for arrays in found)


def _share(channel: np.ndarray, keep: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    # A group without any score counts channels instead.
    total = channel.sum(axis=axis)
    kept = np.where(keep, channel, 0.0).sum(axis=axis)
    return np.divide(kept, total, out=keep.mean(axis=axis), where=total > 0.0)


def _files(path: str | os.PathLike) -> tuple[Path, Path]:
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path / "plan"
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors")


def _plain(value: Any) -> Any:
    # numpy scalars and arrays, and paths, as JSON.
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
