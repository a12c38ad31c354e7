"""Models as orbax checkpoints: for JAX programs on one device or many, no other file needed.

A checkpoint is a folder that orbax makes appear at once: `arrays/` holds the numbers by dotted
path, `structure/` the JSON of `structure.describe`.
"""

import secrets
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from moe_jax.errors import InputError
from moe_jax.files import move_into_place
from moe_jax.sharding import Placement, placement
from moe_jax.structure import VERSION, describe, named_leaves, rebuild
from moe_jax.transformer import Transformer

ARRAYS, STRUCTURE = "arrays", "structure"


def save_model(path: Path | str, model: Transformer, *, overwrite: bool = False) -> Path:
    """Save a model, pruned or not, quantised or not, on one device or sharded.

    Under several processes all of them must call it, with a path on a disk that they share.

    Args:
      path: the folder to make. It is either complete or absent.
      model: the model.
      overwrite: replace a model that an earlier call saved there, once the new one is complete.

    Returns:
      The path.

    Raises:
      FileExistsError: if something is there already, other than a model to be overwritten.
      InputError: if a part of the model is of a class that cannot be written down.
    """
    target = Path(path).absolute()
    replaces = target.exists()
    if replaces and not (overwrite and (target / STRUCTURE).is_dir()):
        raise FileExistsError(
            f"{target} exists; choose another folder or, if it is a model saved by save_model, "
            "overwrite=True"
        )
    # Orbax itself would delete the old checkpoint before it writes the new one.
    writer = _writer()
    fresh = target.with_name(f"{target.name}.tmp-{writer}") if replaces else target
    structure = {"version": VERSION, "model": describe(model)}
    with _checkpointer() as checkpointer:
        items = {
            ARRAYS: ocp.args.StandardSave(named_leaves(model)),
            STRUCTURE: ocp.args.JsonSave(structure),
        }
        checkpointer.save(fresh, args=ocp.args.Composite(**items))
    if replaces:
        if jax.process_index() == 0:
            move_into_place(fresh, target, target.with_name(f"{target.name}.old-{writer}"))
        multihost_utils.sync_global_devices(f"moe_jax.save_model {target}")
    return target


def restore_model(
    path: Path | str, *, sharding: Mesh | Sharding | Placement | None = None
) -> Transformer:
    """Read what `save_model` wrote, every device its own part.

    Args:
      path: the folder.
      sharding: where arrays go, whatever devices they were saved from. A rule (dotted path, shape
        and dtype) -> `jax.sharding.Sharding`, such as `sharding.split_over` makes; a mesh, over
        whose first axis matrices are split; one sharding for all arrays; None for the default
        device. No device holds more of an array than its part, not even while reading.

    Returns:
      The model, bit for bit.

    Raises:
      FileNotFoundError: if there is no such folder.
      InputError: if it holds no saved model, another version's, or a damaged one.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        aside = sorted(str(path) for path in folder.parent.glob(f"{folder.name}.old-*"))
        cure = f"rename {aside[0]}, which a killed save set aside" if aside else (
            "give one that save_model wrote"
        )  # fmt: skip
        raise FileNotFoundError(f"{folder} is no folder; {cure}")
    with _checkpointer() as checkpointer:
        model = _structure(folder, checkpointer)
        place = placement(sharding)
        shapes = named_leaves(model)
        _check_arrays(folder, checkpointer, shapes)
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(name, leaf))
            for name, leaf in shapes.items()
        }
        items = ocp.args.Composite(**{ARRAYS: ocp.args.StandardRestore(wanted)})
        try:
            arrays = checkpointer.restore(folder, args=items)[ARRAYS]
        except Exception as error:  # orbax raises bare `Exception` at damaged files
            reason = str(error).partition("\n")[0][:300]
            raise InputError(f"{folder}: the arrays cannot be read: {reason}") from error
    return jax.tree.unflatten(jax.tree.structure(model), [arrays[name] for name in shapes])


def _checkpointer() -> ocp.Checkpointer:
    handlers: Any = {
        ARRAYS: ocp.StandardCheckpointHandler(),
        STRUCTURE: ocp.JsonCheckpointHandler(),
    }
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _structure(folder: Path, checkpointer: ocp.Checkpointer) -> Transformer:
    """The saved model with shapes for arrays."""
    for item in (STRUCTURE, ARRAYS):
        if not (folder / item).is_dir():
            raise InputError(
                f"{folder} is no model saved by save_model: it lacks {item}/; Hugging Face folders "
                "are opened with convert.load_model"
            )
    items = ocp.args.Composite(**{STRUCTURE: ocp.args.JsonRestore()})
    try:
        structure = checkpointer.restore(folder, args=items)[STRUCTURE]
        version, description = structure["version"], structure["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / STRUCTURE} is damaged: {error!r}") from error
    if version != VERSION:
        raise InputError(
            f"{folder} is of version {version} but this moe_jax reads version {VERSION}; restore "
            "it with the moe_jax that saved it"
        )
    try:
        model = rebuild(description)
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / STRUCTURE} is damaged: {error}") from error
    if not isinstance(model, Transformer):
        raise InputError(f"{folder / STRUCTURE} is damaged: it describes no Transformer")
    return model


def _check_arrays(folder: Path, checkpointer: ocp.Checkpointer, shapes: dict[str, Any]) -> None:
    """Orbax would convert another dtype silently, and stops at the first wrong shape."""
    try:
        stored = (checkpointer.metadata(folder).item_metadata or {})[ARRAYS].tree
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / ARRAYS} is damaged: {error!r}") from error

    def kind(leaf) -> tuple | None:
        return None if leaf is None else (str(leaf.dtype), tuple(leaf.shape))

    wrong = [
        f"{name} is {kind(stored.get(name))} instead of {kind(shapes.get(name))}"
        for name in sorted(shapes.keys() | stored.keys())
        if kind(stored.get(name)) != kind(shapes.get(name))
    ]
    if wrong:
        raise InputError(
            f"{folder}: {len(wrong)} arrays are not what structure/ says: {'; '.join(wrong[:10])}"
        )


def _writer() -> str:
    """Digits that no other writer's files carry, the same in all processes of this one."""
    own = np.frombuffer(secrets.token_bytes(8), np.uint8)
    return multihost_utils.broadcast_one_to_all(own).tobytes().hex()
