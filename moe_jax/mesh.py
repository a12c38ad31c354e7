"""Devices of one process as a mesh: what lies where on it, and a function of one batch on it.

A batch is the whole work of one device, or of several that have some of a layer's experts each:
these add their outputs up once in a layer, and nothing else is added up on the mesh.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, PartitionSpec

from moe_jax.errors import InputError

# Logical axis -> mesh axis, for every family; what has none is the same on all devices.
AXES = {"windows": "data", "experts": "expert"}
KINDS = (AxisType.Auto,) * len(AXES)
WINDOWS, BY_DEVICE = PartitionSpec(AXES["windows"]), PartitionSpec(*AXES.values())
ROWS, SUMS = "rows", "sums"  # what a function of a batch returns: an entry per row, or sums over it


def mesh_of(axes: Mapping[str, int]) -> Mesh | None:
    """A mesh of the first devices of this process; None for one, which is that of `ALONE`.

    Args:
      axes: sizes by mesh axis, those of `AXES`.

    Raises:
      InputError: an axis is unknown, or there are fewer devices.
    """
    for name in axes:
        if name not in AXES.values():
            known = ", ".join(AXES.values())
            raise InputError(f"mesh axis {name!r} is unknown; choose among {known}")
    devices, count = jax.local_devices(), int(np.prod([*axes.values()]))
    if count > len(devices):
        raise InputError(
            f"mesh={','.join(f'{name}={size}' for name, size in axes.items())} takes {count} "
            f"devices and this process has {len(devices)}; choose --mesh data={len(devices)}"
        )
    if count == 1:
        return None
    names = tuple(AXES.values())
    shape = [axes.get(name, 1) for name in names]
    return Mesh(np.array(devices[:count]).reshape(shape), names, axis_types=KINDS)


def specs(tree: Any) -> Any:
    """Where the arrays go that all batches share: those of routed experts, whose first axis is that
    of experts or of their channels, over its mesh axis, others everywhere."""

    def spec(path: tuple, _: Any) -> PartitionSpec:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return PartitionSpec(AXES["experts"]) if "experts" in names else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


@functools.cache
def on_mesh(
    mesh: Mesh, function: Callable[..., Any], out: Any, static: Sequence[tuple[str, Any]]
) -> Callable[..., Any]:
    """A function of one batch as one of a batch per place on the data axis; see `Spread.each`."""
    one = functools.partial(function, **dict(static))

    def local(common: Any, batch: tuple) -> Any:
        def placed(kind: str, part: Any) -> Any:
            return jax.tree.map(lambda a: a[None, None], part) if kind == SUMS else part

        return jax.tree.map(placed, out, one(common, *batch))

    @jax.jit
    def program(common: Any, batch: tuple) -> Any:
        # Without check_vma, under which a sort inside has been seen to lose a sum of gradients
        # (jax 0.10.2); `shared` and `added_up` say what is added across devices.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs(common), WINDOWS),
            out_specs=jax.tree.map(lambda kind: BY_DEVICE if kind == SUMS else WINDOWS, out),
            check_vma=False,
        )(common, batch)

    return lambda common, *batch: program(common, batch)


# --- inside of a layer that has a part of its experts ---


def device_index() -> Array:
    """Number of this device among those that share the experts."""
    return jax.lax.axis_index(AXES["experts"])


@jax.custom_vjp
def shared(whole: Array) -> Array:
    """What every device has alike and uses for its own experts: gradients add up over devices."""
    return whole


@jax.custom_vjp
def added_up(part: Array) -> Array:
    """The sum over devices, whose gradient every device has alike."""
    return jax.lax.psum(part, AXES["experts"])


shared.defvjp(lambda whole: (whole, None), lambda _, d: (jax.lax.psum(d, AXES["experts"]),))
added_up.defvjp(lambda part: (jax.lax.psum(part, AXES["experts"]), None), lambda _, d: (d,))
