"""What the benchmarks measure, two layers each."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of a model with experts.

    Attributes:
      heads: queries, keys, width.
      moe: experts, experts per token, width of an expert.
    """

    vocab: int
    d_model: int
    heads: tuple[int, int, int]
    moe: tuple[int, int, int]


SHAPES = {
    "small": Shape(512, 512, (8, 4, 64), (32, 4, 256)),
    # Qwen3-30B-A3B with 32 of its 128 experts, so that they fit, and 2/48 of its vocabulary
    "qwen3": Shape(6336, 2048, (32, 4, 128), (32, 8, 768)),
}
