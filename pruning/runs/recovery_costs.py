"""What `recover` would take after a compression, before any of it is done."""

import dataclasses
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp

from convert.description import Description
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import STEPS
from moe_jax.transformer import DecoderLayer, abstract
from pruning.recipe.recipe import ResolvedRecipe
from pruning.recipe.recover_options import DEFAULT_WINDOW, RecoverOptions
from pruning.recovery.deltas import Trained
from pruning.recovery.teacher import prediction_bytes
from pruning.runs.held import PROCESS_BYTES
from pruning.stages.preflight import rehearsed_plan
from pruning.stages.recovered import delta_config
from pruning.stages.recovery_sizes import CHECKPOINT, needed_memory

# Forward passes that a token costs: the dense model's prediction, and in each epoch one, its
# repetition in the backward pass, which takes two more; a sixteenth is measured eleven times.
PASSES_ONCE, PASSES_EACH = 1 + 11 / 16, 4


def recovery_costs(base: Description, recipe: ResolvedRecipe, tokens: int) -> dict[str, Any]:
    """Bytes that `recover` takes at its default options, the students' experts of one width each.

    Args:
      base: the dense model.
      recipe: a resolved one.
      tokens: of training text, the held-out sixteenth included.

    Returns:
      tokens, predictions_bytes (of the dense model, on the disk, but for mode layer) and "trained":
      per kind of training its parameters, checkpoint_bytes (on the disk), and memory_bytes of the
      process by mode, model and layer.
    """
    c = base.config
    width = max(1, math.ceil(rehearsed_plan(recipe, base).counts.mean()))
    student = c.replace(moe=dataclasses.replace(c.moe, d_expert=width))
    layers = [_pruned(layer) for layer in abstract(student, dtype=jnp.bfloat16).layers]
    window = min(DEFAULT_WINDOW, c.max_position)
    windows = math.ceil(tokens / window)
    trained = {}
    for train in get_args(Trained):
        memory, numbers = {}, 0
        for mode in ("model", "layer"):
            options = RecoverOptions(text=("-",), output="-", train=train, mode=mode).filled()
            needed, numbers = needed_memory(
                layers, student, delta_config(options, {}), options, windows * window, window
            )
            memory[mode] = PROCESS_BYTES + needed
        trained[train] = {
            "parameters": numbers,
            "checkpoint_bytes": CHECKPOINT * numbers,
            "memory_bytes": memory,
        }
    top = min(RecoverOptions(text=("-",), output="-").top, c.vocab_size - 1)
    return {
        "tokens": tokens,
        "predictions_bytes": prediction_bytes(windows, window, top),
        "trained": trained,
    }


def _pruned(layer: DecoderLayer) -> DecoderLayer:
    """The shapes of a layer behind whose experts the pool is as empty as `PrunedSource` has it."""
    if not isinstance(layer.mlp, MoE):
        return layer
    experts = layer.mlp.experts
    spare = min(STEPS[0], experts.w_gate.shape[0] // experts.count.shape[0])
    pools = {
        name: jax.ShapeDtypeStruct((pool.shape[0] + spare, *pool.shape[1:]), pool.dtype)
        for name in ("w_gate", "w_up", "w_down", "b_gate", "b_up")
        if (pool := getattr(experts, name)) is not None
    }
    mlp = dataclasses.replace(layer.mlp, experts=dataclasses.replace(experts, **pools))
    return dataclasses.replace(layer, mlp=mlp)


def recovery_seconds(forward: float, tokens: int) -> float:
    """Seconds of a recovery at its default options, in which text is seen once or more often.

    Args:
      forward: seconds that a token takes through all layers of the dense model, the student's at
        most.
      tokens: of training text.
    """
    epochs = RecoverOptions(text=("-",), output="-").filled().epochs
    assert epochs is not None
    return forward * tokens * (PASSES_ONCE + PASSES_EACH * epochs)
