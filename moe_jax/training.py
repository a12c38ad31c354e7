"""Gradient training with checkpoints and resume: pretraining, and any recovery after pruning.

The loop knows a pytree of parameters and a loss; what the parameters mean is the caller's.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax import Array

from moe_jax.experts.moe import MoETrace
from moe_jax.structure import named_leaves
from moe_jax.transformer import Transformer

logger = logging.getLogger(__name__)

Parameters = Any
Loss = Callable[[Parameters, Any], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Schedule of a run: AdamW, linear warm-up, cosine decay to a tenth, global-norm clipping.

    Weight decay touches matrices only. `checkpoint_every` counts steps.
    """

    steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    checkpoint_every: int = 250
    log_every: int = 50

    def optimizer(self) -> optax.GradientTransformation:
        """The optax transformation this schedule describes."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, self.steps, self.learning_rate / 10
        )

        def is_matrix(tree):
            return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(schedule, b2=0.95, weight_decay=self.weight_decay, mask=is_matrix),
        )


def split_parameters(model: Transformer) -> tuple[dict[str, Array], Callable[..., Transformer]]:
    """Separate what gradients change from what they do not.

    Args:
      model: any pytree of arrays.

    Returns:
      (float leaves by dotted path, function that puts such leaves back into the model).
    """
    leaves, structure = named_leaves(model), jax.tree.structure(model)
    floating = {
        name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)
    }

    def rebuild(parameters: dict[str, Array]) -> Transformer:
        merged = [parameters.get(name, leaf) for name, leaf in leaves.items()]
        return jax.tree.unflatten(structure, merged)

    return floating, rebuild


def balance_loss(trace: MoETrace) -> Array:
    """Load-balance loss of one layer: E x sum over experts of load share x mean probability.

    1 when every expert gets the same share of the tokens, E when one gets all. Taken per layer:
    pooled over layers it lets a layer lose experts.

    Source: Switch Transformer, arXiv:2101.03961, equation 4.
    """
    probability = trace.probability
    valid = trace.valid[:, None].astype(jnp.float32)
    mean_probability = (probability * valid).sum(0) / valid.sum()
    tokens = trace.dispatch.tokens.astype(jnp.float32)
    return tokens.size * jnp.sum(tokens / tokens.sum() * mean_probability)


def language_model_loss(
    model: Transformer, tokens: Array, *, balance_weight: float = 0.01
) -> tuple[Array, dict[str, Array]]:
    """Next-token loss plus the mean load-balance loss of the layers.

    Args:
      model: the model to train.
      tokens: int32 [B, T], no padding.
      balance_weight: factor of the balance term.

    Returns:
      (scalar loss, {"nll": nats per token, "balance": mean balance loss, "idlest": the smallest
      share of tokens any expert got, relative to an even share}).
    """
    hidden, traces = model.hidden(tokens)
    logits = model.head(hidden[:, :-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    routed = [trace for trace in traces if trace is not None]
    balance = jnp.stack([balance_loss(trace) for trace in routed]).mean()
    load = jnp.stack([trace.dispatch.tokens for trace in routed]).astype(jnp.float32)
    idlest = (load.min(axis=1) / load.mean(axis=1)).min()
    return nll + balance_weight * balance, {"nll": nll, "balance": balance, "idlest": idlest}


def train(
    parameters: Parameters,
    loss: Loss,
    batch: Callable[[int], Any],
    config: TrainingConfig,
    *,
    checkpoints: Path | None = None,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> Parameters:
    """Minimise a loss; a run that was interrupted goes on where its last checkpoint stands.

    Args:
      parameters: pytree of float arrays.
      loss: (parameters, batch) -> (scalar, metrics); traced once.
      batch: step -> batch. It must depend on the step alone, so that a resumed run sees what an
        uninterrupted one would have seen.
      config: the schedule.
      checkpoints: folder of orbax checkpoints; None keeps nothing.
      on_log: receives (step, mean metrics and steps per second) every `config.log_every` steps.

    Returns:
      The trained parameters.
    """
    optimizer = config.optimizer()

    @jax.jit
    def update(parameters, state, batch):
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(parameters, batch)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, metrics

    manager = _manager(checkpoints, config)
    start, parameters, state = _resumed(manager, parameters, optimizer.init(parameters))
    if start:
        logger.info("resumed at step %d of %d", start, config.steps)
    window, clock = [], time.monotonic()
    for step in range(start, config.steps):
        parameters, state, metrics = update(parameters, state, batch(step))
        window.append(metrics)
        done = step + 1
        if on_log and (done % config.log_every == 0 or done == config.steps):
            means = {key: float(sum(m[key] for m in window)) / len(window) for key in metrics}
            means["steps_per_second"] = len(window) / (time.monotonic() - clock)
            on_log(done, means)
            window, clock = [], time.monotonic()
        if manager is not None and (done % config.checkpoint_every == 0 or done == config.steps):
            tree = {"parameters": parameters, "state": state}
            manager.save(done, args=ocp.args.StandardSave(tree))
    if manager is not None:
        manager.wait_until_finished()
        manager.close()
    return parameters


def _resumed(
    manager: ocp.CheckpointManager | None, parameters: Parameters, state: optax.OptState
) -> tuple[int, Parameters, optax.OptState]:
    """Steps done, parameters and optimiser of the last checkpoint; 0 and the given ones without."""
    latest = None if manager is None else manager.latest_step()
    if manager is None or latest is None:
        return 0, parameters, state
    wanted = {"parameters": parameters, "state": state}
    saved = manager.restore(latest, args=ocp.args.StandardRestore(wanted))
    return latest, saved["parameters"], saved["state"]


def _manager(folder: Path | None, config: TrainingConfig) -> ocp.CheckpointManager | None:
    if folder is None:
        return None
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)
