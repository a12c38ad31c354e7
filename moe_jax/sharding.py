"""Where the arrays of a model go on several devices."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from moe_jax.errors import InputError

Placement = Callable[[str, Any], Sharding]  # (dotted path, array or its shape) -> where it goes

# Matrices whose second axis is split first: it is the one that the heads or channels of the matrix
# before them lie along. The pool of the routed experts has a row per channel, whatever the matrix.
BY_COLUMN = ("attention.w_out", "attention.out", "mlp.w_down")


def split_over(mesh: Mesh, axis: str = "model") -> Placement:
    """Split every matrix over one axis of a mesh, as far as sizes allow.

    Rows (heads, channels, vocabulary) are split if the number of devices divides them, otherwise
    columns, otherwise nothing is: pruned pools have any number of rows. Vectors stay whole.

    Args:
      mesh: the devices.
      axis: the mesh axis to split over; along the others the arrays are repeated.

    Returns:
      What `restore_model` takes as `sharding`.

    Raises:
      InputError: if the mesh has no such axis.
    """
    if axis not in mesh.shape:
        raise InputError(f"axis={axis!r} is none of the mesh axes {', '.join(mesh.axis_names)}")
    # The layers say nothing about shardings, so the compiler must be free to choose them; meshes of
    # `jax.make_mesh` leave it no choice.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    devices = mesh.shape[axis]

    def place(path: str, leaf: Any) -> Sharding:
        owner = path.removesuffix(".packed").removesuffix(".scale")
        order = (1, 0) if owner.endswith(BY_COLUMN) else (0, 1)
        for dimension in order if len(leaf.shape) == 2 else ():
            if leaf.shape[dimension] % devices == 0:
                spec = [None, None]
                spec[dimension] = axis  # type: ignore[call-overload]
                return NamedSharding(mesh, PartitionSpec(*spec))
        return NamedSharding(mesh, PartitionSpec())

    return place


def placement(where: Mesh | Sharding | Placement | None) -> Placement:
    """The rule that a user's word for one stands for.

    Args:
      where: a rule; a mesh, over whose first axis matrices are split; a sharding, the same for all
        arrays; or None, the default device.

    Returns:
      The rule.
    """
    if isinstance(where, Mesh):
        return split_over(where, where.axis_names[0])
    if where is None:
        where = jax.sharding.SingleDeviceSharding(_default_device())
    if isinstance(where, Sharding):
        everywhere = where
        return lambda path, leaf: everywhere
    return where


def _default_device():
    """That of `jax.default_device`, a device or a platform's name, else this process's first."""
    chosen = getattr(jax.config, "jax_default_device", None)
    if chosen is None or isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen
