"""Where the batches of a text are worked on: the devices of a process, and processes.

Batches are dealt, never cut: a device does one by the program of a single device, so that sums over
it have the same bits wherever it went. Between layers `Spread.total` adds over processes.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Event, Thread
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from moe_jax.errors import InputError, LostProcess
from moe_jax.mesh import AXES, WINDOWS, on_mesh, specs

PIECE = 1 << 22  # numbers that processes add at a time: each holds the pieces of all
PATIENCE = 60.0  # seconds between the signs of life of a process that others wait for

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """This process's devices, and its place among processes.

    Attributes:
      mesh: of devices of this process, with the axes of `AXES`; None for the default device.
      process: number of this process; process 0 leads, and writes.
      processes: how many there are.
    """

    mesh: Mesh | None = None
    process: int = 0
    processes: int = 1

    @property
    def devices(self) -> int:
        """Batches at work at once in this process."""
        return 1 if self.mesh is None else self.mesh.shape[AXES["windows"]]

    @property
    def parts(self) -> int:
        """Devices that share the experts of a layer."""
        return 1 if self.mesh is None else self.mesh.shape[AXES["experts"]]

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.process == 0

    @property
    def hosts(self) -> "Spread":
        """The same processes, each with one device."""
        return replace(self, mesh=None)

    # --- devices ---

    def everywhere(self, tree: T) -> T:
        """A layer, or what else all batches share, on every device: of its experts some each."""
        if self.mesh is None:
            return tree
        mesh = self.mesh
        return jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs(tree)))

    def dealt(self, tree: Any) -> Any:
        """Arrays whose rows are those of a batch per device, each part on its device."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, NamedSharding(self.mesh, WINDOWS))

    def each(self, function: Callable[..., Any], out: Any, **static: Any) -> Callable[..., Any]:
        """A function of one batch as one of a batch per device.

        Args:
          function: (what all batches share, what has an entry per row of the batch, ...) -> `out`.
          out: `mesh.ROWS` or `mesh.SUMS` for each part of the result.
          static: arguments by name that are no arrays.

        Returns:
          The function of `everywhere` and `dealt` arrays; its sums are for `by_batch`.
        """
        if self.mesh is None:
            return functools.partial(function, **static)
        return on_mesh(self.mesh, function, out, tuple(static.items()))

    def by_batch(self, sums: Any, experts: int = 0, axis: int = 0) -> list[Any]:
        """The sums that a function of `each` returned, of every batch, on the host.

        Args:
          sums: arrays; those with a part of the experts along an axis are put together.
          experts: E.
          axis: which of an array's axes that is.
        """
        sums = jax.tree.map(np.asarray, sums)
        if self.mesh is None:
            return [sums]

        def whole(parts: np.ndarray) -> np.ndarray:  # [devices that share the experts, ...]
            is_part = parts.ndim > 1 + axis and parts.shape[1 + axis] * len(parts) == experts
            return np.concatenate(parts, axis=axis) if is_part else parts[0]

        return [jax.tree.map(lambda a, i=i: whole(a[i]), sums) for i in range(self.devices)]

    def apart(self, tree: Any) -> list[Any]:
        """Arrays with an entry per row, as a batch per device, all on the default one."""
        if self.mesh is None:
            return [tree]
        leaves, form = jax.tree.flatten(tree)
        cut = [np.split(np.asarray(leaf), self.devices) for leaf in leaves]
        return [
            jax.tree.unflatten(form, map(jnp.asarray, parts)) for parts in zip(*cut, strict=True)
        ]

    # --- processes ---

    def total(self, sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add float64 arrays over all processes, in the order of these; all get the result."""
        if self.processes == 1:
            return dict(sums)
        if not sums:
            return {}
        # Processes may have found the names in another order.
        sums = {name: sums[name] for name in sorted(sums)}
        flat = np.concatenate([np.ravel(value) for value in sums.values()])
        assert flat.dtype == np.float64
        for start in range(0, len(flat), PIECE):
            piece = np.ascontiguousarray(flat[start : start + PIECE])
            # jax would round float64, so its bits are gathered.
            found = np.ascontiguousarray(_gathered(piece.view(np.uint32)))
            flat[start : start + PIECE] = found.view(np.float64).sum(axis=0)
        cuts = np.cumsum([value.size for value in sums.values()])[:-1]
        parts = zip(sums.items(), np.split(flat, cuts), strict=True)
        return {name: part.reshape(value.shape) for (name, value), part in parts}

    def led(self, work: Callable[[], T]) -> T:
        """What `work` returns in process 0, which alone does it, for all.

        Args:
          work: returns what JSON can hold.

        Raises:
          LostProcess: in the others, if it failed; process 0 raises what `work` did.
        """
        if self.processes == 1:
            return work()
        told: dict[str, Any] = {}
        failed: Exception | None = None
        if self.leads:
            with _signs_of_life():
                try:
                    told = {"value": work()}
                except Exception as error:
                    failed, told = error, {"error": str(error)}
        while _gathered(np.array([False]))[0, 0]:  # until process 0 is done
            pass
        told = json.loads(self.sent(json.dumps(told).encode()))
        if failed is not None:
            raise failed
        if "error" in told:
            raise LostProcess(f"process 0 has ended: {told['error']}")
        return told["value"]

    def awaited(self, work: Callable[[], T]) -> T:
        """What `work` returns, which each process does at its own pace: those that are done wait
        for the others, however long that takes."""
        if self.processes == 1:
            return work()
        done, lost = Event(), list[LostProcess]()

        def tell() -> None:
            try:
                while not _gathered(np.array([done.wait(PATIENCE)])).all():
                    pass
            except LostProcess as error:
                lost.append(error)

        teller = Thread(target=tell, daemon=True)
        teller.start()
        try:
            found = work()
        finally:
            done.set()
        teller.join()
        if lost:
            raise lost[0]
        return found

    @contextmanager
    def naming_lost(self) -> Iterator[None]:
        """Raise LostProcess for what jax raises in programs of all processes if one has ended."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if self.processes == 1 or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise LostProcess(str(error).splitlines()[0]) from error

    def led_and_read(self, work: Callable[[], T], read: Callable[[], T]) -> T:
        """What `work` returns in process 0, which alone does it, and `read` after it in others."""
        made: list[T] = []
        self.led(lambda: made.append(work()))
        return made[0] if self.leads else read()

    def in_a_row(self, count: int) -> range:
        """Which of so many things in a row are this process's: its neighbours have those beside."""
        first, stop = (count * (self.process + more) // self.processes for more in (0, 1))
        return range(first, stop)

    def sent(self, data: bytes, process: int = 0) -> bytes:
        """The bytes that one process gives, for all."""
        if self.processes == 1:
            return data
        sizes = _gathered(np.array(divmod(len(data), 1 << 32), np.uint32))
        high, low = sizes[process].tolist()
        whole, found = np.frombuffer(data, np.uint8), np.zeros((high << 32) + low, np.uint8)
        for start in range(0, len(found), 4 * PIECE):
            piece = found[start : start + 4 * PIECE]
            words = np.zeros(-(-len(piece) // 4), np.uint32)
            if self.process == process:
                words.view(np.uint8)[: len(piece)] = whole[start : start + 4 * PIECE]
            given = _broadcast(words, self.process == process)
            piece[:] = given.view(np.uint8)[: len(piece)]
        return found.tobytes()

    def sent_arrays(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays that process 0 gives, for all."""
        told = self.led(lambda: {n: [str(a.dtype), list(a.shape)] for n, a in arrays.items()})
        found = {}
        for name, (dtype, shape) in told.items():
            data = self.sent(arrays[name].tobytes() if self.leads else b"")
            found[name] = np.frombuffer(bytearray(data), dtype).reshape(shape)
        return found

    def shared_out(self, tasks: Sequence[T], work: Callable[[T], Any]) -> Iterator[tuple[T, Any]]:
        """What work on tasks returns, each in one process, for all and in their order.

        Args:
          tasks: the same in all processes.
          work: returns what JSON can hold.
        """
        for start in range(0, len(tasks), self.processes):
            now = tasks[start : start + self.processes]
            own = work(now[self.process]) if self.process < len(now) else None
            yield from zip(now, self.told(own), strict=False)

    def told(self, value: Any) -> list[Any]:
        """What each process says, for all and in their order.

        Args:
          value: what JSON can hold.
        """
        if self.processes == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = _gathered(np.array([len(data)], np.uint32))[:, 0]
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(data)] = data
        found = zip(_gathered(padded), sizes, strict=True)
        return [json.loads(words[:size].tobytes()) for words, size in found]

    def everyone(self, holds: bool) -> bool:
        """Whether something holds in all processes; none goes on before all have said so."""
        return holds if self.processes == 1 else bool(_gathered(np.array([holds])).all())

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError, in all processes, unless all were given the same.

        Args:
          facts: by name, what JSON can hold.
        """
        first = self.led(lambda: dict(facts))
        differ = [name for name, value in facts.items() if first[name] != value]
        if not self.everyone(not differ):
            of = f"; {', '.join(differ)} of process {self.process} is not" if differ else ""
            raise InputError(
                f"every process must be given the same command, model and texts as process 0{of}"
            )


ALONE = Spread()


def _gathered(array: np.ndarray) -> np.ndarray:  # [...] -> [processes, ...]
    with _naming_lost():
        return multihost_utils.process_allgather(array)


def _broadcast(words: np.ndarray, gives: bool) -> np.ndarray:  # uint32 [n], of the one that gives
    with _naming_lost():
        return np.asarray(multihost_utils.broadcast_one_to_all(words, is_source=gives), np.uint32)


@contextmanager
def _signs_of_life() -> Iterator[None]:
    """Tell those that wait for this process, now and then, to go on waiting: a collective of jax
    on a CPU ends after half an hour."""
    done = Event()

    def tell() -> None:
        with suppress(LostProcess):  # which whatever comes next will find, too
            while not done.wait(PATIENCE):
                _gathered(np.array([True]))

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


@contextmanager
def _naming_lost() -> Iterator[None]:
    """Raise LostProcess for what jax raises where a process cannot be reached."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise LostProcess(str(error).splitlines()[0]) from error
