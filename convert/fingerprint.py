"""What identifies a checkpoint: all its weights and what config.json says, not how they are stored.

Shards, the order of tensors in them, spaces in a JSON file and the name of a folder play no part.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np

from convert.reader import SafetensorsFolder

CHUNK = 8 << 20  # bytes of a tensor in memory at a time
THREADS = 4  # hashing leaves the interpreter to others
# Who wrote config.json, and from where: nothing that a program makes of the weights.
IRRELEVANT = ("transformers_version", "_name_or_path")


def fingerprint(config: Mapping[str, Any], weights_hash: str) -> str:
    """SHA-256 of a parsed config.json, without `IRRELEVANT`, and of the hash of all weights."""
    told = {key: value for key, value in config.items() if key not in IRRELEVANT}
    text = json.dumps([told, weights_hash], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class WeightsHash:
    """SHA-256 of names, dtypes, shapes and all bytes of a folder's tensors.

    What others read in the meantime, each tensor from its start, is not read again.

    Args:
      tensors: the folder.
    """

    def __init__(self, tensors: SafetensorsFolder):
        self._tensors = tensors
        self._begun: dict[str, Any] = {}  # name -> hash of its first bytes
        self._reached = dict.fromkeys(tensors.names, 0)  # bytes hashed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hash what is read of the folder meanwhile, in a thread that is one piece behind."""
        with ThreadPoolExecutor(1, thread_name_prefix="hash-weights") as thread:
            behind: list[Future[None]] = []
            lock = Lock()  # a layer is read ahead while others read

            def on_read(name: str, start: int, array: np.ndarray) -> None:
                with lock:
                    while behind:
                        behind.pop().result()
                    behind.append(thread.submit(self._take, name, start, array))

            self._tensors.watchers.append(on_read)
            try:
                yield
            finally:
                self._tensors.watchers.remove(on_read)
            for future in behind:
                future.result()

    def finish(self, on_bytes: Callable[[int, int], None] | None = None) -> str:
        """Read what is left of every tensor, in chunks and a few threads.

        Args:
          on_bytes: called with the bytes done and the bytes in all.

        Returns:
          64 hexadecimal digits.
        """
        names, digest = self._tensors.names, hashlib.sha256()
        sizes = {name: self._size(name) for name in names}
        done, total = 0, sum(sizes.values())
        pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
        try:
            for name, found in zip(names, pool.map(self._complete, names), strict=True):
                dtype, shape = self._tensors.spec(name)
                digest.update(json.dumps([name, dtype.name, shape, found]).encode())
                done += sizes[name]
                if on_bytes:
                    on_bytes(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
        return digest.hexdigest()

    def _take(self, name: str, start: int, array: np.ndarray) -> None:
        """Hash a piece of a tensor from its byte `start`, unless a gap comes before it."""
        reached, piece = self._reached[name], array.reshape(-1).view(np.uint8)
        if start <= reached < start + len(piece):
            self._begun.setdefault(name, hashlib.sha256()).update(piece[reached - start :])
            self._reached[name] = start + len(piece)

    def _complete(self, name: str) -> str:
        item, size = self._tensors.spec(name)[0].itemsize, self._size(name)
        while (start := self._reached[name]) < size:
            count = min(CHUNK, size - start) // item
            self._take(name, start, self._tensors.read_part(name, start // item, (count,)))
        return self._begun[name].hexdigest()

    def _size(self, name: str) -> int:
        dtype, shape = self._tensors.spec(name)
        return math.prod(shape) * dtype.itemsize
