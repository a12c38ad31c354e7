"""The devices and processes that a command works on."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import jax

from moe_jax.errors import InputError
from moe_jax.mesh import mesh_of
from moe_jax.spread import ALONE, Spread
from pruning.kit.progress import Steps
from pruning.recipe.place_options import AUTO, PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.stages.writer import only_writer


def places(options: PlaceOptions, steps: Steps) -> Spread:
    """Join the other processes, if there are any, and choose this one's devices.

    Where `jax.distributed` is initialized already, its processes are those.

    Args:
      options: what the user says.
      steps: told what is waited for.

    Returns:
      Where this process is.

    Raises:
      InputError: there is no such mesh, or jax finds no other processes.
      LostProcess: another process has ended.
    """
    _connect(options, steps)
    mesh = mesh_of(options.axes)
    if not jax.distributed.is_initialized():
        return ALONE if mesh is None else Spread(mesh)
    spread = Spread(mesh, jax.process_index(), jax.process_count())
    with _stdout_kept_clean():
        spread.everyone(True)
    return spread


@contextmanager
def working(
    output: str | os.PathLike, where: PlaceOptions | None, steps: Steps | None
) -> Iterator[tuple[Spread, Steps]]:
    """Work for an output folder: process 0 as its only writer, the others in silence.

    Raises:
      InputError: as of `places`, or another command writes there.
    """
    spread, steps = joined(where, steps)
    with only_writer(output) if spread.leads else nullcontext():
        yield spread, steps


def joined(where: PlaceOptions | None, steps: Steps | None) -> tuple[Spread, Steps]:
    """Where this process is, and where its progress goes: nowhere but in process 0.

    Raises:
      InputError: as of `places`.
    """
    steps = steps or Steps()
    spread = places(where or PlaceOptions(), steps)
    return spread, steps if spread.leads else Steps(quiet=True)


def check_places(recipe: CompressionRecipe, spread: Spread, experts: int) -> None:
    """Raise InputError if there is nothing to deal, memory was foretold for one device, or a
    layer's so many experts cannot be shared evenly."""
    here = spread.devices * spread.parts
    if here * spread.processes == 1:
        return
    _check_experts(experts, spread)
    if recipe.weights_only:
        raise InputError(
            "weights_only reads no text that could be dealt to devices or processes; leave out "
            "--mesh and --coordinator"
        )
    if here > 1 and recipe.memory_limit is not None and jax.default_backend() == "cpu":
        raise InputError(
            "memory_limit is kept with one copy of a layer, and every device of a CPU has its "
            "own; leave out --mesh or --memory-limit"
        )


def check_batch(batch: int, mode: str, experts: int, spread: Spread) -> None:
    """Raise InputError if the windows of a training's batches, or a layer's experts, cannot be
    shared evenly."""
    shares = spread.processes * spread.devices
    if batch % shares:
        raise InputError(
            f"batch={batch} windows cannot be shared evenly by {shares} devices; choose --batch "
            f"{-(-batch // shares) * shares}, or less of them"
        )
    if spread.parts > 1 and mode == "layer":
        raise InputError(
            f"mesh has expert={spread.parts}, and mode='layer' has one layer in memory, of which "
            "each device takes a copy; use the axis data alone"
        )
    _check_experts(experts, spread)


def _check_experts(experts: int, spread: Spread) -> None:
    if experts % spread.parts:
        fits = [n for n in range(1, spread.parts) if experts % n == 0]
        raise InputError(
            f"mesh has expert={spread.parts}, which does not divide the {experts} experts of a "
            f"layer; choose expert={fits[-1]}"
        )


def refuse_processes(command: str) -> None:
    """Raise InputError if a batch system has started several processes of a command of one."""
    if are_several():
        raise InputError(
            f"{command} works in one process; start one (`srun --ntasks 1`): compress, score, "
            "compare, audit, export, apply, verify and recover take several"
        )


def say_places(spread: Spread, steps: Steps, batch: int | None = None) -> None:
    """Say how many share the work, or how many more could; of a training those that share its
    batches evenly."""
    if spread.processes > 1:
        steps.say(
            f"{spread.processes} processes share the text; if one is lost all end, and the same "
            "command goes on"
        )
    here, busy = jax.local_device_count(), spread.devices * spread.parts
    if here <= busy:
        return
    fits = [n for n in range(1, here + 1) if not batch or batch % (n * spread.processes) == 0]
    most = max(fits, default=1)
    cure = f"; --mesh data={most} takes {'all' if most == here else most}" if most > busy else ""
    steps.say(f"{here - busy} more devices are idle{cure}")


def are_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a batch system or a TPU pod says that it has started several processes."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return (tasks.isdigit() and int(tasks) > 1) or "," in hosts


def _connect(options: PlaceOptions, steps: Steps) -> None:
    if jax.distributed.is_initialized() or not (options.coordinator or are_several()):
        return
    # jax ends the process itself if they do not come, so what is waited for is said before.
    if options.coordinator not in (None, AUTO):
        steps.say(
            f"process {options.process_id} of {options.processes} waits for the others at "
            f"{options.coordinator}, five minutes at most"
        )
        jax.distributed.initialize(options.coordinator, options.processes, options.process_id)
        return
    steps.say("the other processes are looked for, and waited for five minutes at most")
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise InputError(
            f"jax finds no processes to join ({error}); name them with --coordinator HOST:PORT "
            "--processes N --process-id I"
        ) from None


@contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Send to stderr what native libraries say on stdout, as gloo does when it connects."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
