"""Throughput of a pruned layer by the block that its widths are multiples of, on this machine."""

import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from moe_jax.stream import layer_forward
from moe_jax.transformer import DecoderLayer
from pruning.budget.alignment import check_block
from pruning.budget.rule import Rule, make_plan
from pruning.kit.fitting import misfits
from pruning.kit.progress import Steps
from pruning.recipe.paper_options import BLOCKS
from pruning.report.speed import Speed, Speeds
from pruning.runs.probe import some_tokens
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.prune import pruned_layer
from pruning.stages.job import Job

FILE = "speed.json"
TOKENS = 2048  # at once, as when a prompt is read
RUNS = 15


def blocks_of(asked: Sequence[int], d_expert: int) -> list[int]:
    """The blocks that are asked for, or the usual ones that divide the width of an expert.

    Raises:
      InputError: one that is asked for does not.
    """
    for block in asked:
        check_block(block, d_expert)
    return sorted({*asked}) if asked else [one for one in BLOCKS if d_expert % one == 0]


def layer_speeds(
    job: Job,
    statistics: ChannelStatistics,
    rule: Rule,
    rates: Sequence[float],
    blocks: Sequence[int],
    steps: Steps,
) -> Speeds:
    """Tokens per second through the model's middle layer with experts, dense and under plans.

    What an earlier run measured of the same rates and blocks in the output folder is read again.

    Args:
      job: with the dense model and the output folder.
      statistics: what the plans are made of.
      rule: of the plans, each with its block and as near to its rate as that allows.
      rates: prune rates.
      blocks: that divide the width of an expert.
      steps: where progress goes.
    """
    c, path = job.base.config, job.output / FILE
    wanted = [(0.0, 0), *((rate, block) for rate in rates for block in blocks)]
    earlier = _earlier(path)
    if earlier and [(one.rate, one.block) for one in earlier.speeds] == wanted:
        return earlier
    index = c.moe_layers[len(c.moe_layers) // 2]
    slot = c.moe_layers.index(index)
    dense, (x, context) = job.base.layer(index), some_tokens(job.base, job.recipe, TOKENS)
    found, size = [], len(c.moe_layers) * c.moe.num_experts * c.moe.d_expert
    with steps.bar("throughput by block") as on_step:
        for number, (rate, block) in enumerate(wanted, 1):
            layer, kept = dense, 1.0
            if block:
                plan = make_plan(
                    rule, statistics, budget=block * round((1 - rate) * size / block), block=block,
                    experts_per_token=c.moe.experts_per_token, layer_indices=c.moe_layers,
                    seed=job.recipe.seed,
                )  # fmt: skip
                layer, kept = pruned_layer(index, dense, plan), plan.keep[slot].mean().item()
            seconds = _seconds(layer, x, context)
            rate_of = x.shape[0] * x.shape[1] / seconds
            low, middle, high = np.quantile(rate_of, (0.25, 0.5, 0.75)).tolist()
            found.append(Speed(rate, block, middle, (high - low) / 2, kept))
            on_step(number, len(wanted))
    speeds = Speeds(
        tuple(found), layer=index, tokens=x.shape[0] * x.shape[1], dtype=job.recipe.dtype,
        device=jax.devices()[0].device_kind, jax=jax.__version__,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    )  # fmt: skip
    replace_text(path, json.dumps(speeds.to_dict(), indent=1) + "\n")
    return speeds


def _earlier(path: Path) -> Speeds | None:
    """What an earlier run measured; None if there is nothing, or something else."""
    if not path.is_file():
        return None
    values = read_json(path)
    speeds = values.get("speeds")
    if misfits(Speeds, values) or any(misfits(Speed, one) for one in speeds):
        return None
    return Speeds(**{**values, "speeds": tuple(Speed(**one) for one in speeds)})


def _seconds(layer: DecoderLayer, x: Array, context: Context) -> np.ndarray:  # [RUNS]
    """Seconds of each of several runs after one that compiles."""
    jax.block_until_ready(layer_forward(layer, x, context))
    found = []
    for _ in range(RUNS):
        started = time.perf_counter()
        jax.block_until_ready(layer_forward(layer, x, context))
        found.append(time.perf_counter() - started)
    return np.array(found)
