"""Several processes played by threads of one, which exchange what real ones would."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax import spread as spreading
from moe_jax.spread import Spread


def together(monkeypatch, count: int, work: Callable[[Spread], Any]) -> list[Any]:
    """What `work` returns in each of so many processes, or the exception that it raised there."""
    barrier, told = threading.Barrier(count, timeout=30), [np.zeros(0)] * count
    own, found = threading.local(), list[Any]([None] * count)

    def gathered(array: np.ndarray) -> np.ndarray:
        told[own.process] = np.array(array)
        barrier.wait()
        every = np.stack(told)
        barrier.wait()
        return every

    def run(process: int) -> None:
        own.process = process
        try:
            found[process] = work(Spread(None, process, count))
        except Exception as error:
            found[process] = error

    def broadcast(words: np.ndarray, gives: bool) -> np.ndarray:
        return gathered(words if gives else np.zeros_like(words)).sum(axis=0, dtype=words.dtype)

    class OfProcess(threading.Thread):
        """A second thread of the process that makes it."""

        def __init__(self, **given: Any):
            super().__init__(**given)
            self._process = own.process

        def run(self) -> None:
            own.process = self._process
            super().run()

    monkeypatch.setattr(spreading, "Thread", OfProcess)
    monkeypatch.setattr(spreading, "_gathered", gathered)
    monkeypatch.setattr(spreading, "_broadcast", broadcast)
    threads = [threading.Thread(target=run, args=(process,)) for process in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
