"""End-to-end attributions that a recipe asks for: their cost, said first, and their collection."""

import dataclasses
from collections.abc import Callable

import numpy as np

from moe_jax.errors import InputError
from moe_jax.experts.grouped_matmul import on_cpu
from moe_jax.stream import LayerSource
from moe_jax.transformer import Transformer
from pruning.kit.memory import free_memory
from pruning.kit.progress import OnStep, Steps
from pruning.recipe.recipe import ResolvedRecipe
from pruning.scores.ablation import layer_visits
from pruning.scores.curvature import nll_grad2
from pruning.scores.end_to_end import every_expert, ig_visits, nll_ablate, nll_ig
from pruning.scores.statistics import ChannelStatistics

PASSES = 4  # forward passes that a Hessian-vector product costs: two functions and their gradients


def costs(source: LayerSource, recipe: ResolvedRecipe) -> dict[str, int]:
    """Layer visits of every extra attribution; the plain sweep has one for each layer.

    Args:
      source: the dense model.
      recipe: what is asked for.

    Returns:
      Name of the attribution -> visits, for each time the text is gone through.
    """
    found = {}
    if recipe.nll_ig is not None:
        found["nll_ig"] = ig_visits(source, recipe.nll_ig)
    if recipe.nll_ablate:
        found["nll_ablate"] = layer_visits(every_expert(source), len(source))
    if recipe.nll_grad2:
        found["nll_grad2"] = PASSES * len(source) * len(every_expert(source))
    return found


def announce(source: LayerSource, recipe: ResolvedRecipe, steps: Steps) -> None:
    """Say what the extra attributions cost, before anything is measured.

    Raises:
      InputError: nll_grad2 is asked for and the model does not fit in memory, or the machine has
        no second derivatives of its products.
    """
    if recipe.nll_grad2 and not on_cpu():
        raise InputError(
            "nll_grad2 needs second derivatives, which only the products of a CPU have; leave it "
            "out, or set JAX_PLATFORMS=cpu"
        )
    for name, visits in costs(source, recipe).items():
        times = visits / len(source)
        steps.say(
            f"{name}: {visits:,} layer visits for each text, about {times:,.0f} times the plain "
            "sweep's"
        )
    if recipe.nll_grad2:
        need, free = 2 * model_bytes(source), free_memory()
        if need > free:
            raise InputError(
                f"nll_grad2 differentiates the whole model twice and needs about {need / 1e9:.0f} "
                f"GB of memory, {free / 1e9:.0f} GB are free; use --nll-ig 4, which streams the "
                "layers"
            )


def add(
    statistics: ChannelStatistics,
    source: LayerSource,
    texts: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    recipe: ResolvedRecipe,
    steps: Steps,
    load: Callable[[], Transformer],
    *,
    batch: int,
    dtype,
) -> ChannelStatistics:
    """Collect the attributions a recipe asks for.

    Args:
      statistics: of the sweep.
      source: the dense model.
      texts: tokens int32 [B, T], which are valid and which count in losses, bool [B, T].
      recipe: what is asked for.
      steps: where progress goes.
      load: reads the whole model, for nll_grad2.
      batch: sequences per step.
      dtype: of the activations.

    Returns:
      The statistics with those fields filled.
    """
    runs: dict[str, Callable[[OnStep], np.ndarray]] = {}
    how = {"batch": batch, "dtype": dtype}
    if recipe.nll_ig is not None:
        more = {"steps": recipe.nll_ig, "scratch": recipe.scratch_folder}
        runs["nll_ig"] = lambda on: nll_ig(source, *texts, on_step=on, **more, **how)
    if recipe.nll_ablate:
        runs["nll_ablate"] = lambda on: nll_ablate(source, *texts, on_step=on, **how)
    if recipe.nll_grad2:
        runs["nll_grad2"] = lambda on: nll_grad2(load(), *texts, on_step=on, **how)
    found = {}
    for name, run in runs.items():
        with steps.bar(name) as on_step:
            found[name] = run(on_step)
    return dataclasses.replace(statistics, **found)


def model_bytes(source: LayerSource) -> int:
    """Bytes of a model with 16-bit weights, but for its norms and attention."""
    c = source.config
    expert = 3 * c.moe.num_experts * c.moe.d_expert * c.d_model
    return 2 * (len(c.moe_layers) * expert + 2 * c.vocab_size * c.d_model)
