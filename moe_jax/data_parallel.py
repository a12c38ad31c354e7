"""A step of training on all devices of all processes: each has its windows, gradients are averaged.

Every process has the devices of its `Spread`, side by side on the data axis of one mesh. What all
share is given by every process alike, what has an entry per window each gives of its own.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.mesh import AXES, KINDS, specs
from moe_jax.spread import Spread

T = TypeVar("T")


def mesh_of_all(spread: Spread) -> Mesh | None:
    """The devices of all processes as a mesh; None for the one device of one process."""
    if spread.processes == 1:
        return spread.mesh
    count = spread.devices * spread.parts
    each = [
        [one for one in jax.devices() if one.process_index == process][:count]
        for process in range(spread.processes)
    ]
    shape = spread.processes * spread.devices, spread.parts
    return Mesh(np.array(each).reshape(shape), tuple(AXES.values()), axis_types=KINDS)


def placed(mesh: Mesh | None, tree: T) -> T:
    """What all devices share, given alike by all processes: of routed experts each has its own."""
    if mesh is None:
        return tree

    def place(leaf: Any, spec: PartitionSpec) -> jax.Array:
        where = NamedSharding(mesh, spec)
        if where.is_fully_addressable:
            return jax.device_put(leaf, where)
        host = np.asarray(leaf)  # device_put would have all processes compare their bits
        return jax.make_array_from_callback(host.shape, where, host.__getitem__)

    return jax.tree.map(place, tree, specs(tree))


def dealt(mesh: Mesh | None, batch: T, axis: int = 0) -> T:
    """A batch of windows on its devices; arrays without the axis of windows are the same for all.

    Args:
      mesh: of `mesh_of_all`.
      batch: arrays of this process's windows.
      axis: that of windows.
    """
    if mesh is None:
        return batch

    def deal(leaf: Any) -> jax.Array:
        where = NamedSharding(mesh, _rows(leaf, axis))
        return jax.make_array_from_process_local_data(where, np.asarray(leaf))

    return jax.tree.map(deal, batch)


def averaged(
    mesh: Mesh | None, function: Callable[[Any, Any], Any], axis: int = 0
) -> Callable[[Any, Any], Any]:
    """A function of a batch as one whose result is the mean over the devices' parts of it.

    Args:
      mesh: of `mesh_of_all`.
      function: (what all share, batch) -> arrays; may be differentiated inside, not from outside.
      axis: of windows, in the batch.

    Returns:
      The function of `placed` and `dealt` arrays, to be called under `jit`.
    """
    if mesh is None:
        return function

    def local(common: Any, batch: Any) -> Any:
        found = function(common, batch)
        return jax.tree.map(lambda part: jax.lax.pmean(part, AXES["windows"]), found)

    def program(common: Any, batch: Any) -> Any:
        return jax.shard_map(  # without check_vma, for the reason in `mesh.on_mesh`
            local,
            mesh=mesh,
            in_specs=(specs(common), jax.tree.map(lambda leaf: _rows(leaf, axis), batch)),
            out_specs=specs(jax.eval_shape(function, common, batch)),
            check_vma=False,
        )(common, batch)

    return program


def placed_alike(mesh: Mesh | None, make: Callable[[T], Any], tree: T) -> Any:
    """What a function makes of `placed` arrays, placed by the same rule, as an optimizer's state.

    Args:
      mesh: of `mesh_of_all`.
      make: names parts of its result as those of its argument.
      tree: arrays.
    """
    if mesh is None:
        return make(tree)
    where = jax.tree.map(lambda s: NamedSharding(mesh, s), specs(jax.eval_shape(make, tree)))
    return jax.jit(make, out_shardings=where)(tree)


def _rows(leaf: Any, axis: int) -> PartitionSpec:
    if np.ndim(leaf) <= axis:
        return PartitionSpec()
    return PartitionSpec(*[None] * axis, AXES["windows"])
