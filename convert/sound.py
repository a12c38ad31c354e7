"""Which tensors hold numbers alone: found out whenever one is read, and not again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from convert.reader import CheckpointError
from convert.view import View

PIECE = 1 << 17  # numbers looked at together
ALL_ONES = 0x7F80  # the exponent of bfloat16


class Sound:
    """What is known of the tensors of a folder.

    Args:
      folder: named in errors.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._checked: set[str] = set()  # names of what holds no NaN

    def read(self, name: str, view: View) -> np.ndarray:
        """Read a tensor.

        Raises:
          CheckpointError: it holds NaN or infinity.
        """
        array = view.read()
        if name not in self._checked:
            if not _finite(array):
                words = "holds NaN or infinity; download the checkpoint again"
                raise CheckpointError(self._folder, [f"{name} {words}"])
            self._checked.add(name)
        return array

    @contextmanager
    def checking(
        self, views: Mapping[str, View], on_tensor: Callable[[int, int], None] | None = None
    ) -> Iterator[None]:
        """Check tensors as they are read meanwhile, and at the end those that were not.

        Args:
          views: the tensors by name.
          on_tensor: called at the end with the tensors done and the tensors in all.

        Raises:
          CheckpointError: naming every tensor that holds NaN or infinity.
        """
        problems, fault = [], None
        try:
            yield
        except CheckpointError as error:  # go on: all bad tensors belong in one message
            fault = error
        for done, (name, view) in enumerate(views.items(), 1):
            try:
                if name not in self._checked:
                    self.read(name, view)
            except CheckpointError as error:
                problems.extend(error.problems)
            if on_tensor:
                on_tensor(done, len(views))
        if problems:
            raise CheckpointError(self._folder, problems)
        if fault:
            raise fault


def _finite(array: np.ndarray) -> bool:
    if array.dtype.name != "bfloat16":
        return bool(np.isfinite(array).all())
    # ml_dtypes' isfinite is many times slower. In pieces: memory for a whole tensor would come anew
    # from the system each time, which takes longer than the work.
    bits = array.reshape(-1).view(np.uint16)
    room = np.empty(min(PIECE, bits.size), np.uint16)
    for start in range(0, bits.size, PIECE):
        piece = bits[start : start + PIECE]
        if np.bitwise_and(piece, ALL_ONES, out=room[: piece.size]).max() == ALL_ONES:
            return False
    return True
