"""Decoder layers read from named tensors, whole or in groups of experts, the next one ahead."""

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from convert.assemble import (
    Arrays,
    PoolShape,
    build_layer,
    expert_groups,
    pool_shape,
    read_arrays,
)
from convert.description import Description
from convert.reader import CheckpointError
from moe_jax.config import ModelConfig
from moe_jax.transformer import DecoderLayer


@dataclass(frozen=True)
class _Place:
    """Some consecutive experts of a layer, or all, and the pool that they are read into."""

    index: int
    first: int
    stop: int
    pool: PoolShape


class LayerReader(ABC):
    """The layers of a checkpoint.

    While layers are taken in order, upwards or downwards, one thread reads the next; of a layer
    that is taken in groups, the next group.

    Attributes:
      about: what it is, without its weights.
      read_ahead: whether it does; without, one layer or group is held at a time.
      experts_at_once: how many experts a group of a layer has; None takes layers whole.
    """

    def __init__(self, about: Description):
        self.about = about
        self.read_ahead = True
        self.experts_at_once: int | None = None
        self._pools: dict[int | None, PoolShape] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-layer")
        self._ahead: tuple[_Place, Future[Arrays]] | None = None
        self._last: _Place | None = None

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.about.config

    def __len__(self) -> int:
        return len(self.about)

    def layer(self, index: int) -> DecoderLayer:
        """Read one decoder layer.

        Args:
          index: 0 to len(self) - 1.

        Returns:
          The layer.

        Raises:
          CheckpointError: naming every tensor of the layer that holds NaN or infinity.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"layer {index} must lie in [0, {len(self)})")
        last = None if self._last is None else self._last.index
        down = last is not None and index == last - 1
        in_order = down or index == 0 or (last is not None and index == last + 1)
        following = index - 1 if down else index + 1
        if not (in_order and 0 <= following < len(self)):
            return self._taken(self._whole(index), None)
        # Who takes a layer whole that could be taken in groups takes the next one so, too.
        at_once = None if self.groups(index) > 1 else self.experts_at_once
        return self._taken(self._whole(index), self._places(following, at_once)[0])

    def groups(self, index: int) -> int:
        """Groups in which layer `index` is to be taken, by `experts_at_once`; 1 for whole."""
        return len(self._places(index, self.experts_at_once))

    def group(self, index: int, number: int) -> DecoderLayer:
        """Read a group of a layer, see `moe_jax.source.InGroups`.

        Args:
          index: 0 to len(self) - 1.
          number: 0 to groups(index) - 1.

        Returns:
          The group; of one group the layer.

        Raises:
          CheckpointError: as of `layer`.
        """
        places = self._places(index, self.experts_at_once)
        if len(places) == 1:
            return self.layer(index)
        down = number + 1 < len(places) and self._last == places[number + 1]
        following = number - 1 if down else number + 1
        ahead = places[following] if 0 <= following < len(places) else None
        return self._taken(places[number], ahead)

    @abstractmethod
    def _read(self, name: str) -> np.ndarray:
        """A tensor by its public name; raises CheckpointError if it holds NaN or infinity."""

    @abstractmethod
    def _shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""

    def _whole(self, index: int) -> _Place:
        (place,) = self._places(index, None)
        return place

    def _places(self, index: int, at_once: int | None) -> list[_Place]:
        """The groups of a layer."""
        if at_once not in self._pools:
            self._pools[at_once] = pool_shape(self.config, self.about.widths, at_once)
        found = expert_groups(len(self.about.widths[index]), at_once)
        return [_Place(index, own.start, own.stop, self._pools[at_once]) for own in found]

    def _taken(self, place: _Place, following: _Place | None) -> DecoderLayer:
        """Read a layer or group, and begin with the one that is likely to be asked for next."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == place:
            arrays = ahead[1].result()
        else:
            arrays = self._read_layer(place)
        counts, alive = self._counts(place)
        layer = build_layer(
            arrays, self.config, place.index, counts, place.pool, place.first, alive
        )
        # only now: reading on while this layer is copied would hold a third one
        if self.read_ahead and following is not None:
            self._ahead = following, self._thread.submit(self._read_layer, following)
        self._last = place
        return layer

    def _counts(self, place: _Place) -> tuple[tuple[int, ...], np.ndarray | None]:
        """Channels of the experts at a place, and which of the layer's the router knows if not
        all."""
        whole = self.about.widths[place.index]
        alive = np.array(whole) > 0 if self.config.moe.emptied_cut and whole else None
        return whole[place.first : place.stop], alive

    def _read_layer(self, place: _Place) -> Arrays:
        problems: list[str] = []

        def read(name: str) -> np.ndarray:
            try:
                return self._read(name)
            except CheckpointError as error:  # go on: all bad tensors belong in one message
                problems.extend(error.problems)
                return np.zeros(self._shape(name), np.float32)

        counts, alive = self._counts(place)
        rules, rows = self.about.family.rules, place.pool.rows_of(counts)
        given = (rules, self.config, place.index, counts, rows, read, place.first, alive)
        arrays = read_arrays(*given)
        if problems:
            raise CheckpointError(self.about.folder, problems)
        return arrays
