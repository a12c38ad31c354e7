"""How the channels of an expert go together: Grams of its hidden rows, on a sample of the text.

What single channels do, the sweep over the whole text knows: its sums stand on the diagonal, and a
sample says how far two channels are alike. So little text is enough.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from moe_jax.experts.dispatch import gather_rows, make_dispatch, tile_height
from moe_jax.experts.grouped_matmul import add_slice, dot
from moe_jax.experts.moe import MoE, MoETrace
from moe_jax.spread import ALONE, Spread
from moe_jax.transformer import DecoderLayer

SHARE = 1 / 4  # of the tokens of a text, by which obs sees how far channels are alike
PIECE = 256  # tokens of a longer window: more texts say more than longer ones
COLUMNS = (((0,), (0,)), ((), ()))  # x.T @ x


def sample_size(windows: int, length: int, share: float) -> tuple[int, int]:
    """How many of so many windows of a length in tokens are a sample, and how many tokens of each.

    Args:
      windows: at least 1.
      length: of each.
      share: of the tokens, about.
    """
    size = min(length, PIECE)
    return max(1, round(windows * min(1.0, share * length / size))), size


def sample_lengths(windows: int, length: int, share: float) -> np.ndarray:  # int32 [windows]
    """How many tokens of each window, from its beginning, are of a sample: of some windows, which
    are evenly spread over the text, all as many, and of others none."""
    count, size = sample_size(windows, length, share)
    found = np.zeros(windows, np.int32)
    found[np.arange(count) * windows // count] = size
    return found


def sampled(
    tokens: np.ndarray, valid: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:  # [N, S] each
    """The beginnings of some windows [B, T], evenly spread over a text: a share of its tokens."""
    lengths = sample_lengths(len(tokens), tokens.shape[1], share)
    rows, size = lengths > 0, lengths.max()
    return tokens[rows, :size], valid[rows, :size]


@dataclass(frozen=True)
class Seen:
    """What a sample shows of a layer's experts.

    Attributes:
      grams: float32 [E, F, F], sums over the sample's tokens of h h^T, with h an expert's hidden
        row times the routing weight and relative to the norm of the block's output.
      squares: float64 [E, F], the sums of h^2 over the whole text.
      tokens: int [E], of the sample.
    """

    grams: np.ndarray
    squares: np.ndarray
    tokens: np.ndarray

    def gram(self, expert: int) -> np.ndarray:
        """Of one expert as of the whole text, float64 [F, F]: the squares on its diagonal, and all
        else as much larger. A channel that the sample has not seen is like no other."""
        found, squares = self.grams[expert].astype(np.float64), self.squares[expert]
        own = np.diagonal(found)
        factor = np.sqrt(np.divide(squares, own, out=np.zeros_like(own), where=own > 0))
        found *= factor[:, None] * factor
        np.fill_diagonal(found, squares)
        return found


def hidden_squares(energy: np.ndarray, down_norm: np.ndarray) -> np.ndarray:
    """The sums of h^2 as of `Seen`, by what statistics have of the same channels."""
    norms = np.square(down_norm)
    return np.divide(energy, norms, out=np.zeros_like(norms), where=norms > 0)


@struct.dataclass
class GramRows:
    """What the tokens of a batch add to Grams, rows in dispatch order.

    Attributes:
      hidden: [P, F].
      weight: float32 [P], the routing weight relative to the norm of the block's output.
      expert: int32 [P], whose row it is; E for padding.
      token: int32 [P], of the batch.
    """

    hidden: Array
    weight: Array
    expert: Array
    token: Array


def gram_rows(trace: MoETrace, q: Array) -> GramRows:
    """What a batch adds to Grams.

    Args:
      trace: of a run of `observe_experts`.
      q: float32 [N], 1 / the squared norm of the block's output, 0 where there is no token.
    """
    d = trace.dispatch
    is_real = d.row_copy < trace.expert.size
    expert = jnp.where(is_real, jnp.repeat(d.tile_expert, d.tile), len(d.tokens))
    weight = trace.row_weight * gather_rows(jnp.sqrt(q), d, d.copies)
    return GramRows(hidden=trace.kept.hidden, weight=weight, expert=expert, token=d.token)


class GramSums:
    """Grams of the experts of a layer, or of a group of one, while batches add to them.

    Args:
      layer: whose experts they are.
    """

    def __init__(self, layer: DecoderLayer):
        assert isinstance(layer.mlp, MoE)
        self._moe, experts = layer.mlp.config, len(layer.mlp.experts.count)
        width = self._moe.d_expert
        self._grams = jnp.zeros((experts, width, width))
        self._tokens = jnp.zeros(experts, jnp.int32)

    def add(self, rows: GramRows, lengths: np.ndarray, length: int) -> None:
        """Add a batch.

        Args:
          rows: of the batch.
          lengths: int32 [b], of each window how many tokens from its beginning are of the sample:
            none, or as many as of any other.
          length: T of the windows.
        """
        if not lengths.any():
            return
        copies = int(lengths.max()) * len(lengths) * self._moe.experts_per_token
        tile = tile_height(copies, self._moe.num_experts)
        sums = self._grams, self._tokens
        self._grams, self._tokens = _added(sums, rows, jnp.asarray(lengths), length, tile)

    def seen(self, squares: np.ndarray, spread: Spread = ALONE) -> Seen:
        """What the batches of all processes show; `squares` as of `Seen`."""
        grams, tokens = np.asarray(self._grams), np.asarray(self._tokens)
        if spread.processes > 1:
            grams = grams.copy()
            tokens = spread.total({"tokens": tokens.astype(np.float64)})["tokens"].astype(np.int32)
            for gram in grams:  # one by one, for they are added up as float64
                gram[:] = spread.total({"gram": gram.astype(np.float64)})["gram"]
        return Seen(grams, squares, tokens)


@partial(jax.jit, donate_argnums=0, static_argnames=("length", "tile"))
def _added(
    sums: tuple[Array, Array], rows: GramRows, lengths: Array, length: int, tile: int
) -> tuple[Array, Array]:
    """Grams [E, F, F] and tokens [E] with those of a batch's rows that are of the sample, which are
    put in tiles by themselves."""
    experts = len(sums[1])
    window, place = rows.token // length, rows.token % length
    among = place < lengths.at[window].get(mode="fill", fill_value=0)
    dispatch = make_dispatch(jnp.where(among, rows.expert, experts), experts, tile)

    def step(i: Array, grams: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(dispatch.row_copy, i * tile, tile)
        h = rows.hidden.at[row].get(mode="fill", fill_value=0).astype(jnp.float32)
        h *= rows.weight.at[row].get(mode="fill", fill_value=0)[:, None]
        return add_slice(grams, dot(h, h, COLUMNS)[None], (dispatch.tile_expert[i], 0, 0))

    grams = jax.lax.fori_loop(0, dispatch.num_tiles, step, sums[0])
    return grams, sums[1] + dispatch.tokens
