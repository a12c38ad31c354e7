"""Where a command works: options that no result depends on, so no recipe keeps them."""

import re
from dataclasses import dataclass
from typing import Annotated

from moe_jax.errors import InputError
from pruning.recipe.group import About, Options

AUTO = "auto"
AXIS = re.compile(r"([a-z]+)=([1-9][0-9]*)")


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(Options):
    """Devices and hosts."""

    mesh: Annotated[
        str | None,
        About(
            "devices of each process that score or train, such as data=4: each works on --batch "
            "windows, in training on its share of them, with a copy of the layer; or "
            "data=2,expert=4: of every four each has a quarter of its experts; default one "
            "device, whatever there are",
            shown="AXIS=N",
        ),
    ] = None
    coordinator: Annotated[
        str | None,
        About(
            "where process 0 listens, if several are given this same command: they share windows, "
            "of exports and their checks layers, of compare plans and of audit ablations too; all "
            "read model, texts and output folder, process 0 writes. auto asks Slurm, MPI or the "
            "TPU pod, which happens unasked in a Slurm step of several tasks and where "
            "TPU_WORKER_HOSTNAMES has several",
            shown="HOST:PORT",
        ),
    ] = None
    processes: Annotated[int | None, About("how many processes there are", least=1)] = None
    process_id: Annotated[int | None, About("which of them this is, from 0", least=0)] = None

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the mesh by axis."""
        words = (self.mesh or "").split(",") if self.mesh is not None else []
        found: dict[str, int] = {}
        for word in words:
            axis = AXIS.fullmatch(word)
            if axis is None or axis[1] in found:
                raise InputError(f"mesh={self.mesh!r} must be axes with sizes, such as data=4")
            found[axis[1]] = int(axis[2])
        return found

    def check(self) -> None:
        """Raise InputError if the mesh is none, or the processes are named by halves."""
        self.axes  # noqa: B018
        numbers = (self.processes, self.process_id)
        if self.coordinator in (None, AUTO):
            if numbers != (None, None):
                raise InputError(
                    "processes and process_id belong to --coordinator HOST:PORT; give all three"
                )
            return
        if not re.fullmatch(r".+:[0-9]{1,5}", self.coordinator):
            raise InputError(f"coordinator={self.coordinator!r} must be HOST:PORT, or {AUTO}")
        if self.processes is None or self.process_id is None:
            raise InputError("coordinator needs --processes N and --process-id I; give all three")
        if self.process_id >= self.processes:
            raise InputError(
                f"process_id={self.process_id} must be less than processes={self.processes}; they "
                "are counted from 0"
            )
