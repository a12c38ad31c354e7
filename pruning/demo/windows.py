"""Training batches of the demo model, addressed by step.

A resumed run must see the batches it would have seen without the interruption, so a batch is a
pure function of the token arrays, the seed and the step; nothing is drawn from a running stream.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moe_jax.errors import InputError

MIX_EXPONENT = 0.7
# A novel of 0.3M tokens would hardly be seen next to domains of 3M; experts can only specialise
# on a domain that is common enough to shape the router.
MIX_BOOST = {"mobydick": 1.5}
_BLOCK = 256  # rows over which the domain mix is exact


@dataclass(frozen=True, eq=False)
class TrainingWindows:
    """Batches addressed by step; see `training_windows`."""

    tokens: dict[str, np.ndarray]  # each [T_domain] uint16
    rows_per_block: dict[str, int]
    batch_size: int
    length: int
    seed: int

    def batch(self, step: int) -> np.ndarray:
        """The batch of one step, independent of the batches asked for before.

        Args:
            step: Step number, >= 0.

        Returns:
            [B, T] int32 token ids.

        Raises:
            InputError: If step is negative.
        """
        if step < 0:
            raise InputError(f"step={step} must be >= 0; count steps from 0")
        first = step * self.batch_size
        rows = [self._window(row) for row in range(first, first + self.batch_size)]
        return np.stack(rows).astype(np.int32)  # [B, T]

    def _window(self, row: int) -> np.ndarray:
        block, place = divmod(row, _BLOCK)
        domain_index, rank = _schedule(tuple(self.rows_per_block.values()), self.seed, block)[place]
        domain = list(self.tokens)[domain_index]
        tokens = self.tokens[domain]
        # One window of each pass is given up so that passes can start at different offsets.
        count = max(1, (len(tokens) - self.length) // self.length)
        epoch, index = divmod(block * self.rows_per_block[domain] + rank, count)
        order, offset = _epoch_order(
            count, self.length, len(tokens), self.seed, domain_index, epoch
        )
        start = offset + int(order[index]) * self.length
        return tokens[start : start + self.length]  # [T]


@lru_cache(maxsize=4)
def _schedule(rows: tuple[int, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """(domain index, rank among the block's rows of that domain) of each row of a block."""
    domains = np.repeat(np.arange(len(rows)), rows)
    domains = np.random.default_rng([seed, 0, block]).permutation(domains)
    ranks = np.zeros(len(domains), np.int64)
    for domain, count in enumerate(rows):
        ranks[domains == domain] = np.arange(count)  # in order of appearance: passes do not mix
    return list(zip(domains.tolist(), ranks.tolist(), strict=True))


@lru_cache(maxsize=16)
def _epoch_order(
    count: int, length: int, size: int, seed: int, domain: int, epoch: int
) -> tuple[np.ndarray, int]:
    """Window order [count] and start offset (tokens) of one pass over one domain."""
    rng = np.random.default_rng([seed, 1, domain, epoch])
    offset = int(rng.integers(0, min(length, size - count * length) + 1))
    return rng.permutation(count), offset


def training_windows(
    tokens_by_domain: Mapping[str, np.ndarray], length: int, batch_size: int, seed: int = 0
) -> TrainingWindows:
    """Sampler that mixes the domains and sees every window of a domain once per pass.

    A domain's share of rows is proportional to tokens^0.7, with Moby Dick raised by 1.5; every
    domain has at least one row in 256.

    Args:
        tokens_by_domain: [T_domain] uint16 ids of each domain.
        length: T, tokens per row.
        batch_size: B, rows per batch.
        seed: Changes order and offsets.

    Returns:
        The sampler; `batch(step)` gives [B, T] int32.

    Raises:
        InputError: If there is no domain, a domain is shorter than one window, or a size is not
            positive.
    """
    if not tokens_by_domain:
        raise InputError("tokens_by_domain={} must hold a domain; pass e.g. {'code': tokens}")
    if length < 1 or batch_size < 1:
        raise InputError(
            f"length={length} and batch_size={batch_size} must be >= 1; e.g. 256 and 8"
        )
    for domain, tokens in tokens_by_domain.items():
        if len(tokens) < length:
            raise InputError(
                f"domain {domain!r} has {len(tokens)} tokens, needs at least length={length}; "
                "add documents or choose a shorter length"
            )
    weights = np.array(
        [len(t) ** MIX_EXPONENT * MIX_BOOST.get(d, 1.0) for d, t in tokens_by_domain.items()]
    )
    bounds = np.rint(np.cumsum(weights) / weights.sum() * (_BLOCK - len(weights))).astype(np.int64)
    rows = 1 + np.diff(bounds, prepend=0)  # sums to _BLOCK
    shares = {domain: int(count) for domain, count in zip(tokens_by_domain, rows, strict=True)}
    return TrainingWindows(dict(tokens_by_domain), shares, batch_size, length, seed)
