"""Milliseconds to plan a model of Qwen3-30B-A3B's size: 48 layers, 128 experts, 768 channels.

Run by hand from the repository root: `python tests/bench/bench_planning.py`.
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pruning.budget.alignment import best_channels, redistribute
from pruning.budget.optimum import best_known, block_values, coverage_by_blocks
from pruning.budget.planners import PLANNERS
from pruning.budget.problem import Problem
from pruning.scores.criteria import ChannelScores

LAYERS, EXPERTS, CHANNELS, PER_TOKEN, BLOCK = 48, 128, 768, 8, 64


def synthetic_scores() -> ChannelScores:
    """Log-normal scores, the shape that real ones have."""
    rng = np.random.default_rng(0)
    return ChannelScores(
        channel=rng.lognormal(sigma=1.0, size=(LAYERS, EXPERTS, CHANNELS)),
        expert=rng.lognormal(sigma=1.5, size=(LAYERS, EXPERTS)),
        layer=rng.lognormal(sigma=0.5, size=LAYERS),
    )


def main() -> None:
    """Print, per planner, the first (compiling) and the fastest of three runs."""
    scores = synthetic_scores()
    budget = round(0.75 * scores.channel.size)
    reserved = np.argsort(np.argsort(-scores.expert, axis=1), axis=1) < PER_TOKEN
    problem = Problem(
        scores=scores,
        budget=budget,
        floor=np.where(reserved, BLOCK, 0),
        most=np.full(reserved.shape, CHANNELS),
        planner=PLANNERS["fair"],
    )
    print(f"{'planner':18}{'first ms':>10}{'best ms':>10}{'align ms':>10}{'mask ms':>10}")
    for name, planner in PLANNERS.items():
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            counts = planner(problem)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        aligned = redistribute(
            counts,
            d_expert=CHANNELS,
            block=BLOCK,
            minimum=BLOCK,
            attribution=scores.expert,
            reserved=reserved,
        )
        align = time.perf_counter() - start
        start = time.perf_counter()
        best_channels(scores.channel, aligned)
        mask = time.perf_counter() - start
        row = (1e3 * t for t in (seconds[0], min(seconds), align, mask))
        print(f"{name:18}" + "".join(f"{ms:10.1f}" for ms in row))
    start = time.perf_counter()
    coverage = coverage_by_blocks(scores.channel, 1)
    values = block_values(coverage[:, :, ::BLOCK], scores.expert)
    bounds = {"reserved": reserved, "most": np.full(reserved.shape, CHANNELS // BLOCK)}
    best_known(values, budget // BLOCK, least=2, **bounds)
    print(f"coverage and aligned optimum: {1e3 * (time.perf_counter() - start):.1f} ms")


if __name__ == "__main__":
    main()
